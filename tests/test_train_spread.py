"""Training spread over micro-batches and over processes (gloo on the CPU) is training in one; kept
weights are the moving average.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_runs import (
    HELD_OUT,
    TRAIN,
    Run,
    command_line,
    ended,
    equal,
    features_of,
    forked,
    furnished,
    in_step,
    left,
    measure_briefly,
    new_trainer,
    random_answers,
    weights,
)

from flashdraft.methods.dflash import DFlashDraftModel
from flashdraft.train import trainer as trainer_module
from flashdraft.train.features import FeatureSet


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


# Micro-batches, and the moving average.


@pytest.mark.parametrize(
    "changes", [{}, {"weights": "dpace"}, {"head": ("swiglu", 4)}], ids=["decay", "dpace", "swiglu"]
)
def test_micro_batches_join_to_the_whole_batch(
    tmp_path: Path, data: FeatureSet, changes: dict[str, Any]
) -> None:
    runs = []
    for name, accumulate, sequences in (("two", 2, 3), ("one", 1, 6)):
        trainer = new_trainer(
            data, tmp_path / name, accumulate=accumulate, sequences=sequences, **changes
        )
        runs.append([trainer.train_step() for _ in range(6)])
    for two, one in zip(*runs, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert two["norm"] == pytest.approx(one["norm"], rel=1e-4)
        assert [two[name] for name in ("step", "positions", "accuracy")] == [
            one[name] for name in ("step", "positions", "accuracy")
        ]


def test_kept_weights_are_the_moving_average(tmp_path: Path, data: FeatureSet) -> None:
    trainer = new_trainer(data, tmp_path, steps=6, ema=0.8, head=("swiglu", 4))
    average = {name: tensor.double() for name, tensor in weights(trainer).items()}
    train_step = trainer.train_step

    def followed() -> dict[str, Any]:
        figures = train_step()
        for name, tensor in weights(trainer).items():
            average[name] = 0.8 * average[name] + 0.2 * tensor.double()
        return figures

    trainer.train_step = followed  # type: ignore[method-assign]
    trainer.run(HELD_OUT, quiet=True)
    groups, _, _ = left(tmp_path)
    best = DFlashDraftModel.from_pretrained(tmp_path / "best").state_dict()
    assert groups["average"].keys() == best.keys() == average.keys()
    for name, tensor in average.items():
        torch.testing.assert_close(groups["average"][name].double(), tensor, atol=1e-6, rtol=1e-5)
        assert torch.equal(best[name], groups["average"][name].bfloat16().float())
    assert not equal(groups["average"], weights(trainer))
    assert equal(
        groups["model"], {f"model.{name}": tensor for name, tensor in weights(trainer).items()}
    )


# Several processes, by gloo on the CPU.


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "ACCELERATE_TORCH_DEVICE": "cpu",
}


def together(job: Callable[[int], Any], *, fsdp: bool = False) -> list[int]:
    """Run `job(rank)` in two processes as `accelerate launch` would start them; returns their exit
    codes.

    accelerate shards (FSDP2) on accelerators only: there the CPU is passed off as one, by
    recipes/accelerate/fsdp2.yaml's settings.
    """
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    shared |= {"OMP_NUM_THREADS": "1"} | (FSDP2 if fsdp else {"ACCELERATE_USE_CPU": "true"})

    def member(rank: int) -> None:
        from accelerate import state
        from accelerate.utils import DistributedType

        warnings.simplefilter("ignore")
        os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
        state.AcceleratorState._reset_state(reset_partial_state=True)
        if fsdp:
            state.PartialState._prepare_backend = lambda *_, **__: (
                "gloo",
                DistributedType.MULTI_GPU,
            )
        assert trainer_module.process_device().type == "cpu"
        job(rank)

    return [ended(child) for child in [forked(lambda rank=rank: member(rank)) for rank in range(2)]]


def near(first: Path, second: Path) -> None:
    """Two runs' losses and weights agree to 1e-5, and their figures that are counted are the
    same.
    """
    (groups, _, rows), (others, _, other_rows) = left(first), left(second)
    for row, other in zip(rows, other_rows, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert row["norm"] == pytest.approx(other["norm"], rel=1e-4)
        assert [row[name] for name in ("step", "positions", "accuracy")] == [
            other[n] for n in ("step", "positions", "accuracy")
        ]
    assert groups.keys() == others.keys()
    for name in groups.keys() - {"optimizer"}:
        for key, tensor in groups[name].items():
            torch.testing.assert_close(tensor, others[name][key], atol=1e-5, rtol=0)
    assert groups["optimizer"].keys() == others["optimizer"].keys()


SPREAD: dict[str, dict[str, Any]] = {
    "ddp": {"weights": "dpace", "head": ("selector", 4)},
    "fsdp2": {"ema": 0.9},
}


@pytest.mark.parametrize("kind", SPREAD)
def test_two_processes_are_one_with_two_micro_batches(
    tmp_path: Path, data: FeatureSet, kind: str
) -> None:
    """One of the two is told to stop, both do, and the run goes on in two processes."""
    settings: dict[str, Any] = {"steps": 12, "sequences": 3, **SPREAD[kind]}

    def job(rank: int, name: str, stop: int | None) -> None:
        seed = (
            rank if kind == "ddp" else 0
        )  # the first one's weights are everybody's; FSDP2 has every one bring its part
        trainer = new_trainer(data, tmp_path / name, seed=seed, **settings)
        kinds = {type(parameter).__name__ for parameter in trainer.model.parameters()}
        assert (trainer.acc.num_processes, kinds) == (
            2,
            {"DTensor" if kind == "fsdp2" else "Parameter"},
        )
        if rank == 1 and stop is not None:
            in_step(trainer, stop, lambda: os.kill(os.getpid(), signal.SIGTERM))
        trainer.run(HELD_OUT, quiet=True)

    fsdp = kind == "fsdp2"
    assert together(lambda rank: job(rank, "two", 6), fsdp=fsdp) == [128 + signal.SIGTERM] * 2
    assert left(tmp_path / "two")[1]["step"] == 7
    assert together(lambda rank: job(rank, "two", None), fsdp=fsdp) == [0, 0]
    new_trainer(data, tmp_path / "one", accumulate=2, **settings).run(HELD_OUT, quiet=True)
    near(tmp_path / "two", tmp_path / "one")


def test_accelerate_launch_of_two_processes_is_one_with_accumulate_2(
    run: Run, shop: Path, tmp_path: Path
) -> None:
    line = f"train feats --out {{}} {TRAIN} --steps 6 --save-every 3 --eval-every 100 --sequences 2"
    words = [
        str(shop / "target") if word == "T" else word for word in shlex.split(line.format("two"))
    ]
    launch = [
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    launch += ["--main_process_port", str(free_port()), "-m", "flashdraft", *words]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launch],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert run(f"{line.format('one')} --accumulate 2")[0] == 0
    near(tmp_path / "two", tmp_path / "one")
