"""The chat page in real Chromium: keys, names, contrast, small screens, motion and scrolling."""

from __future__ import annotations

import re

import pytest
import toy_browser
from playwright.sync_api import expect
from toy_browser import Fresh, ask, is_wider_than_screen, wait_until
from toy_page import ToyChat

# fixtures
chat = toy_browser.chat
toy = toy_browser.toy
url = toy_browser.url
chromium = toy_browser.chromium
fresh = toy_browser.fresh


def test_enter_sends_and_shift_enter_does_not(fresh: Fresh, toy: ToyChat) -> None:
    page = fresh()
    field = page.get_by_label("Message")
    expect(field).to_be_focused()
    page.keyboard.press("Enter")  # nothing to send
    page.keyboard.type("Write")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("it")
    expect(field).to_have_value("Write\nit")
    composing = (
        "n => n.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true}))"
    )
    field.evaluate(composing)
    assert toy.bodies == []
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("Finished")
    expect(field).to_have_value("")
    expect(field).to_be_focused()
    assert toy.bodies[0]["messages"][0]["content"] == "Write\nit"


def test_focus_stays_with_who_asks_again_by_key(fresh: Fresh, toy: ToyChat) -> None:
    page = fresh()
    ask(page, "Write it")
    toy.seconds = 0.01
    page.get_by_role("button", name="Again without drafting").press("Enter")
    expect(page.get_by_role("button", name="Stop")).to_be_focused()
    expect(page.get_by_role("status")).to_contain_text("Finished")
    expect(page.get_by_label("Message")).to_be_focused()


def test_every_control_is_reached_by_tab_with_a_name_and_a_ring(fresh: Fresh) -> None:
    page = fresh()
    page.get_by_role("button", name="Settings").click()
    page.locator("#new").focus()
    describe = """() => {
        const it = document.activeElement;
        const drawn = it.type === "radio" ? it.nextElementSibling : it;
        const ring = getComputedStyle(drawn);
        const name = it.id || it.value || it.textContent;
        return [name, ring.outlineStyle, parseFloat(ring.outlineWidth)];
    }"""
    reached = []
    for _ in range(14):
        page.keyboard.press("Tab")
        name, style, width = page.evaluate(describe)
        if name in reached or name.startswith("\n"):
            break
        assert (style, width >= 2) == ("solid", True), name
        reached.append(name)
    wanted = ["prompt", "send", "auto", "marks", "more", "temperature", "max-tokens", "seed"]
    assert [name for name in reached if name in wanted] == wanted

    controls = page.locator("button:visible, input:visible, textarea:visible")
    for control in controls.all():
        assert re.match(r'- \w+ "\S', control.aria_snapshot()), control.evaluate("n => n.outerHTML")


