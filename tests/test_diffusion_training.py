"""Trajectories and the training of an image draft: recorded as the stock pipe goes, killed at any
moment and gone on with, never trained on what is held out."""

import errno
import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy_diffusion import CLEAN, toy_pipe
from toy_runs import DAMAGES, Unplugged, ended, equal, forked, killed, piped, same_end

from flashdraft import files
from flashdraft.cli import main
from flashdraft.diffusion import training, trajectories
from flashdraft.diffusion.learned import BlockDraftModel
from flashdraft.diffusion.options import DraftTrainOptions, RecordOptions
from flashdraft.diffusion.training import DraftTrainer, Held, Split
from flashdraft.diffusion.trajectories import Trajectories, record
from flashdraft.errors import DataError, FlashDraftError, InvalidParameter

PROMPTS = ["abc", "xyz", "hello", "q", "zebra"]
RECORDED = RecordOptions(steps=8, batch=2, seed=5)
SETTINGS = DraftTrainOptions(
    steps=6, samples=3, lags=3, eval_every=3, save_every=2, width=8, blocks=1, held_out=0.4, ema=0.9
)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = toy_pipe(tmp_path_factory.mktemp("toy"))
    made.scheduler = DDPMScheduler(clip_sample=False, **CLEAN)
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, pipe: Any) -> Path:
    out = tmp_path_factory.mktemp("recorded") / "data"
    record(pipe, PROMPTS, out, RECORDED, quiet=True)
    return out


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_MEASURED", 8)
    monkeypatch.setattr(training, "_AT_ONCE", 8)


@pytest.fixture
def copied(data: Path, tmp_path: Path) -> Path:
    """Data that a test may damage."""
    return Path(shutil.copytree(data, tmp_path / "data"))


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


# ---- recording -----------------------------------------------------------------------------------


def test_points_are_the_stock_pipes_latents_at_those_seeds(pipe: Any, data: Path) -> None:
    held = Trajectories(data)
    for number, prompt in enumerate(PROMPTS):
        latents: list[Tensor] = []

        def keep(
            _pipe: Any, _step: int, _time: Any, got: dict[str, Any], own: list[Tensor] = latents
        ) -> dict[str, Any]:
            own.append(got["latents"][0])
            return got

        pipe(
            prompt,
            num_inference_steps=8,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(5 + number),
            output_type="latent",
            callback_on_step_end=keep,
        )
        points = held.read("points", number, 1, 7)
        torch.testing.assert_close(points, torch.stack(latents[:-1]), rtol=1e-4, atol=1e-4)
        clean, noises = held.read("clean", number, 0, 8), held.read("noises", number, 0, 8)
        table = held.table
        for step in range(7):
            own = torch.tensor([step])
            point = held.read("points", number, step)
            mean = table.mean(own, point, table.implied(own, point, clean[step, None]))
            made = mean[0] + float(table.deviation[step]) * noises[step]
            torch.testing.assert_close(made, points[step], rtol=1e-4, atol=1e-4)


def test_recording_goes_on_with_the_missing_shard_alone(
    pipe: Any, data: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copied / "shard-00001.safetensors").unlink()
    with pytest.raises(DataError, match=r"lacks 1 of 3 shards, shard-00001\.safetensors first"):
        Trajectories(copied)
    made: list[int] = []
    own = trajectories._recorded

    def noted(pipe: Any, prompts: Any, start: int, options: Any) -> dict[str, Tensor]:
        made.append(start)
        return own(pipe, prompts, start, options)

    monkeypatch.setattr(trajectories, "_recorded", noted)
    record(pipe, PROMPTS, copied, RECORDED, quiet=True)
    assert made == [2]
    assert shards(copied) == shards(data)


def test_other_pipe_schedule_or_prompts_are_refused(pipe: Any, copied: Path) -> None:
    def refused(said: str, prompts: list[str] = PROMPTS, **changes: Any) -> None:
        before = shards(copied)
        with pytest.raises(DataError) as error:
            record(pipe, prompts, copied, replace(RECORDED, **changes), quiet=True)
        assert said in error.value.args[0]
        assert shards(copied) == before

    refused("prompts", prompts=PROMPTS[::-1])
    refused("num_images", prompts=[*PROMPTS, "more"])
    refused("steps 8, not 9", steps=9)
    refused("seed 5, not 6", seed=6)
    refused("guidance 1.0, not 2.0", guidance=2.0)
    scheduler = pipe.scheduler
    pipe.scheduler = DDPMScheduler.from_config(scheduler.config, beta_end=0.02)
    refused("beta_end 0.012, not 0.02")
    pipe.scheduler = DDIMScheduler(clip_sample=False, **CLEAN)
    refused('name "DDPMScheduler", not "DDIMScheduler"')
    pipe.scheduler = scheduler
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(2.0)
    refused("made with pipe")
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(0.5)
    record(pipe, PROMPTS, copied, RECORDED, quiet=True)


