"""Prompts that a target writes itself: where a template is cut, what is kept, and that a run which
was killed and resumed leaves the same file.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from toy_templates import CHATML, KINDS, TEMPLATES, chat_tokenizer
from toy_training import language_model, one_line_and_hint

from flashdraft.cli import main
from flashdraft.decoding.prompt import told
from flashdraft.errors import DataError, InvalidParameter, InvalidPrompt
from flashdraft.train.opening import opening
from flashdraft.train.own_prompts import (
    Asking,
    LocalWriter,
    RemoteWriter,
    Wanted,
    Written,
    write_own_prompts,
)
from flashdraft.train.regenerate import Server
from flashdraft.train.sieve import Sieve
from flashdraft.types import SamplingParams

TALK = [{"role": "user", "content": "One"}, {"role": "assistant", "content": "Two"}]


# --- the opening ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("turns", [[], TALK])
def test_an_opening_ends_where_the_users_text_begins(
    kind: str, template: str, turns: list[dict[str, str]]
) -> None:
    tokenizer = chat_tokenizer(kind, template)
    question = "abc"
    whole = told(tokenizer, "toy", [*turns, {"role": "user", "content": question}])
    begun = opening(tokenizer, "toy", turns)

    before = whole[: whole.rindex(question)]
    assert begun.tokens == tokenizer.encode(before.removesuffix(" "), add_special_tokens=False)
    behind = whole[whole.rindex(question) + len(question) :].strip()
    if begun.end_token is not None:
        assert behind.startswith(tokenizer.convert_ids_to_tokens(begun.end_token))
    else:
        assert behind.startswith(begun.end_text)
        assert begun.end_text or not behind


def test_a_system_turn_stands_before_the_opening() -> None:
    tokenizer = chat_tokenizer("byte level", "chatml")
    plain = opening(tokenizer, "toy")
    system = opening(tokenizer, "toy", [{"role": "system", "content": "Be kind."}])
    assert "Be kind." in tokenizer.decode(system.tokens)
    assert len(system.tokens) > len(plain.tokens)


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        (None, "no chat template"),
        ("{% for m in messages %}<s>{{ m['content'] | upper }}</s>{% endfor %}", "changed"),
        ("{% for m in messages %}{{ m['content'] + m['content'] }}{% endfor %}", "more than once"),
        ("{{ messages[0]['content'] }}", "nothing before"),
    ],
)
def test_a_template_that_cannot_be_cut_is_refused_in_one_line(
    template: str | None, cause: str
) -> None:
    tokenizer = chat_tokenizer("byte level", "chatml")
    tokenizer.chat_template = template
    with pytest.raises(InvalidPrompt) as error:
        opening(tokenizer, "toy")
    message = one_line_and_hint(error)
    assert cause in message
    assert "`toy`" in message


# --- the sieve ------------------------------------------------------------------------------------


GOOD = "How do I plant a tree in dry ground?"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD, None),
        ("¿Cómo planto un árbol en tierra seca?", None),
        (
            "\u5982\u4f55\u5728\u5e72\u65f1\u7684\u571f\u5730\u4e0a\u79cd\u6811\uff0c"
            "\u8bf7\u8be6\u7ec6\u8bf4\u660e\u6bcf\u4e00\u6b65",
            None,
        ),
        ("Why?", "too short"),
        ("A tree. " * 400, "too long"),
        ("What is a \ufffd tree in dry ground?", "with control characters"),
        ("to be or not " * 8, "repeating itself"),
        ("How do I \u0440\u0430\u0441\u0442\u0438\u0442 a tree?", "of mixed scripts"),
    ],
)
def test_a_text_is_dropped_for_its_own_faults(text: str, reason: str | None) -> None:
    assert Sieve().reason(text) == reason


def test_what_was_there_is_dropped_and_counted() -> None:
    long_entry = " ".join(f"word{number}" for number in range(30))
    sieve = Sieve([long_entry, "What is the capital of France?"])
    shared = " ".join(f"word{number}" for number in range(9, 22))  # 13 of them
    assert sieve.keep(GOOD)
    assert not sieve.keep(GOOD.upper() + "!!")
    assert not sieve.keep("How do I plant a tree in a dry ground?")
    assert sieve.keep("How do I bake bread without an oven?")
    assert not sieve.keep(f"Say it: {shared}")
    assert sieve.keep("Say it: " + " ".join(f"word{number}" for number in range(9, 21)))
    assert not sieve.keep("what is the CAPITAL of france")
    assert sieve.counts == {
        "there already": 1,
        "nearly there already": 1,
        "of an evaluation set": 2,
    }


# --- the file -------------------------------------------------------------------------------------


class Scripted:
    """Writes by number: question `say(number)`, answers that count their turns."""

    max_rows = 2

    def __init__(self, say: Callable[[int], str | None], *, stop_after: int = 10**9) -> None:
        self.say = say
        self.facts = {"target": {"name": "scripted", "id": None}}
        self.left = stop_after

    def questions(self, wanted: Sequence[Wanted]) -> Iterator[Written]:
        for one in reversed(wanted):  # they end in any order
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            text = self.say(one.number)
            if text is not None and one.turns:
                text = f"{text} And turn {len(one.turns)}?"
            yield Written(one.number, text, "" if text else "unfinished")

    def answers(self, wanted: Sequence[Wanted]) -> Iterator[Written]:
        for one in wanted:
            is_finished = one.number % 3 != 0
            yield Written(one.number, f"Answer {one.number}" if is_finished else None, "unfinished")


NAMES = """apple bridge candle desert engine forest garden hammer island jacket kettle ladder
meadow needle orange pillow quarry ribbon saddle tunnel umbrella violin walnut yellow zipper"""
WORDS = re.findall(r"\w+", NAMES)


def question(number: int) -> str | None:
    """Every fifth is unfinished, every seventh was there before."""
    if number % 5 == 4:
        return None
    if number % 7 == 6:
        number -= 6
    first, second = WORDS[number % 25], WORDS[number * 11 % 23]
    return f"Tell me about the {first} and number {number * 7919} of the {second}."


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("turns", [1, 3])
def test_a_run_that_was_killed_goes_on_to_the_same_file(tmp_path: Path, turns: int) -> None:
    asking = Asking(turns=turns)
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    counts = write_own_prompts(Scripted(question), whole, 40, asking, quiet=True)

    for stop_after in (3, 20, 37):
        writer = Scripted(question, stop_after=stop_after)
        with pytest.raises(KeyboardInterrupt):
            write_own_prompts(writer, torn, 40, asking, quiet=True)
    with torn.open("a") as file:
        file.write('{"source": "self", "ro')  # half a line
    again = write_own_prompts(Scripted(question), torn, 40, asking, quiet=True)

    assert torn.read_bytes() == whole.read_bytes()
    assert again == counts
    assert counts["unfinished"] > 0
    assert counts["there already"] > 0


def test_lines_that_a_kill_left_before_the_note_are_not_written_twice(tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    write_own_prompts(Scripted(question), whole, 12, Asking(), quiet=True)
    note = whole.with_name("whole.jsonl.run.json").read_text()
    write_own_prompts(Scripted(question), whole, 20, Asking(), quiet=True)
    torn.write_bytes(whole.read_bytes())
    torn.with_name("torn.jsonl.run.json").write_text(note)

    write_own_prompts(Scripted(question), torn, 30, Asking(), quiet=True)
    write_own_prompts(Scripted(question), whole, 30, Asking(), quiet=True)
    assert torn.read_bytes() == whole.read_bytes()


def test_a_talk_ends_before_what_cannot_be_used(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    write_own_prompts(Scripted(question), out, 20, Asking(turns=3), quiet=True)
    for row in lines_of(out):
        if row["row"] % 3 == 0:  # its answer never ends
            assert isinstance(row["prompt"], str)
            continue
        roles = [turn["role"] for turn in row["prompt"]]
        assert roles == ["user", "assistant", "user", "assistant", "user"]
        assert row["prompt"][1]["content"] == f"Answer {row['row']}"


def test_other_settings_do_not_go_on(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    write_own_prompts(Scripted(question), out, 5, Asking(), quiet=True)
    with pytest.raises(DataError, match="seed 0, not 1"):
        write_own_prompts(Scripted(question), out, 9, Asking(seed=1), quiet=True)


def test_a_file_of_others_is_not_touched(tmp_path: Path) -> None:
    out = tmp_path / "mine.jsonl"
    out.write_text('{"prompt": "mine"}\n')
    with pytest.raises(InvalidParameter, match="was not written by"):
        write_own_prompts(Scripted(question), out, 5, Asking(), quiet=True)
    assert out.read_text() == '{"prompt": "mine"}\n'


def test_a_target_that_asks_nothing_is_told_from_one_that_is_slow(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        write_own_prompts(Scripted(lambda _: None), tmp_path / "out.jsonl", 5, Asking(), quiet=True)
    assert "gave a prompt: 516 unfinished" in one_line_and_hint(error)


# --- who writes -----------------------------------------------------------------------------------


def chat_model() -> Any:
    model = language_model()
    model.tokenizer.chat_template = (
        "{% for m in messages %}{{ '<s>' + m['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<s>' }}{% endif %}"
    )
    return model


def test_the_target_here_goes_on_from_its_opening() -> None:
    model = chat_model()
    writer = LocalWriter(model)
    params = SamplingParams(temperature=1.0, max_new_tokens=40, seed=3)
    wanted = [Wanted(number, [], params.numbered(number)) for number in range(12)]
    written = {one.number: one for one in writer.questions(wanted)}
    assert len(written) == 12

    begun = opening(model.tokenizer, "toy").tokens
    for one in wanted:
        result = model.generate(begun, one.params)
        own = written[one.number]
        if result.finish_reason == "length":
            assert own.text is None
            assert own.fault == "unfinished"
        elif own.text is not None:
            assert own.text == result.text.strip()
        else:
            assert own.fault == "with control tokens"
    assert any(one.text for one in written.values())


class Completions:
    """A server of raw completions and chat completions that keeps what it was asked."""

    def __init__(self) -> None:
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.bodies.append((self.path, body))
                if self.path == "/v1/completions":
                    choice = {"text": " Why so? ", "finish_reason": "stop"}
                else:
                    message = {"role": "assistant", "content": "So."}
                    choice = {"message": message, "finish_reason": "length"}
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps({"choices": [choice]}).encode())

            def log_message(self, *arguments: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def completions() -> Iterator[Completions]:
    server = Completions()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


def test_a_server_is_asked_for_raw_completions(completions: Completions) -> None:
    tokenizer = chat_tokenizer("byte level", "chatml")
    tokenizer.chat_template = CHATML
    writer = RemoteWriter(Server(completions.url, "big", 2), tokenizer, "toy")
    params = SamplingParams(temperature=0.5, top_p=0.95, seed=7, max_new_tokens=9)
    (written,) = writer.questions([Wanted(4, [], params)])
    assert written == Written(4, "Why so?")

    (path, body), *others = completions.bodies
    assert not others
    assert path == "/v1/completions"
    assert body["prompt"] == opening(tokenizer, "toy").tokens
    assert (body["model"], body["temperature"], body["seed"]) == ("big", 0.5, 7)
    (end,) = body["stop_token_ids"]
    assert tokenizer.convert_ids_to_tokens(end) == "<|im_end|>"

    (answered,) = writer.answers([Wanted(4, [{"role": "user", "content": "Why?"}], params)])
    assert answered.text is None
    assert completions.bodies[1][0] == "/v1/chat/completions"


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (["--self", "3", "sets.jsonl"], "takes no data sets"),
        (["--self", "3", "--thinking", "0.5"], "takes no data sets and no --thinking"),
        (["--self", "0"], "self"),
        (["--turns", "2"], "writes nothing without --self"),
        (["--kernel", "int8"], "writes nothing without --self"),
        (["--self", "3", "--temperatures", "warm"], "temperatures"),
        (["--self", "3", "--url", "http://host/v1"], "go together"),
        (["--self", "3", "--url", "http://h/v1", "--model", "m", "--kernel", "int8"], "writes"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    options: list[str], cause: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prompts", "--out", str(tmp_path / "p.jsonl"), *options]) in (1, 2)
    error = capsys.readouterr().err
    assert cause in error
    assert not (tmp_path / "p.jsonl").exists()
