"""A learned block draft: it begins as the frozen one, keeps to the noises that it may know, and is
of one UNet."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor
from toy_diffusion import CLEAN, toy_pipe, toy_unet

import flashdraft
from flashdraft.diffusion import learned
from flashdraft.diffusion.drafts import Block, FrozenDraft, Past
from flashdraft.diffusion.learned import (
    BlockDraftModel,
    DraftShape,
    LearnedDraft,
    identity_of,
    is_image_draft,
)
from flashdraft.diffusion.models import builtin_draft, load_pipe
from flashdraft.diffusion.pipeline import SpeculativeDiffusion
from flashdraft.diffusion.transitions import Prediction, Transitions, transitions
from flashdraft.errors import CheckpointError, DraftMismatch, InvalidParameter, ModelNotFound
from flashdraft.loading import open_network
from flashdraft.process import FLOATS

LAGS = 5
SHAPE = DraftShape(feature_channels=8, width=8, blocks=2)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = toy_pipe(tmp_path_factory.mktemp("toy"))
    made.scheduler = DDPMScheduler(clip_sample=False, **CLEAN)
    return made


def network(unet: Any, *, trained: bool) -> BlockDraftModel:
    """trained: stands for one whose last layer is not zero any more."""
    torch.manual_seed(3)
    model = BlockDraftModel(SHAPE, identity_of(unet))
    if trained:
        torch.nn.init.normal_(model.conv_out.weight, std=0.3)
    return model


def table() -> Transitions:
    scheduler = DDPMScheduler(clip_sample=False, **CLEAN)
    scheduler.set_timesteps(12)
    return transitions(scheduler)


def past() -> Past:
    torch.manual_seed(4)
    clean, noise, features = torch.randn(4, 8, 8), torch.randn(4, 8, 8), torch.randn(8, 8, 8)
    return Past(3, Prediction(clean, noise), features=features)


def predictions(draft: Any, noises: Tensor) -> Tensor:
    """The clean latents that a block says, [lags, ...], at the points where it comes to itself."""
    own, seen = table(), past()
    torch.manual_seed(5)
    point = torch.randn(4, 8, 8)
    predict = draft.block(own, seen, point, noises)
    said = []
    for lag in range(len(noises)):
        step = seen.step + 1 + lag
        told = predict(lag, step, point[None])
        said.append(told.clean[0])
        mean = own.mean(torch.tensor([step]), point[None], told)[0]
        point = mean + float(own.deviation[step]) * noises[lag]
    return torch.stack(said)


def drawn(pipe: Any, **options: Any) -> Tensor:
    asked = {"prompt": "abc", "num_inference_steps": 12, "output_type": "latent"} | options
    asked.setdefault("generator", torch.Generator().manual_seed(0))
    images: Tensor = pipe(**asked).images
    return images


# ---- what it says --------------------------------------------------------------------------------


def test_untrained_network_is_the_frozen_draft(pipe: Any) -> None:
    noises = torch.randn(LAGS, 4, 8, 8)
    untrained = LearnedDraft(network(pipe.unet, trained=False))
    assert torch.equal(predictions(untrained, noises), predictions(FrozenDraft(), noises))
    trained = LearnedDraft(network(pipe.unet, trained=True))
    assert not torch.equal(predictions(trained, noises), predictions(FrozenDraft(), noises))
    images = drawn(SpeculativeDiffusion(pipe, draft=untrained, block=4))
    assert torch.equal(images, drawn(SpeculativeDiffusion(pipe, draft="frozen-x0", block=4)))


class Peeking(LearnedDraft):
    """The planted fault: every lag is told its own noise."""

    def block(self, table: Transitions, past: Past, point: Tensor, noises: Tensor) -> Block:
        ahead = torch.cat([noises[1:], noises[-1:]])
        return super().block(table, past, point + 0.1 * noises[0], ahead)


def lags_that_change(draft: Any, noise: int) -> list[int]:
    """Where another noise of that lag shows."""
    torch.manual_seed(6)
    noises = torch.randn(LAGS, 4, 8, 8)
    others = noises.clone()
    others[noise] = torch.randn(4, 8, 8)
    before, after = predictions(draft, noises), predictions(draft, others)
    return [lag for lag in range(LAGS) if not torch.equal(before[lag], after[lag])]


@pytest.mark.parametrize("noise", range(LAGS))
def test_noise_of_a_lag_is_seen_by_later_lags_only(pipe: Any, noise: int) -> None:
    draft = LearnedDraft(network(pipe.unet, trained=True))
    assert lags_that_change(draft, noise) == list(range(noise + 1, LAGS))
    peeking = Peeking(network(pipe.unet, trained=True))
    assert noise in lags_that_change(peeking, noise)


def test_innovations_are_standard_normal_where_the_clean_latents_are_known() -> None:
    """What the sampler's own steps add, by their own noises; of any other kind of sampler, too."""
    torch.manual_seed(7)
    ddim = DDIMScheduler(clip_sample=False, **CLEAN)
    ddim.set_timesteps(12)
    for own in (table(), transitions(ddim, eta=1.0)):
        clean, point = torch.randn(40, 4, 8, 8), torch.randn(40, 4, 8, 8)
        last = torch.full([40], 3)
        steps = 4 + torch.arange(LAGS).expand(40, LAGS)
        said = own.implied(last, point, clean)
        noise = float(own.deviation[3]) * torch.randn_like(point)
        start = own.mean(last, point, said) + noise
        points = learned.frozen_points(own, start, clean, steps, torch.randn(40, LAGS, 4, 8, 8))
        seen = learned.seen_at(own, last, clean, point, torch.zeros(40, 8, 8, 8))
        moved, levels = learned.innovations(own, seen, last, steps, points)
        assert moved.mean().abs() < 0.02
        assert ((moved.var(dim=(0, 2, 3, 4)) - 1).abs() < 0.06).all()
        assert (levels[:, 1:] < levels[:, :-1]).all()