def halves(folder: Path) -> list[str]:
    """Shards that cannot be read."""
    odd = []
    for path in folder.glob("shard-*"):
        try:
            load_file(path)
        except SafetensorError:
            odd.append(path.name)
    return odd


def cut_short(tensors: Any, path: Path, metadata: Any = None) -> None:
    """A file system that is full, or a power that is gone, in the middle of a file."""
    save_file(tensors, path, metadata=metadata)
    path.write_bytes(path.read_bytes()[:1000])
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("is_atomic", [True, False])
def test_full_disk_is_one_line_and_leaves_no_half_shard(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_atomic: bool
) -> None:
    """The planted fault: shards that are written where they shall be."""
    if is_atomic:
        monkeypatch.setattr(files, "save_file", cut_short)
    else:
        monkeypatch.setattr(
            trajectories, "write_tensors", lambda path, tensors: cut_short(tensors, path)
        )
    with pytest.raises(FlashDraftError, match=r"the disk is full: `.*` was not written"):
        record(pipe, PROMPTS[:2], tmp_path / "data", RECORDED, quiet=True)
    assert halves(tmp_path / "data") == ([] if is_atomic else ["shard-00000.safetensors"])


def test_recording_that_is_killed_goes_on(
    pipe: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(tensors: Any, path: Path, metadata: Any = None) -> None:
        save_file(tensors, path, metadata=metadata)
        if "00001" in path.name:
            path.write_bytes(path.read_bytes()[:1000])
            os.kill(os.getpid(), signal.SIGKILL)

    out = tmp_path / "data"
    with monkeypatch.context() as patched:
        patched.setattr(files, "save_file", dies)
        child = forked(lambda: record(pipe, PROMPTS, out, RECORDED, quiet=True))
        assert ended(child) == -signal.SIGKILL
    assert list(shards(out)) == ["shard-00000.safetensors"]
    assert halves(out) == []
    record(pipe, PROMPTS, out, RECORDED, quiet=True)
    assert shards(out) == shards(data)


def test_folder_of_something_else_is_left_alone(pipe: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InvalidParameter, match="was not written by `flashdraft image-record`"):
        record(pipe, PROMPTS, tmp_path, RECORDED, quiet=True)
    with pytest.raises(DataError, match="holds no recorded images"):
        Trajectories(tmp_path)
    (tmp_path / "recorded.json").write_text("[]")
    with pytest.raises(InvalidParameter, match=r"recorded\.json` was not written by"):
        record(pipe, PROMPTS, tmp_path, RECORDED, quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "recorded.json"]


def test_steps_that_no_schedule_has_leave_no_folder(pipe: Any, tmp_path: Path) -> None:
    too_many = replace(RECORDED, steps=1001)
    with pytest.raises(InvalidParameter, match="more than the model's schedule has"):
        record(pipe, PROMPTS, tmp_path / "data", too_many, quiet=True)
    assert not (tmp_path / "data").exists()


# ---- training ------------------------------------------------------------------------------------


def trainer(data: Path, out: Path, **changes: Any) -> DraftTrainer:
    return DraftTrainer([Trajectories(data)], out, replace(SETTINGS, **changes))


def unplugged(made: DraftTrainer, step: int) -> None:
    """Ends the run in the middle of that step."""
    own = made._take_average

    def dies() -> None:
        if made.step == step:
            raise Unplugged
        own()

    made._take_average = dies  # type: ignore[method-assign]
    with pytest.raises(Unplugged):
        made.run(quiet=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run that was never disturbed."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "_MEASURED", 8)
        patched.setattr(training, "_AT_ONCE", 8)
        trainer(data, out).run(quiet=True)
    return out


def same(out: Path, whole: Path) -> bool:
    best = [load_file(folder / "best" / "model.safetensors") for folder in (out, whole)]
    return same_end(out, whole) and equal(*best)


@pytest.mark.parametrize("step", range(1, 7))
def test_run_that_ends_in_any_step_comes_to_the_same_bits(
    data: Path, whole: Path, tmp_path: Path, step: int
) -> None:
    unplugged(trainer(data, tmp_path), step)
    torch.rand(7)  # everybody's generator stands elsewhere
    trainer(data, tmp_path).run(quiet=True)
    assert same(tmp_path, whole)


def test_run_resumed_without_its_average_is_caught(data: Path, whole: Path, tmp_path: Path) -> None:
    unplugged(trainer(data, tmp_path), 5)
    resumed = trainer(data, tmp_path)
    assert resumed.step == 4
    resumed.average.load_state_dict(resumed.model.state_dict())
    resumed.run(quiet=True)
    assert not same(tmp_path, whole)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_passed_over(
    data: Path, whole: Path, tmp_path: Path, damage: str
) -> None:
    unplugged(trainer(data, tmp_path), 5)
    DAMAGES[damage](tmp_path / "checkpoints" / "step-0000004")
    resumed = trainer(data, tmp_path)
    assert resumed.step == 2
    resumed.run(quiet=True)
    assert same(tmp_path, whole)


def test_run_killed_at_random_moments_comes_to_the_same_bits(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    def living(out: BinaryIO) -> None:
        made = trainer(data, tmp_path)
        own = made.train_step

        def noted() -> float:
            out.write(b".")
            return own()

        made.train_step = noted  # type: ignore[method-assign]
        made.run(quiet=True)
        time.sleep(60)

    for moment in (0.0, 0.01, 0.02, 0.03):
        child, pipe = piped(living)
        assert pipe.read(1) == b"."
        time.sleep(moment)
        assert killed(child) == -signal.SIGKILL
        pipe.close()
    trainer(data, tmp_path).run(quiet=True)
    assert same(tmp_path, whole)


def test_signal_writes_a_checkpoint(data: Path, whole: Path, tmp_path: Path) -> None:
    made = trainer(data, tmp_path)
    own = made._take_average

    def interrupted() -> None:
        own()
        if made.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    made._take_average = interrupted  # type: ignore[method-assign]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left_with:
        made.run(quiet=True)
    assert left_with.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "checkpoints" / "step-0000003").is_dir()
    trainer(data, tmp_path).run(quiet=True)
    assert same(tmp_path, whole)


def test_other_trajectories_or_settings_are_refused(
    pipe: Any, data: Path, whole: Path, tmp_path: Path
) -> None:
    record(pipe, PROMPTS, tmp_path / "other", replace(RECORDED, seed=6), quiet=True)
    with pytest.raises(InvalidParameter, match="was begun with other trajectories"):
        trainer(tmp_path / "other", whole)
    with pytest.raises(InvalidParameter, match=r"was begun with lr 0\.002, not 0\.1"):
        trainer(data, whole, lr=0.1)
    assert trainer(data, whole, steps=9).step == 6
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "metrics.jsonl").write_text("mine")
    with pytest.raises(InvalidParameter, match="was not written by"):
        trainer(data, tmp_path / "foreign")
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(2.0)
    record(pipe, PROMPTS, tmp_path / "unet", RECORDED, quiet=True)
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(0.5)
    both = [Trajectories(data), Trajectories(tmp_path / "unet")]
    with pytest.raises(DataError, match="was recorded with another UNet"):
        DraftTrainer(both, tmp_path / "run", SETTINGS)


def spoilt(folder: Path, images: Tensor, value: float) -> None:
    """Their clean latents are something else."""
    for number in images.tolist():
        path = folder / f"shard-{number // 2:05d}.safetensors"
        tensors = load_file(path)
        tensors["clean"][number % 2] = value
        save_file(tensors, path)


@pytest.mark.parametrize("is_kept", [True, False])
def test_what_is_held_out_is_never_trained_on(
    data: Path, whole: Path, copied: Path, monkeypatch: pytest.MonkeyPatch, is_kept: bool
) -> None:
    """Weights don't hang on it. The planted fault: a split that trains on everything."""
    split = Split.of(len(PROMPTS), 0.4)
    assert set(split.seen.tolist()) | set(split.held.tolist()) == set(range(len(PROMPTS)))
    assert not set(split.seen.tolist()) & set(split.held.tolist())
    reference = whole
    if not is_kept:
        everything = Split(torch.arange(len(PROMPTS)), split.held)
        monkeypatch.setattr(Split, "of", lambda count, share: everything)
        reference = copied.parent / "reference"
        trainer(data, reference).run(quiet=True)
    spoilt(copied, split.held, 50.0)
    made = trainer(copied, copied.parent / "run")
    made.run(quiet=True)
    again = trainer(data, reference)
    assert equal(made.model.state_dict(), again.model.state_dict()) == is_kept
    assert made.measured != again.measured


def test_loss_that_is_nan_is_one_line(copied: Path, tmp_path: Path) -> None:
    spoilt(copied, Split.of(len(PROMPTS), 0.4).seen, float("nan"))
    with pytest.raises(FlashDraftError) as error:
        trainer(copied, tmp_path / "run").run(quiet=True)
    assert f"the loss is nan at step 1, in `{copied}`" == error.value.args[0]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_damaged_shard_is_named(copied: Path, tmp_path: Path) -> None:
    for path in copied.glob("shard-*"):
        path.write_bytes(path.read_bytes()[:-99])
    with pytest.raises(DataError, match=r"shard-0000.*is damaged"):
        trainer(copied, tmp_path / "run").run(quiet=True)


def test_best_is_what_was_best_on_held_out_images(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = iter([0.0, 1.0, 3.0, 2.0, 1.0])
    made = trainer(data, tmp_path, eval_every=1, steps=5)
    averages: list[dict[str, Tensor]] = []

    def measure() -> list[Held]:
        state = made.average.state_dict()
        averages.append({name: weight.clone() for name, weight in state.items()})
        return [Held(next(figures), 1.5)]

    monkeypatch.setattr(made, "measure", measure)
    assert made.run(quiet=True) == Held(3.0, 1.5)
    best = BlockDraftModel.from_pretrained(tmp_path / "best")
    assert equal(best.state_dict(), averages[2])
    assert not equal(best.state_dict(), averages[3])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["learned"] for line in lines] == [0.0, 1.0, 3.0, 2.0, 1.0]
    assert {line["frozen"] for line in lines} == {1.5}
    card = (tmp_path / "best" / "README.md").read_text()
    assert "| 3 | 3.00 | 1.50 |" in card
    assert "| 5 | 2 | DDPMScheduler | 8 | 1 |" in card


def walking(folder: Path) -> None:
    """The clean latents become a walk by the noises, and the points what the sampler makes of it:
    all that can be foretold of them is in the noises."""
    table = Trajectories(folder).table
    for path in folder.glob("shard-*"):
        tensors = load_file(path)
        point, clean = tensors["points"][:, 0], tensors["clean"][:, 0]
        for step in range(len(table.deviation)):
            tensors["points"][:, step] = point
            tensors["clean"][:, step] = clean
            own = torch.full([len(point)], step)
            noise = tensors["noises"][:, step]
            mean = table.mean(own, point, table.implied(own, point, clean))
            point = mean + float(table.deviation[step]) * noise
            clean = clean + 0.3 * noise
        save_file(tensors, path)


@pytest.mark.parametrize("is_own", [True, False])
def test_network_learns_what_the_noises_say(copied: Path, tmp_path: Path, is_own: bool) -> None:
    """The planted fault: another image's innovations."""
    walking(copied)
    settings = {"steps": 40, "samples": 8, "lr": 2e-2, "eval_every": 40, "save_every": 40}
    made = trainer(copied, tmp_path / "run", **settings)
    if not is_own:
        blocks_of = made._blocks

        def shuffled(*args: Any) -> Any:
            blocks = blocks_of(*args)
            return blocks._replace(innovations=blocks.innovations.roll(1, 0))

        made._blocks = shuffled  # type: ignore[method-assign]
    held = made.run(quiet=True)
    assert (held.learned > 1.2 * held.frozen) == is_own, held


# ---- commands ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, pipe: Any) -> Path:
    folder = tmp_path_factory.mktemp("pipe")
    pipe.save_pretrained(folder)
    return folder


def test_commands_record_train_and_go_on(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "captions.txt").write_text("abc\n\n xyz \n")
    data, run = tmp_path / "data", tmp_path / "run"
    record_it = f"image-record {saved} --out {data} --prompts {tmp_path}/captions.txt --images 3"
    record_it += " --steps 6 --scheduler ddim --batch 2"
    assert main(record_it.split()) == 0
    assert capsys.readouterr().out == f"3 images of 6 steps in {data}\n"
    assert Trajectories(data).facts["options"]["eta"] == 1.0
    train_it = f"image-train {data} --out {run} --steps 2 --samples 2 --lags 2 --width 8"
    for _ in range(2):
        assert main(train_it.split()) == 0
        said = capsys.readouterr().out
        assert said.startswith("best accepted steps ")
        assert said.endswith(f" of 2; the draft: {run / 'best'}\n")
    assert main([*train_it.split(), "--lr", "0.1"]) == 1
    assert "was begun with lr 0.002, not 0.1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "prompts come from a file or from the command line"),
        ("--prompt a --prompts x.txt", "prompts come from a file or from the command line"),
        ("--prompt a --prompt b --images 1", "images is 1, and there are 2 prompts"),
        ("--prompt a --eta 0.5", "eta is 0.5, and DDPMScheduler has none"),
        ("--prompt a --scheduler dpm++", "scheduler is 'dpm++'"),
        ("--prompts none.txt", "cannot use `none.txt`"),
        ("--prompts empty.txt", "`empty.txt` holds no prompts"),
        ("--prompts latin.txt", "`latin.txt` is no UTF-8 text"),
    ],
)
def test_slip_is_one_line_and_writes_nothing(
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: str,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n")
    Path("latin.txt").write_bytes(b"caf\xe9\n")
    assert main(f"image-record {saved} --out data --steps 4 {options}".split()) != 0
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert said in error
    assert hint.startswith("hint: ")
    assert not Path("data").exists()