def test_only_status_and_problems_are_announced(fresh: Fresh, toy: ToyChat) -> None:
    toy.seconds = 0.005
    page = fresh()
    heard = """() => { window.heard = [];
        const note = () => window.heard.push(document.querySelector('[role=status]').textContent);
        new MutationObserver(note).observe(document.querySelector('[role=status]'),
            {childList: true, characterData: true, subtree: true}); }"""
    page.evaluate(heard)
    ask(page, "Why the tides?")
    assert page.evaluate("window.heard") == ["Reading the prompt", "Writing", "Finished: 79 tokens"]
    assert page.locator("main [aria-live], main [role=log], main [role=status]").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_marks_stand_out_from_their_ground(fresh: Fresh, scheme: str) -> None:
    page = fresh(color_scheme=scheme)
    ask(page, "drop it", ends="Failed")
    colours = """(selector) => {
        const node = document.querySelector(selector);
        let under = node;
        const clear = (n) => getComputedStyle(n).backgroundColor === "rgba(0, 0, 0, 0)";
        while (under && clear(under)) under = under.parentElement;
        const look = getComputedStyle(node);
        const line = look.backgroundImage.match(/rgb\\([^)]*\\)/)?.[0];
        return [look.color, getComputedStyle(under).backgroundColor, line, look.outlineColor];
    }"""
    texts = [".said", ".asked", ".said del", ".runs p", ".problem", ".status", "figcaption", "dt"]
    texts += ["#send", ".choice input:checked + span", ".choice input:not(:checked) + span"]
    texts += ["#more", "#new", ".model", ".again button"]
    for selector in texts:
        ink, ground, _, _ = page.evaluate(colours, selector)
        assert contrast(ink, ground) >= 4.5, selector
    _, paper, underline, _ = page.evaluate(colours, ".said .drafted")
    assert contrast(underline, paper) >= 3
    _, paper, _, box = page.evaluate(colours, ".said .own")
    assert contrast(box, paper) >= 3
    assert (paper == "rgb(252, 252, 250)") == (scheme == "light")


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio of two CSS colours."""
    lights = sorted(luminance(colour) for colour in (one, other))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def luminance(colour: str) -> float:
    light = 0.0
    for value, weight in zip(re.findall(r"\d+", colour)[:3], (0.2126, 0.7152, 0.0722), strict=True):
        share = int(value) / 255
        linear = share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4
        light += weight * linear
    return light


def test_contrast_of_known_colours() -> None:
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(119, 119, 119)", "rgb(255, 255, 255)") < 4.5


@pytest.mark.parametrize("size", [(320, 640), (320, 256), (768, 600)])
def test_small_screens_scroll_one_way(fresh: Fresh, toy: ToyChat, size: tuple[int, int]) -> None:
    page = fresh(*size)
    assert not is_wider_than_screen(page)
    ask(page, "Write it")
    page.get_by_role("button", name="Settings").click()
    assert not is_wider_than_screen(page)
    toy.key = "key"
    ask(page, "Why the tides?", ends="Locked")
    assert not is_wider_than_screen(page)


def test_less_motion_is_no_motion(fresh: Fresh, toy: ToyChat) -> None:
    toy.seconds = 0.02
    for wish, name in (("no-preference", "land"), ("reduce", "none")):
        page = fresh(reduced_motion=wish)
        ask(page, "endless", ends="Writing")
        moving = page.locator(".is-new").first
        assert moving.evaluate("n => getComputedStyle(n).animationName") == name
        page.keyboard.press("Escape")
        expect(page.locator(".is-new")).to_have_count(0)


def test_page_follows_the_text_until_the_reader_leaves_the_end(fresh: Fresh, toy: ToyChat) -> None:
    toy.seconds = 0.002
    page = fresh(height=500)
    ask(page, "endless", ends="Writing")
    rest = "document.documentElement.scrollHeight - innerHeight - scrollY"
    wait_until(page, lambda: page.evaluate("scrollY") > 300)
    assert page.evaluate(rest) < 48
    page.mouse.move(300, 200)
    page.mouse.wheel(0, -200)
    wait_until(page, lambda: page.evaluate(rest) > 100)
    page.wait_for_timeout(100)
    place = page.evaluate("scrollY")
    page.wait_for_timeout(200)
    assert page.evaluate("scrollY") == place
    page.get_by_role("button", name="Jump to the end").click()
    assert page.evaluate(rest) < 48
    page.wait_for_timeout(200)
    assert page.evaluate(rest) < 48


def test_long_answer_is_laid_out_in_parts(fresh: Fresh) -> None:
    page = fresh()
    ask(page, "lines")
    lines = [f"line {number}" for number in range(2000)]
    blocks = page.locator(".said > span")
    assert blocks.count() > 5
    assert "\n".join(blocks.all_text_contents()).splitlines() == lines
    visibility = "n => getComputedStyle(n).contentVisibility"
    assert blocks.first.evaluate(visibility) == "auto"
    assert blocks.last.evaluate(visibility) == "visible"

    # what is copied is whole all the same
    page.locator(".said").evaluate("n => getSelection().selectAllChildren(n)")
    page.wait_for_timeout(100)
    assert page.evaluate("getSelection().toString()").split("\n") == lines
