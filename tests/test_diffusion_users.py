"""What users do around a pipe's loop: the stock pipe at block 1 and at tolerance 0, whatever it
is, or one line that says why not."""

import copy
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image as Picture
from torch import Tensor
from toy_diffusion import CLEAN, toy_pipe, toy_unet
from toy_diffusion_xl import toy_xl_pipe

from flashdraft.diffusion import calls
from flashdraft.diffusion.lengths import Lengths
from flashdraft.diffusion.patches import Mark
from flashdraft.diffusion.pipeline import SpeculativeDiffusion
from flashdraft.diffusion.sampler import Decision
from flashdraft.errors import InvalidParameter, UnusableLogits

STEPS = 6


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return toy_pipe(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def pipe(toy: Any) -> Any:
    toy.scheduler = DDIMScheduler(clip_sample=False, **CLEAN)
    return toy


def drawn(pipe: Any, **options: Any) -> Tensor:
    """Latents."""
    asked = {"prompt": "abc", "num_inference_steps": STEPS, "output_type": "latent"} | options
    asked.setdefault("generator", torch.Generator().manual_seed(0))
    images: Tensor = pipe(**asked).images
    return images


def fast(pipe: Any, **options: Any) -> SpeculativeDiffusion:
    return SpeculativeDiffusion(pipe, **{"costs": "flat"} | options)


def picture(side: int = 16) -> Any:
    numbers = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return Picture.fromarray(numbers)


def check_like_stock(pipe: Any, options: Callable[[], dict[str, Any]]) -> None:
    """The stock pipe's latents, by single steps with noise and by blocks without; and blocks that
    are fewer."""
    stock = drawn(pipe, eta=1.0, **options())
    ours = drawn(fast(pipe, block=1), eta=1.0, **options())
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
    stock = drawn(pipe, **options())
    ours = drawn(fast(pipe, mode="tolerance", block=4, tol=0.0), **options())
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
    own = fast(pipe, block=4)
    assert drawn(own, eta=1.0, **options()).isfinite().all()
    assert own.last_stats is not None
    assert own.last_stats.rounds < own.last_stats.steps


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def one_for_both() -> dict[str, Any]:
    (shared,) = seeded(3)
    return {"prompt": ["abc", "xyz"], "generator": [shared, shared]}


OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "generators of a list": lambda: {
        "prompt": ["abc", "xyz"],
        "generator": seeded(1, 2),
        "guidance_scale": 4.0,
        "negative_prompt": ["no", "nor"],
    },
    "one generator twice in a list": one_for_both,
    "images of one prompt": lambda: {"num_images_per_prompt": 3, "generator": seeded(1, 2, 3)},
    "rescaled guidance": lambda: {"guidance_scale": 4.0, "guidance_rescale": 0.7},
    "embeddings": lambda: {
        "prompt": None,
        "prompt_embeds": torch.ones(1, 8, 16),
        "negative_prompt_embeds": torch.zeros(1, 8, 16),
        "guidance_scale": 3.0,
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_the_pipe_are_kept(pipe: Any, name: str) -> None:
    check_like_stock(pipe, OPTIONS[name])


@pytest.mark.parametrize("kind", ["text", "image", "inpaint"])
def test_xl_is_the_stock_pipe(kind: str, tmp_path: Path) -> None:
    own = toy_xl_pipe(tmp_path, kind)
    options: dict[str, Any] = {"guidance_scale": 3.0, "num_images_per_prompt": 2}
    if kind == "text":
        options["denoising_end"] = 0.8
    else:
        options |= {"image": picture(), "strength": 0.7}
    if kind == "inpaint":
        mask = np.zeros((16, 16), dtype=np.uint8)
        mask[4:12] = 255
        options |= {"mask_image": Picture.fromarray(mask), "height": 16, "width": 16}
        stock = drawn(own, **options)
        ours = drawn(fast(own, mode="tolerance", block=4, tol=0.0), **options)
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
        return
    check_like_stock(own, lambda: options)


@pytest.mark.parametrize("steps", [1, 2])
def test_few_steps_are_the_stock_pipes(pipe: Any, steps: int) -> None:
    for scheduler in (pipe.scheduler, DDPMScheduler(clip_sample=False, **CLEAN)):
        pipe.scheduler = scheduler
        options = {"num_inference_steps": steps, "eta": 1.0}
        stock = drawn(pipe, **options)
        torch.testing.assert_close(drawn(fast(pipe, block=4), **options), stock, atol=1, rtol=1)
        ours = drawn(fast(pipe, block=1), **options)
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_latents_void_nothing(dtype: torch.dtype, tmp_path: Path) -> None:
    """And noises are drawn in the sampler's own dtype: DPM-Solver's is float32."""
    own = toy_pipe(tmp_path).to(dtype)
    own.set_progress_bar_config(disable=True)
    sde = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=1, **CLEAN)
    for scheduler in (DDPMScheduler(clip_sample=False, **CLEAN), sde):
        own.scheduler = scheduler
        stock = drawn(own)
        ours = drawn(fast(own, block=1))
        assert ours.dtype == dtype
        gap = (ours.float() - stock.float()).norm() / stock.float().norm()
        assert float(gap) < (0.1 if dtype == torch.bfloat16 else 0.02)
        blocks = fast(own, block=4)
        drawn(blocks)
        assert blocks.last_stats is not None
        assert blocks.last_stats.voids == 0
        assert blocks.last_stats.rounds < STEPS


# ---- callbacks -----------------------------------------------------------------------------------


def scales_latents_in_place(pipe: Any, step: int, time: Any, tensors: Any) -> dict[str, Any]:
    if step == 3:
        tensors["latents"].mul_(1.5)
    return {}


def scales_embeddings_in_place(pipe: Any, step: int, time: Any, tensors: Any) -> dict[str, Any]:
    if step == 3:
        tensors["prompt_embeds"].mul_(20.0)
    return {}


def frees_up(pipe: Any, step: int, time: Any, tensors: Any) -> dict[str, Any]:
    if step == 3:
        pipe.enable_freeu(0.1, 0.1, 3.0, 3.0)
    return {}


def stops(pipe: Any, step: int, time: Any, tensors: Any) -> dict[str, Any]:
    pipe._interrupt = step == 3
    return {}


def cuts_guidance_off() -> Any:
    return SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=2)


