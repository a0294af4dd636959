"""What training reads: prompts of known sets, the target's own answers, features. A stage that was
stopped goes on as if it had not been.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from toy_pipeline import ANSWER, CONFIG, PROMPTS, written_answers, written_features, written_prompts
from toy_training import HIDDEN, LAYERS, language_model, one_line_and_hint, write_lines

from flashdraft import files, growing
from flashdraft.errors import DataError, FlashDraftError, InvalidParameter
from flashdraft.train import features as features_stage
from flashdraft.train import regenerate as stage
from flashdraft.train.batch import make_batch
from flashdraft.train.features import FeatureSet, write_features
from flashdraft.train.prompts import SOURCES, read_jsonl, write_prompts
from flashdraft.train.regenerate import regenerate


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_prompts(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, prompts: Path) -> Path:
    return written_answers(tmp_path_factory.mktemp("answers"), prompts)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, answers: Path) -> FeatureSet:
    return written_features(tmp_path_factory.mktemp("features"), answers)


# Stage 1: prompts.


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """A data folder with two entries of every training set, one of them twice."""
    folder = tmp_path / "data"
    for source, name in SOURCES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, Any]] = [
            {"question": f"{source} {n}", "instruction": f"{source} {n}", "input": ""}
            for n in range(2)
        ]
        if name.endswith(".json"):
            path.write_text(json.dumps([*rows, rows[0]]))
        else:
            write_lines(path, [*rows, rows[0]])
    return folder


def test_prompts_are_written_once_each_in_a_seeded_order(tmp_path: Path, sets: Path) -> None:
    out = tmp_path / "out" / "prompts.jsonl"
    assert write_prompts(sets, out) == 10
    rows = list(read_jsonl(out))
    assert {(row["source"], row["row"]) for row in rows} == {
        (source, n) for source in SOURCES for n in range(2)
    }
    assert len({row["prompt"] for row in rows}) == 10
    first = out.read_bytes()
    write_prompts(sets, out)
    assert out.read_bytes() == first
    write_prompts(sets, out, seed=1)
    assert out.read_bytes() != first
    assert sorted(out.read_bytes().split(b"\n")) == sorted(first.split(b"\n"))


@pytest.mark.parametrize(
    "name", ["gsm8k/test.jsonl", "openai_humaneval:test", "mt_bench", "alpaca_eval"]
)
def test_evaluation_sets_are_refused_by_name(tmp_path: Path, sets: Path, name: str) -> None:
    with pytest.raises(InvalidParameter) as error:
        write_prompts(sets, tmp_path / "out.jsonl", files=[name])
    assert name in one_line_and_hint(error)
    assert "evaluation sets are not trained on" in str(error.value)
    assert not (tmp_path / "out.jsonl").exists()


BAD_SETS = {
    "broken line": (
        "gsm8k/train.jsonl",
        '{"question": "a"}\n{"question": \n',
        "train.jsonl, line 2: not valid JSON",
    ),
    "not an object": (
        "gsm8k/train.jsonl",
        '{"question": "a"}\n\n[1]\n',
        "train.jsonl, line 3: not a JSON object",
    ),
    "another field": (
        "gsm8k/train.jsonl",
        '{"question": "a"}\n{"asked": "b"}\n',
        "train.jsonl, line 2: none of the fields",
    ),
    "list of others": (
        "gpteacher/codegen-instruct.json",
        '[{"instruction": "a"}, "b"]',
        "codegen-instruct.json, entry 2: ",
    ),
}


@pytest.mark.parametrize("case", BAD_SETS)
def test_row_of_a_known_set_that_cannot_be_used_is_named_with_its_line(
    tmp_path: Path, sets: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    name, content, expected = BAD_SETS[case]
    (sets / name).write_text(content)
    assert write_prompts(sets, tmp_path / "out.jsonl") == 9
    told = capsys.readouterr().err
    assert told.startswith("1 row left out: ")
    assert expected in told


def test_damaged_set_is_named(tmp_path: Path, sets: Path) -> None:
    (sets / "gpteacher/codegen-instruct.json").write_text('[{"instruction": "a"},')
    with pytest.raises(DataError) as error:
        write_prompts(sets, tmp_path / "out.jsonl")
    assert "codegen-instruct.json: not valid JSON" in one_line_and_hint(error)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("source", SOURCES)
def test_missing_set_is_named(tmp_path: Path, sets: Path, source: str) -> None:
    (sets / SOURCES[source]).unlink()
    with pytest.raises(DataError) as error:
        write_prompts(sets, tmp_path / "out.jsonl")
    assert SOURCES[source] in one_line_and_hint(error)


# Stage 2: the target's own answers.

SAMPLED = replace(ANSWER, temperature=1.0, seed=3)


def sorted_lines(path: Path) -> list[str]:
    return sorted(path.read_text().splitlines())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, prompts: Path) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "answers.jsonl"
    regenerate(language_model(torch.float64), prompts, out, params=SAMPLED, quiet=True)
    return out


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.55, 0.97])
def test_regenerate_resumes_after_a_torn_last_line(
    tmp_path: Path, prompts: Path, undisturbed: Path, share: float
) -> None:
    whole, out = undisturbed.read_bytes(), tmp_path / "answers.jsonl"
    out.write_bytes(whole[: int(share * len(whole))])
    kept = out.read_bytes().count(b"\n")
    assert share == 0 or not out.read_bytes().endswith(b"\n")
    count = regenerate(language_model(torch.float64), prompts, out, params=SAMPLED, quiet=True)
    assert count == len(PROMPTS) - kept
    assert sorted_lines(out) == sorted_lines(undisturbed)
    assert regenerate(language_model(torch.float64), prompts, out, params=SAMPLED, quiet=True) == 0


def test_torn_line_that_is_kept_is_caught(
    tmp_path: Path, prompts: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growing, "_is_json", lambda text: True)
    whole, out = undisturbed.read_bytes(), tmp_path / "answers.jsonl"
    out.write_bytes(whole[: int(0.55 * len(whole))])
    with pytest.raises(FlashDraftError, match=r"line \d: not valid JSON"):
        regenerate(language_model(torch.float64), prompts, out, params=SAMPLED, quiet=True)


def test_answers_are_written_as_they_end(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill in the middle loses only what was not finished."""
    lm, out, feed = language_model(), tmp_path / "answers.jsonl", stage.feed
    lm.max_rows = 2

    def killed(*args: Any, **kwargs: Any) -> Iterator[Any]:
        finished = 0
        for chunk in feed(*args, **kwargs):
            yield chunk
            finished += chunk.result is not None
            if finished == 3:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, "feed", killed)
        with pytest.raises(KeyboardInterrupt):
            regenerate(lm, prompts, out, params=ANSWER, quiet=True)
    assert len(sorted_lines(out)) == 3
    assert regenerate(lm, prompts, out, params=ANSWER, quiet=True) == len(PROMPTS) - 3


