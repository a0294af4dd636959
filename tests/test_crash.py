"""Training that is killed, stopped, out of disk, fed bad data or spread over processes: nothing
finished is lost, and a run that goes on ends with the bits of one that was never disturbed.
Children are forked, so that they can really be killed.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import random
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import safetensors.torch
import torch
from conftest import EOS, MASK, VOCAB, tiny_target
from safetensors import SafetensorError
from torch import Tensor
from toy_folders import letter_tokenizer, save_target

from flashdraft import files
from flashdraft.cli import main
from flashdraft.errors import FlashDraftError
from flashdraft.generate import Model
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.methods.dflash import DFlashDraftModel
from flashdraft.train import config as config_module
from flashdraft.train import trainer as trainer_module
from flashdraft.train.config import TrainConfig, last_checkpoint, load_checkpoint, save_checkpoint
from flashdraft.train.features import FeatureSet, Sample, write_features
from flashdraft.train.initialise import draft_config, random_weights
from flashdraft.train.trainer import Trainer
from flashdraft.types import SamplingParams

Groups = Mapping[str, Mapping[str, Tensor]]
Save = Callable[[Path, int, Groups, Mapping[str, Any]], None]
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


# Saving. A process that dies leaves what its file operations have done so far: every one of them is
# a possible death.

SIZES = {"model": 30, "optimizer": 50, "average": 20}
CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate")


def groups_of(number: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(number)
    return {
        name: {"w": torch.randn(size, generator=generator), "b": torch.ones(3)}
        for name, size in SIZES.items()
    }


def write(save: Save, folder: Path, step: int, number: int | None = None) -> None:
    """A checkpoint whose content is made of `number`, the step if it is not given."""
    number = step if number is None else number
    save(folder, step, groups_of(number), {"best": number / 7})


def holds(path: Path, number: int) -> bool:
    groups, state = load_checkpoint(path)
    wanted = groups_of(number)
    same = all(
        torch.equal(tensor, wanted[name][key])
        for name, tensors in groups.items()
        for key, tensor in tensors.items()
    )
    return (
        same
        and groups.keys() == wanted.keys()
        and state["best"] == number / 7
        and f"step-{state['step']:07d}" == path.name
    )


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """Steps 4 and 8 are whole; of step 12 there is a part, of an earlier life of the run and with
    other content.
    """
    folder = tmp_path / "before"
    write(save_checkpoint, folder, 12, 99)
    (folder / "step-0000012/optimizer.safetensors").unlink()
    for step in (4, 8):
        write(save_checkpoint, folder, step)
    return folder


def torn_save_file(tensors: Any, path: Any, metadata: Any = None) -> None:
    """safetensors' save_file in two halves, each of which is an event of its own."""
    content = safetensors.torch.save(tensors, metadata)
    for mode, part in (("wb", content[: len(content) // 2]), ("ab", content[len(content) // 2 :])):
        with open(path, mode) as file:
            file.write(part)


def die_at(number: int) -> None:
    """End this process before its n-th file operation, as SIGKILL would."""
    left = itertools.count(number, -1)
    sys.addaudithook(lambda event, _: os._exit(9) if event in CHANGES and next(left) == 1 else None)


def deaths(save: Save, before: Path, work: Path) -> list[str]:
    """What is found after each possible death of a save of step 12:
    `old`, `new`, or what is wrong.
    """
    found = []
    for number in itertools.count(1):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(before, work)
        code = ended(forked(lambda number=number: (die_at(number), write(save, work, 12))))
        assert code in (0, 9)
        last = last_checkpoint(work)
        if last is None:
            found.append("nothing is left")
        elif last.name == "step-0000008" and holds(last, 8):
            found.append("old")
        else:
            found.append(
                "new"
                if last.name == "step-0000012" and holds(last, 12)
                else f"{last.name} is a mixture"
            )
        if code == 0:
            return found
        if save is save_checkpoint:
            after = 12 if found[-1] == "old" else 16
            write(save, work, after)
            assert sorted(path.name for path in work.iterdir()) == [
                last.name if last else "",
                f"step-{after:07d}",
            ]
    raise AssertionError


def test_save_that_dies_at_any_operation_leaves_the_old_or_the_new(
    before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "save_file", torn_save_file)
    found = deaths(save_checkpoint, before, tmp_path / "work")
    assert set(found) == {"old", "new"}
    assert found == sorted(
        found, reverse=True
    )  # at one operation the new one takes the old one's place
    assert len(found) > 30


def saved_in_its_place(folder: Path, step: int, groups: Groups, state: Mapping[str, Any]) -> None:
    """The planted fault: files are written straight into the final folder, the marker last."""
    final = folder / f"step-{step:07d}"
    final.mkdir(parents=True, exist_ok=True)
    for name, tensors in groups.items():
        torn_save_file(dict(tensors), final / f"{name}.safetensors", {"format": "pt"})
    sizes = {path.name: path.stat().st_size for path in final.glob("*.safetensors")}
    (final / "state.json").write_text(json.dumps({**state, "step": step, "files": sizes}))


def saved_after_making_room(
    folder: Path, step: int, groups: Groups, state: Mapping[str, Any]
) -> None:
    """The planted fault: the older ones are removed first."""
    for path in folder.glob("step-*"):
        shutil.rmtree(path)
    save_checkpoint(folder, step, groups, state)


@pytest.mark.parametrize(
    ("wrong", "symptom"),
    [(saved_in_its_place, "is a mixture"), (saved_after_making_room, "nothing is left")],
)
def test_planted_wrong_save_is_caught(
    before: Path, tmp_path: Path, wrong: Save, symptom: str
) -> None:
    assert any(symptom in text for text in deaths(wrong, before, tmp_path / "work"))


def test_save_killed_at_thirty_random_moments_loses_nothing_that_was_finished(
    tmp_path: Path,
) -> None:
    chance, busy = random.Random(0), 0
    folder = tmp_path / "checkpoints"
    for _ in range(30):
        shutil.rmtree(folder, ignore_errors=True)
        write(save_checkpoint, folder, 1)

        def saving(out: BinaryIO) -> None:
            for step in range(2, 5000):
                out.write(b".")
                write(save_checkpoint, folder, step)

        child, pipe = piped(saving)
        assert pipe.read(1) == b"."
        time.sleep(chance.random() * 0.04)
        assert killed(child) == -signal.SIGKILL
        begun = 2 + len(pipe.read())
        pipe.close()
        last = last_checkpoint(folder)
        assert last is not None
        step = int(last.name.removeprefix("step-"))
        assert step in (begun - 1, begun)
        assert holds(last, step)
        busy += (folder / ".tmp-save").exists()
    assert busy >= 3, "the kills fell beside the saves"


def is_synced(monkeypatch: pytest.MonkeyPatch, folder: Path) -> bool:
    """Whether a power cut finds the files of a checkpoint on the disk once its name is there."""
    synced: set[int] = set()
    verdicts = []
    fsync, move = os.fsync, os.replace

    def noting(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    def judging(old: Any, new: Any) -> None:
        if Path(new).name.startswith("step-"):
            verdicts.append(
                {path.stat().st_ino for path in (Path(old), *Path(old).iterdir())} <= synced
            )
            synced.clear()
        move(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", noting)
        patch.setattr(os, "replace", judging)
        write(save_checkpoint, folder, 3)
    return verdicts == [True] and folder.stat().st_ino in synced


def test_checkpoint_is_on_the_disk_before_its_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_synced(monkeypatch, tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(config_module, "_sync", lambda _: None)
        assert not is_synced(monkeypatch, tmp_path / "b")
    with monkeypatch.context() as patch:
        patch.setattr(
            config_module,
            "write_tensors",
            lambda path, tensors: safetensors.torch.save_file(tensors, path),
        )
        assert not is_synced(monkeypatch, tmp_path / "c")


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


def test_damaged_newer_checkpoints_do_not_push_the_whole_one_out(tmp_path: Path) -> None:
    whole = tmp_path / "step-0000008"
    write(save_checkpoint, tmp_path, 8)
    for step, damage in enumerate(DAMAGES.values(), 12):
        write(save_checkpoint, tmp_path / "elsewhere", step)
        damage(tmp_path / f"elsewhere/step-{step:07d}")
        shutil.move(tmp_path / f"elsewhere/step-{step:07d}", tmp_path / f"step-{step:07d}")
    shutil.rmtree(tmp_path / "elsewhere")
    assert last_checkpoint(tmp_path) == whole
    write(save_checkpoint, tmp_path, 10)
    assert holds(whole, 8)
    write(save_checkpoint, tmp_path, 14)
    assert not whole.exists()
    write(save_checkpoint, tmp_path, 30)
    assert holds(tmp_path / "step-0000014", 14)
    assert last_checkpoint(tmp_path) == tmp_path / "step-0000030"
    write(save_checkpoint, tmp_path, 34)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000030", "step-0000034"]


# Runs.


def language_model() -> Model:
    target = tiny_target("llama", lean=True, dtype=torch.float32)
    return Model(target, letter_tokenizer(), Autoregressive, eos=frozenset({EOS}), max_rows=8)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of different lengths, so that micro-batches have different numbers of labels."""
    chance, path = random.Random(1), tmp_path_factory.mktemp("answers") / "answers.jsonl"
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


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, answers: Path) -> FeatureSet:
    out = tmp_path_factory.mktemp("features")
    write_features(language_model(), [answers], out, layers=(2,), max_length=128, quiet=True)
    return FeatureSet(out)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
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


# The command line: full disks and bad data.

Run = Callable[[str], tuple[int, str, str]]
NETWORK = "--target T --num-features 1 --num-layers 1 --init random --mask-token-id 60"
TRAIN = f"--eval-prompts held.jsonl {NETWORK} --anchors 6 --vocab 0 --precision fp32 --lr 3e-3"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, answers: Path) -> Path:
    """A target, its answers, their features, and held-out prompts."""
    folder = tmp_path_factory.mktemp("shop")
    save_target(folder / "target")
    shutil.copy(answers, folder / "answers.jsonl")
    (folder / "held.jsonl").write_text('{"prompt": "hello there"}\n')
    command = (
        f"features {folder}/answers.jsonl --out {folder}/feats --target "
        f"{folder}/target --num-features 1"
    )
    assert main(command.split()) == 0
    return folder


@pytest.fixture
def run(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Run a command line in a folder of its own that holds the shop's files; `T` is the target."""
    monkeypatch.setenv("NO_COLOR", "1")
    for path in shop.iterdir():
        if path.name != "target":
            (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(shop / "target") if word == "T" else word for word in shlex.split(line)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


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


def test_another_trouble_of_the_disk_is_not_called_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    write(save_checkpoint, tmp_path, 1)
    monkeypatch.setattr(config_module, "write_file", refused)
    with pytest.raises(PermissionError):
        write(save_checkpoint, tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000001"]


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
    "ddp": {"weights": "dpace", "head": ("swiglu", 4)},
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
