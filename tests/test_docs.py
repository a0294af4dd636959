"""The documentation tells the truth: its pages build, its blocks run, its paths exist, its
references are complete.

README.md and docs/ are read here; what only the README promises is in tests/test_readme.py.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

import flashdraft
from flashdraft import errors
from flashdraft.cli import main
from flashdraft.cli.table import COMMANDS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PACKAGE = ROOT / "flashdraft"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
COMMANDS_PAGE = DOCS / "reference" / "commands.md"
SVGS = sorted(DOCS.glob("*.svg"))


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    language: str
    title: str  # an excerpt's, which names the file that it is from; else empty
    code: str


def name_of(value: object) -> str:
    """What a parameter is called in pytest's output."""
    if isinstance(value, Path):
        return str(value.relative_to(ROOT))
    if isinstance(value, Block):
        return f"{name_of(value.page)}: {value.code.splitlines()[0][:40]}"
    return str(value)[:60]


def blocks_of(page: Path) -> list[Block]:
    found = re.findall(
        r'^```(\w*)(?: title="(.*?)")?\n(.*?)^```$', page.read_text(encoding="utf-8"), re.M | re.S
    )
    return [Block(page, *parts) for parts in found]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
RUN = [block for block in PYTHON if not block.title]
EXCERPTS = [block for block in PYTHON if block.title]
WITH_PYTHON = list(dict.fromkeys(block.page for block in RUN))


def commands_of(block: Block) -> Iterator[str]:
    """The lines of a shell block, those that a backslash joins as one."""
    for line in block.code.replace("\\\n", " ").splitlines():
        if line.strip() and not line.startswith("#"):
            yield line


SHELL = [line for block in BLOCKS if block.language == "sh" for line in commands_of(block)]
OURS = list(dict.fromkeys(line for line in SHELL if re.search(r"(^|[\s;&])flashdraft [a-z]", line)))


# Blocks


def test_there_are_blocks_to_check() -> None:
    assert len(RUN) >= 8
    assert len(OURS) >= 30
    # `py` needs what a page has not at hand: a server, a drafter (tests/test_deploy.py)
    assert {block.language for block in BLOCKS} <= {"python", "py", "sh", ""}


@pytest.fixture(scope="module")
def load_once() -> Iterator[None]:
    """A model is loaded once for all pages."""
    plain = flashdraft.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flashdraft, "load", functools.cache(plain), raising=False)
        yield