def test_answers_are_the_models_own(answers: Path, prompts: Path) -> None:
    rows, lm = list(read_jsonl(answers)), language_model()
    assert {row["prompt"] for row in rows} == set(PROMPTS)
    for row in rows[:3]:
        result = lm.generate(row["prompt"], ANSWER)
        assert row == {
            **{"source": "toy", "row": PROMPTS.index(row["prompt"]), "prompt": row["prompt"]},
            **{
                "response": result.text,
                "finish": "length",
                "num_tokens": 24,
                "tokens": list(result.tokens),
            },
        }


def test_sampled_answers_differ_by_prompt_number_and_seed(
    tmp_path: Path, undisturbed: Path
) -> None:
    same = [{"source": "toy", "row": n, "prompt": "why?"} for n in range(3)]
    path, texts = write_lines(tmp_path / "prompts.jsonl", same), set()
    for seed in (0, 100):
        out = tmp_path / f"answers{seed}.jsonl"
        regenerate(language_model(), path, out, params=replace(SAMPLED, seed=seed), quiet=True)
        texts |= {row["response"] for row in read_jsonl(out)}
    assert len(texts) == 6


def test_prompt_beyond_the_context_is_left_out_and_limit_counts(tmp_path: Path) -> None:
    rows = [
        {"source": "toy", "row": n, "prompt": prompt}
        for n, prompt in enumerate(("a", "x" * 250, "b", "c"))
    ]
    path, out = write_lines(tmp_path / "prompts.jsonl", rows), tmp_path / "answers.jsonl"
    assert regenerate(language_model(), path, out, params=ANSWER, limit=3, quiet=True) == 2
    assert {row["row"] for row in read_jsonl(out)} == {0, 2}


