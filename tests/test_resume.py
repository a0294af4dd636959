"""Training that is stopped or killed goes on, and ends with the bits of a run that was never
disturbed. Children are forked, so that they can really be killed.
"""

from __future__ import annotations

import os
import random
import re
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from toy_runs import (
    DAMAGES,
    HELD_OUT,
    SIZES,
    VARIANTS,
    Unplugged,
    features_of,
    files_of,
    in_step,
    killed,
    measure_briefly,
    metrics,
    new_trainer,
    piped,
    random_answers,
    same_end,
    unplug,
)

from flashdraft.train.config import last_checkpoint, load_checkpoint
from flashdraft.train.features import FeatureSet
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


Undisturbed = Callable[[str], tuple[Path, list[int]]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: FeatureSet) -> Undisturbed:
    """Runs of 20 steps, each made once, with the order in which they read their samples."""
    made: dict[str, tuple[Path, list[int]]] = {}

    def run(variant: str) -> tuple[Path, list[int]]:
        if variant not in made:
            trainer, order = watched(
                new_trainer(data, tmp_path_factory.mktemp(variant), **VARIANTS[variant])
            )
            trainer.run(HELD_OUT, quiet=True)
            made[variant] = trainer.out, order
        return made[variant]

    return run


def watched(trainer: Trainer) -> tuple[Trainer, list[int]]:
    order: list[int] = []
    place = trainer._place
    trainer._place = lambda number: (order.append(number), place(number))[1]  # type: ignore[method-assign]
    return trainer, order


@pytest.mark.parametrize("variant", VARIANTS)
def test_ten_steps_and_ten_more_are_twenty(
    tmp_path: Path, data: FeatureSet, undisturbed: Undisturbed, variant: str
) -> None:
    whole, whole_order = undisturbed(variant)
    trainer, order = watched(in_step(new_trainer(data, tmp_path, **VARIANTS[variant]), 10, unplug))
    with pytest.raises(Unplugged):
        trainer.run(HELD_OUT, quiet=True)
    torch.rand(17)  # the generator of everybody stands elsewhere
    resumed, more = watched(new_trainer(data, tmp_path, seed=9, **VARIANTS[variant]))
    assert resumed.step == 10
    resumed.run(HELD_OUT, quiet=True)
    assert order + more == whole_order
    assert same_end(tmp_path, whole)
    assert len(metrics(whole)) == 20


@pytest.mark.parametrize("variant", ["plain", "swiglu"])
def test_run_stopped_before_its_first_checkpoint_begins_again_alike(
    tmp_path: Path, data: FeatureSet, undisturbed: Undisturbed, variant: str
) -> None:
    with pytest.raises(Unplugged):
        in_step(new_trainer(data, tmp_path, **VARIANTS[variant]), 3, unplug).run(
            HELD_OUT, quiet=True
        )
    torch.rand(17)
    new_trainer(data, tmp_path, **VARIANTS[variant]).run(HELD_OUT, quiet=True)
    assert same_end(tmp_path, undisturbed(variant)[0])


def test_run_resumed_without_its_average_is_caught(
    tmp_path: Path, data: FeatureSet, undisturbed: Undisturbed
) -> None:
    with pytest.raises(Unplugged):
        in_step(new_trainer(data, tmp_path, ema=0.9), 10, unplug).run(HELD_OUT, quiet=True)
    resumed = new_trainer(data, tmp_path, ema=0.9)
    resumed.average = {name: p.detach().clone() for name, p in resumed.model.named_parameters()}
    resumed.run(HELD_OUT, quiet=True)
    assert not same_end(tmp_path, undisturbed("ema")[0])


def pickles(out: Path) -> list[str]:
    """Files that are neither tensors nor text nor tensorboard's, by their names, and pickles by
    their first bytes.
    """
    known = (".safetensors", ".json", ".jsonl", ".md")
    odd = [n for n in files_of(out) if not n.endswith(known) and not n.startswith("tensorboard/")]
    return odd + [
        n
        for n, content in files_of(out).items()
        if content[:2] == b"PK" or re.match(rb"\x80[\x00-\x05]", content)
    ]