# ---- in a pipe -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_of_a_batch_with_guidance_and_any_shape(
    tmp_path: Path, pipe: Any, dtype: torch.dtype
) -> None:
    """A tall image, blocks of different lengths in one batch, and a pipe of half the precision."""
    own = toy_pipe(tmp_path)
    own.scheduler = pipe.scheduler
    own.to(dtype)
    network(pipe.unet, trained=True).save_pretrained(tmp_path / "draft")
    fast = SpeculativeDiffusion(own, draft=tmp_path / "draft", block=5)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    images = drawn(
        fast,
        prompt=["abc", "xyz", "q"],
        generator=generators,
        guidance_scale=3.0,
        height=32,
        width=16,
        num_inference_steps=8,
    )
    assert images.shape == (3, 4, 16, 8)
    assert images.isfinite().all()
    stats = fast.last_stats
    assert stats is not None
    assert stats.steps == 8
    assert stats.drafted > 0


def test_draft_of_another_unet_is_refused_and_the_pipe_is_as_it_was(
    pipe: Any, tmp_path: Path
) -> None:
    other = toy_unet()
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.02)  # a fine-tune
    network(other, trained=False).save_pretrained(tmp_path)
    before = dict(pipe.unet.__dict__), dict(pipe.scheduler.__dict__)
    with pytest.raises(DraftMismatch, match="trained for another UNet"):
        SpeculativeDiffusion(pipe, draft=tmp_path)
    assert (dict(pipe.unet.__dict__), dict(pipe.scheduler.__dict__)) == before
    assert not identity_of(toy_unet(channels=9)).is_like(identity_of(pipe.unet))
    assert identity_of(toy_unet().to(torch.float16)).is_like(identity_of(pipe.unet))


def test_unet_without_the_layer_that_is_read_is_refused(pipe: Any) -> None:
    own = copy.copy(pipe)
    own.unet = copy.deepcopy(pipe.unet)
    own.unet.last = own.unet.conv_out
    del own.unet.conv_out
    draft = LearnedDraft(network(pipe.unet, trained=False))
    with pytest.raises(InvalidParameter, match="has no last layer `conv_out`"):
        SpeculativeDiffusion(own, draft=draft)


# ---- its folder ----------------------------------------------------------------------------------