@pytest.mark.parametrize("line", ['{"prompt": "a"}', '{"source": "s", "row": 1}', "[]", "{"])
def test_prompt_file_of_another_form_is_named_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    """A line is left out; a file of such lines is refused."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"source": "s", "row": 0, "prompt": "a"}\n' + line + "\n")
    assert (
        regenerate(language_model(), path, tmp_path / "answers.jsonl", params=ANSWER, quiet=True)
        == 1
    )
    assert "prompts.jsonl, line 2: " in capsys.readouterr().err
    path.write_text(line)
    with pytest.raises(DataError) as error:
        regenerate(language_model(), path, tmp_path / "none.jsonl", params=ANSWER, quiet=True)
    assert "prompts.jsonl" in one_line_and_hint(error)


# Stage 3: features.


def test_features_are_the_targets_hidden_states(tmp_path: Path, answers: Path) -> None:
    """Checked against transformers itself: the output of layer i is hidden_states[i + 1]; one layer
    off is caught.
    """
    lm, model = language_model(torch.float64), tiny_model("llama")
    write_features(lm, [answers], tmp_path, layers=LAYERS, max_length=128, quiet=True)
    data = FeatureSet(tmp_path)
    assert (data.layers, data.hidden_size, data.target, len(data)) == (
        LAYERS,
        HIDDEN,
        "llama",
        len(PROMPTS),
    )
    texts = {
        tuple(lm.encode(row["prompt"]) + row["tokens"]): len(lm.encode(row["prompt"]))
        for row in read_jsonl(answers)
    }
    for sample in (data[i] for i in range(len(data))):
        assert sample.num_prompt == texts[tuple(sample.tokens.tolist())]
        with torch.no_grad():
            hidden = model(sample.tokens[None], output_hidden_states=True).hidden_states
        theirs = [torch.cat([hidden[i + off][0] for i in LAYERS], -1) for off in (0, 1, 2)]
        half_a_bit = {"rtol": 2**-8, "atol": 1e-3}  # of bfloat16's eight
        assert [torch.allclose(sample.features.double(), one, **half_a_bit) for one in theirs] == [
            False,
            True,
            False,
        ]
        _, own = lm.target.prefill(lm.target.new_cache(1, 64), 0, sample.tokens, LAYERS)
        assert own is not None
        assert torch.equal(sample.features, own.bfloat16())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_features_resume_and_make_nothing_twice(
    tmp_path: Path, answers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_stage, "SHARD", 3)
    lm, made = language_model(), []

    def write(folder: str, stop_at: int = 99) -> int:
        real = files.save_file

        def save(tensors: Any, path: Any, metadata: Any = None) -> None:
            if len(made) == stop_at:
                Path(path).write_bytes(b"half")
                raise KeyboardInterrupt
            made.append(path)
            real(tensors, path, metadata=metadata)

        with monkeypatch.context() as patch:
            patch.setattr(files, "save_file", save)
            return write_features(
                lm, [answers], tmp_path / folder, layers=LAYERS, max_length=128, quiet=True
            )

    assert write("whole") == 3
    made.clear()
    with pytest.raises(KeyboardInterrupt):
        write("stopped", stop_at=2)
    assert len(FeatureSet(tmp_path / "stopped")) == 6
    assert write("stopped") == 3
    assert len(made) == 3
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_more_answers_do_not_count_the_first_ones_twice(
    tmp_path: Path, answers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_stage, "SHARD", 3)
    lines, growing, lm = (
        answers.read_text().splitlines(keepends=True),
        tmp_path / "growing.jsonl",
        language_model(),
    )
    for count in (4, 8, 8):
        growing.write_text("".join(lines[:count]))
        write_features(
            lm, [growing], tmp_path / "features", layers=LAYERS, max_length=128, quiet=True
        )
        data = FeatureSet(tmp_path / "features")
        assert len({tuple(data[i].tokens.tolist()) for i in range(len(data))}) == len(data) == count


def test_features_of_another_kind_are_refused(tmp_path: Path, answers: Path) -> None:
    lm = language_model()
    write_features(lm, [answers], tmp_path, layers=LAYERS, max_length=128, quiet=True)
    before = contents(tmp_path)
    for layers, max_length in (((0, 1), 128), (LAYERS, 64)):
        with pytest.raises(DataError) as error:
            write_features(
                lm, [answers], tmp_path, layers=layers, max_length=max_length, quiet=True
            )
        assert "holds features of another kind" in one_line_and_hint(error)
    assert contents(tmp_path) == before


def test_long_answers_are_cut(tmp_path: Path, answers: Path) -> None:
    lm = language_model()
    write_features(lm, [answers], tmp_path, layers=LAYERS, max_length=14, quiet=True)
    data = FeatureSet(tmp_path)
    lengths = {len(data[i].tokens) for i in range(len(data))}
    assert lengths == {14}
    assert any(data[i].num_prompt > 14 for i in range(len(data)))
    make_batch(((i, data[i]) for i in range(len(data))), CONFIG, 4, 0)


@pytest.mark.parametrize(
    "read", [lambda data: data[0], lambda data: data.answer_tokens(0)], ids=["sample", "tokens"]
)
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_shard_is_named(
    tmp_path: Path, answers: Path, damage: str, read: Callable[[FeatureSet], Any]
) -> None:
    write_features(language_model(), [answers], tmp_path, layers=LAYERS, max_length=128, quiet=True)
    data, (shard,) = FeatureSet(tmp_path), tmp_path.glob("*.safetensors")
    read(data)
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        shard.unlink()
    with pytest.raises(DataError) as error:
        read(data)
    assert shard.name in one_line_and_hint(error)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"layers": [1]}'])
def test_damaged_manifest_is_named(tmp_path: Path, answers: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    for read in (
        FeatureSet,
        lambda out: write_features(
            language_model(), [answers], out, layers=LAYERS, max_length=9, quiet=True
        ),
    ):
        with pytest.raises(DataError) as error:
            read(tmp_path)
        assert "manifest.json` cannot be read" in one_line_and_hint(error)


def test_answers_in_the_place_of_features_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        FeatureSet(write_lines(tmp_path / "answers.jsonl", []))
    assert "is a file, not a folder of features" in one_line_and_hint(error)
    assert "`train --online`" in str(error.value.hint)  # the doctor reads features, too


def test_folder_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        FeatureSet(tmp_path)
    assert "holds no manifest.json" in one_line_and_hint(error)
    empty = write_lines(tmp_path / "empty.jsonl", [])
    write_features(
        language_model(), [empty], tmp_path / "out", layers=LAYERS, max_length=9, quiet=True
    )
    with pytest.raises(DataError) as error:
        FeatureSet(tmp_path / "out")
    assert "holds no samples" in one_line_and_hint(error)
