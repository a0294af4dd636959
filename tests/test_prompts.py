"""Prompts of any source and the target's answers to them: what a drafter may learn from, and that a
bad line is named.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import EOS, tiny_target
from toy_folders import CHAT, letter_tokenizer, save_target

from flashdraft.cli import main
from flashdraft.cli import options as cli_options
from flashdraft.errors import DataError, FlashDraftError, InvalidParameter, InvalidPrompt
from flashdraft.generate import Model
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.train import regenerate as stage
from flashdraft.train.features import FeatureSet, ShardWriter, encode, write_features
from flashdraft.train.prompts import as_prompt, read_jsonl, write_prompts
from flashdraft.train.regenerate import Server, mixed, regenerate
from flashdraft.types import SamplingParams

ANSWER = SamplingParams(max_new_tokens=12, ignore_eos=True)
SAMPLED = replace(ANSWER, temperature=1.0, seed=3)
THINKING = (
    CHAT + "{% if enable_thinking is defined %}{{ 'on' if enable_thinking else 'off' }} {% endif %}"
)
TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text(
        "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    )
    return path


def one_line(error: pytest.ExceptionInfo[FlashDraftError]) -> str:
    message, *hint = str(error.value).split("\n")
    assert [line[:6] for line in hint] == ["hint: "]
    return message


def language_model(template: str = THINKING) -> Model:
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = template
    target = tiny_target("llama", lean=True, dtype=torch.float64)
    return Model(target, tokenizer, Autoregressive, eos=frozenset({EOS}), max_rows=4)


def prompt_file(folder: Path, prompts: Sequence[Any], **fields: Any) -> Path:
    rows = [
        {"source": "toy", "row": n, "prompt": prompt, **fields} for n, prompt in enumerate(prompts)
    ]
    return write_lines(folder / "prompts.jsonl", rows)


# --- stage 1: the forms of a row
# -----------------------------------------------------------------------------------------

SHARE = [
    {"from": "human", "value": "a"},
    {"from": "gpt", "value": "b"},
    {"from": "user", "value": "c"},
]
SYSTEM = {"role": "system", "content": "s"}
FORMS = [
    ({"messages": TALK}, TALK),
    ({"messages": [*TALK, {"role": "assistant", "content": "d"}]}, TALK),
    (
        {"messages": [*TALK, {"role": "assistant", "content": None}], "prompt": "its first turn"},
        TALK,
    ),
    ({"messages": [SYSTEM, TALK[0]]}, [SYSTEM, TALK[0]]),
    ({"messages": TALK[:2]}, "a"),
    (
        {
            "conversations": [
                *SHARE,
                {"from": "assistant", "value": "d"},
                {"from": "gpt", "value": "e"},
            ]
        },
        TALK,
    ),
    ({"conversations": [{"from": "system", "value": "s"}, *SHARE[:2]]}, [SYSTEM, TALK[0]]),
    ({"conversations": TALK}, TALK),
    ({"question": "how many?", "answer": "2"}, "how many?"),
    ({"instruction": "do it", "input": "", "output": "done"}, "do it"),
    ({"instruction": "add ", "input": "1 and 2", "output": "3"}, "add\n1 and 2"),
    ({"prompt": "hi", "messages": None}, "hi"),
    ({"prompt": TALK}, TALK),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize(("row", "expected"), FORMS)
def test_rows_of_every_form_become_prompts(
    tmp_path: Path, row: dict[str, Any], expected: Any, suffix: str
) -> None:
    path, out = tmp_path / f"set{suffix}", tmp_path / "out.jsonl"
    path.write_text(json.dumps(row if suffix == ".jsonl" else [row]))
    assert write_prompts(None, out, files=[str(path)]) == 1
    assert list(read_jsonl(out)) == [{"source": str(path), "row": 0, "prompt": expected}]


NO_USER = {"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "b"}]}
BAD_ROWS = [
    ('{"prompt": \n', "not valid JSON"),
    ({"prompt": " \n"}, "the prompt is empty"),
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": 3}, "`prompt` is no text"),
    ({"prompt": "\ud800"}, "surrogates"),
    ({"instruction": " ", "input": ""}, "the prompt is empty"),
    ({"messages": [{"role": "user", "content": ""}]}, "the prompt is empty"),
    (
        {"messages": [*TALK[:2], {"role": "user", "content": [{"type": "text"}]}]},
        "content is no text",
    ),
    (NO_USER, "no user turn"),
    ({"messages": []}, "no user turn"),
    ({"messages": "hi"}, "not a list of turns"),
    ({"conversations": [{"from": "tool", "value": "x"}]}, "no user turn"),
    (
        {"conversations": [{"from": "Moderator", "value": "x"}]},
        "a turn is from 'Moderator'; roles are human, user, gpt",
    ),
    ({"conversations": [3]}, "not a list of turns, each from one of human, user, gpt"),
    ({"text": "hi"}, "none of the fields messages, "),
    ([1], "not a JSON object"),
]


@pytest.mark.parametrize(("row", "expected"), BAD_ROWS)
def test_bad_row_is_left_out_and_named_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: Any, expected: str
) -> None:
    """Line 17 of a file with a blank line: lines are counted, not rows."""
    path = write_lines(
        tmp_path / "set.jsonl",
        [*({"prompt": str(n)} for n in range(15)), "\n", row, {"prompt": "z"}],
    )
    assert write_prompts(None, tmp_path / "out.jsonl", files=[str(path)]) == 16
    told = capsys.readouterr().err
    assert told.startswith(f"1 row left out: {path}, line 17: ")
    assert expected in told
    assert {line["prompt"] for line in read_jsonl(tmp_path / "out.jsonl")} == {
        "z",
        *map(str, range(15)),
    }


@pytest.mark.parametrize(("row", "expected"), BAD_ROWS)
def test_set_of_bad_rows_is_refused_and_nothing_is_written(
    tmp_path: Path, row: Any, expected: str
) -> None:
    path = write_lines(tmp_path / "set.jsonl", [row])
    with pytest.raises(DataError) as error:
        write_prompts(None, tmp_path / "out.jsonl", files=[str(path)])
    assert one_line(error).startswith(f"`{path}` holds no prompts: 1 row left out: {path}, ")
    assert expected in one_line(error)
    assert set(tmp_path.iterdir()) == {path}


def test_the_first_three_bad_rows_are_named_and_all_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_lines(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": ""}, {"prompt": 3}])
    second = write_lines(tmp_path / "b.jsonl", [{"prompt": "b"}, *[{"prompt": ""}] * 8])
    assert main(["prompts", str(first), str(second), "--out", str(tmp_path / "out.jsonl")]) == 0
    out, told = capsys.readouterr()
    assert out == f"2 prompts in {tmp_path / 'out.jsonl'}\n"
    assert told.startswith(
        f"10 rows left out: {first}, line 2: the prompt is empty; {first}, line 3: `prompt` is no text; "
    )
    assert told.endswith(f"{second}, line 2: the prompt is empty; ...\n")


BAD_FILES = [
    ("empty.jsonl", "", "holds no prompts"),
    ("empty.json", "[]", "holds no prompts"),
    ("list.json", "[3, 4]", "2 rows left out"),
    ("cut.json", '[{"prompt": "a"},', "not valid JSON"),
    ("latin.jsonl", b'{"prompt": "\xe9"}\n', "not UTF-8"),
]


@pytest.mark.parametrize(("name", "content", "expected"), BAD_FILES)
def test_bad_file_is_named(tmp_path: Path, name: str, content: str | bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as error:
        write_prompts(None, tmp_path / "out.jsonl", files=[str(tmp_path / name)])
    assert name in one_line(error)
    assert expected in one_line(error)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("instances", [[{}], [], {}, ["odd"], [{"input": ""}]])
def test_instances_without_an_input_leave_the_instruction_alone(instances: Any) -> None:
    assert as_prompt({"instruction": "sort", "instances": instances}) == "sort"
    assert as_prompt({"instruction": "sort", "instances": [{"input": "2 1"}]}) == "sort\n2 1"


@pytest.mark.parametrize("name", ["nowhere.jsonl", "nowhere.json"])
def test_missing_file_is_named_and_not_looked_for_on_the_hub(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"^no file `{name}`"):
        write_prompts(None, tmp_path / "out.jsonl", files=[name])


def test_sources_are_joined_and_every_prompt_is_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashdraft.train.prompts.SOURCES", {"gsm8k/train": "gsm8k/train.jsonl"})
    data, out = tmp_path / "data", tmp_path / "out.jsonl"
    (data / "gsm8k").mkdir(parents=True)
    write_lines(data / "gsm8k/train.jsonl", [{"question": "a"}])
    first = write_lines(
        tmp_path / "a.jsonl",
        [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}, {"messages": TALK}],
    )
    second = write_lines(
        tmp_path / "b.jsonl", [{"messages": TALK[:2]}, {"conversations": SHARE}, {"prompt": "c"}]
    )
    assert write_prompts(data, out, files=[str(first), str(second)]) == 5
    assert {(row["source"], row["row"]) for row in read_jsonl(out)} == {
        *(("gsm8k/train", 0), (str(first), 0), (str(first), 1), (str(first), 3), (str(second), 2))
    }


# --- stage 1: the hub
#


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A `datasets` package that knows one set; returns the calls that it got."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(
        name: str, *config: str, split: str, trust_remote_code: bool | None = None
    ) -> list[Any]:
        assert trust_remote_code is False  # a set's own script never runs, and nobody is asked
        calls.append((name, *config, split))
        if name != "org/name":
            raise ValueError(f"Dataset '{name}' doesn't exist\non the Hub")
        return (
            [{"question": " "}] if split == "bad" else [{"question": f"q {split}"}, {"prompt": "p"}]
        )

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_hub_data_set_is_read_by_name_config_and_split(tmp_path: Path, hub: list[Any]) -> None:
    names = [
        "org/name",
        "org/name:val",
        "org/name:main:val2",
        "org/name:train[:10]",
        "org/name:main:train[1:2]",
    ]
    assert write_prompts(None, tmp_path / "out.jsonl", files=names) == 6
    splits = ("train", "val", "val2", "train[:10]", "train[1:2]")
    assert hub == [
        ("org/name", *(["main"] if "main" in name else []), split)
        for name, split in zip(names, splits, strict=True)
    ]
    found = {(row["source"], row["prompt"]) for row in read_jsonl(tmp_path / "out.jsonl")}
    assert found == {
        ("org/name", "p"),
        *((name, f"q {split}") for name, split in zip(names, splits, strict=True)),
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/other", "`org/other`: Dataset 'org/other' doesn't exist on the Hub"),
        (
            "org/name:bad",
            "`org/name:bad` holds no prompts: 1 row left out: org/name:bad, entry 1: the prompt is empty",
        ),
        ("set.csv", "no hub data set `set.csv`: "),
    ],
)
def test_hub_data_set_that_cannot_be_used_is_named(
    tmp_path: Path, hub: list[Any], name: str, expected: str
) -> None:
    with pytest.raises(DataError) as error:
        write_prompts(None, tmp_path / "out.jsonl", files=[name])
    assert expected in one_line(error)
    assert not list(tmp_path.iterdir())


def test_missing_datasets_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError) as error:
        write_prompts(None, tmp_path / "out.jsonl", files=["org/name"])
    assert "`org/name` is no .jsonl or .json file" in one_line(error)
    assert "hint: pip install datasets" in str(error.value)


EVALUATION = [
    *(
        "gsm8k/test.jsonl",
        "gsm8k_test.json",
        "openai/gsm8k:main:test",
        "gsm8k:test[:9]",
        "openai/openai_humaneval:test",
    ),
    *(
        "humaneval/HumanEval.jsonl",
        "evalplus/humanevalplus",
        "google-research-datasets/mbpp",
        "HuggingFaceH4/MATH-500:test",
    ),
    *(
        "math500.jsonl",
        "mt_bench/question.jsonl",
        "HuggingFaceH4/mt_bench_prompts",
        "spec_bench/question.jsonl",
    ),
    *(
        "hemingkx/Spec-Bench",
        "livecodebench/code_generation",
        "tatsu-lab/alpaca_eval",
        "HuggingFaceH4/aime_2024",
    ),
]
TRAINING = [
    "gsm8k/train.jsonl",
    "gsm8k/latest.jsonl",
    "mt_bench/runs/mine.jsonl",
    "math_5000.jsonl",
    "benchmark.jsonl",
]


@pytest.mark.parametrize("name", EVALUATION)
def test_evaluation_set_is_refused_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidParameter) as error:
        write_prompts(None, Path("out.jsonl"), files=[name])
    assert f"`{name}` is an evaluation set" in one_line(error)


def test_evaluation_set_is_refused_from_inside_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gsm8k").mkdir()
    write_lines(tmp_path / "gsm8k/test.jsonl", [{"question": "a"}])
    monkeypatch.chdir(tmp_path / "gsm8k")
    with pytest.raises(InvalidParameter, match="evaluation set"):
        write_prompts(None, Path("out.jsonl"), files=["test.jsonl"])


@pytest.mark.parametrize("name", TRAINING)
def test_training_set_of_a_like_name_is_taken(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    write_lines(tmp_path / name, [{"question": "a"}])
    assert write_prompts(None, tmp_path / "out.jsonl", files=[str(tmp_path / name)]) == 1


# --- stage 1: the command, and the share that thinks
# ---------------------------------------------------------------------


def test_thinking_is_drawn_by_seed_with_its_share(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "set.jsonl", [{"prompt": str(n)} for n in range(40)])
    drawn = {}
    for key, share, seed in (
        ("none", None, 0),
        ("a", 0.25, 0),
        ("again", 0.25, 0),
        ("other", 0.25, 1),
        ("all", 1.0, 0),
    ):
        write_prompts(None, tmp_path / "out.jsonl", files=[str(path)], thinking=share, seed=seed)
        drawn[key] = {
            row["prompt"]: row.get("thinking") for row in read_jsonl(tmp_path / "out.jsonl")
        }
    assert set(drawn["none"].values()) == {None}
    assert list(drawn["none"]) == list(drawn["a"])
    assert sum(drawn["a"].values()) == 10
    assert list(drawn["a"].values()).index(True) < list(drawn["a"].values()).index(False) + 10 < 39
    assert list(drawn["a"].values()) != sorted(drawn["a"].values(), reverse=True)
    assert drawn["a"] == drawn["again"] != drawn["other"]
    assert set(drawn["all"].values()) == {True}


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_share_outside_its_range_is_refused(tmp_path: Path, share: float) -> None:
    path = write_lines(tmp_path / "set.jsonl", [{"prompt": "a"}])
    with pytest.raises(InvalidParameter, match=r"^thinking is"):
        write_prompts(None, tmp_path / "out.jsonl", files=[str(path)], thinking=share)
    with pytest.raises(InvalidParameter, match=r"^greedy_share is"):
        mixed(SAMPLED, share)


def test_command_needs_a_source(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    hub: list[Any],
) -> None:
    """FLASHDRAFT_DATA counts only where nothing is named: the known sets do not slip in beside a
    user's own.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLASHDRAFT_DATA", raising=False)
    assert main(["prompts", "--out", "out.jsonl"]) == 1
    assert capsys.readouterr().err.startswith("error: no source of prompts\nhint: ")
    write_lines(tmp_path / "a.jsonl", [{"prompt": "a"}])
    monkeypatch.setenv("FLASHDRAFT_DATA", "nowhere")
    assert (
        main(["prompts", "a.jsonl", "org/name:val", "--out", "out.jsonl", "--thinking", "1"]) == 0
    )
    assert capsys.readouterr().out == "3 prompts in out.jsonl\n"
    assert all(row["thinking"] is True for row in read_jsonl(tmp_path / "out.jsonl"))
    for line in (
        ["prompts", "--out", "out2.jsonl"],
        ["prompts", "a.jsonl", "--data", "nowhere", "--out", "out2.jsonl"],
    ):
        assert main(line) == 1
        assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "out2.jsonl").exists()


