"""SpeculativeDiffusion in users' own pipelines: the stock pipe at block 1, nothing left behind, and
nothing missed that a callback or an option changes."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    PNDMScheduler,
)
from PIL import Image as Picture
from torch import Tensor
from toy_diffusion import CLEAN, SCHEDULE, toy_pipe

from flashdraft.diffusion import loop, sampler
from flashdraft.diffusion.noises import Noises
from flashdraft.diffusion.pipeline import SpeculativeDiffusion
from flashdraft.diffusion.transitions import Transitions, transitions
from flashdraft.errors import InvalidParameter, UnusableLogits

SAMPLERS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "ddpm": (DDPMScheduler(clip_sample=False, **CLEAN), {}, "exact"),
    "ddim": (DDIMScheduler(clip_sample=False, **CLEAN), {"eta": 1.0}, "exact"),
    "sde": (
        DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=1, **CLEAN),
        {},
        "exact",
    ),
    "euler": (EulerAncestralDiscreteScheduler(steps_offset=1, **SCHEDULE), {}, "exact"),
    "ddim0": (DDIMScheduler(clip_sample=False, **CLEAN), {}, "tolerance"),
    "2m": (DPMSolverMultistepScheduler(**CLEAN), {}, "tolerance"),
}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return toy_pipe(tmp_path_factory.mktemp("toy"))


def drawn(pipe: Any, seed: int = 0, **options: Any) -> Tensor:
    """Latents."""
    asked = {"prompt": "abc", "num_inference_steps": 12, "output_type": "latent"} | options
    asked.setdefault("generator", torch.Generator().manual_seed(seed))
    images: Tensor = pipe(**asked).images
    return images


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_block_of_one_step_is_the_stock_pipe(pipe: Any, name: str, guidance: float) -> None:
    scheduler, options, mode = SAMPLERS[name]
    pipe.scheduler = scheduler
    options = options | {"guidance_scale": guidance, "num_images_per_prompt": 2}
    stock = drawn(pipe, **options)
    fast = SpeculativeDiffusion(pipe, mode=mode, block=1)
    torch.testing.assert_close(drawn(fast, **options), stock, rtol=1e-4, atol=1e-4)
    stats = fast.last_stats
    assert stats is not None
    assert (stats.rounds, stats.steps, stats.images) == (12, 12, 2)
    assert stats.rows == 12 * 2 * (2 if guidance > 1 else 1)


def wrong_coefficient(name: str) -> Any:
    """Planted."""

    def read(*args: Any, **kwargs: Any) -> Transitions:
        table = transitions(*args, **kwargs)
        return replace(table, **{name: 1.01 * getattr(table, name)})

    return read


def noise_of_another_step(noises: Noises, step: int, place: int) -> Tensor:
    """Planted."""
    return own_noise(noises, (step + 1) % 12, place)


def noise_of_another_image(noises: Noises, step: int, place: int) -> Tensor:
    """Planted."""
    return own_noise(noises, step, 1 - place)


own_noise = Noises.of

FAULTS: dict[str, tuple[Any, str, Any]] = {
    "clean": (loop.tables, "transitions", wrong_coefficient("clean")),
    "deviation": (loop.tables, "transitions", wrong_coefficient("deviation")),
    "another step's noise": (Noises, "of", noise_of_another_step),
    "another image's noise": (Noises, "of", noise_of_another_image),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_single_steps_that_are_not_the_pipes_are_seen(
    pipe: Any, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, options, mode = SAMPLERS["ddim"]
    pipe.scheduler = scheduler
    options = options | {"num_images_per_prompt": 2}
    stock = drawn(pipe, **options)
    monkeypatch.setattr(*FAULTS[fault])
    ours = drawn(SpeculativeDiffusion(pipe, mode=mode, block=1), **options)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


def check_tolerance_zero(pipe: Any, name: str) -> None:
    """Against the stock pipe."""
    scheduler, options, mode = SAMPLERS[name]
    pipe.scheduler = scheduler
    stock = drawn(pipe, **options)
    fast = SpeculativeDiffusion(pipe, mode=mode, block=5, tol=0.0)
    torch.testing.assert_close(drawn(fast, **options), stock, rtol=1e-5, atol=1e-5)
    assert fast.last_stats is not None
    assert fast.last_stats.defects == [0.0]


@pytest.mark.parametrize("name", ["ddim0", "2m"])
def test_tolerance_zero_is_the_stock_pipe(pipe: Any, name: str) -> None:
    check_tolerance_zero(pipe, name)


@pytest.mark.parametrize("name", ["ddim0", "2m"])
def test_a_tolerance_that_accepts_everything_is_seen(
    pipe: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted."""
    monkeypatch.setattr(sampler, "_norm", lambda values: torch.zeros(len(values)))
    with pytest.raises(AssertionError):
        check_tolerance_zero(pipe, name)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "euler"])
