"""The page in real Chromium: fixtures, and what a person does with it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from toy_page import Step, ToyChat, served

CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
Fresh = Callable[..., Page]
expect.set_options(timeout=15_000)  # milliseconds; a machine may be busy


def chromium_path() -> str:
    """Where the browser is.

    Without one, files that import this one are skipped, for one reason in one line; with
    FLASHDRAFT_CHROMIUM=required that is an error.
    """
    for name in ("chromium", "chromium-browser", "google-chrome"):
        path = shutil.which(name)
        if path is not None:
            return path
    told = "no Chromium, so the chat page is not tested: apt-get install chromium"
    if os.environ.get("FLASHDRAFT_CHROMIUM") == "required":
        raise RuntimeError(told)
    pytest.skip(told, allow_module_level=True)


CHROMIUM = chromium_path()


@pytest.fixture(scope="module")
def chat() -> ToyChat:
    return ToyChat()


@pytest.fixture(scope="module")
def url(chat: ToyChat) -> Iterator[str]:
    with served(chat.app) as address:
        yield address


@pytest.fixture(autouse=True)
def toy(chat: ToyChat) -> ToyChat:
    """The server behind the page, as it is at first."""
    chat.__dict__.update(key="", name="smollm2-135m", seconds=0.0, num_gone=0)
    chat.bodies.clear()
    return chat


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def fresh(chromium: Browser, url: str) -> Iterator[Fresh]:
    """Opens the page in a tab of its own; afterwards no script of it failed, no request left."""
    contexts: list[BrowserContext] = []
    asked: list[str] = []
    failed: list[str] = []

    def open_page(width: int = 1024, height: int = 800, **options: Any) -> Page:
        size = {"width": width, "height": height}
        context = chromium.new_context(viewport=size, **options)
        context.set_default_timeout(15_000)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.goto(url)
        expect(page.get_by_role("status")).not_to_have_text("")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert failed == []
    assert [one for one in asked if not one.startswith(f"{url}/")] == []


def ask(page: Page, prompt: str, ends: str | None = "Finished") -> None:
    """Type and send; ends: what the page says in the end; None: do not wait."""
    page.get_by_label("Message").fill(prompt)
    page.get_by_label("Message").press("Enter")
    if ends is not None:
        expect(page.get_by_role("status")).to_contain_text(ends)


def text_of(steps: list[Step]) -> str:
    return "".join("".join(step.drafted + step.own) for step in steps)


def said(page: Page) -> str:
    """The last answer's text, without what was rejected."""
    kept = "n => { n = n.cloneNode(true); n.querySelectorAll('.rejected').forEach(r => r.remove());"
    told = page.locator(".said").last.evaluate(f"{kept} return n.textContent; }}")
    assert isinstance(told, str)
    return told


def is_wider_than_screen(page: Page) -> bool:
    edge = "document.documentElement"
    return bool(page.evaluate(f"{edge}.scrollWidth > {edge}.clientWidth"))


def wait_until(page: Page, holds: Callable[[], bool]) -> None:
    for _ in range(100):
        if holds():
            return
        page.wait_for_timeout(20)
    pytest.fail("it did not come")
