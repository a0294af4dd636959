"""Saving a checkpoint: a process that dies leaves the old one or the new one, whole.

It leaves what its file operations have done so far: every one of them is a possible death. Children
are forked, so that they can really be killed.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import safetensors.torch
import torch
from torch import Tensor
from toy_runs import DAMAGES, SIZES, ended, forked, killed, piped

from flashdraft import files
from flashdraft.train import config as config_module
from flashdraft.train.config import last_checkpoint, load_checkpoint, save_checkpoint

Groups = Mapping[str, Mapping[str, Tensor]]
Save = Callable[[Path, int, Groups, Mapping[str, Any]], None]
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