def test_blocks_take_fewer_rounds_and_as_many_noises(pipe: Any, name: str) -> None:
    """The generator stands where the stock pipe leaves it: what a user draws next is the same."""
    scheduler, options, mode = SAMPLERS[name]
    pipe.scheduler = scheduler
    stock, ours = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    drawn(pipe, generator=stock, **options)
    tol = 0.5 if mode == "tolerance" else None
    fast = SpeculativeDiffusion(pipe, mode=mode, block=6, tol=tol)
    drawn(fast, generator=ours, **options)
    assert torch.equal(stock.get_state(), ours.get_state())
    stats = fast.last_stats
    assert stats is not None
    assert stats.rounds < 12
    assert stats.drafted >= stats.accepted > 0
    assert stats.exact == (mode == "exact")


def test_images_of_a_batch_are_what_each_would_be_alone(pipe: Any) -> None:
    pipe.scheduler = SAMPLERS["ddpm"][0]
    fast = SpeculativeDiffusion(pipe, block=5)
    prompts = ["abc", "xyz", "hello"]
    makers = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    together = drawn(fast, prompt=prompts, generator=makers, guidance_scale=3.0)
    for place, prompt in enumerate(prompts):
        own = torch.Generator().manual_seed(5 + place)
        alone = drawn(fast, prompt=prompt, generator=[own], guidance_scale=3.0)
        if place == 0:  # coins hang on an image's place in its batch, too
            torch.testing.assert_close(alone[0], together[0], rtol=1e-4, atol=1e-4)
    assert together.shape[0] == 3


def restored(pipe: Any) -> tuple[Any, ...]:
    """Whatever could be left behind. (The stock pipe itself sets `_guidance_scale` and its kin.)"""
    return (
        dict(pipe.__dict__),
        dict(pipe.config),
        set(pipe.unet.__dict__),
        set(pipe.scheduler.__dict__),
        pipe.scheduler,
        type(pipe.scheduler),
    )


def test_leaving_the_context_restores_the_pipe(pipe: Any) -> None:
    pipe.scheduler = SAMPLERS["ddpm"][0]
    drawn(pipe)
    before = restored(pipe)
    with SpeculativeDiffusion(pipe) as fast:
        assert restored(pipe) != before
        drawn(fast)
    assert restored(pipe) == before
    with pytest.raises(ZeroDivisionError), SpeculativeDiffusion(pipe):
        raise ZeroDivisionError
    assert restored(pipe) == before


def test_a_patched_pipe_is_not_patched_again(pipe: Any) -> None:
    pipe.scheduler = SAMPLERS["ddpm"][0]
    with (
        SpeculativeDiffusion(pipe),
        pytest.raises(InvalidParameter, match="another"),
        SpeculativeDiffusion(pipe),
    ):
        pass


# ---- what users do -------------------------------------------------------------------------------


def far_from_stock(pipe: Any, change: Any) -> float:
    """How far a drafted image with this callback is from the stock pipe's, for each unit that the
    callback changes of the image."""
    pipe.scheduler = SAMPLERS["ddim0"][0]
    options: dict[str, Any] = {"callback_on_step_end": change}
    stock = drawn(pipe, **options)
    fast = SpeculativeDiffusion(pipe, mode="tolerance", block=8, tol=0.05)
    ours = drawn(fast, **options)
    assert fast.last_stats is not None
    assert fast.last_stats.rounds < 12
    return float((ours - stock).norm() / (drawn(pipe) - stock).norm())


