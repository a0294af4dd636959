"""The benchmark's prompts: fixed entries of the evaluation sets, from a folder or the hub."""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flashdraft.bench import tasks
from flashdraft.bench.tasks import TASKS, read_ids, read_prompts, write_tasks
from flashdraft.errors import DataError, InvalidParameter
from flashdraft.train.prompts import MATHS_SUFFIX

IDS = Path(__file__).parent.parent / "recipes" / "bench_ids.json"
THREE = ("gsm8k", "humaneval", "mt_bench")


def test_committed_ids_are_the_drawn_ones() -> None:
    sizes = {
        "gsm8k": 1319,
        "math500": 500,
        "humaneval": 164,
        "mbpp": 427,
        "mt_bench": 80,
        "alpaca": 805,
    }
    sizes |= {
        f"spec_bench/{kind}": 80
        for kind in ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag")
    }
    assert read_ids(IDS) == {
        task: random.Random(0).sample(range(size), 40) for task, size in sizes.items()
    }
    assert list(sizes) == list(TASKS)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    rows: dict[str, list[Any]] = {
        "gsm8k/test.jsonl": [{"question": "1 + 1?"}, {"question": "2 + 2?"}],
        "math500/math500.jsonl": [{"problem": "Find $x$ in ${x}$.", "level": 2}],
        "humaneval/HumanEval.jsonl.gz": [{"prompt": "def f():\n"}, {"prompt": "def g():\n"}],
        "mbpp/sanitized-mbpp.json": [
            {"prompt": "Add.", "test_list": ["assert f(1) == 2", "assert f(2) == 3"], "task_id": 1}
        ],
        "mt_bench/question.jsonl": [
            {"turns": ["Write.", "Again."], "category": "writing"},
            {"turns": ["Say.", "Why?"]},
        ],
        "alpaca_eval/alpaca_eval.json": [{"instruction": "Name a colour.", "output": "Red."}],
        "spec_bench/question.jsonl": [
            {"turns": ["Write.", "Again."], "category": "coding"},
            {"turns": ["Translate: ja"], "category": "translation"},
            {"turns": ["Who?"], "category": "qa"},
            {"turns": ["Translate: nein"], "category": "translation"},
        ],
    }
    for name, entries in rows.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        text = (
            json.dumps(entries)
            if name.endswith(".json")
            else "".join(json.dumps(row) + "\n" for row in entries)
        )
        (folder / name).write_bytes(
            gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
        )
    return folder


def test_tasks_are_written_in_the_order_of_their_ids(data: Path, tmp_path: Path) -> None:
    ids = {"gsm8k": [1, 0], "humaneval": [0, 1], "mt_bench": [1, 0]}
    assert write_tasks(data, tmp_path / "deep/all.jsonl", ids, tasks=THREE) == 6
    prompts = read_prompts(tmp_path / "deep/all.jsonl")
    assert [prompt.task for prompt in prompts] == [
        "gsm8k",
        "gsm8k",
        "humaneval",
        "humaneval",
        "mt_bench",
        "mt_bench",
    ]
    assert prompts[0].text == "2 + 2?" + MATHS_SUFFIX
    assert prompts[2].text == "Complete this Python function:\n```python\ndef f():\n```"
    assert [prompt.turns for prompt in prompts[4:]] == [("Say.", "Why?"), ("Write.", "Again.")]
    assert write_tasks(data, tmp_path / "first.jsonl", ids, tasks=THREE, first=1) == 3
    assert [prompt.text for prompt in read_prompts(tmp_path / "first.jsonl")] == [
        prompt.text for prompt in prompts[::2]
    ]


def test_every_set_asks_in_its_own_form(data: Path, tmp_path: Path) -> None:
    ids = {"math500": [0], "mbpp": [0], "alpaca": [0]}
    write_tasks(data, tmp_path / "all.jsonl", ids, tasks=list(ids))
    maths, code, chat = (prompt.text for prompt in read_prompts(tmp_path / "all.jsonl"))
    assert maths == "Find $x$ in ${x}$." + MATHS_SUFFIX
    assert code == (
        "Add.\nYour code should pass these tests:\n"
        "```python\nassert f(1) == 2\nassert f(2) == 3\n```"
    )
    assert chat == "Name a colour."


def test_spec_bench_is_six_tasks_by_category(data: Path, tmp_path: Path) -> None:
    ids = {task: [0] for task in TASKS} | {"spec_bench/translation": [1, 0]}
    with pytest.raises(
        DataError, match="spec_bench/summarization has no entry 0, only 0"
    ):  # all six were asked for
        write_tasks(data, tmp_path / "all.jsonl", ids, tasks=["spec_bench"])
    names = ["spec_bench/qa", "spec_bench/mt_bench", "spec_bench/translation"]
    write_tasks(data, tmp_path / "all.jsonl", ids, tasks=names)
    found = [
        (prompt.task.split("/")[1], prompt.turns) for prompt in read_prompts(tmp_path / "all.jsonl")
    ]
    talk, translated = (
        ("mt_bench", ("Write.", "Again.")),
        [("Translate: nein",), ("Translate: ja",)],
    )
    assert found == [talk, *(("translation", turns) for turns in translated), ("qa", ("Who?",))]
    with pytest.raises(InvalidParameter, match="no task 'spec'"):
        write_tasks(data, tmp_path / "all.jsonl", ids, tasks=["spec"])


