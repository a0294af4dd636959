"""Prompts of any source: rows of every form, files, data sets on the hub. Evaluation sets are
refused, and a bad line is left out and named.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toy_prompts import NO_USER, SAMPLED, SYSTEM, TALK, one_line, write_lines

from flashdraft.cli import main
from flashdraft.errors import DataError, InvalidParameter
from flashdraft.train.prompts import as_prompt, read_jsonl, write_prompts
from flashdraft.train.regenerate import mixed

# The forms of a row.

SHARE = [
    {"from": "human", "value": "a"},
    {"from": "gpt", "value": "b"},
    {"from": "user", "value": "c"},
]
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
        f"10 rows left out: {first}, line 2: the prompt is empty; "
        f"{first}, line 3: `prompt` is no text; "
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


# The hub.


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
            "`org/name:bad` holds no prompts: 1 row left out: "
            "org/name:bad, entry 1: the prompt is empty",
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


# The command, and the share that thinks.


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


def test_folder_is_no_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError) as error:
        write_prompts(None, tmp_path / "out.jsonl", files=[str(tmp_path)])
    assert error.value.args[0] == f"`{tmp_path}` is a folder"
    assert error.value.hint == "name the .jsonl or .json files in it"