def test_run_leaves_tensors_in_safetensors_and_no_pickle(
    tmp_path: Path, undisturbed: Undisturbed
) -> None:
    out, _ = undisturbed("swiglu")
    assert pickles(out) == []
    last = last_checkpoint(out / "checkpoints")
    assert last is not None
    assert sorted(path.name for path in last.iterdir()) == [
        *(f"{n}.safetensors" for n in sorted(SIZES)),
        "state.json",
    ]
    groups, state = load_checkpoint(last)
    moments = {name.rpartition(".")[2] for name in groups["optimizer"]}
    assert moments == {"exp_avg", "exp_avg_sq", "step"}
    assert len(groups["optimizer"]) == 3 * len(groups["model"])
    assert state["config"]["ema"] == 0.9
    torch.save({"a": 1}, tmp_path / "optimizer.pt")
    torch.save({"a": 1}, tmp_path / "optimizer.json")
    assert sorted(pickles(tmp_path)) == ["optimizer.json", "optimizer.pt", "optimizer.pt"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_run_goes_on_from_the_last_whole_checkpoint(
    tmp_path: Path, data: FeatureSet, undisturbed: Undisturbed, damage: str
) -> None:
    with pytest.raises(Unplugged):
        in_step(new_trainer(data, tmp_path), 11, unplug).run(HELD_OUT, quiet=True)
    DAMAGES[damage](tmp_path / "checkpoints/step-0000010")
    resumed = new_trainer(data, tmp_path, seed=9)
    assert resumed.step == 5
    resumed.run(HELD_OUT, quiet=True)
    assert same_end(tmp_path, undisturbed("plain")[0])


def test_run_killed_ten_times_ends_with_the_same_bits(tmp_path: Path, data: FeatureSet) -> None:
    settings: dict[str, Any] = {
        "steps": 60,
        "save_every": 2,
        "eval_every": 25,
        "sequences": 2,
        "ema": 0.5,
    }
    chance, kills, lives = random.Random(0), 0, []

    def living(out: BinaryIO) -> None:
        trainer = new_trainer(data, tmp_path / "killed", **settings)
        train_step, first = trainer.train_step, trainer.step

        def noted() -> dict[str, Any]:
            out.write(b".")
            if trainer.step == first + 8:
                time.sleep(60)  # the parent is late
            return train_step()

        trainer.train_step = noted  # type: ignore[method-assign]
        trainer.run(HELD_OUT, quiet=True)

    while kills < 10:
        child, pipe = piped(living)
        for _ in range(chance.randrange(1, 5)):
            assert select.select([pipe], [], [], 30)[0]
            assert pipe.read(1) == b"."
        time.sleep(chance.random() * 0.03)
        assert killed(child) == -signal.SIGKILL
        pipe.close()
        kills += 1
        last = last_checkpoint(tmp_path / "killed/checkpoints")
        lives.append(0 if last is None else int(last.name.removeprefix("step-")))
    assert lives == sorted(lives)
    assert 0 < lives[-1] < 60
    new_trainer(data, tmp_path / "killed", **settings).run(HELD_OUT, quiet=True)
    new_trainer(data, tmp_path / "whole", **settings).run(HELD_OUT, quiet=True)
    assert same_end(tmp_path / "killed", tmp_path / "whole")


# Signals.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("when", ["in-a-step", "while-measuring", "while-saving"])
def test_signal_writes_a_checkpoint_and_leaves_with_its_code(
    tmp_path: Path, data: FeatureSet, undisturbed: Undisturbed, number: int, when: str
) -> None:
    trainer = new_trainer(data, tmp_path, eval_every=7 if when == "while-measuring" else 100)
    old = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    name = {"in-a-step": "_batches", "while-measuring": "measure", "while-saving": "_save"}[when]
    real = getattr(trainer, name)

    def interrupted(*values: Any) -> Any:
        if trainer.step == {"in-a-step": 6, "while-measuring": 7, "while-saving": 5}[when]:
            os.kill(os.getpid(), number)
        return real(*values)

    setattr(trainer, name, interrupted)
    with pytest.raises(SystemExit) as left_with:
        trainer.run(HELD_OUT, quiet=True)
    assert left_with.value.code == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == old
    step = {"in-a-step": 7, "while-measuring": 7, "while-saving": 6}[when]
    last = last_checkpoint(tmp_path / "checkpoints")
    assert last == tmp_path / f"checkpoints/step-{step:07d}"
    if when != "while-measuring":
        new_trainer(data, tmp_path, seed=9).run(HELD_OUT, quiet=True)
        assert same_end(tmp_path, undisturbed("plain")[0])


def test_signal_handlers_are_restored_however_a_run_ends(tmp_path: Path, data: FeatureSet) -> None:
    old = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Unplugged):
        in_step(new_trainer(data, tmp_path, steps=2), 1, unplug).run(HELD_OUT, quiet=True)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == old
    new_trainer(data, tmp_path, steps=2).run(HELD_OUT, quiet=True)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == old