def test_folder_gives_back_what_was_saved(pipe: Any, tmp_path: Path) -> None:
    model = network(pipe.unet, trained=True)
    model.save_pretrained(tmp_path / "draft", readme="# Mine\n")
    names = sorted(path.name for path in (tmp_path / "draft").iterdir())
    assert names == ["README.md", "config.json", "model.safetensors"]
    again = BlockDraftModel.from_pretrained(tmp_path / "draft")
    assert (again.shape, again.unet) == (model.shape, model.unet)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    assert is_image_draft(tmp_path / "draft")
    assert not is_image_draft(tmp_path)
    with pytest.raises(CheckpointError, match="drafts images, not text"):
        open_network(tmp_path / "draft")


def test_folder_that_is_no_image_draft_is_one_line(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(name: object, kind: type[Exception], said: str) -> None:
        with pytest.raises(kind) as error:
            LearnedDraft.from_pretrained(str(name))
        assert said in str(error.value.args[0])
        assert "\n" not in error.value.args[0]
        assert getattr(error.value, "hint", None)

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", CheckpointError, "it has no config.json")
    text_drafter = Path(flashdraft.__file__).parent / "assets" / "smollm2-135m-dflash"
    refused(text_drafter, CheckpointError, "holds no image draft")
    pipe.save_pretrained(tmp_path / "pipe")
    refused(tmp_path / "pipe", CheckpointError, "holds no image draft")
    refused(tmp_path / "nowhere", CheckpointError, "is no folder of an image draft")

    def fails(*_: object, **__: object) -> None:
        raise OSError("nobody is there")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fails)
    refused("some-owner/no-such-draft", ModelNotFound, "nobody is there")
    with pytest.raises(InvalidParameter, match="draft is 'nothing'"):
        SpeculativeDiffusion(pipe, draft="nothing")

    folder = tmp_path / "draft"
    network(pipe.unet, trained=False).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for changes, said in (
        ({"format": 2}, "has format 2, and this version reads 1"),
        ({"width": 16}, "is damaged"),
        ({"unet": None}, "is damaged"),
        ({"groups": 3}, "is damaged"),
    ):
        (folder / "config.json").write_text(json.dumps(config | changes))
        refused(folder, CheckpointError, said)
    (folder / "config.json").write_text(json.dumps(config))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    refused(folder, CheckpointError, "is damaged")


def test_a_unet_that_came_in_between_leaves_nothing_patched(tmp_path: Path) -> None:
    own = toy_pipe(tmp_path)
    own.scheduler = DDPMScheduler(clip_sample=False, **CLEAN)
    fast = SpeculativeDiffusion(own, draft=LearnedDraft(network(own.unet, trained=False)))
    with torch.no_grad():
        own.unet.conv_in.weight.add_(1.0)
    before = dict(vars(own.scheduler)), dict(vars(own.unet))
    with pytest.raises(DraftMismatch), fast:
        pass
    assert (vars(own.scheduler), vars(own.unet)) == before


def test_the_network_goes_where_the_latents_are(pipe: Any) -> None:
    """A pipe that is moved later, or whose models wait in another place than they work in."""
    draft = LearnedDraft(network(pipe.unet, trained=False))
    there = torch.device("meta")
    said = Prediction(torch.empty(4, 8, 8, device=there), torch.empty(4, 8, 8, device=there))
    elsewhere = Past(3, said, features=torch.empty(8, 8, 8, device=there))
    noises = torch.empty(2, 4, 8, 8, device=there)
    block = draft.block(table(), elsewhere, said.clean, noises)
    assert block(0, 4, said.clean[None]).clean.device == there


def test_shipped_draft_is_of_the_shipped_pipe() -> None:
    folder = builtin_draft("digits")
    assert folder is not None
    draft = LearnedDraft.from_pretrained(folder)
    draft.check(load_pipe("digits").unet)
    assert draft.model.conv_out.weight.abs().max() > 0
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size < 1e6


def test_tensors_of_a_network_state_their_dtype() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        model = BlockDraftModel(SHAPE, learned.Identity("", []))
    finally:
        torch.set_default_dtype(before)
    for name, weight in model.state_dict().items():
        assert weight.dtype == FLOATS["dtype"], name
