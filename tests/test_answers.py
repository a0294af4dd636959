"""The target's answers to prompts: what a drafter may learn from, which of it is a label, and that
a prompt that cannot be answered is left out and named.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_folders import CHAT, save_target
from toy_prompts import (
    ANSWER,
    NO_USER,
    SAMPLED,
    SYSTEM,
    TALK,
    language_model,
    one_line,
    prompt_file,
    write_lines,
)

from flashdraft.cli import main
from flashdraft.cli import options as cli_options
from flashdraft.errors import DataError, InvalidParameter, InvalidPrompt
from flashdraft.train import regenerate as stage
from flashdraft.train.features import FeatureSet, ShardWriter, encode, write_features
from flashdraft.train.prompts import read_jsonl, write_prompts
from flashdraft.train.regenerate import mixed, regenerate

# Thinking, and what is a label.


def test_thinking_is_passed_to_the_template() -> None:
    lm = language_model()
    texts = {
        thinking: lm.tokenizer.decode(lm.encode("hi", thinking=thinking))
        for thinking in (None, True, False)
    }
    assert texts == {None: "u hi.a ", True: "u hi.a on ", False: "u hi.a off "}


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("template", [CHAT, None])
def test_template_without_the_switch_refuses_it(thinking: bool, template: Any) -> None:
    with pytest.raises(InvalidPrompt, match="no `enable_thinking`"):
        language_model(template).encode("hi", thinking=thinking)


@pytest.mark.parametrize("prompt", ["hi", TALK], ids=["text", "conversation"])
@pytest.mark.parametrize("thinking", [None, True, False])
def test_answers_are_those_to_the_prompt_with_its_thinking(
    tmp_path: Path, thinking: bool | None, prompt: Any
) -> None:
    lm, out = language_model(), tmp_path / "answers.jsonl"
    fields = {} if thinking is None else {"thinking": thinking}
    path = prompt_file(tmp_path, [prompt], **fields)
    shards = ShardWriter(lm, tmp_path / "features", layers=(1,), max_length=64)
    assert regenerate(lm, path, out, params=ANSWER, shards=shards, quiet=True) == 1
    (row,) = read_jsonl(out)
    assert {key: row[key] for key in row if key == "thinking"} == fields
    tokens = lm.encode(prompt, thinking=thinking)
    assert encode(lm, row) == ([*tokens, *row["tokens"]], len(tokens))
    assert tuple(row["tokens"]) == lm.generate(tokens, ANSWER).tokens


@pytest.mark.parametrize(
    "thinking", [(True, False), (True, True)], ids=["thinking-and-not", "the-same-prompt-twice"]
)
def test_kept_features_are_those_of_thinking_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thinking: tuple[bool, bool]
) -> None:
    lm, out = language_model(), tmp_path / "answers.jsonl"
    monkeypatch.setattr(stage, "SHARD", 2)
    monkeypatch.setattr("flashdraft.train.features.SHARD", 2)
    rows = [{"source": "toy", "row": n, "prompt": "hi", "thinking": thinking[n]} for n in range(2)]
    shards = ShardWriter(lm, tmp_path / "kept", layers=(1,), max_length=64)
    regenerate(
        lm, write_lines(tmp_path / "p.jsonl", rows), out, params=ANSWER, shards=shards, quiet=True
    )
    assert len(shards.known) == 1
    write_features(lm, [out], tmp_path / "read", layers=(1,), max_length=64, quiet=True)
    write_features(lm, [out], tmp_path / "kept", layers=(1,), max_length=64, quiet=True)
    kept, read = FeatureSet(tmp_path / "kept"), FeatureSet(tmp_path / "read")
    assert kept.index == read.index
    assert {start for _, _, start in kept.index} == {
        len(lm.encode("hi", thinking=switch)) for switch in thinking
    }
    for n in range(2):
        assert torch.equal(kept[n].tokens, read[n].tokens)
        assert (num_kept := len(kept[n].features)) >= len(read[n].tokens) - 2
        assert torch.allclose(
            kept[n].features.float(), read[n].features[:num_kept].float(), atol=0.02
        )


def test_only_the_regenerated_answer_of_a_conversation_is_a_label(tmp_path: Path) -> None:
    """What the assistant said before stands in front of the answer, as the template tells it."""
    lm, out = language_model(), tmp_path / "answers.jsonl"
    chat = write_lines(
        tmp_path / "chat.jsonl", [{"messages": [*TALK, {"role": "assistant", "content": "Never"}]}]
    )
    write_prompts(None, tmp_path / "prompts.jsonl", files=[str(chat)])
    regenerate(lm, tmp_path / "prompts.jsonl", out, params=ANSWER, quiet=True)
    (row,) = read_jsonl(out)
    for answer in (row, {key: row[key] for key in row if key != "tokens"}):
        tokens, num_prompt = encode(lm, answer)
        assert lm.tokenizer.decode(tokens[:num_prompt]) == "u a.a b.u c.a "
        assert lm.tokenizer.decode(tokens[num_prompt:], skip_special_tokens=True) == row["response"]
    assert "Never" not in out.read_text()
    write_features(lm, [out], tmp_path / "features", layers=(1,), max_length=64, quiet=True)
    data = FeatureSet(tmp_path / "features")
    assert data[0].num_prompt == len("u a.a b.u c.a ")
    assert data.answer_tokens(0) == row["tokens"]


BAD_PROMPTS = [
    ({"source": "s", "row": 1, "prompt": " "}, "the prompt is empty"),
    ({"source": "s", "row": 1, "prompt": NO_USER["messages"]}, "no user turn"),
    ({"source": "s", "row": 1, "prompt": [3, 4]}, "not a list of turns"),
    ({"source": "s", "row": 1, "prompt": "a", "thinking": "no"}, "`thinking` is 'no'"),
    ('{"source": \n', "not valid JSON"),
    (
        {"source": "s", "row": 1, "prompt": TALK + TALK[:1]},
        "the chat template of `llama` refuses the conversation: in turn",
    ),
]


@pytest.mark.parametrize(("row", "expected"), BAD_PROMPTS)
def test_prompt_that_cannot_be_answered_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: Any, expected: str
) -> None:
    """Once beside others, and once alone, where nothing is left."""
    lm = language_model(
        "{% if messages|length > 3 %}{{ raise_exception('in turn') }}{% endif %}" + CHAT
    )
    good = [{"source": "s", "row": n, "prompt": "ab"[n == 3]} for n in (0, 3)]
    path = write_lines(tmp_path / "p.jsonl", [good[0], "\n", row, good[1]])
    for new in (2, 0):
        assert regenerate(lm, path, tmp_path / "out.jsonl", params=SAMPLED, quiet=True) == new
        told = capsys.readouterr().err
        assert told.startswith(f"1 prompt left out: {path}, line 3: ")
        assert expected in told
    answers = {line["row"]: line["response"] for line in read_jsonl(tmp_path / "out.jsonl")}
    seeds = {
        0: 3,
        3: 5,
    }  # a row that is left out has a number: once it is mended, the others keep theirs
    assert answers == {
        n: lm.generate("ab"[n == 3], replace(SAMPLED, seed=seeds[n])).text for n in (0, 3)
    }

    alone = write_lines(tmp_path / "alone.jsonl", [row])
    with pytest.raises(DataError) as error:
        regenerate(lm, alone, tmp_path / "new" / "out.jsonl", params=ANSWER, quiet=True)
    assert f"1 prompt left out: {alone}, line 1: " in one_line(error)
    assert expected in one_line(error)
    assert (
        not list(tmp_path.glob("new/*.jsonl")) or (tmp_path / "new/out.jsonl").read_bytes() == b""
    )


def test_prompts_beyond_the_context_are_counted_and_are_an_error_where_all_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lm, path = language_model(), prompt_file(tmp_path, ["a", *["b" * 300] * 5])
    assert regenerate(lm, path, tmp_path / "out.jsonl", params=ANSWER, quiet=True) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"5 prompts left out: {path}, line 2: the prompt has ")
    assert told.endswith("; ...\n")
    with pytest.raises(
        DataError, match=r"no prompt could be answered: 6 prompts left out: .* context"
    ):
        regenerate(
            lm,
            path,
            tmp_path / "none.jsonl",
            params=replace(ANSWER, max_new_tokens=10000),
            quiet=True,
        )


def test_file_without_prompts_is_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", ["\n"])
    with pytest.raises(DataError, match=r"p\.jsonl` holds no prompts"):
        regenerate(language_model(), path, tmp_path / "out.jsonl", params=ANSWER, quiet=True)
    assert set(tmp_path.iterdir()) == {path}


# A share of greedy answers.


def test_share_of_the_prompts_is_answered_greedily(tmp_path: Path) -> None:
    lm, prompts = language_model(), [f"{letter} x" for letter in "abcdefghijkl"]
    path, answers = prompt_file(tmp_path, prompts), {}
    for share in (0.0, 0.5, 1.0):
        regenerate(lm, path, tmp_path / f"{share}.jsonl", params=mixed(SAMPLED, share), quiet=True)
        answers[share] = {
            row["row"]: row["response"] for row in read_jsonl(tmp_path / f"{share}.jsonl")
        }
    greedy = {n for n in answers[0.5] if answers[0.5][n] == answers[1.0][n]}
    assert {n: lm.generate(prompts[n], ANSWER).text for n in answers[1.0]} == answers[1.0]
    assert all(
        answers[0.5][n] == answers[0.0][n] != answers[1.0][n] for n in set(answers[0.0]) - greedy
    )
    assert 2 <= len(greedy) <= 10
    regenerate(lm, path, tmp_path / "again.jsonl", params=mixed(SAMPLED, 0.5), limit=5, quiet=True)
    regenerate(lm, path, tmp_path / "again.jsonl", params=mixed(SAMPLED, 0.5), quiet=True)
    assert {row["row"]: row["response"] for row in read_jsonl(tmp_path / "again.jsonl")} == answers[
        0.5
    ]


def test_greedy_prompts_are_drawn_with_their_share_and_by_seed() -> None:
    drawn = {
        seed: [mixed(replace(SAMPLED, seed=seed), 0.3)(n).temperature == 0 for n in range(2000)]
        for seed in (0, 1)
    }
    assert all(abs(sum(greedy) / 2000 - 0.3) < 0.05 for greedy in drawn.values())
    assert drawn[0] != drawn[1]
    assert [mixed(SAMPLED)(n) for n in (0, 5)] == [
        replace(SAMPLED, seed=3),
        replace(SAMPLED, seed=8),
    ]


def test_greedy_share_of_what_is_greedy_already_is_refused() -> None:
    with pytest.raises(InvalidParameter, match=r"greedy_share is 0\.5, but all is greedy"):
        mixed(ANSWER, 0.5)


def test_command_mixes_greedy_answers_and_keeps_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_target(tmp_path / "target")
    monkeypatch.setattr(stage, "SHARD", 2)
    monkeypatch.chdir(tmp_path)
    prompt_file(tmp_path, ["a", "b"])
    options = (
        "--target target --max-new-tokens 8 --temperature 1 "
        "--keep-features kept --num-features 1 --max-length 32"
    )
    assert (
        main(
            [
                "regenerate",
                "prompts.jsonl",
                "--out",
                "out.jsonl",
                "--greedy-share",
                "1",
                *options.split(),
            ]
        )
        == 0
    )
    assert capsys.readouterr().out == "2 new answers in out.jsonl\n"
    lm = cli_options.load("target", draft="autoregressive")
    for row in read_jsonl(tmp_path / "out.jsonl"):
        assert row["response"] == lm.generate(row["prompt"], max_new_tokens=8).text
    assert json.loads((tmp_path / "kept/manifest.json").read_text())["max_length"] == 32


# Prompts that are measured.


def test_held_out_conversations_are_measured_and_one_that_cannot_be_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `prompts` writes is what `eval` takes;
    with fewer prompts a figure would be another one.
    """
    save_target(tmp_path / "target")
    monkeypatch.chdir(tmp_path)
    prompt_file(tmp_path, ["a", TALK, [SYSTEM, TALK[0]]])
    options = ["--target", "target", "--draft", "prompt_lookup", "--max-new-tokens", "8"]
    assert main(["eval", "prompts.jsonl", *options]) == 0
    assert " on 3 prompts, " in capsys.readouterr().out
    for prompt, cause in (
        ("a" * 300, "line 2: the prompt has 305 tokens"),
        ("", "line 2: no text to ask"),
    ):
        prompt_file(tmp_path, ["a", prompt])
        assert main(["eval", "prompts.jsonl", *options]) == 1
        assert cause in capsys.readouterr().err
