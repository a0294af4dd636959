"""Pipes by name: what loads, with which sampler, and what is refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler
from toy_diffusion import SCHEDULE, toy_pipe

from flashdraft.diffusion import models
from flashdraft.diffusion.models import SCHEDULERS, eta_of, load_pipe, set_steps, with_scheduler
from flashdraft.diffusion.transitions import transitions
from flashdraft.errors import CheckpointError, FlashDraftError, InvalidParameter, ModelNotFound


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pipe")
    toy_pipe(tmp_path_factory.mktemp("toy")).save_pretrained(made)
    return made


@pytest.fixture
def index(folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Of a pipe whose parts lie beside a model_index.json that a test writes."""
    for part in folder.iterdir():
        if part.is_dir():
            (tmp_path / part.name).symlink_to(part)
    held: dict[str, Any] = json.loads((folder / "model_index.json").read_text())
    return held


def written(folder: Path, index: dict[str, Any]) -> str:
    (folder / "model_index.json").write_text(json.dumps(index))
    return str(folder)


def test_folder_is_loaded_without_bars(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = load_pipe(str(folder), dtype="bfloat16", scheduler="ddpm")
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert type(pipe.scheduler).__name__ == "DDPMScheduler"
    assert str(pipe.unet.dtype) == "torch.bfloat16"
    pipe("abc", num_inference_steps=2, output_type="latent")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_keeps_the_pipes_own_schedule(folder: Path, name: str) -> None:
    """A pipe's own may say nothing of clipping; no kind clips latents by its own default."""
    pipe = load_pipe(str(folder))
    pipe.scheduler = PNDMScheduler(**SCHEDULE)
    replaced = with_scheduler(pipe, name).scheduler
    assert replaced.config.beta_start == SCHEDULE["beta_start"]
    replaced.set_timesteps(10)
    table = transitions(replaced, eta=eta_of(replaced, None) or 0.0)
    assert table.is_random == (name != "dpm++")
    assert table.limited is None
    assert DDIMScheduler(**SCHEDULE).config.clip_sample  # the planted fault: its own default


def test_eta_is_ddims(folder: Path) -> None:
    pipe = load_pipe(str(folder), scheduler="ddim")
    assert eta_of(pipe.scheduler, None) == 1.0
    assert eta_of(pipe.scheduler, None, is_exact=False) == 0.0
    assert eta_of(pipe.scheduler, 0.5) == 0.5
    with_scheduler(pipe, "ddpm")
    assert eta_of(pipe.scheduler, None) is None
    with pytest.raises(InvalidParameter, match=r"eta is 0\.5, and DDPMScheduler has none"):
        eta_of(pipe.scheduler, 0.5)


def test_schedule_that_is_none_of_betas_is_refused(folder: Path) -> None:
    pipe = load_pipe(str(folder))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(InvalidParameter, match="FlowMatchEulerDiscreteScheduler has no schedule"):
        with_scheduler(pipe, "ddim")


def test_missing_safety_checker_is_none(index: dict[str, Any], tmp_path: Path) -> None:
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    assert load_pipe(written(tmp_path, index)).safety_checker is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": ["mine", "Mine"]}, "brings code of its own: its class is"),
        ({"unet": ["mine", "Mine"]}, "brings code of its own: its unet is"),
        ({"vae": ["os", "system"]}, "brings code of its own: its vae is"),
        ({"vae": ["diffusers", "NoSuchThing"]}, "cannot load"),
    ],
)
def test_code_of_a_folder_never_runs(
    index: dict[str, Any], tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    (tmp_path / "mine.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(CheckpointError) as error:
        load_pipe(written(tmp_path, index | change))
    assert said in error.value.args[0]


def test_part_that_is_missing_is_named(index: dict[str, Any], tmp_path: Path) -> None:
    """Of a folder that is not there some tokenizers make an empty one."""
    (tmp_path / "tokenizer").unlink()
    with pytest.raises(CheckpointError, match="lacks its tokenizer"):
        load_pipe(written(tmp_path, index))


def test_steps_that_a_scheduler_refuses_are_one_line() -> None:
    with pytest.raises(InvalidParameter, match="steps is 3, which PNDMScheduler refuses"):
        set_steps(PNDMScheduler(), 3)


def test_pickled_weights_are_never_read(index: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "unet").unlink()
    (tmp_path / "unet").mkdir()
    config = {"_class_name": "UNet2DConditionModel"}
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    (tmp_path / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="cannot load"):
        load_pipe(written(tmp_path, index))


def test_what_is_no_pipe_is_one_line(
    folder: Path, index: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(name: str, kind: type[FlashDraftError], said: str, **options: str) -> None:
        with pytest.raises(kind) as error:
            load_pipe(name, **options)
        assert said in error.value.args[0]
        assert error.value.hint is not None
        assert "\n" not in error.value.args[0]

    refused("nope", ModelNotFound, "no folder `nope`")
    refused(str(tmp_path), CheckpointError, "has no model_index.json")
    refused(str(folder / "model_index.json"), ModelNotFound, "is a file")
    del index["unet"]
    refused(written(tmp_path, index), CheckpointError, "which has no UNet")
    (tmp_path / "model_index.json").write_text("{")
    refused(str(tmp_path), CheckpointError, "cannot read model_index.json")
    refused(str(folder), InvalidParameter, "scheduler is 'pndm'", scheduler="pndm")
    refused(str(folder), InvalidParameter, "dtype is 'int8'", dtype="int8")
    refused(str(folder), InvalidParameter, "device is 'nowhere'", device="nowhere")
    monkeypatch.setattr(models, "_PACKAGES", ("no_such_package",))
    refused(str(folder), FlashDraftError, "images need no_such_package")


def test_hub_that_has_no_such_pipe_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError("nobody is there")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fails)
    with pytest.raises(ModelNotFound) as error:
        load_pipe("some-owner/no-such-pipe")
    assert "as a hub id: it cannot be fetched: nobody is there" in error.value.args[0]
