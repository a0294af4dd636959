"""Training with numbers that are none, on a full disk or with bad data: nothing finished is lost,
and the cause is named in one line.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MASK, VOCAB
from safetensors import SafetensorError
from toy_runs import (
    HELD_OUT,
    SIZES,
    TRAIN,
    VARIANTS,
    Run,
    command_line,
    cut_short,
    features_of,
    files_of,
    furnished,
    in_step,
    left,
    measure_briefly,
    metrics,
    new_trainer,
    random_answers,
    same_end,
    weights,
)
from toy_training import language_model

from flashdraft import files
from flashdraft.errors import FlashDraftError
from flashdraft.train import config as config_module
from flashdraft.train.config import last_checkpoint
from flashdraft.train.features import FeatureSet, Sample, write_features
from flashdraft.train.initialise import draft_config, random_weights
from flashdraft.train.trainer import Trainer


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_answers(tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, answers: Path) -> FeatureSet:
    return features_of(answers, tmp_path_factory.mktemp("features"))


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_briefly(monkeypatch)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, answers: Path) -> Path:
    return furnished(tmp_path_factory.mktemp("shop"), answers)


@pytest.fixture
def run(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    return command_line(shop, tmp_path, monkeypatch, capsys)


# Numbers that are none.


class Poisoned(FeatureSet):
    """One sample's features are no numbers."""

    poisoned = 5

    def __getitem__(self, i: int) -> Sample:
        sample = super().__getitem__(i)
        return (
            replace(sample, features=sample.features * math.nan) if i == self.poisoned else sample
        )


@pytest.mark.parametrize("variant", ["plain", "accumulate", "swiglu", "dpace"])
def test_loss_that_is_no_number_names_its_step_and_only_its_sample(
    tmp_path: Path, data: FeatureSet, variant: str
) -> None:
    trainer = new_trainer(
        Poisoned(data.folder), tmp_path, save_every=1, seed=0, **VARIANTS[variant]
    )
    step = next(n for n in itertools.count() if trainer._place(n) == Poisoned.poisoned) // 4
    kept: dict[str, bytes] = {}
    in_step(trainer, step, lambda: kept.update(files_of(tmp_path)))
    with pytest.raises(FlashDraftError) as error:
        trainer.run(HELD_OUT, quiet=True)
    message, hint = str(error.value).split("\n")
    assert (
        f"the loss is nan at step {step}, in sample {data.index[Poisoned.poisoned][1]} of "
        in message
    )
    assert message.count("sample") == 1
    assert hint.startswith("hint: look at that data")
    after = files_of(tmp_path)
    assert {name: after[name] for name in kept if "tensorboard" not in name} == {
        name: content for name, content in kept.items() if "tensorboard" not in name
    }
    assert not [name for name in after if name.startswith("checkpoints") and name not in kept]
    assert all(torch.isfinite(tensor).all() for tensor in weights(trainer).values())


def test_gradient_that_is_no_number_names_its_step_and_overwrites_nothing(
    tmp_path: Path, data: FeatureSet
) -> None:
    trainer = new_trainer(data, tmp_path, save_every=2, ema=0.9)
    trainer.model.fc.weight.register_hook(
        lambda gradient: gradient * math.nan if trainer.step == 7 else gradient
    )
    with pytest.raises(FlashDraftError) as error:
        trainer.run(HELD_OUT, quiet=True)
    message, _ = str(error.value).split("\n")
    assert "the gradient's norm is nan at step 7, in sample" in message
    assert left(tmp_path)[1]["step"] == 6
    assert all(
        torch.isfinite(tensor).all()
        for tensor in (*weights(trainer).values(), *trainer.average.values())
    )
    assert len(metrics(tmp_path)) == 7


# Full disks and bad data.


def said(got: tuple[int, str, str]) -> tuple[str, str]:
    """The error and the hint of a command that failed."""
    status, _, err = got
    assert status == 1, got
    assert [line.split(":")[0] for line in err.splitlines()] == ["error", "hint"], err
    error, hint = err.splitlines()
    return error, hint


