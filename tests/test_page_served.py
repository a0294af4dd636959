"""The chat page in front of the real server and the built-in model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import toy_browser
from playwright.sync_api import expect
from toy_browser import Fresh, ask, said
from toy_server import Toy, running, until

import flashdraft
from flashdraft.generate import Model
from flashdraft.serve.app import Options
from flashdraft.serve.worker import Limits

pytestmark = pytest.mark.real_model
QUESTION = "Write a Python function that reverses a string."
# fixtures
chromium = toy_browser.chromium
fresh = toy_browser.fresh


@pytest.fixture(scope="module")
def model() -> Model:
    return flashdraft.load("smollm2-135m", max_rows=2)


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[Toy]:
    options = Options(model_name="smollm2-135m", keys=(b"a key",))
    with running(Limits(max_rows=2, queue=2), options, load=lambda: model) as toy:
        yield toy


@pytest.fixture(scope="module")
def url(server: Toy) -> str:
    return server.url


def test_page_shows_what_the_server_counts(fresh: Fresh, server: Toy, model: Model) -> None:
    page = fresh()
    page.get_by_label("API key").fill("a key")
    page.get_by_label("API key").press("Enter")
    expect(page.locator("#model")).to_have_text("smollm2-135m")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Most tokens").fill("40")
    ask(page, QUESTION)
    plain = model.generate([[{"role": "user", "content": QUESTION}]], max_new_tokens=40)[0]
    assert said(page) == plain.text
    assert page.locator(".said .drafted").count() > 10

    until(lambda: server.worker.is_idle)
    drafted = server.metric("drafted_tokens_total")
    accepted = server.metric("accepted_tokens_total")
    assert page.locator("#acceptance").inner_text() == f"{100 * accepted / drafted:.0f} %"
    tokens = server.metric("completion_tokens_total")
    expect(page.get_by_role("status")).to_have_text(f"Finished: {tokens:.0f} tokens")

    page.get_by_role("button", name="Again without drafting").click()
    expect(page.locator(".verdict")).to_contain_text("The text is the same.")
    assert page.locator("#tau").inner_text() == "1.00"
    until(lambda: server.worker.is_idle)
    assert server.metric("drafted_tokens_total") == drafted
