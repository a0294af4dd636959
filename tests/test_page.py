"""The chat page in real Chromium: what it shows, what it asks, and what model text cannot do."""

from __future__ import annotations

import re

import pytest
import toy_browser
from playwright.sync_api import Browser, Route, expect
from toy_browser import Fresh, ask, is_wider_than_screen, said, text_of, wait_until
from toy_page import HOSTILE, HOSTILE_NAME, REVERSE, TIDES, ToyChat

# fixtures
chat = toy_browser.chat
toy = toy_browser.toy
url = toy_browser.url
chromium = toy_browser.chromium
fresh = toy_browser.fresh

# --- a talk ---------------------------------------------------------------------------------------


def test_answer_is_shown_with_its_marks(fresh: Fresh, toy: ToyChat) -> None:
    page = fresh()
    ask(page, "Write a function")
    assert said(page) == text_of(REVERSE)
    answer = page.locator(".said")
    drafted = [text.strip() for step in REVERSE for text in step.drafted if text.strip()]
    own = [text.strip() for step in REVERSE[1:] for text in step.own if text.strip()]
    assert [text.strip() for text in answer.locator(".drafted").all_inner_texts()] == drafted
    assert [text.strip() for text in answer.locator(".own").all_inner_texts()] == own
    rejected = [step.rejected[0].strip() for step in REVERSE if step.rejected and step.own]
    assert answer.locator("del").all_inner_texts() == rejected
    assert answer.locator(".rejected").first.inner_text() == "Python+1"
    assert answer.locator(".rejected:not([aria-hidden=true])").count() == 0


def test_figures_are_those_of_the_steps(fresh: Fresh, toy: ToyChat) -> None:
    toy.seconds = 0.005
    page = fresh()
    ask(page, "Write a function")
    tokens = sum(len(step.drafted) + len(step.own) for step in REVERSE)
    accepted = [len(step.drafted) for step in REVERSE[1:]]
    drafted = sum(len(step.drafted) + len(step.rejected) for step in REVERSE[1:])
    assert page.locator("#tau").inner_text() == f"{(tokens - 1) / len(accepted):.2f}"
    assert page.locator("#acceptance").inner_text() == f"{100 * sum(accepted) / drafted:.0f} %"
    speed = float(page.locator("#speed").inner_text())
    assert 0 < speed < tokens / (0.005 * len(accepted))
    name = page.locator("#chart").get_attribute("aria-label")
    first = sum(count >= 1 for count in accepted) / len(accepted)
    assert name is not None
    assert name.startswith(f"Accepted by position: 1: {100 * first:.0f} %, 2: ")
    heights = page.locator("#chart .bar").evaluate_all(
        "bars => bars.map(b => +b.attributes.height.value)"
    )
    assert heights == sorted(heights, reverse=True)
    assert heights[0] == pytest.approx(32 * first)
    assert f"{tokens} tokens" in page.locator(".runs").inner_text().replace("\xa0", " ")


def test_request_says_what_the_controls_say(fresh: Fresh, toy: ToyChat) -> None:
    page = fresh()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("0.7")
    page.get_by_label("Most tokens").fill("99")
    page.get_by_label("Seed").fill("1234567890123")
    page.get_by_role("radio", name="Off").check()
    ask(page, "Why the tides?")
    page.get_by_role("radio", name="On").check()
    ask(page, "Write more")
    first, second = toy.bodies
    assert first == {
        "model": "smollm2-135m",
        "messages": [{"role": "user", "content": "Why the tides?"}],
        "drafting": "off",
        "temperature": 0.7,
        "max_tokens": 99,
        "seed": 1234567890123,
        "stream": True,
        "stream_options": {"include_usage": True},
        "draft_pieces": True,
    }
    assert second["drafting"] == "on"
    assert second["messages"] == [
        {"role": "user", "content": "Why the tides?"},
        {"role": "assistant", "content": text_of(TIDES)},
        {"role": "user", "content": "Write more"},
    ]


def test_setting_that_is_wrong_is_shown_and_not_sent(fresh: Fresh, toy: ToyChat) -> None:
    page = fresh()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("5")
    page.get_by_role("button", name="Settings").click()
    ask(page, "Why?", ends=None)
    expect(page.get_by_label("Temperature")).to_be_focused()
    assert toy.bodies == []


def test_switching_drafting_off_shows_the_same_text_without_marks(
    fresh: Fresh, toy: ToyChat
) -> None:
    toy.seconds = 0.002
    page = fresh()
    ask(page, "Write a function")
    page.get_by_role("button", name="Again without drafting").click()
    verdict = page.locator(".verdict")
    expect(verdict).to_contain_text("The text is the same.")
    assert re.match(r"With drafting \d+\.\d\d times as fast", verdict.inner_text())
    assert page.locator(".said .drafted, .said .own, .said .rejected").count() == 0
    assert page.locator("#tau").inner_text() == "1.00"
    drafted, plain = toy.bodies
    assert (drafted["drafting"], plain["drafting"]) == ("auto", "off")
    assert drafted["seed"] == plain["seed"]
    assert drafted["messages"] == plain["messages"]
    page.get_by_role("button", name="Again with drafting").click()
    expect(page.locator(".runs p:not(.verdict)")).to_have_count(3)
    assert page.locator(".said .drafted").count() > 0


