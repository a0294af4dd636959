"""Generation of a file without a server: answers are the model's own, a run that was stopped is
gone on with to the same bytes, and what is not ours or made otherwise is refused by name.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_folders import save_target
from toy_prompts import SAMPLED, TALK, language_model, one_line, write_lines

import flashdraft
from flashdraft import growing, offline
from flashdraft.cli import main
from flashdraft.engine import Request
from flashdraft.errors import DataError, FlashDraftError, InvalidParameter, UnusableLogits
from flashdraft.feed import feed
from flashdraft.files import locked
from flashdraft.generate import Model
from flashdraft.offline import Done, Job, answer_file
from flashdraft.types import Chunk, SamplingParams

PROMPTS: list[dict[str, Any]] = [
    {"prompt": "hi", "id": "first", "max_new_tokens": 30},
    {"prompt": TALK, "meta": {"set": "talks", "row": 7}},
    {"prompt": [5, 6, 7], "id": 12, "temperature": 0.0},
    {"prompt": "a b c", "thinking": True},
    {"prompt": "zebra", "seed": 99},
    {"prompt": "why?", "stop": ["e"], "top_k": 20},
    {"source": "gsm8k/train", "row": 3, "task": "gsm8k", "prompt": "as `prompts` writes it"},
    {"prompt": "tell me", "max_new_tokens": 3},
]


def answered(
    folder: Path,
    prompts: Path,
    out: str = "out.jsonl",
    *,
    params: SamplingParams = SAMPLED,
    rows: int = 4,
) -> Done:
    lm = language_model()
    lm.max_rows = rows
    return answer_file(Job(prompts, folder / out, params), "llama", lambda: lm, quiet=True)


def sorted_lines(path: Path) -> list[bytes]:
    return sorted(path.read_bytes().splitlines(keepends=True))


def by_number(path: Path) -> dict[int, dict[str, Any]]:
    return {row["number"]: row for row in map(json.loads, path.read_text().splitlines())}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "prompts.jsonl", PROMPTS)


@pytest.fixture
def undisturbed(tmp_path: Path, prompts: Path) -> Path:
    assert answered(tmp_path, prompts, "whole.jsonl").num_answers == len(PROMPTS)
    return tmp_path / "whole.jsonl"


def killed_after(monkeypatch: pytest.MonkeyPatch, finished: int) -> None:
    def killed(model: Model, requests: Iterator[Request]) -> Iterator[Chunk]:
        left = finished
        for chunk in feed(model, requests):
            yield chunk
            left -= chunk.result is not None
            if left == 0:
                raise KeyboardInterrupt

    monkeypatch.setattr(offline, "feed", killed)


# What an answer is.


def test_answers_are_the_models_own_with_the_prompts_fields(undisturbed: Path) -> None:
    """Seeds count on by number; a prompt's own fields come first."""
    lm, rows = language_model(), by_number(undisturbed)
    assert sorted(rows) == list(range(len(PROMPTS)))
    for number, line in enumerate(PROMPTS):
        others = ("prompt", "id", "meta", "thinking", "source", "row", "task")
        own = {name: line[name] for name in line if name not in others}
        params = replace(SAMPLED.numbered(number), **own)
        tokens = lm.encode(line["prompt"], thinking=line.get("thinking"))
        result = lm.generate(tokens, params)
        assert rows[number] == {
            "number": number,
            **line,
            "text": result.text,
            "tokens": list(result.tokens),
            "finish_reason": result.finish_reason,
            "num_prompt_tokens": len(tokens),
        }


def test_logprobs_are_written_where_they_are_asked_for(tmp_path: Path, prompts: Path) -> None:
    answered(tmp_path, prompts, params=replace(SAMPLED, logprobs=True))
    for row in by_number(tmp_path / "out.jsonl").values():
        assert len(row["logprobs"]) == len(row["tokens"])


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    texts = tmp_path / "prompts.txt"
    texts.write_bytes(b'hi\r\n\r\n{"prompt": "zebra"}\n\xff\nwhy?')
    lines = [
        {"prompt": "hi"},
        {"prompt": '{"prompt": "zebra"}'},
        {"prompt": [-1]},
        {"prompt": "why?"},
    ]
    same = write_lines(tmp_path / "same.jsonl", lines)
    assert answered(tmp_path, texts, "a.jsonl").num_answers == 3
    assert answered(tmp_path, same, "b.jsonl").num_answers == 3
    assert sorted_lines(tmp_path / "a.jsonl") == sorted_lines(tmp_path / "b.jsonl")


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_the_batch_changes_no_byte(
    tmp_path: Path, prompts: Path, undisturbed: Path, rows: int
) -> None:
    answered(tmp_path, prompts, rows=rows)
    assert sorted_lines(tmp_path / "out.jsonl") == sorted_lines(undisturbed)