# --- thinking, and what is a label
# ---------------------------------------------------------------------------------------


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


# --- a share of greedy answers
# -------------------------------------------------------------------------------------------


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


# --- answers from a server
# -----------------------------------------------------------------------------------------------

PARAMS = SamplingParams(max_new_tokens=12, temperature=0.7, top_p=0.9, seed=5)
Reply = Callable[[dict[str, Any]], tuple[int, Any]]


def completion(body: dict[str, Any], **message: Any) -> tuple[int, Any]:
    content = "to " + body["messages"][-1]["content"]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": content, **message},
        "finish_reason": "stop",
    }
    return 200, {"choices": [choice], "usage": {"completion_tokens": 7}}


class Api:
    """A server that keeps what it was asked and answers as it is told."""

    def __init__(self) -> None:
        self.reply: Reply = completion
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                api.bodies.append(body)
                api.headers.append((self.path, self.headers["Authorization"]))
                status, content = api.reply(body)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(
                    (content if isinstance(content, str) else json.dumps(content)).encode()
                )

            def log_message(self, *arguments: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def asked(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.bodies]


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    monkeypatch.setattr(stage._AGAIN, "backoff_factor", 0.0)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    api = Api()
    thread = threading.Thread(target=api.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield api
    api.http.shutdown()
    thread.join()
    api.http.server_close()


def test_server_answers_in_the_same_lines(
    tmp_path: Path, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    rows = [
        {"source": "s", "row": 0, "prompt": "a", "thinking": False},
        {"source": "s", "row": 1, "prompt": TALK},
    ]
    path, out = write_lines(tmp_path / "p.jsonl", rows), tmp_path / "answers.jsonl"
    server = Server(api.url + "/", "big", max_rows=2)
    assert (
        regenerate(
            server,
            path,
            out,
            params=replace(PARAMS, stop=("END",), presence_penalty=0.5),
            quiet=True,
        )
        == 2
    )
    answers = [
        row | {"response": f"to {text}", "finish": "stop", "num_tokens": 7}
        for row, text in zip(rows, "ac", strict=True)
    ]
    assert sorted(read_jsonl(out), key=lambda row: int(row["row"])) == answers
    assert set(api.headers) == {("/v1/chat/completions", "Bearer secret")}
    common = {
        "model": "big",
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 12,
        "stop": ["END"],
        "presence_penalty": 0.5,
    }
    assert sorted(api.bodies, key=lambda body: int(body["seed"])) == [
        common
        | {
            "seed": 5,
            "messages": [{"role": "user", "content": "a"}],
            "chat_template_kwargs": {"enable_thinking": False},
        },
        common | {"seed": 6, "messages": TALK},
    ]
    lm = language_model()
    tokens, num_prompt = encode(lm, answers[0])
    assert tokens[:num_prompt] == lm.encode("a", thinking=False)
    assert tokens[num_prompt:] == [*lm.tokenizer.encode("to a", add_special_tokens=False), EOS]


def test_greedy_share_goes_to_the_server(tmp_path: Path, api: Api) -> None:
    path = prompt_file(tmp_path, [str(n) for n in range(12)])
    regenerate(
        Server(api.url, "big", 3),
        path,
        tmp_path / "out.jsonl",
        params=mixed(PARAMS, 0.5),
        quiet=True,
    )
    assert {body["temperature"] for body in api.bodies} == {0.0, 0.7}
    assert {body["seed"] for body in api.bodies} == set(range(5, 17))
    assert all("stop" not in body and "chat_template_kwargs" not in body for body in api.bodies)
    assert {authorization for _, authorization in api.headers} == {None}


@pytest.mark.parametrize("status", [503, 429])
def test_busy_server_is_asked_again(tmp_path: Path, api: Api, status: int) -> None:
    path = prompt_file(tmp_path, "abc")
    api.reply = lambda body: completion(body) if len(api.bodies) > 1 else (status, "busy")
    assert (
        regenerate(
            Server(api.url, "big", 1), path, tmp_path / "out.jsonl", params=PARAMS, quiet=True
        )
        == 3
    )
    assert sorted(api.asked()) == ["a", "a", "b", "c"]


FAILURES: dict[str, tuple[Reply, str, int]] = {
    "always-500": (lambda body: (500, "out of\nmemory"), "500 out of memory", 4),
    "unknown-model": (lambda body: (404, {"error": "no model"}), '404 {"error": "no model"}', 1),
    "no-key": (lambda body: (401, "no key"), "401 no key", 1),
    "no-json": (lambda body: (200, "<html>"), "not a chat completion (JSONDecodeError", 1),
    "other-json": (lambda body: (200, {"choices": []}), "not a chat completion (IndexError", 1),
    "a-list": (lambda body: (200, []), "not a chat completion (TypeError", 1),
    "thoughts-apart": (
        lambda body: completion(body, reasoning_content="hm"),
        "without a reasoning parser",
        1,
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_server_that_fails_is_named_with_the_cause_and_finished_answers_are_kept(
    tmp_path: Path, api: Api, case: str
) -> None:
    failure, expected, count = FAILURES[case]
    path, out = prompt_file(tmp_path, "abcdefgh"), tmp_path / "out.jsonl"
    api.reply = lambda body: (
        failure(body) if body["messages"][-1]["content"] == "d" else completion(body)
    )
    with pytest.raises(FlashDraftError) as error:
        regenerate(Server(api.url, "big", 1), path, out, params=PARAMS, quiet=True)
    assert one_line(error).startswith(f"`{api.url}` gave no answer to {path}, line 4: ")
    assert expected in one_line(error)
    assert "`big`" in str(error.value)
    assert api.asked() == [*"abc", *"d" * count]  # nothing new is sent after it
    assert [row["prompt"] for row in read_jsonl(out)] == [*"abc"]
    api.reply, before = completion, len(api.bodies)
    assert regenerate(Server(api.url, "big", 2), path, out, params=PARAMS, quiet=True) == 5
    assert sorted(api.asked()[before:]) == [*"defgh"]


def test_answers_under_way_when_another_fails_are_kept(tmp_path: Path, api: Api) -> None:
    path, out = prompt_file(tmp_path, "abc"), tmp_path / "out.jsonl"
    under_way, failed = threading.Event(), threading.Event()

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        if body["messages"][-1]["content"] == "a":
            assert under_way.wait(10)
            failed.set()
            return 404, "no"
        under_way.set()
        assert failed.wait(10)
        return completion(body)

    api.reply = reply
    with pytest.raises(FlashDraftError, match="404 no"):
        regenerate(Server(api.url, "big", 2), path, out, params=PARAMS, quiet=True)
    assert "b" in {row["prompt"] for row in read_jsonl(out)}


def test_answers_of_a_server_are_written_as_they_end(tmp_path: Path, api: Api) -> None:
    path, out = prompt_file(tmp_path, "abcd"), tmp_path / "out.jsonl"
    written: list[int] = []

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        give_up = time.monotonic() + 5
        while len(written) == 3 and not out.exists() and time.monotonic() < give_up:
            time.sleep(0.01)  # the answers before are being written
        written.append(out.read_bytes().count(b"\n") if out.exists() else 0)
        return completion(body)

    api.reply = reply
    regenerate(Server(api.url, "big", 1), path, out, params=PARAMS, quiet=True)
    assert written[-1] > 0


def test_dead_port_is_named_after_its_retries(
    tmp_path: Path, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(stage._AGAIN, "backoff_factor", 0.1)
    monkeypatch.setattr("time.sleep", pauses.append)
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}/v1"
    path, out = prompt_file(tmp_path, "ab"), tmp_path / "out.jsonl"
    with pytest.raises(FlashDraftError) as error:
        regenerate(Server(url, "big", 1), path, out, params=PARAMS, quiet=True)
    assert f"`{url}` gave no answer" in one_line(error)
    assert "refused" in one_line(error)
    assert pauses == [0.2, 0.4]
    assert [left.name for left in tmp_path.iterdir()] == [path.name]


LEFT_OUT: dict[str, tuple[Reply, str]] = {
    "context": (
        lambda body: (400, {"error": {"message": "This model's maximum context length is 4096"}}),
        "400",
    ),
    "roles": (lambda body: (400, "roles must alternate"), "400 roles must alternate"),
    "too-large": (lambda body: (413, "entity too large"), "413 entity too large"),
    "unprocessable": (lambda body: (422, {"detail": "no"}), "422"),
    "no-text": (lambda body: completion(body, content=None), "finish_reason 'stop'"),
    "calls-a-tool": (
        lambda body: completion(body, content=None, tool_calls=[{"id": "1"}]),
        "no text for it",
    ),
    "half-a-character": (lambda body: completion(body, content="\ud800"), "half a character"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_prompt_that_a_server_refuses_is_left_out_and_named(
    tmp_path: Path, api: Api, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    refusal, expected = LEFT_OUT[case]
    path, out = prompt_file(tmp_path, "abc"), tmp_path / "out.jsonl"
    api.reply = lambda body: (
        refusal(body) if body["messages"][0]["content"] == "b" else completion(body)
    )
    for new in (2, 0):
        assert regenerate(Server(api.url, "big", 2), path, out, params=PARAMS, quiet=True) == new
        told = capsys.readouterr().err
        assert told.startswith(f"1 prompt left out: {path}, line 2: ")
        assert expected in told
    assert {row["prompt"] for row in read_jsonl(out)} == {"a", "c"}
    api.reply = refusal
    with pytest.raises(DataError, match="no prompt could be answered: 3 prompts left out"):
        regenerate(
            Server(api.url, "big", 2), path, tmp_path / "none.jsonl", params=PARAMS, quiet=True
        )


@pytest.mark.parametrize("finish", ["content_filter", "tool_calls"])
def test_text_that_a_filter_or_a_call_cut_is_no_answer(
    tmp_path: Path, api: Api, finish: str
) -> None:
    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        status, content = completion(body)
        content["choices"][0]["finish_reason"] = (
            finish if body["messages"][0]["content"] == "b" else "stop"
        )
        return status, content

    api.reply = reply
    assert (
        regenerate(
            Server(api.url, "big", 2),
            prompt_file(tmp_path, "abc"),
            tmp_path / "o",
            params=PARAMS,
            quiet=True,
        )
        == 2
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", 5),
        ("min_p", 0.1),
        ("ignore_eos", True),
        ("repetition_penalty", 1.2),
        ("logit_bias", {3: 1.0}),
        ("logprobs", True),
    ],
)
def test_sampling_that_the_api_has_not_is_refused(
    tmp_path: Path, api: Api, name: str, value: Any
) -> None:
    params = replace(PARAMS, **{name: value})
    with pytest.raises(InvalidParameter, match=f"^{name} is set"):
        regenerate(
            Server(api.url, "big", 2),
            prompt_file(tmp_path, "ab"),
            tmp_path / "out.jsonl",
            params=params,
            quiet=True,
        )
    assert api.bodies == []


@pytest.mark.parametrize("url", ["localhost:8000/v1", "file:///etc", ""])
def test_url_of_no_web_server_is_refused(url: str) -> None:
    with pytest.raises(InvalidParameter, match=r"^url is"):
        Server(url, "big", 1)


def test_server_keeps_no_features(tmp_path: Path, api: Api) -> None:
    shards = ShardWriter(language_model(), tmp_path / "kept", layers=(1,), max_length=64)
    server, path = Server(api.url, "big", 1), prompt_file(tmp_path, "a")
    with pytest.raises(InvalidParameter, match="no features to keep"):
        regenerate(server, path, tmp_path / "out.jsonl", params=PARAMS, shards=shards, quiet=True)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:99999/v1", "http://127.0.0.1:x/v1", "http:///v1"]
)
def test_url_that_cannot_be_reached_is_named(tmp_path: Path, api: Api, url: str) -> None:
    with pytest.raises(FlashDraftError) as error:
        regenerate(
            Server(url, "big", 1),
            prompt_file(tmp_path, "a"),
            tmp_path / "out.jsonl",
            params=PARAMS,
            quiet=True,
        )
    assert url in one_line(error)


def test_command_asks_a_server_and_loads_no_target(
    tmp_path: Path, api: Api, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loaded(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a target was loaded")

    monkeypatch.setattr(cli_options, "load", loaded)
    monkeypatch.chdir(tmp_path)
    prompt_file(tmp_path, "abc")
    line = ["regenerate", "prompts.jsonl", "--out", "out.jsonl", "--url", api.url]
    model = ["--model", "big", "--temperature", "0.5"]
    assert main([*line, *model, "--limit", "2", "--greedy-share", "1", "--max-rows", "2"]) == 0
    assert capsys.readouterr().out == "2 new answers in out.jsonl\n"
    assert {body["temperature"] for body in api.bodies} == {0.0}
    refused = [
        (["--keep-features", "kept"], "keep_features"),
        (["--soft-labels"], "soft_labels"),
        (["--target", "gpt2"], "target"),
        (["--draft", "prompt_lookup"], "draft"),
        (["--block-size", "4"], "block_size"),
        (["--dtype", "float32"], "dtype"),
        (["--max-rows", "0"], "max_rows"),
        (["--greedy-share", "2"], "greedy_share"),
    ]
    for words, name in refused:
        assert main([*line, *model, *words]) == 1
        assert capsys.readouterr().err.startswith(f"error: {name} is ")
    for words in (line, [*line[:4], *model]):
        assert main(words) == 1
        assert capsys.readouterr().err.startswith("error: --url and --model go together\nhint: ")
    assert len(api.bodies) == 2
    assert {path.name for path in tmp_path.iterdir()} == {
        "prompts.jsonl",
        "out.jsonl",
        "out.jsonl.run.json",
    }


def test_command_mixes_greedy_answers_and_keeps_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_target(tmp_path / "target")
    monkeypatch.setattr(stage, "SHARD", 2)
    monkeypatch.chdir(tmp_path)
    prompt_file(tmp_path, ["a", "b"])
    options = "--target target --max-new-tokens 8 --temperature 1 --keep-features kept --num-features 1 --max-length 32"
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


# --- prompts that are measured
# -------------------------------------------------------------------------------------------


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


def test_folder_is_no_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError) as error:
        write_prompts(None, tmp_path / "out.jsonl", files=[str(tmp_path)])
    assert error.value.args[0] == f"`{tmp_path}` is a folder"
    assert error.value.hint == "name the .jsonl or .json files in it"