FULL: dict[str, Callable[[], Exception]] = {
    "oserror": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "safetensors": lambda: SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    ),
}


def fill_disk(patch: pytest.MonkeyPatch, name: str, error: Callable[[], Exception]) -> None:
    """No space is left when the file of that name is written behind the first checkpoint."""
    place, _, name = name.rpartition("/")
    real, log = {"checkpoint": files.save_file, "state": config_module.write_file}, Trainer._log

    def full(path: Any) -> bool:
        here = (".tmp-save" if place == "" else f"/{place}/") in str(Path(path).absolute())
        return (
            here
            and Path(path).name == name
            and last_checkpoint(Path("run/checkpoints")) is not None
        )

    def save_file(tensors: Any, path: Any, metadata: Any = None) -> None:
        real["checkpoint"](tensors, path, metadata=metadata)
        if full(path):
            cut_short(Path(path))
            raise error()

    def write_file(path: Path, content: bytes) -> None:
        if full(path):
            raise error()
        real["state"](path, content)

    def logged(self: Trainer, figures: dict[str, Any]) -> None:
        log(self, figures)
        if name == "metrics.jsonl" and self.step == 3:
            path = self.out / "metrics.jsonl"
            path.write_bytes(path.read_bytes()[:-20])
            raise error()

    patch.setattr(files, "save_file", save_file)
    patch.setattr(config_module, "write_file", write_file)
    patch.setattr(Trainer, "_log", logged)


PLACES = [
    *((f"{name}.safetensors", kind) for name in SIZES for kind in FULL),
    ("state.json", "oserror"),
]
PLACES += [("best/model.safetensors", kind) for kind in FULL] + [("metrics.jsonl", "oserror")]


@pytest.mark.parametrize(("name", "kind"), PLACES)
def test_full_disk_is_one_line_and_the_last_checkpoint_is_kept_and_named(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    line = (
        f"train feats --out run {TRAIN} --steps 4 --save-every 2 "
        f"--eval-every 100 --sequences 2 --ema 0.9"
    )
    with monkeypatch.context() as patch:
        fill_disk(patch, name, FULL[kind])
        error, hint = said(run(line))
    assert "the disk is full: " in error
    assert (
        "run/checkpoints/step-0000004" if "/" not in name and name != "metrics.jsonl" else "run`"
    ) in error
    assert "make room" in hint
    assert "step-0000002" in hint
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-0000002"]
    assert not [path for path in (tmp_path / "run").rglob(".tmp*")]
    if name in ("optimizer.safetensors", "metrics.jsonl"):  # there is room again
        assert run(line)[0] == 0
        assert run(line.replace("--out run", "--out whole"))[0] == 0
        assert same_end(tmp_path / "run", tmp_path / "whole")


def test_file_without_answers_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    error, hint = said(run(f"train empty.jsonl --online --out run {TRAIN}"))
    assert "`empty.jsonl` holds no answers" in error
    assert "flashdraft regenerate" in hint
    assert run("features empty.jsonl --out none --target T --num-features 1")[0] == 0
    error, hint = said(run(f"train none --out run {TRAIN}"))
    assert "`none` holds no samples" in error
    assert "flashdraft features" in hint
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "wrong", ['{"prompt": "a", ', "[]", '{"prompt": "a"}'], ids=["cut", "no-object", "no-response"]
)
def test_bad_line_of_a_file_with_answers_is_left_out_and_named(
    run: Run, tmp_path: Path, answers: Path, wrong: str
) -> None:
    lines = (answers.read_text().splitlines() * 3)[:20]
    lines[16] = wrong
    (tmp_path / "bad.jsonl").write_text("".join(line + "\n" for line in lines))
    finished = files_of(tmp_path / "feats")
    status, _, err = run("features bad.jsonl --out some --target T --num-features 1")
    assert status == 0
    assert "bad.jsonl, line 17" in err
    assert files_of(tmp_path / "feats") == finished
    assert run("features answers.jsonl --out feats --target T --num-features 1")[:2] == (
        0,
        "1 shards in feats\n",
    )