@pytest.mark.real_model
def test_the_batch_changes_no_byte_of_the_built_in_model(tmp_path: Path) -> None:
    texts = ["Name a colour.", "Count to five.", "Why is the sky blue?"]
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": text} for text in texts])
    params = SamplingParams(temperature=0.8, seed=5, max_new_tokens=16)
    for rows in (1, 8):
        lm = flashdraft.load("smollm2-135m", max_rows=rows)
        assert lm.target.row_exact
        job = Job(path, tmp_path / f"{rows}.jsonl", params)
        answer_file(job, "smollm2-135m", lambda lm=lm: lm, quiet=True)  # type: ignore[misc]
    assert sorted_lines(tmp_path / "1.jsonl") == sorted_lines(tmp_path / "8.jsonl")


def test_rows_never_wait_and_few_prompts_are_taken_ahead() -> None:
    """While prompts are left, every row has one; a list of any length costs no memory."""
    lm = language_model()
    lm.max_rows = 3
    num_taken = 0
    lengths = [2, 30, 2, 2, 9, 2, 2, 2, 2, 14, 2, 2]

    def requests() -> Iterator[Request]:
        nonlocal num_taken
        for number, length in enumerate(lengths):
            num_taken += 1
            params = SamplingParams(max_new_tokens=length, ignore_eos=True)
            yield lm.request("hi", params, index=number)

    ended: list[int] = []
    for chunk in feed(lm, requests()):
        assert num_taken - len(ended) <= 6
        if num_taken < len(lengths):
            assert num_taken - len(ended) >= 3
        if chunk.result is not None:
            ended.append(chunk.index)
    assert sorted(ended) == list(range(len(lengths)))
    assert ended.index(1) >= 8  # the long one stopped nobody


# Stopped and gone on with.


@pytest.mark.parametrize("finished", [1, 3, 6])
def test_a_run_that_was_stopped_ends_with_the_same_bytes(
    tmp_path: Path,
    prompts: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    finished: int,
) -> None:
    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        killed_after(patch, finished)
        with pytest.raises(KeyboardInterrupt):
            answered(tmp_path, prompts)
    assert len(sorted_lines(out)) == finished
    assert answered(tmp_path, prompts, rows=2).num_answers == len(PROMPTS) - finished
    assert sorted_lines(out) == sorted_lines(undisturbed)
    assert answered(tmp_path, prompts).num_answers == 0
    assert sorted_lines(out) == sorted_lines(undisturbed)