@pytest.mark.parametrize(
    "callback",
    [
        scales_latents_in_place,
        scales_embeddings_in_place,
        frees_up,
        stops,
        cuts_guidance_off(),
    ],
)
@pytest.mark.parametrize("solver", ["ddim", "2m"])
def test_what_callbacks_do_is_done(pipe: Any, callback: Any, solver: str) -> None:
    """Tolerance 0 is exactly the stock pipe; the blocks that such a change voids are counted."""
    if solver == "2m":
        pipe.scheduler = DPMSolverMultistepScheduler(**CLEAN)

    def options(generator: torch.Generator) -> dict[str, Any]:
        inputs = ["latents", "prompt_embeds"]
        return {
            "guidance_scale": 4.0,
            "generator": generator,
            "callback_on_step_end": callback,
            "callback_on_step_end_tensor_inputs": inputs,
        }

    theirs, own = seeded(0, 0)
    try:
        stock = drawn(pipe, **options(theirs))
        pipe.disable_freeu()
        ours = drawn(fast(pipe, mode="tolerance", block=6, tol=0.0), **options(own))
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
        assert torch.equal(theirs.get_state(), own.get_state())
        pipe.disable_freeu()
        loose = fast(pipe, mode="tolerance", block=8, tol=1e3)
        drawn(loose, **options(own))
        assert loose.last_stats is not None
        assert loose.last_stats.voids == (0 if callback is stops else 1)
    finally:
        pipe.disable_freeu()


