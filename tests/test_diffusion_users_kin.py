"""Options and kinds of pipes that few use: the stock pipe, or refused by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    StableDiffusionInstructPix2PixPipeline,
)
from test_diffusion_users import (
    STEPS,
    check_like_stock,
    drawn,
    fast,
    picture,
    pipe,
    refused,
    seeded,
    toy,
)
from toy_diffusion import CLEAN, toy_pipe
from toy_diffusion_xl import toy_xl_pipe

from flashdraft.diffusion.pipeline import SpeculativeDiffusion
from flashdraft.errors import InvalidParameter

__all__ = ["pipe", "toy"]

TIMES = [900, 700, 520, 410, 300, 40]


def test_xl_that_refines_from_a_middle_step_is_the_stock_pipe(tmp_path: Path) -> None:
    """`denoising_start`: the latents are another pipe's, as they are."""
    own = toy_xl_pipe(tmp_path, "image")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"image": latents, "denoising_start": 0.4, "guidance_scale": 3.0}
    check_like_stock(own, lambda: options | {"num_inference_steps": 10})


@pytest.mark.parametrize("name", ["ddpm", "2m"])
def test_timesteps_that_a_user_gives_are_taken(pipe: Any, name: str) -> None:
    pipe.scheduler = DDPMScheduler(clip_sample=False, **CLEAN)
    mode = "exact"
    block = 1
    if name == "2m":
        pipe.scheduler = DPMSolverMultistepScheduler(**CLEAN)
        mode = "tolerance"
        block = 4
    stock = drawn(pipe, timesteps=TIMES)
    ours = drawn(
        fast(pipe, mode=mode, block=block, tol=0.0 if mode == "tolerance" else None),
        timesteps=TIMES,
    )
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
    evenly = drawn(pipe)
    assert not torch.allclose(evenly, stock, rtol=1e-2, atol=1e-2)
    blocks = fast(pipe, mode=mode, block=4, tol=0.5 if mode == "tolerance" else None)
    drawn(blocks, timesteps=TIMES)
    assert blocks.last_stats is not None
    assert blocks.last_stats.rounds < STEPS


@pytest.mark.filterwarnings("ignore:.callback:FutureWarning")
def test_a_callback_of_the_old_kind_sees_what_it_saw(pipe: Any) -> None:
    seen: list[tuple[int, int, torch.Tensor]] = []

    def look(step: int, time: Any, latents: torch.Tensor) -> None:
        seen.append((step, int(time), latents.clone()))

    options: dict[str, Any] = {"callback": look, "callback_steps": 2}
    drawn(pipe, **options)
    theirs = seen.copy()
    seen.clear()
    drawn(fast(pipe, mode="tolerance", block=4, tol=0.0), **options)
    assert [one[:2] for one in seen] == [one[:2] for one in theirs]
    assert len(seen) == STEPS // 2
    for ours, stock in zip(seen, theirs, strict=True):
        torch.testing.assert_close(ours[2], stock[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_pictures_come_as_they_are_asked_for(pipe: Any, kind: str) -> None:
    options = {"output_type": kind, "num_images_per_prompt": 2}
    blocks = fast(pipe, mode="tolerance", block=4, tol=0.0)
    pictures = []
    for own in (pipe, blocks):
        generator = seeded(0)[0]
        said = own("abc", num_inference_steps=STEPS, generator=generator, **options)
        pictures.append(said.images)
    stock, ours = pictures
    assert type(ours) is type(stock)
    assert len(ours) == 2
    for one, other in zip(ours, stock, strict=True):
        assert type(one) is type(other)
        reach = 1 if kind == "pil" else 1e-4  # of 255
        np.testing.assert_allclose(np.asarray(one, float), np.asarray(other, float), atol=reach)
    plain = blocks("abc", num_inference_steps=2, return_dict=False, **options)
    assert isinstance(plain, tuple)


def test_guidance_of_three_branches_is_refused(tmp_path: Path) -> None:
    """As InstructPix2Pix has it: by the text and by the picture."""
    parts = toy_pipe(tmp_path, channels=8).components
    own = StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    own.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"image": picture(), "guidance_scale": 4.0}
    assert "3 branches" in refused(own, **options)
    options["guidance_scale"] = 1.0  # one branch, beside the picture's channels
    check_like_stock(own, lambda: options)


@pytest.mark.parametrize(
    "kind", [HeunDiscreteScheduler, LCMScheduler, FlowMatchEulerDiscreteScheduler]
)
def test_another_scheduler_is_refused_by_name_and_the_pipe_left_alone(pipe: Any, kind: Any) -> None:
    pipe.scheduler = kind()
    before = dict(vars(pipe.unet)), dict(vars(pipe.scheduler))
    for mode in ("exact", "tolerance"):
        with pytest.raises(InvalidParameter, match=kind.__name__) as caught:
            drawn(SpeculativeDiffusion(pipe, mode=mode))
        assert "DDIMScheduler" in str(caught.value.hint)
    assert (dict(vars(pipe.unet)), dict(vars(pipe.scheduler))) == before