def test_seeds_that_count_from_where_a_run_begins_are_caught(
    tmp_path: Path, prompts: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault: a resumed run numbers its own prompts."""
    missing = offline._missing

    def renumbered(job: Job, held: Any) -> Iterator[Any]:
        for number, prompt in enumerate(missing(job, held)):
            yield prompt._replace(params=SAMPLED.numbered(number))

    with monkeypatch.context() as patch:
        killed_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            answered(tmp_path, prompts)
    monkeypatch.setattr(offline, "_missing", renumbered)
    answered(tmp_path, prompts)
    assert sorted_lines(tmp_path / "out.jsonl") != sorted_lines(undisturbed)


def test_half_a_last_line_is_made_again(tmp_path: Path, prompts: Path, undisturbed: Path) -> None:
    whole = undisturbed.read_bytes()
    for cut in (len(whole) - 1, len(whole) - 40, whole.rfind(b'{"number"') + 3):
        undisturbed.write_bytes(whole[:cut])
        expected = 0 if cut == len(whole) - 1 else 1  # only the line's end was missing
        assert answered(tmp_path, prompts, "whole.jsonl").num_answers == expected
        assert sorted_lines(undisturbed) == sorted(whole.splitlines(keepends=True))


def test_half_a_line_that_is_kept_is_caught(
    tmp_path: Path, prompts: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growing, "_is_json", lambda text: True)
    undisturbed.write_bytes(undisturbed.read_bytes()[:-40])
    with pytest.raises(DataError, match=rf"line {len(PROMPTS)}: not valid JSON"):
        answered(tmp_path, prompts, "whole.jsonl")


def test_killed_process_loses_only_what_was_running(tmp_path: Path) -> None:
    """SIGKILL, with no chance to tidy up; then to the bytes of a run that nobody stopped."""
    save_target(tmp_path / "target")
    lines = [{"prompt": "hi", "max_new_tokens": 3}, *[{"prompt": "so"}] * 12]
    write_lines(tmp_path / "p.jsonl", lines)
    options = "--prompts p.jsonl --target target --max-new-tokens 40 --ignore-eos --temperature 1"
    command = ["generate", *options.split(), "--max-rows", "2"]
    out = tmp_path / "out.jsonl"
    running = subprocess.Popen(
        [sys.executable, "-m", "flashdraft", *command, "--out", "out.jsonl"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
    )
    until = time.monotonic() + 120
    while not (out.exists() and out.stat().st_size) and time.monotonic() < until:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    num_held = len(sorted_lines(out))
    assert 1 <= num_held < len(lines)

    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        assert main([*command, "--out", "out.jsonl"]) == 0
        assert main([*command, "--out", "whole.jsonl"]) == 0
    finally:
        os.chdir(here)
    assert sorted_lines(out) == sorted_lines(tmp_path / "whole.jsonl")


def test_more_prompts_at_the_end_are_gone_on_with(
    tmp_path: Path, prompts: Path, undisturbed: Path
) -> None:
    write_lines(prompts, [*PROMPTS, {"prompt": "more"}])
    assert answered(tmp_path, prompts, "whole.jsonl").num_answers == 1


# Refused by name.


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"temperature": 0.5}, "temperature 1.0, not 0.5"),
        ({"seed": 4}, "seed 3, not 4"),
        ({"max_new_tokens": 13}, "max_new_tokens 12, not 13"),
        ({"logprobs": True}, "logprobs false, not true"),
        ({"stop": ("e",)}, 'stop [], not ["e"]'),
    ],
)
def test_other_parameters_do_not_go_on_with_it(
    tmp_path: Path, prompts: Path, undisturbed: Path, change: dict[str, Any], why: str
) -> None:
    before = undisturbed.read_bytes()
    with pytest.raises(DataError) as error:
        answered(tmp_path, prompts, "whole.jsonl", params=replace(SAMPLED, **change))
    assert why in one_line(error)
    assert undisturbed.read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ([{"prompt": "ho"}, *PROMPTS[1:]], "another prompt than"),
        ([{**PROMPTS[0], "max_new_tokens": 29}, *PROMPTS[1:]], "another prompt than"),
        (PROMPTS[1:], "another prompt than"),
        (PROMPTS[:-1], f"answer to prompt number {len(PROMPTS) - 1}, which is not there"),
    ],
)
def test_other_prompts_do_not_go_on_with_it(
    tmp_path: Path, prompts: Path, undisturbed: Path, changed: Sequence[Any], why: str
) -> None:
    write_lines(prompts, changed)
    with pytest.raises(DataError) as error:
        answered(tmp_path, prompts, "whole.jsonl")
    assert why in one_line(error)


def test_another_target_does_not_go_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, dtype in (("t", torch.float32), ("other", torch.bfloat16)):
        save_target(tmp_path / name, dtype=dtype)
    write_lines(tmp_path / "p.jsonl", [{"prompt": "hi"}])
    command = "generate --prompts p.jsonl --out a.jsonl --max-new-tokens 3 --target"
    assert main([*command.split(), "t"]) == 0
    told = capsys.readouterr().out
    assert re.fullmatch(r"1 new answers in a\.jsonl\n3 tokens, [\d.]+ tokens/s, tau 1\.00\n", told)
    assert main([*command.split(), "other"]) == 1
    assert "made with target `t`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"my notes\n", "was not written by `flashdraft generate`"),
        (b'{"number": 0, "text": "", "tokens": []}\n', "was not written by `flashdraft generate`"),
    ],
)
def test_a_file_that_is_not_ours_is_refused(
    tmp_path: Path, prompts: Path, content: bytes, why: str
) -> None:
    (tmp_path / "out.jsonl").write_bytes(content)
    with pytest.raises(InvalidParameter) as error:
        answered(tmp_path, prompts)
    assert why in one_line(error)
    assert (tmp_path / "out.jsonl").read_bytes() == content


def test_an_output_of_another_command_is_refused(tmp_path: Path, prompts: Path) -> None:
    (tmp_path / "out.jsonl").write_text("{}\n")
    (tmp_path / "out.jsonl.run.json").write_text('{"made_by": "regenerate"}')
    with pytest.raises(InvalidParameter, match="was written by `flashdraft regenerate`"):
        answered(tmp_path, prompts)


DAMAGES = [b"not json\n", b'{"number": 1}\n', b"[]\n", b"[" * 100_000 + b"\n"]
DAMAGES += [b'{"number": [1], "text": "", "tokens": []}\n']
DAMAGES += [b'{"number": "1", "text": "", "tokens": []}\n']


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_line_is_named(
    tmp_path: Path, prompts: Path, undisturbed: Path, damage: bytes
) -> None:
    first, *others = undisturbed.read_bytes().splitlines(keepends=True)
    undisturbed.write_bytes(first + damage + b"".join(others[1:]))
    with pytest.raises(DataError, match=r"whole\.jsonl, line 2: not "):
        answered(tmp_path, prompts, "whole.jsonl")


def test_the_prompts_themselves_and_a_file_in_work_are_no_output(
    tmp_path: Path, prompts: Path
) -> None:
    with pytest.raises(InvalidParameter, match="is read and would be written over"):
        answered(tmp_path, prompts, "prompts.jsonl")
    with (
        locked(tmp_path / "out.jsonl"),
        pytest.raises(InvalidParameter, match="another process is writing"),
    ):
        answered(tmp_path, prompts)


# Prompts that cannot be answered.

BAD_LINES = [
    ("{broken\n", "not valid JSON"),
    ("12\n", "not a JSON object"),
    ({"id": 3}, "no field `prompt`"),
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": {"role": "user"}}, "is not a prompt"),
    ({"prompt": [3, 10**6]}, "outside the vocabulary"),
    ({"prompt": "a" * 300}, "the prompt has 30"),
    ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"prompt": "a", "temperature": "hot"}, "temperature is 'hot'"),
    ({"prompt": "a", "max_tokens": 5}, "unknown field `max_tokens`"),
    ({"prompt": "a", "logprobs": True}, "unknown field `logprobs`"),
    ({"prompt": "a", "id": [1]}, "`id` is [1]"),
    ({"prompt": "a", "thinking": "no"}, "`thinking` is 'no'"),
    ({"prompt": "\ud800"}, "half a character"),
]


@pytest.mark.parametrize(("line", "why"), BAD_LINES)
def test_a_bad_line_is_left_out_named_and_has_a_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: Any, why: str
) -> None:
    good = [{"prompt": "hi"}, {"prompt": "zebra"}]
    path = write_lines(tmp_path / "p.jsonl", [good[0], "\n", line, good[1]])
    for count in (2, 0):
        assert answered(tmp_path, path).num_answers == count
        told = capsys.readouterr().err
        assert told.startswith(f"1 prompt left out: {path}, line 3: ")
        assert why in told

    write_lines(path, [good[0], "\n", {"prompt": "mended"}, good[1]])
    assert answered(tmp_path, path).num_answers == 1
    lm, rows = language_model(), by_number(tmp_path / "out.jsonl")
    for number, text in enumerate(("hi", "mended", "zebra")):
        assert rows[number]["text"] == lm.generate(text, SAMPLED.numbered(number)).text

    alone = write_lines(tmp_path / "alone.jsonl", [line])
    with pytest.raises(DataError) as error:
        answered(tmp_path, alone, "none.jsonl")
    assert f"no prompt could be answered: 1 prompt left out: {alone}, line 1: " in one_line(error)


def test_a_row_that_fails_alone_is_left_out_and_asked_again(
    tmp_path: Path,
    prompts: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(model: Model, requests: Iterator[Request]) -> Iterator[Chunk]:
        for chunk in feed(model, requests):
            is_bad = chunk.index == 2 and chunk.result is not None
            error = UnusableLogits("the logits are NaN") if is_bad else None
            yield Chunk(chunk.index, (), (), None, error=error) if is_bad else chunk

    with monkeypatch.context() as patch:
        patch.setattr(offline, "feed", failing)
        assert answered(tmp_path, prompts).num_answers == len(PROMPTS) - 1
    assert "prompts.jsonl, line 3: the logits are NaN" in capsys.readouterr().err
    assert answered(tmp_path, prompts).num_answers == 1
    assert sorted_lines(tmp_path / "out.jsonl") == sorted_lines(undisturbed)


@pytest.mark.parametrize(
    ("content", "why"), [("", "holds no prompts"), ("\n\n", "holds no prompts"), (None, "no file")]
)
def test_no_prompts_are_refused_before_the_model_is_loaded(
    tmp_path: Path, content: str | None, why: str
) -> None:
    path = tmp_path / "p.jsonl"
    if content is not None:
        path.write_text(content)

    def load() -> Model:
        raise AssertionError("loaded")

    with pytest.raises(FlashDraftError) as error:
        answer_file(Job(path, tmp_path / "out.jsonl", SAMPLED), "llama", load, quiet=True)
    assert why in one_line(error)
    assert not list(tmp_path.glob("out*"))


# The command.


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("hi --prompts p.jsonl --out a.jsonl", "given twice: by --prompts and as arguments"),
        ("--prompts p.jsonl", "--prompts and --out go together"),
        ("hi --out a.jsonl", "--prompts and --out go together"),
        ("--prompts p.jsonl --out a.jsonl --json", "json is True"),
        ("--prompts p.jsonl --out a.jsonl --max-rows 0", "max_rows is 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
    why: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "p.jsonl", [{"prompt": "hi"}])
    assert main(["generate", *words.split()]) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert why in error
    assert hint.startswith("hint: ")
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]