@pytest.mark.parametrize("what", ["settings", "conditions"])
def test_a_change_that_is_not_looked_for_is_seen_by_these_tests(
    pipe: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted."""
    if what == "settings":
        monkeypatch.setattr(calls.Settings, "are_now", lambda own: True)
        callback = frees_up
    else:
        monkeypatch.setattr(calls, "_copied", lambda value: value)
        callback = scales_embeddings_in_place
    options: dict[str, Any] = {
        "guidance_scale": 4.0,
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    loose = fast(pipe, mode="tolerance", block=8, tol=1e3)
    drawn(loose, **options)
    pipe.disable_freeu()
    assert loose.last_stats is not None
    assert loose.last_stats.voids == 0


def changing_at(*steps: int) -> Callable[..., dict[str, Any]]:
    def change(own: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * 1.01} if step in steps else {}

    return change


def test_only_blocks_in_a_row_that_become_void_end_them(pipe: Any) -> None:
    own = fast(pipe, mode="tolerance", block=4, tol=0.5)
    rounds = []
    for steps in ((2, 9, 16), range(24)):  # now and then, and every step
        drawn(own, num_inference_steps=24, callback_on_step_end=changing_at(*steps))
        assert own.last_stats is not None
        rounds.append(own.last_stats.rounds)
    assert rounds[0] <= 11
    assert rounds[1] == 24
    assert own.last_stats is not None
    assert own.last_stats.voids == 2


def test_lengths_learn_of_no_step_that_may_still_become_void(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its noise and its coin are used again where it is done anew."""
    change = changing_at(3)
    learned: list[int] = []
    learn = Lengths.learn

    def seen(self: Lengths, decisions: Iterable[Decision]) -> None:
        own = list(decisions)
        learned.extend(one.step for one in own)
        learn(self, own)

    def check(own: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert all(other <= step for other in learned)
        return change(own, step, time, tensors)

    monkeypatch.setattr(Lengths, "learn", seen)
    own = fast(pipe)
    drawn(own, eta=1.0, num_inference_steps=12, callback_on_step_end=check)
    assert own.last_stats is not None
    assert own.last_stats.voids == 1
    assert len(learned) > 4


def test_whoever_draws_from_the_generator_voids_the_noises_seen_ahead(pipe: Any) -> None:
    """Else the noise of a later step would be what a callback has got."""

    def options() -> dict[str, Any]:
        (own,) = seeded(0)

        def draw(*_: Any) -> dict[str, Any]:
            torch.randn(3, generator=own)
            return {}

        return {"generator": own, "callback_on_step_end": draw, "eta": 1.0}

    stock = drawn(pipe, **options())
    one = drawn(fast(pipe, block=1), **options())
    torch.testing.assert_close(one, stock, rtol=1e-4, atol=1e-4)
    blocks = fast(pipe, block=5)
    drawn(blocks, **options())
    assert blocks.last_stats is not None
    assert blocks.last_stats.voids > 0


def test_an_image_with_its_own_generator_is_what_it_is_alone(pipe: Any) -> None:
    prompts = ["abc", "xyz", "hello"]
    blocks = fast(pipe, block=5)
    together = drawn(blocks, prompt=prompts, generator=seeded(5, 6, 7), eta=1.0)
    for place, prompt in enumerate(prompts):
        alone = drawn(blocks, prompt=prompt, generator=seeded(5 + place), eta=1.0)
        torch.testing.assert_close(alone[0], together[place], rtol=1e-4, atol=1e-4)


def test_a_callback_that_raises_leaves_a_context_that_works(pipe: Any) -> None:
    def fails(*_: Any) -> dict[str, Any]:
        raise ZeroDivisionError

    stock = drawn(pipe)
    with fast(pipe, mode="tolerance", block=5, tol=0.0) as own:
        with pytest.raises(ZeroDivisionError):
            drawn(pipe, callback_on_step_end=fails, prompt=["abc", "xyz"])
        torch.testing.assert_close(drawn(own), stock, rtol=1e-4, atol=1e-4)
        few = drawn(own, num_inference_steps=3, num_images_per_prompt=2)
    torch.testing.assert_close(
        few, drawn(pipe, num_inference_steps=3, num_images_per_prompt=2), rtol=1e-4, atol=1e-4
    )


# ---- the pipe's parts ----------------------------------------------------------------------------


def test_parts_may_be_swapped_within_a_context(pipe: Any) -> None:
    first, unet = pipe.scheduler, pipe.unet
    with fast(pipe, block=5) as own:
        drawn(pipe, eta=1.0)
        pipe.scheduler = DDPMScheduler(clip_sample=False, **CLEAN)
        assert "step" in first.__dict__
        drawn(pipe)
        assert own.last_stats is not None
        assert own.last_stats.rounds < STEPS
        assert "step" not in first.__dict__
        pipe.unet = toy_unet()
        drawn(own)
        assert "forward" not in unet.__dict__
        pipe.scheduler = PNDMScheduler()
        with pytest.raises(InvalidParameter, match="PNDM"):
            drawn(pipe)
    assert "forward" not in pipe.unet.__dict__
    pipe.unet = unet


def test_the_old_scheduler_is_taken_again_where_another_was_refused(pipe: Any) -> None:
    first = pipe.scheduler
    other = DDPMScheduler(clip_sample=False, **CLEAN)
    Mark(other)
    with fast(pipe, block=5) as own:
        drawn(pipe, eta=1.0)
        before = own.last_stats
        pipe.scheduler = other
        with pytest.raises(InvalidParameter, match="another SpeculativeDiffusion context"):
            drawn(pipe)
        pipe.scheduler = first
        drawn(pipe, eta=1.0)
        assert own.last_stats is not None
        assert own.last_stats is not before
        assert own.last_stats.rounds < STEPS
    assert "step" not in first.__dict__


def test_copies_are_refused_in_a_context_and_saving_works(pipe: Any, tmp_path: Path) -> None:
    with fast(pipe):
        for part in (pipe.unet, pipe.scheduler):
            with pytest.raises(InvalidParameter, match="copied"):
                copy.deepcopy(part)
        with pytest.raises(InvalidParameter, match="copied"):
            torch.save(pipe.unet, tmp_path / "unet.pt")
        pipe.unet.save_pretrained(tmp_path / "unet")
        pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    saved = copy.deepcopy(pipe.unet).state_dict()
    again = type(pipe.unet).from_pretrained(tmp_path / "unet").state_dict()
    assert saved.keys() == again.keys()


def test_patches_of_others_are_kept(pipe: Any) -> None:
    """A user's, from before and from within a context; and one that is put on anew after every
    call, as accelerate's where models are offloaded."""
    unet = pipe.unet
    plain = unet.forward
    stock = drawn(pipe)
    seen = []

    def before(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return plain(*args, **kwargs)

    unet.forward = before
    try:
        with fast(pipe, mode="tolerance", block=5, tol=0.0) as own:
            torch.testing.assert_close(drawn(own), stock, rtol=1e-4, atol=1e-4)
            patched = unet.forward

            def within(*args: Any, **kwargs: Any) -> Any:
                return patched(*args, **kwargs)

            unet.forward = within
            torch.testing.assert_close(drawn(own), stock, rtol=1e-4, atol=1e-4)
            unet.forward = before
            torch.testing.assert_close(drawn(own), stock, rtol=1e-4, atol=1e-4)
            assert own.last_stats is not None
        assert unet.forward is before
        assert seen
    finally:
        del unet.forward


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_unet_is_the_stock_one(how: str, tmp_path: Path) -> None:
    own = toy_pipe(tmp_path)
    if how == "wrapped":
        own.unet = torch.compile(own.unet, backend="eager")
    else:
        own.unet.compile(backend="eager")
    before = dict(own.unet.__dict__)
    with torch.compiler.set_stance("force_eager"):  # the wrapping is what is tested
        stock = drawn(own, num_inference_steps=4)
        blocks = fast(own, mode="tolerance", block=3, tol=0.0)
        ours = drawn(blocks, num_inference_steps=4)
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
    assert blocks.last_stats is not None
    assert blocks.last_stats.drafted > 0
    after = own.unet.__dict__
    assert before.keys() == after.keys()
    assert all(after[name] is value for name, value in before.items())


def test_two_threads_are_told(pipe: Any) -> None:
    barrier = threading.Barrier(2)
    told: list[str] = []

    def meet(pipe: Any, step: int, time: Any, tensors: Any) -> dict[str, Any]:
        if step == 0:
            barrier.wait()
        return {}

    def work() -> None:
        try:
            drawn(pipe, callback_on_step_end=meet, eta=1.0)
        except (InvalidParameter, threading.BrokenBarrierError) as error:
            told.append(str(error))
            barrier.abort()

    with fast(pipe, block=4):
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert any("two threads" in text for text in told)


# ---- what is refused -----------------------------------------------------------------------------


class Together:
    """Attention whose rows see each other, as a style for all images of a batch has it."""

    def __call__(self, attention: Any, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        said: Tensor = AttnProcessor()(attention, states, *args, **kwargs)
        return said + said.mean(0, keepdim=True)


def refused(pipe: Any, **options: Any) -> str:
    with pytest.raises(InvalidParameter) as caught:
        drawn(fast(pipe, block=4), eta=1.0, **options)
    assert "forward" not in vars(pipe.unet) or "_flashdraft" not in vars(pipe.unet)
    assert "\n" not in caught.value.args[0].split("\nhint")[0]
    return str(caught.value)


def test_a_unet_whose_rows_see_each_other_is_refused(pipe: Any) -> None:
    before = pipe.unet.attn_processors
    try:
        pipe.unet.set_attn_processor(Together())
        assert "rest of the batch" in refused(pipe)
        drawn(fast(pipe, block=1), eta=1.0)  # as it is asked
    finally:
        pipe.unet.set_attn_processor(before)


def test_a_unet_that_keeps_what_it_said_is_refused(pipe: Any) -> None:
    """As DeepCache does it. And one that takes a single time."""
    plain = pipe.unet.forward
    kept: list[Any] = []

    def cached(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not kept or kept[0][0].shape != sample.shape or len(kept) == 3:
            kept.clear()
            kept.append(plain(sample, *args, **kwargs))
        kept.append(None)
        return kept[0]

    def single(sample: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Any:
        timestep.item()
        return plain(sample, timestep, *args, **kwargs)

    try:
        pipe.unet.forward = cached
        assert "earlier calls" in refused(pipe)
        pipe.unet.forward = single
        assert "different steps in one batch" in refused(pipe)
    finally:
        del pipe.unet.forward


def test_unequal_settings_in_a_batch_are_refused(pipe: Any) -> None:
    with fast(pipe, block=4):
        pipe.scheduler.set_timesteps(STEPS)
        latents = torch.randn(2, 4, 8, 8)
        text = torch.zeros(2, 8, 16)
        times = pipe.scheduler.timesteps[:2]
        with pytest.raises(InvalidParameter, match="different steps"):
            pipe.unet(latents, times, encoder_hidden_states=text)

    def by_image(own: Any, step: int, time: Any, tensors: Any) -> dict[str, Any]:
        own._guidance_scale = torch.tensor([2.0, 3.0]).view(2, 1, 1, 1)
        return {}

    asked: dict[str, Any] = {"prompt": ["abc", "xyz"], "guidance_scale": 3.0}
    with pytest.raises((InvalidParameter, RuntimeError), match=r"not one number|Boolean value"):
        drawn(fast(pipe, block=4), eta=1.0, callback_on_step_end=by_image, **asked)
    del pipe._guidance_scale  # the pipe is other tests', too


def test_a_scheduler_whose_step_was_replaced_is_refused(pipe: Any) -> None:
    """What somebody has put around it would not be called."""
    own = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kwargs: own(*args, **kwargs)
    try:
        with pytest.raises(InvalidParameter, match="has replaced its DDIMScheduler's `step`"):
            drawn(fast(pipe))
    finally:
        del pipe.scheduler.step


@pytest.mark.parametrize(
    "name",
    [
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
    ],
)
def test_residuals_of_one_point_are_refused(pipe: Any, name: str) -> None:
    with fast(pipe, block=4):
        pipe.scheduler.set_timesteps(STEPS)
        latents, text = torch.randn(1, 4, 8, 8), torch.zeros(1, 8, 16)
        with pytest.raises(InvalidParameter, match=name):
            pipe.unet(latents, 1, encoder_hidden_states=text, **{name: (latents,)})


def test_nan_counts_only_where_it_is_reached(pipe: Any) -> None:
    """A drafted point may lie where the UNet overflows; nobody has come there."""
    plain = pipe.unet.forward
    row = -1

    def overflows(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = plain(sample, *args, **kwargs)[0].clone()
        if len(sample) > 4:  # a block; the rows that are seen to be independent are fewer
            output[row] = torch.nan
        return (output,)

    try:
        pipe.unet.forward = overflows
        stock_like = fast(pipe, mode="tolerance", block=5, tol=0.0)
        assert drawn(stock_like).isfinite().all()
        row = 0
        with pytest.raises(UnusableLogits, match="NaN"):
            drawn(stock_like)
    finally:
        del pipe.unet.forward


def test_a_users_own_loop_is_drafted_too(pipe: Any) -> None:
    """Its scale of guidance is nowhere but in the loop."""

    def own_loop() -> Tensor:
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        text = torch.stack([torch.zeros(8, 16), torch.ones(8, 16)])
        pipe.scheduler.set_timesteps(STEPS)
        with torch.no_grad():
            for time in pipe.scheduler.timesteps:
                rows = pipe.scheduler.scale_model_input(torch.cat([latents] * 2), time)
                said = pipe.unet(rows, time, encoder_hidden_states=text).sample
                without, with_text = said.chunk(2)
                output = without + 6.5 * (with_text - without)
                latents = pipe.scheduler.step(output, time, latents).prev_sample
        return latents

    stock = own_loop()
    with fast(pipe, mode="tolerance", block=5, tol=0.0):
        torch.testing.assert_close(own_loop(), stock, rtol=1e-4, atol=1e-4)
    with fast(pipe, mode="tolerance", block=5, tol=0.5) as loose:
        own_loop()
        assert loose.last_stats is not None
        assert loose.last_stats.rounds < STEPS