def test_marks_can_be_hidden(fresh: Fresh) -> None:
    page = fresh()
    ask(page, "Write a function")
    expect(page.locator(".said .rejected").first).to_be_visible()
    page.get_by_role("checkbox", name="Marks").uncheck()
    expect(page.locator(".said .rejected").first).to_be_hidden()
    assert page.locator(".said").inner_text() == text_of(REVERSE)
    look = "n => [getComputedStyle(n).backgroundImage, getComputedStyle(n).outlineStyle]"
    assert page.locator(".said .drafted").first.evaluate(look) == ["none", "none"]
    assert page.locator(".said .own").first.evaluate(look) == ["none", "none"]


def test_new_conversation_forgets_the_talk_and_ends_its_answer(fresh: Fresh, toy: ToyChat) -> None:
    toy.seconds = 0.01
    page = fresh()
    ask(page, "endless", ends="Writing")
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#intro")).to_be_visible()
    expect(page.get_by_role("status")).to_have_text("Ready")
    toy.seconds = 0.0
    page.get_by_role("button", name="Why does the sea have tides?").click()
    expect(page.get_by_role("status")).to_contain_text("Finished")
    assert len(toy.bodies[-1]["messages"]) == 1
    wait_until(page, lambda: toy.num_gone == 1)


# --- the stream -----------------------------------------------------------------------------------

STREAM = (
    "\ufeff: hello\r\n\r\nevent: error\rdata: one\r\rdata:two\ndata: \ndata: 漢\n\n"
    "id: 7\nretry: 9\ndata\n\n:\ndata:  x: y\r\n\r\nnonsense\n\nevent: lost\n\ndata: unfinished"
)
EVENTS = [["error", "one"], ["message", "two\n\n漢"], ["message", ""], ["message", " x: y"]]


def test_events_are_the_same_wherever_the_stream_is_cut(fresh: Fresh) -> None:
    page = fresh()
    found = page.evaluate(
        """async (text) => {
            const { EventParser } = await import("/stream.js");
            const read = (parts) => {
                const parser = new EventParser();
                return parts.flatMap((part) => [...parser.push(part)].map((e) => [e.name, e.data]));
            };
            const cuts = [...text].map((_, i) => read([text.slice(0, i), text.slice(i)]));
            return [read([text]), read([...text]), ...cuts];
        }""",
        STREAM,
    )
    assert len(found) > 100
    for events in found:
        assert events == EVENTS


def test_stream_in_crumbs_with_comments_is_read_whole(fresh: Fresh) -> None:
    page = fresh()
    ask(page, "cut")
    assert said(page) == "größer → 漢字 👩‍👩‍👧‍👦\n" * 20


def test_text_that_was_held_back_keeps_its_marks(fresh: Fresh) -> None:
    """As a parser of calls and thoughts does, the server shows later what it was not sure of."""
    page = fresh()
    ask(page, "held")
    assert said(page) == "a <b c"
    marks = page.locator(".said .drafted, .said .own").evaluate_all(
        "all => all.map(n => [n.className, n.textContent])"
    )
    assert marks == [["drafted", "a"], ["drafted", "<"], ["own", "b"], ["drafted", "c"]]
    assert page.locator(".thought").inner_text() == "hm"
    assert page.locator(".thought .drafted").inner_text() == "hm"


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("drop it", "The connection broke before the answer was complete."),
        ("fault", "The engine stopped."),
        ("busy", "The queue is full. Try again in 7 s."),
        ("long", "The prompt has 9000 tokens, 8192 are allowed."),
        ("proxy", "The server answered with status 502."),
    ],
)
def test_failure_is_told_in_words_and_keeps_the_text(
    fresh: Fresh, toy: ToyChat, prompt: str, told: str
) -> None:
    toy.seconds = 0.003
    page = fresh()
    ask(page, prompt, ends="Failed")
    expect(page.get_by_role("alert")).to_have_text(told)
    written = text_of(TIDES[:9]) if prompt in ("drop it", "fault") else ""
    assert page.locator(".said").count() == bool(written)
    if written:
        assert said(page) == written
    page.get_by_role("radio", name="Off").check()
    page.get_by_role("button", name="Try again").click()
    wait_until(page, lambda: len(toy.bodies) == 2)
    expect(page.get_by_role("alert")).to_have_text(told)
    assert toy.bodies[0]["messages"] == toy.bodies[1]["messages"]
    assert [body["drafting"] for body in toy.bodies] == ["auto", "off"]
    ask(page, "Why?")
    kept = [message["role"] for message in toy.bodies[-1]["messages"]]
    assert kept == (["user", "assistant", "user"] if written else ["user"])


def test_server_that_is_gone_is_told(fresh: Fresh) -> None:
    page = fresh()
    page.context.set_offline(True)
    ask(page, "Why?", ends="Failed")
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    page.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("status")).to_contain_text("Finished")
    expect(page.get_by_role("alert")).to_have_count(0)


