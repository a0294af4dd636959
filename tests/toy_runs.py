"""What the tests of runs share: children that can really be killed, a small trainer and what it has
left, a shop of files and a command line in it.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from conftest import MASK
from torch import Tensor
from toy_folders import save_target
from toy_training import language_model

from flashdraft.cli import main
from flashdraft.train import trainer as trainer_module
from flashdraft.train.config import TrainConfig, last_checkpoint, load_checkpoint
from flashdraft.train.features import FeatureSet, write_features
from flashdraft.train.initialise import draft_config, random_weights
from flashdraft.train.trainer import Trainer
from flashdraft.types import SamplingParams

PROMPTS = (
    "hello there",
    "what is it",
    "a b c",
    "zebra",
    "Quick fox",
    "sing a song",
    "why?",
    "tell me",
)
HELD_OUT = PROMPTS[:1]
SETTINGS = TrainConfig(
    steps=20,
    sequences=4,
    anchors=6,
    lr=3e-3,
    vocab=0,
    precision="fp32",
    save_every=5,
    eval_every=100,
    weight_decay=0.1,
)


# Children.


def forked(job: Callable[[], Any]) -> int:
    """A child that runs `job` and leaves without any of pytest's endings;
    returns its process id.
    """
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # Python 3.12 warns where threads are about
        child = os.fork()
    if child:
        return child
    status = 1
    try:
        torch.set_num_threads(1)
        job()
        status = 0
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def ended(child: int, seconds: float = 60.0) -> int:
    """The exit code of a child, negative for a signal's; a child that takes too long is killed."""
    for _ in range(int(seconds * 200)):
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"the child ran longer than {seconds} s")


def killed(child: int) -> int:
    os.kill(child, signal.SIGKILL)
    return ended(child)


def piped(job: Callable[[BinaryIO], Any]) -> tuple[int, BinaryIO]:
    """A child whose `job` may write to a pipe, and the pipe's other end."""
    reader, writer = os.pipe()

    def run() -> None:
        os.close(reader)
        with os.fdopen(writer, "wb", buffering=0) as out:
            job(out)

    child = forked(run)
    os.close(writer)
    return child, os.fdopen(reader, "rb", buffering=0)


# Runs.


def random_answers(folder: Path) -> Path:
    """Of different lengths, so that micro-batches have different numbers of labels."""
    chance, path = random.Random(1), folder / "answers.jsonl"
    rows = []
    for n, prompt in enumerate(PROMPTS):
        tokens = [chance.randrange(3, MASK) for _ in range(5 + 3 * n)]
        rows.append(
            {
                "source": "toy",
                "row": n,
                "prompt": prompt,
                "response": "",
                "tokens": tokens,
                "finish": "length",
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def features_of(answers: Path, out: Path) -> FeatureSet:
    write_features(language_model(), [answers], out, layers=(2,), max_length=128, quiet=True)
    return FeatureSet(out)


def measure_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "_MEASURED", SamplingParams(max_new_tokens=8))


def new_trainer(
    data: FeatureSet,
    out: Path,
    *,
    seed: int = 0,
    head: tuple[str, int] | None = None,
    **changes: Any,
) -> Trainer:
    lm = language_model()
    config = draft_config(lm.target, num_layers=1, block_size=4, num_features=1, mask_token_id=MASK)
    return Trainer(
        random_weights(config, seed), lm, data, out, replace(SETTINGS, **changes), head=head
    )


def in_step(trainer: Trainer, step: int, action: Callable[[], Any]) -> Trainer:
    """Something happens while that step (from 0) is made."""
    train_step = trainer.train_step

    def wrapped() -> dict[str, Any]:
        if trainer.step == step:
            action()
        return train_step()

    trainer.train_step = wrapped  # type: ignore[method-assign]
    return trainer


class Unplugged(BaseException):
    pass


def unplug() -> None:
    raise Unplugged


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def metrics(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if name != "positions_per_second"}
        for row in rows
    ]


def left(out: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any], list[dict[str, Any]]]:
    """What a run has left: the tensors of its last checkpoint, the rest of it, its metrics."""
    last = last_checkpoint(out / "checkpoints")
    assert last is not None
    return *load_checkpoint(last), metrics(out)


def same_end(first: Path, second: Path) -> bool:
    (groups, *rest), (others, *other_rest) = left(first), left(second)
    return (
        groups.keys() == others.keys()
        and all(equal(groups[n], others[n]) for n in groups)
        and rest == other_rest
    )


def files_of(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ema": {"ema": 0.9},
    "accumulate": {"accumulate": 2, "sequences": 2},
    "dpace": {"weights": "dpace"},
    "swiglu": {"head": ("swiglu", 4), "ema": 0.9},
    "vocabulary": {"vocab": 20, "negatives": 5, "head": ("swiglu", 4)},
}


# Files of a run that are damaged.

SIZES = {"model": 30, "optimizer": 50, "average": 20}


def cut_short(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "no-state": lambda path: (path / "state.json").unlink(),
    "cut-state": lambda path: cut_short(path / "state.json"),
    "empty-state": lambda path: (path / "state.json").write_bytes(b""),
    "cut-weights": lambda path: cut_short(path / "model.safetensors"),
    "no-optimizer": lambda path: (path / "optimizer.safetensors").unlink(),
    "nothing": lambda path: [file.unlink() for file in path.iterdir()],
}


# A command line.

Run = Callable[[str], tuple[int, str, str]]
NETWORK = "--target T --num-features 1 --num-layers 1 --init random --mask-token-id 60"
TRAIN = f"--eval-prompts held.jsonl {NETWORK} --anchors 6 --vocab 0 --precision fp32 --lr 3e-3"


def furnished(folder: Path, answers: Path) -> Path:
    """A target, its answers, their features, and held-out prompts."""
    save_target(folder / "target")
    shutil.copy(answers, folder / "answers.jsonl")
    (folder / "held.jsonl").write_text('{"prompt": "hello there"}\n')
    command = (
        f"features {folder}/answers.jsonl --out {folder}/feats --target "
        f"{folder}/target --num-features 1"
    )
    assert main(command.split()) == 0
    return folder


def command_line(
    shop: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Run a command line in a folder of its own that holds the shop's files; `T` is the target."""
    monkeypatch.setenv("NO_COLOR", "1")
    for path in shop.iterdir():
        if path.name != "target":
            (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    monkeypatch.chdir(folder)

    def run(line: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(shop / "target") if word == "T" else word for word in shlex.split(line)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