@pytest.mark.parametrize(
    ("ids", "first", "message"),
    [
        ({"gsm8k": [2], "humaneval": [0], "mt_bench": [0]}, None, "no entry 2"),
        ({"gsm8k": [0], "humaneval": [-1], "mt_bench": [0]}, None, "no entry -1"),
        ({"gsm8k": [0], "humaneval": [0], "mt_bench": [0]}, 0, "first is 0"),
        ({"gsm8k": [0], "humaneval": [0]}, None, "no entry numbers for mt_bench"),
    ],
)
def test_wrong_ids_write_nothing(
    data: Path, tmp_path: Path, ids: dict[str, list[int]], first: int | None, message: str
) -> None:
    with pytest.raises((DataError, InvalidParameter), match=message):
        write_tasks(data, tmp_path / "out.jsonl", ids, tasks=THREE, first=first)
    assert not (tmp_path / "out.jsonl").exists()


def test_without_a_folder_the_sets_come_from_the_hub(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = ModuleType("datasets")
    asked = []

    def load_dataset(name: str, *config: str, split: str, trust_remote_code: bool) -> Any:
        asked.append((name, *config, split))
        return [
            {"question": "3 + 3?", "prompt": ["Hub.", "Twice."]}
        ]  # the hub's MT-Bench calls its turns `prompt`

    monkeypatch.setattr(hub, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    fetched = data / "alpaca_eval/alpaca_eval.json"
    monkeypatch.setattr(
        tasks,
        "hf_hub_download",
        lambda repo, file, repo_type: asked.append((repo, file)) or str(fetched),
    )
    ids = {"gsm8k": [0], "mt_bench": [0], "alpaca": [0]}
    write_tasks(None, tmp_path / "hub.jsonl", ids, tasks=list(ids))
    assert [prompt.turns for prompt in read_prompts(tmp_path / "hub.jsonl")] == [
        ("3 + 3?" + MATHS_SUFFIX,), ("Hub.", "Twice."), ("Name a colour.",)
    ]  # fmt: skip
    assert asked[:2] == [
        ("openai/gsm8k", "main", "test"),
        ("HuggingFaceH4/mt_bench_prompts", "train"),
    ]
    assert asked[2:] == [("tatsu-lab/alpaca_eval", "alpaca_eval.json")]


def test_a_set_that_cannot_be_had_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no way out")

    monkeypatch.setattr(tasks, "hf_hub_download", offline)
    ids = {task: [0] for task in TASKS}
    for task, message in (("spec_bench/qa", "no set for spec_bench/qa"), ("alpaca", "no way out")):
        with pytest.raises(DataError, match=message):
            write_tasks(None, tmp_path / "out.jsonl", ids, tasks=[task])
    with pytest.raises(DataError, match=r"math500\.jsonl"):
        write_tasks(tmp_path, tmp_path / "out.jsonl", ids, tasks=["math500"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('["Name a colour."]', "entry 0 is no JSON object"),
        ('[{"text": "?"}]', r"entry 0 of alpaca cannot be asked: KeyError"),
    ],
)
def test_a_damaged_set_is_named(tmp_path: Path, rows: str, message: str) -> None:
    (tmp_path / "alpaca_eval").mkdir()
    (tmp_path / "alpaca_eval/alpaca_eval.json").write_text(rows)
    with pytest.raises(DataError, match=message):
        write_tasks(tmp_path, tmp_path / "out.jsonl", {"alpaca": [0]}, tasks=["alpaca"])


@pytest.mark.parametrize(
    "line", ['{"turns": []}', '{"turns": ["a", " "]}', '{"prompt": 3}', '{"turns": "ab"}']
)
def test_a_line_that_asks_nothing_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "p.jsonl").write_text(line)
    with pytest.raises(DataError, match="line 1: no text"):
        read_prompts(tmp_path / "p.jsonl")


def test_prompts_of_other_forms_are_asked_whole(tmp_path: Path) -> None:
    """What `flashdraft prompts` writes or takes may be measured: a conversation with what was said
    before, a system prompt.
    """
    user, said = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    rows: list[dict[str, Any]] = [
        {"source": "s", "row": 0, "prompt": [user, said, {"role": "user", "content": "c"}]},
        {"system": "be short", "question": "a"},
        {"messages": [user, said]},
        {"turns": ["a", "c"]},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = read_prompts(tmp_path / "p.jsonl")
    assert [prompt.asked for prompt in prompts] == [
        [user, said, {"role": "user", "content": "c"}],
        [{"role": "system", "content": "be short"}, user],
        "a",
        "a",
    ]
    assert [len(prompt.turns) for prompt in prompts] == [1, 1, 1, 2]
    assert prompts[1].place == f"{tmp_path / 'p.jsonl'}, line 2"