def test_what_a_callback_changes_voids_the_rest_of_the_block(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def change(own: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return {"latents": tensors["latents"] * 1.5} if step == 6 else {}

    assert far_from_stock(pipe, change) < 0.3
    assert seen == [*range(12)] * 2
    monkeypatch.setattr(loop, "_is_same", lambda *_: True)
    assert far_from_stock(pipe, change) > 0.7  # planted: the change is lost


@pytest.mark.parametrize("what", ["prompt_embeds", "guidance"])
def test_other_conditions_void_it_too(pipe: Any, what: str) -> None:
    pipe.scheduler = SAMPLERS["ddim0"][0]

    def change(own: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step != 3:
            return {}
        if what == "guidance":
            own._guidance_scale = 30.0
            return {}
        return {"prompt_embeds": tensors["prompt_embeds"] * 20}

    options: dict[str, Any] = {
        "callback_on_step_end": change,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
        "guidance_scale": 5.0,
    }
    stock = drawn(pipe, **options)
    exact = SpeculativeDiffusion(pipe, mode="tolerance", block=8, tol=0.0)
    torch.testing.assert_close(drawn(exact, **options), stock, rtol=1e-4, atol=1e-4)
    fast = SpeculativeDiffusion(pipe, mode="tolerance", block=8, tol=0.5)
    drawn(fast, **options)
    assert fast.last_stats is not None
    assert fast.last_stats.voids == 1


def picture(side: int = 16) -> Any:
    numbers = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return Picture.fromarray(numbers)


@pytest.mark.parametrize(("kind", "channels"), [("image", 4), ("inpaint", 4), ("inpaint", 9)])
def test_image_to_image_and_inpainting_are_the_stock_pipes(
    kind: str, channels: int, tmp_path: Path
) -> None:
    own = toy_pipe(tmp_path, kind, channels)
    options: dict[str, Any] = {"image": picture(), "strength": 0.7, "eta": 1.0}
    if kind == "inpaint":
        mask = np.zeros((16, 16), dtype=np.uint8)
        mask[4:12] = 255
        options |= {"mask_image": Picture.fromarray(mask), "height": 16, "width": 16}
    stock = drawn(own, **options)
    one = SpeculativeDiffusion(own, block=1)
    torch.testing.assert_close(drawn(one, **options), stock, rtol=1e-4, atol=1e-4)
    fast = SpeculativeDiffusion(own, block=4)
    assert drawn(fast, **options).isfinite().all()
    assert fast.last_stats is not None
    assert fast.last_stats.steps == 8  # 0.7 of 12


def test_given_latents_are_kept(pipe: Any) -> None:
    pipe.scheduler = SAMPLERS["ddim0"][0]
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    stock = drawn(pipe, latents=latents)
    fast = SpeculativeDiffusion(pipe, mode="tolerance", tol=0.0)
    torch.testing.assert_close(drawn(fast, latents=latents), stock, rtol=1e-4, atol=1e-4)


def test_a_cost_table_changes_the_choice(pipe: Any) -> None:
    """Where a batch costs what its rows cost, single steps are taken; where it costs nothing,
    blocks."""
    pipe.scheduler = SAMPLERS["ddpm"][0]
    rounds = {}
    for name, costs in (("cpu", {1: 1.0, 64: 64.0}), ("gpu", {1: 1.0, 64: 1.1})):
        fast = SpeculativeDiffusion(pipe, costs=costs)
        for seed in range(3):
            drawn(fast, seed=seed)
        assert fast.last_stats is not None
        rounds[name] = fast.last_stats.rounds
        if name == "cpu":
            assert fast.last_stats.rows == 12 * 2
    assert rounds["gpu"] < 12 <= rounds["cpu"]


# ---- what is refused -----------------------------------------------------------------------------


def test_a_sampler_without_noise_is_no_exact_mode(pipe: Any) -> None:
    pipe.scheduler = SAMPLERS["ddim0"][0]
    before = restored(pipe)
    with pytest.raises(InvalidParameter, match="no noise") as caught:
        drawn(SpeculativeDiffusion(pipe))
    assert "tolerance" in str(caught.value.hint)
    pipe.scheduler = SAMPLERS["ddpm"][0]
    with pytest.raises(InvalidParameter, match="draws noise"):
        drawn(SpeculativeDiffusion(pipe, mode="tolerance"))
    del before


def test_another_scheduler_is_refused_before_anything_runs(pipe: Any) -> None:
    pipe.scheduler = PNDMScheduler()
    with pytest.raises(InvalidParameter, match="PNDMScheduler"):
        drawn(SpeculativeDiffusion(pipe))
    assert "forward" not in pipe.unet.__dict__


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "fast"}, "mode"),
        ({"block": 0}, "block"),
        ({"block": "long"}, "block"),
        ({"block": True}, "block"),
        ({"tol": float("inf")}, "tol"),
        ({"tol": 0.005}, "exact mode has none"),
        ({"tol": -1.0}, "tol"),
        ({"tol": float("nan")}, "tol"),
        ({"draft": "nonsense"}, "draft"),
    ],
)
def test_options_are_refused_by_name(pipe: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidParameter, match=words):
        SpeculativeDiffusion(pipe, **options)


def test_a_pipe_without_a_unet_is_refused() -> None:
    with pytest.raises(InvalidParameter, match="no UNet"):
        SpeculativeDiffusion(object())


def test_nan_is_an_error_and_leaves_nothing(pipe: Any) -> None:
    pipe.scheduler = SAMPLERS["ddpm"][0]
    bias = pipe.unet.conv_out.bias
    kept = bias.detach().clone()
    try:
        with torch.no_grad():
            bias.fill_(float("nan"))
        with pytest.raises(UnusableLogits, match="NaN"):
            drawn(SpeculativeDiffusion(pipe))
    finally:
        with torch.no_grad():
            bias.copy_(kept)
    assert "forward" not in pipe.unet.__dict__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert drawn(pipe).isfinite().all()