@pytest.mark.real_model
@pytest.mark.usefixtures("load_once")
@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_blocks_run(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The blocks of a page run one after the other, as somebody types them who reads it."""
    names: dict[str, object] = {"__name__": "page"}
    for block in RUN:
        if block.page == page:
            exec(compile(block.code, name_of(page), "exec"), names)
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("block", EXCERPTS, ids=name_of)
def test_excerpts_are_of_the_file_that_they_name(block: Block) -> None:
    path, _, how = block.title.partition(", ")
    assert how == "shortened"
    source = (PACKAGE / path).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            kind = "class" if isinstance(node, ast.ClassDef) else "def"
            assert re.search(rf"\b{kind} {node.name}\b", source), f"{path} has no {node.name}"


@pytest.mark.parametrize("line", OURS, ids=name_of)
def test_commands_and_their_options_exist(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(line, comments=True)
    words = words[words.index("flashdraft") + 1 :]
    name = words[:2] if " ".join(words[:2]) in COMMANDS else words[:1]
    assert main([*name, "--help"]) == 0
    text = capsys.readouterr().out
    for word in words[1:]:
        if word in ("&&", "|", "&", ";"):
            break
        if word.startswith("--") and word != "--":
            assert word.split("=")[0] in text


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("make ")], ids=name_of)
def test_make_targets_exist(line: str) -> None:
    target = line.split()[1]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_line_is_too_long(page: Path) -> None:
    """Outside tables and code: a page is read as it stands, too."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for line in text.splitlines():
        assert len(line) <= 120 or line.startswith(("|", "    ")), line


# Paths and links


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_files_exist(page: Path) -> None:
    """`decoding/verify.py` and its like, below the package or the repository, outside blocks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for name in re.findall(
        r"`([a-z_0-9]+/(?:[\w.-]+/)*(?:[\w-]+\.(?:py|sh|h|cpp|json|yaml))?)`", text
    ):
        if not name.startswith(
            ("checkpoints/", "tensorboard/", "best/", "alpaca_eval/")
        ):  # what commands write and read
            assert (PACKAGE / name).exists() or (ROOT / name).exists(), name
    for name in re.findall(r"`(?:python )?((?:recipes|examples|tests)/[\w./-]+)", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_linked_files_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_file_tree_names_every_module() -> None:
    concepts = (DOCS / "concepts.md").read_text(encoding="utf-8")
    tree = concepts.split("## Where things are")[1].split("```")[1]
    for path in PACKAGE.rglob("*"):
        folder = path.is_dir() and any(path.glob("*.py"))
        module = path.suffix == ".py" and not path.name.startswith("__")
        if module:
            assert path.name in tree, f"{path.relative_to(ROOT)} is missing from docs/concepts.md"
        if folder:
            assert f"{path.name}/" in tree, (
                f"{path.relative_to(ROOT)}/ is missing from docs/concepts.md"
            )
    for name in re.findall(r"(\w+\.py)", tree):
        assert any(PACKAGE.rglob(name)), f"docs/concepts.md names {name}, which is not there"


# References


def recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_of_commands_is_that_of_the_commands() -> None:
    page = recipe("command_reference").page()
    assert COMMANDS_PAGE.read_text(encoding="utf-8") == page, (
        "run `make docs`, which writes the page anew"
    )
    assert "--max-new-tokens" in page


def test_the_page_of_sampling_names_every_field() -> None:
    page = (DOCS / "reference" / "api.md").read_text(encoding="utf-8")
    for field in flashdraft.SamplingParams.__dataclass_fields__:
        assert f"| `{field}` |" in page


def test_the_tree_of_errors_is_that_of_the_classes() -> None:
    page = (DOCS / "reference" / "api.md").read_text(encoding="utf-8")
    (tree,) = re.findall(r"^```\n(FlashDraftError .*?)```", page, re.M | re.S)
    above = ["FlashDraftError"]
    named = {"FlashDraftError"}
    for line in tree.splitlines()[1:]:
        branch, name = re.match(r"([│├└─ ]+)(\w+)", line).groups()  # type: ignore[union-attr]
        depth = len(branch) // 4
        parent = getattr(errors, above[depth - 1])
        assert getattr(errors, name).__bases__[0] is parent
        above[depth:] = [name]
        named.add(name)
    assert named == {name for name, value in vars(errors).items() if isinstance(value, type)}


def test_the_reference_holds_every_room() -> None:
    """A room's page shows all of its modules by itself; a module at the top needs a line."""
    pages = [path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md")]
    shown = re.findall(r"^::: flashdraft\.(\w+)", "\n".join(pages), re.MULTILINE)
    for path in PACKAGE.iterdir():
        is_module = path.suffix == ".py" and not path.name.startswith("__")
        is_room = (path / "__init__.py").exists() and path.name != "cli"
        if is_module or is_room:
            assert path.stem in shown


# The site


class Assets(HTMLParser):
    """The addresses from which a page would load something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe"):
            self.found += [value for name, value in attrs if name in ("src", "href") and value]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(folder),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_builds_strictly(site: Path) -> None:
    for page in PAGES[1:]:
        assert (site / page.relative_to(DOCS).with_suffix(".html")).is_file()


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        assets = Assets()
        assets.feed(path.read_text(encoding="utf-8"))
        assert assets.found
        assert not [address for address in assets.found if "//" in address]


def test_the_pages_show_lists_as_lists(site: Path) -> None:
    """A list needs an empty line before it, which GitHub does not ask for."""
    for path in site.rglob("*.html"):
        article = (
            path.read_text(encoding="utf-8").partition("<article")[2].partition("</article>")[0]
        )
        for paragraph in re.findall(r"<p>(.*?)</p>", article, re.DOTALL):
            assert not re.search(r"\n\s*(?:[-*]|\d+\.) |\n\||```", paragraph), path.name


def test_the_reference_shows_docstrings(site: Path) -> None:
    page = (site / "reference" / "api.html").read_text(encoding="utf-8")
    assert "ready to generate" in page
    page = (site / "reference" / "decoding.html").read_text(encoding="utf-8")
    assert 'id="flashdraft.decoding.verify.verify"' in page


# Pictures


@pytest.mark.parametrize("path", SVGS, ids=name_of)
def test_pictures_are_whole_and_load_nothing(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ET.fromstring(text).tag.endswith("svg")
    assert "@import" not in text
    assert not re.search(r'(href|src)="(?!#)', text)


def test_the_picture_of_the_demo_says_what_the_readme_says() -> None:
    picture = (DOCS / "demo.svg").read_text(encoding="utf-8").replace("\u00a0", " ")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (tau,) = re.findall(r"([\d.]+) tokens per target pass", picture)
    assert f"{tau} tokens were committed" in " ".join(readme.split())
    assert "texts identical: yes" in picture
    assert "tokens/s" not in picture


def test_the_picture_marks_what_was_drafted() -> None:
    demo_picture = recipe("demo_picture")
    printed = (
        "⟨drafted and accepted⟩, the target's own\n\na⟨ <b\nc⟩ d\n\ndflash "
        "  9.9 tokens/s\nratio  2.00\ntau  2.00\n"
    )
    kept = demo_picture.without_speeds(printed)
    assert "tau" in kept
    assert "9.9" not in kept
    assert "ratio" not in kept

    lines = demo_picture.lines_of("a⟨ <b\nc⟩ d")
    assert lines == [[("a", "plain"), (" <b", "drafted")], [("c", "drafted"), (" d", "plain")]]

    drawn = demo_picture.drawing("flashdraft demo", kept)
    texts = re.findall(r'class="(\w+)" x=[^>]*>([^<]*)</text>', drawn)
    marked = [text for style, text in texts if style == "drafted"]
    assert marked == ["drafted\u00a0and\u00a0accepted", "&lt;b", "c"]
    assert drawn.count('class="box"') == 3
    ET.fromstring(drawn)


def test_the_picture_wraps_long_lines_without_losing_a_letter() -> None:
    demo_picture = recipe("demo_picture")
    words = [f"word{number}" for number in range(40)]
    line = [
        demo_picture.Run(" ".join(words[:20]) + " ", "plain"),
        demo_picture.Run(" ".join(words[20:]), "drafted"),
    ]
    wrapped = demo_picture.wrapped(line)
    assert len(wrapped) > 2
    text = " ".join("".join(run.text for run in part) for part in wrapped)
    assert text.split() == words
    for part in wrapped:
        assert sum(len(run.text) for run in part) <= demo_picture.COLUMNS
    drafted = " ".join(run.text for part in wrapped for run in part if run.style == "drafted")
    assert drafted.split() == words[20:]