@pytest.mark.parametrize("by", ["button", "key"])
def test_stop_ends_the_request_and_keeps_what_came(fresh: Fresh, toy: ToyChat, by: str) -> None:
    toy.seconds = 0.01
    page = fresh()
    ask(page, "endless", ends="Writing")
    page.wait_for_timeout(100)
    if by == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    expect(page.get_by_role("status")).to_contain_text("Stopped")
    wait_until(page, lambda: toy.num_gone == 1)
    expect(page.get_by_label("Message")).to_be_focused()
    kept = said(page)
    assert kept
    assert text_of(TIDES * 2).startswith(kept)
    toy.seconds = 0.0
    ask(page, "Write on")
    assert toy.bodies[-1]["messages"][1] == {"role": "assistant", "content": kept}


# --- the key --------------------------------------------------------------------------------------


def test_key_is_asked_for_used_and_kept_in_the_tab_alone(
    fresh: Fresh, toy: ToyChat, url: str
) -> None:
    toy.key = "right key"
    page = fresh()
    field = page.get_by_label("API key")
    expect(field).to_be_focused()
    assert field.get_attribute("type") == "password"
    field.fill("wrong")
    field.press("Enter")
    expect(page.get_by_text("The server refused this API key.")).to_be_visible()
    field.fill("right key")
    page.get_by_role("button", name="Use key").click()
    expect(page.locator("#lock")).to_be_hidden()
    expect(page.locator("#model")).to_have_text("smollm2-135m")
    ask(page, "Write it")
    stored = page.evaluate("[Object.values(sessionStorage), localStorage.length, document.cookie]")
    assert stored == [["right key"], 0, ""]
    page.reload()
    expect(page.locator("#model")).to_have_text("smollm2-135m")
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Forget the API key").click()
    assert page.evaluate("sessionStorage.length") == 0


def test_question_that_met_a_lock_is_asked_again_behind_it(fresh: Fresh, toy: ToyChat) -> None:
    page = fresh()
    toy.key = "new key"
    ask(page, "Write it", ends="Locked")
    expect(page.get_by_role("alert")).to_have_text("This question waits for an API key.")
    page.get_by_label("API key").fill("new key")
    page.get_by_label("API key").press("Enter")
    expect(page.get_by_role("status")).to_contain_text("Finished")
    assert said(page) == text_of(REVERSE)
    assert page.locator(".turn").count() == 1


# --- hostile text ---------------------------------------------------------------------------------


def test_hostile_text_is_only_text(fresh: Fresh, toy: ToyChat) -> None:
    toy.name = HOSTILE_NAME
    page = fresh(width=320, height=640)
    ask(page, "hostile")
    assert said(page) == text_of(HOSTILE)
    assert page.title() == "FlashDraft"
    assert page.locator("main img, main script, main svg, main b").count() == 0
    assert page.locator("#model").text_content() == HOSTILE_NAME
    assert not is_wider_than_screen(page)
    for text in page.locator(".rejected").all_inner_texts():
        assert len(text) < 40
        assert "\n" not in text
    # Piled-up accents and reversed writing stay in the answer: the controls stand where they stood.
    expect(page.get_by_role("button", name="Send")).to_be_in_viewport()
    assert page.locator(".said").evaluate("n => getComputedStyle(n).overflowY") == "clip"
    assert page.locator(".said").evaluate("n => getComputedStyle(n).unicodeBidi") == "plaintext"


def test_planted_fault_a_page_that_makes_markup_is_caught(
    chromium: Browser, toy: ToyChat, url: str
) -> None:
    """Without textContent and without the policy, the same text does run."""
    with chromium.new_context() as context:
        page = context.new_page()
        page.route("**/*", unsafe)
        page.goto(url)
        ask(page, "hostile")
        expect(page).to_have_title("run")


def unsafe(route: Route) -> None:
    if "/v1/" in route.request.url:
        route.continue_()
        return
    answer = route.fetch()
    body = answer.text().replace("node.textContent = text", "node.innerHTML = text")
    route.fulfill(body=body, content_type=answer.headers["content-type"])


def test_policy_stops_what_slips_through(fresh: Fresh, url: str) -> None:
    page = fresh()
    tries = {
        "markup": "document.body.innerHTML = '<img src=x>'",
        "script": "document.body.appendChild(document.createElement('script')).text = 'x = 1'",
        "eval": "setTimeout('document.title = 1')",
        "handler": "document.body.setAttribute('onclick', 'document.title = 1')",
    }
    for name, code in tries.items():
        ran = page.evaluate(f"() => {{ try {{ {code}; return true; }} catch {{ return false; }} }}")
        assert not ran, name
    away = url.replace("127.0.0.1", "localhost")
    assert (
        page.evaluate(f"fetch('{away}/v1/models').then(() => 'sent', () => 'stopped')") == "stopped"
    )
    frame = (
        f"() => new Promise(r => {{ const f = document.createElement('iframe'); f.src = '{url}';"
    )
    shown = (
        f"{frame} f.onload = () => r(f.contentDocument?.title ?? ''); document.body.append(f); }})"
    )
    assert page.evaluate(shown) == ""