def test_bad_line_of_a_prompt_file_costs_no_answer(run: Run, tmp_path: Path) -> None:
    rows = [json.dumps({"source": "toy", "row": n, "prompt": "hi"}) for n in range(20)]
    (tmp_path / "prompts.jsonl").write_text("".join(row + "\n" for row in rows))
    line = "regenerate prompts.jsonl --out out.jsonl --target T --max-new-tokens 4"
    assert run(f"{line} --limit 6")[1] == "6 new answers in out.jsonl\n"
    finished = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "prompts.jsonl").write_text(
        "".join(row + "\n" for row in [*rows[:16], rows[16][:-9], *rows[17:]])
    )
    status, out, err = run(line)
    assert (status, out) == (0, "13 new answers in out.jsonl\n")
    assert "prompts.jsonl, line 17" in err
    assert (tmp_path / "out.jsonl").read_bytes().startswith(finished)


@pytest.mark.parametrize("damage", ["is gone", "has "])
def test_vanished_shard_is_found_before_the_first_step(
    run: Run, tmp_path: Path, damage: str
) -> None:
    line = f"train feats --out run {TRAIN} --save-every 1 --eval-every 100 --sequences 2 --steps"
    assert run(f"{line} 2")[0] == 0
    finished = files_of(tmp_path / "run")
    (shard,) = (tmp_path / "feats").glob("*.safetensors")
    shard.unlink() if damage == "is gone" else cut_short(shard)
    error, hint = said(run(f"{line} 4"))
    assert f"feats/{shard.name}` {damage}" in error
    assert "flashdraft features" in hint
    assert files_of(tmp_path / "run") == finished
    shard.unlink(missing_ok=True)
    assert run("features answers.jsonl --out feats --target T --num-features 1")[0] == 0
    assert run(f"{line} 4")[0] == 0
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_network_or_features_of_another_target_are_named(run: Run, tmp_path: Path) -> None:
    lm = language_model()
    config = draft_config(lm.target, num_layers=1, block_size=4, num_features=1, mask_token_id=MASK)
    random_weights(replace(config, hidden_size=64, head_dim=16), 0).save_pretrained(
        tmp_path / "wide"
    )
    error, hint = said(
        run(f"train feats --out run {TRAIN.replace('--init random', '--init-from wide')}")
    )
    assert "64 wide, these 32" in error
    assert "--init target" in hint
    write_features(
        lm, [tmp_path / "answers.jsonl"], tmp_path / "other", layers=(1,), max_length=64, quiet=True
    )
    error, hint = said(run(f"train other --out run {TRAIN}"))
    assert "`other` holds layers (1,), the drafter reads (2,)" in error
    assert "flashdraft features" in hint
    error, _ = said(run(f"train feats --out run {TRAIN} --mask-token-id {VOCAB}"))
    assert f"mask token {VOCAB}" in error or f"mask_token_id is {VOCAB}" in error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_command_that_is_told_to_stop_leaves_with_the_signals_code(
    run: Run, tmp_path: Path, number: int
) -> None:
    line = (
        f"train feats --out run {TRAIN} --steps 4 --save-every 100 --eval-every 100 --sequences 2"
    )
    train_step = Trainer.train_step

    def interrupted(self: Trainer) -> dict[str, Any]:
        if self.step == 1:
            os.kill(os.getpid(), number)
        return train_step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        with pytest.raises(SystemExit) as left_with:
            run(line)
    assert left_with.value.code == 128 + number
    assert (
        last_checkpoint(tmp_path / "run/checkpoints") == tmp_path / "run/checkpoints/step-0000002"
    )
    assert run(line)[0] == 0
    assert run(line.replace("--out run", "--out whole"))[0] == 0
    assert same_end(tmp_path / "run", tmp_path / "whole")
