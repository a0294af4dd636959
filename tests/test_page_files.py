"""The files of the chat page: how they are served, and what is not in them."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
from toy_page import ToyChat, served

from flashdraft.serve import page as page_module
from flashdraft.serve.page import PAGE_PATHS

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "flashdraft/serve/page"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(ToyChat().app) as address:
        yield address


@pytest.mark.parametrize("path", sorted(PAGE_PATHS))
def test_files_come_with_headers_that_shut_everything_else_out(url: str, path: str) -> None:
    answer = httpx.get(url + path)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"].split("; ")
    assert policy[0] == "default-src 'none'"
    for rule in ("script-src 'self'", "style-src 'self'", "connect-src 'self'"):
        assert rule in policy
    for rule in ("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"):
        assert rule in policy
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-cache"


def test_browser_that_has_a_file_is_told_so(url: str) -> None:
    whole = httpx.get(url)
    tag = whole.headers["etag"]
    for named in (tag, f"W/{tag}", f'"other", {tag}'):
        again = httpx.get(url, headers={"If-None-Match": named})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == tag
    assert httpx.get(url, headers={"If-None-Match": '"other"'}).content == whole.content
    head = httpx.head(url)
    assert (head.status_code, head.content) == (200, b"")


def test_every_file_is_served_and_packaged() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {name for name, _ in page_module._FILES.values()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["flashdraft"]
    packaged = set()
    for pattern in patterns:
        packaged |= set((ROOT / "flashdraft").glob(pattern))
    assert {FOLDER / name for name in names} <= packaged


def test_files_name_nothing_from_elsewhere_and_make_no_markup() -> None:
    for path in FOLDER.iterdir():
        source = path.read_text(encoding="utf-8")
        code = re.sub(r"^\s*(//|\*).*", "", source, flags=re.M)
        elsewhere = set(re.findall(r"https?://[^\"'\s)]+", code))
        assert elsewhere <= {"http://www.w3.org/2000/svg"}, path.name
        for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval("):
            assert word not in code, path.name
        assert " style=" not in source
        assert not re.search(r"\son[a-z]+=", source), path.name
