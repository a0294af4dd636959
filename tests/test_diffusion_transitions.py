"""The tables of steps against diffusers' own `scheduler.step`, one step after the other."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)

from flashdraft.diffusion.transitions import Transitions, check, transitions
from flashdraft.errors import InvalidParameter

SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("linspace", "leading", "trailing")
SIZE = (2, 4, 3, 5)
CLOSE = 1e-4  # of the largest latent: diffusers' own steps are in float32

DDPMS = [{"clip_sample": clip} for clip in (True, False)]
DDPMS += [{"variance_type": "fixed_large"}, {"thresholding": True}, {"steps_offset": 1}]
DDIMS = [{"clip_sample": clip, "steps_offset": int(clip)} for clip in (True, False)]
DDIMS += [{"set_alpha_to_one": False}, {"thresholding": True, "rescale_betas_zero_snr": False}]
SDE = {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}
SOLVERS: list[dict[str, Any]] = [SDE, SDE | {"use_karras_sigmas": True}, {"solver_order": 1}]
SOLVERS += [{"solver_type": kind} for kind in ("midpoint", "heun")]
SOLVERS += [{"final_sigmas_type": "sigma_min", "euler_at_final": last} for last in (True, False)]


def worst_gap(scheduler: Any, table: Transitions, eta: float | None, first: int = 0) -> float:
    """Over all steps: how far a step by the table is from the scheduler's, each from the
    scheduler's last latents, relative to the largest of them."""
    generator = torch.Generator().manual_seed(0)
    point = torch.randn(SIZE, generator=generator) * float(scheduler.init_noise_sigma)
    before = torch.zeros_like(point)
    worst = 0.0
    options = {} if eta is None else {"eta": eta}
    for step, time in enumerate(scheduler.timesteps[first:]):
        scaled = scheduler.scale_model_input(point, time)
        torch.testing.assert_close(scaled, point * float(table.scale[step]), rtol=1e-5, atol=1e-6)
        output = torch.randn(SIZE, generator=generator)
        own = torch.Generator().manual_seed(step)
        later = scheduler.step(output, time, point, generator=own, **options).prev_sample
        noise = torch.randn(SIZE, generator=torch.Generator().manual_seed(step))
        steps = torch.full([len(point)], step)
        said = table.predicted(steps, point, output)
        mean = table.mean(steps, point, said, before)
        ours = mean + float(table.deviation[step]) * noise
        drew = bool((own.get_state() != torch.Generator().manual_seed(step).get_state()).any())
        assert drew == table.draws[step]
        gap = float((ours - later).abs().max() / later.abs().max())
        assert math.isfinite(gap)  # `max` would pass over it
        worst = max(worst, gap)
        before = said.clean
        point = later
    return worst


@pytest.mark.parametrize("steps", [7, 16, 20])  # few; many that divide 1000, or not
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_step_is_the_schedulers(prediction: str, spacing: str, steps: int) -> None:
    own = {"prediction_type": prediction, "timestep_spacing": spacing, **SCHEDULE}
    cases: list[tuple[Any, float | None]] = []
    cases += [(DDPMScheduler(**own | more), None) for more in DDPMS]
    for more in DDIMS:
        cases += [(DDIMScheduler(**own | more), eta) for eta in (0.0, 0.4, 1.0)]
    cases += [(DPMSolverMultistepScheduler(**own | more), None) for more in SOLVERS]
    if prediction != "sample":  # which the scheduler itself has not
        cases.append((EulerAncestralDiscreteScheduler(**own), None))
    for scheduler, eta in cases:
        scheduler.set_timesteps(steps)
        table = transitions(scheduler, eta=eta or 0.0)
        gap = worst_gap(scheduler, table, eta)
        assert gap < CLOSE, (scheduler, eta)


RARE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "ddpm": lambda own: DDPMScheduler(clip_sample=False, **own),
    "ddpm in logarithms": lambda own: DDPMScheduler(variance_type="fixed_small_log", **own),
    "ddim": lambda own: DDIMScheduler(clip_sample=False, **own),
    "ddim, clipped": lambda own: DDIMScheduler(clip_sample_range=0.5, **own),
    "2m": lambda own: DPMSolverMultistepScheduler(**own),
    "2m by exponents": lambda own: DPMSolverMultistepScheduler(use_exponential_sigmas=True, **own),
    "2m, ends of higher order": lambda own: DPMSolverMultistepScheduler(
        lower_order_final=False, lambda_min_clipped=-5.1, **own
    ),
    "sde by Lu's steps": lambda own: DPMSolverMultistepScheduler(use_lu_lambdas=True, **own | SDE),
    "euler": lambda own: EulerAncestralDiscreteScheduler(**own),
}


@pytest.mark.parametrize("has_no_signal", [False, True])
@pytest.mark.parametrize("name", RARE)
def test_one_step_two_steps_and_a_start_without_signal(name: str, has_no_signal: bool) -> None:
    """rescale_betas_zero_snr: the first point is noise alone. (With eta=1 DDIM's own step is NaN
    there.)"""
    for steps in (1, 2, 6):
        for spacing in SPACINGS:
            own = SCHEDULE | {"prediction_type": "v_prediction", "timestep_spacing": spacing}
            scheduler = RARE[name](own | {"rescale_betas_zero_snr": has_no_signal})
            scheduler.set_timesteps(steps)
            eta = 0.5 if name.startswith("ddim") else None
            table = transitions(scheduler, eta=eta or 0.0)
            assert worst_gap(scheduler, table, eta) < 3 * CLOSE, (spacing, steps)


@pytest.mark.parametrize(
    "new",
    [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler],
)
def test_a_loop_that_begins_late_is_the_schedulers(new: Callable[..., Any]) -> None:
    """As image to image does it."""
    scheduler = new(**SCHEDULE)
    scheduler.set_timesteps(20)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(8)
    eta = 0.5 if new is DDIMScheduler else None
    table = transitions(scheduler, eta=eta or 0.0, first=8)
    assert table.num_steps == 12
    assert worst_gap(scheduler, table, eta, first=8) < CLOSE


@pytest.mark.parametrize("name", ["state", "clean", "noise", "before", "deviation"])
def test_a_faulty_table_is_seen(name: str) -> None:
    scheduler: Any = DDIMScheduler(**SCHEDULE)
    eta: float | None = 0.5
    if name == "before":
        scheduler, eta = DPMSolverMultistepScheduler(**SCHEDULE), None
    if name == "state":
        scheduler, eta = DDPMScheduler(**SCHEDULE), None
    scheduler.set_timesteps(20)
    table = transitions(scheduler, eta=eta or 0.0)
    faulty = replace(table, **{name: getattr(table, name) * 1.01})
    assert worst_gap(scheduler, faulty, eta) > CLOSE


def test_the_weight_of_clean_latents_is_the_gain_in_signal_to_noise() -> None:
    """2501.05370, section 4: |D|^2 = (SNR' - SNR) |x0 - x0'|^2, of DDPM and of DDIM(1)."""
    from flashdraft.diffusion.lengths import weights_of

    for scheduler, eta in ((DDPMScheduler(**SCHEDULE), 0.0), (DDIMScheduler(**SCHEDULE), 1.0)):
        scheduler.set_timesteps(50)
        table = transitions(scheduler, eta=eta)
        ratio = (table.alpha / table.sigma) ** 2
        torch.testing.assert_close(weights_of(table)[:-1], ratio[1:] - ratio[:-1])


class OwnStep(DDIMScheduler):
    """A user's, which does something else in its steps."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        return (super().step(*args, **kwargs)[0] * 2,)


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (PNDMScheduler(), "PNDMScheduler"),
        (HeunDiscreteScheduler(), "HeunDiscreteScheduler"),
        (LCMScheduler(), "LCMScheduler"),
        (FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler"),
        (DDPMScheduler(variance_type="learned_range"), "variance_type"),
        (DPMSolverMultistepScheduler(variance_type="learned"), "variance_type"),
        (DPMSolverMultistepScheduler(solver_order=3), "solver_order"),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), "solver_order"),
        (
            DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
            "flow",
        ),
        (DDPMScheduler(variance_type="fixed_large_log"), "variance_type"),
        (EulerAncestralDiscreteScheduler(prediction_type="sample"), "prediction_type"),
        (OwnStep(), "a `step` of its own"),
        (object(), "object"),
    ],
)
def test_what_is_not_known_is_refused_by_name(scheduler: Any, words: str) -> None:
    with pytest.raises(InvalidParameter, match=words):
        check(scheduler)


@pytest.mark.filterwarnings("ignore:.*algorithm_type dpmsolver is deprecated")
def test_an_older_solver_is_refused_by_name() -> None:
    with pytest.raises(InvalidParameter, match="algorithm_type"):
        check(
            DPMSolverMultistepScheduler(algorithm_type="dpmsolver", final_sigmas_type="sigma_min")
        )


def test_what_is_left_of_another_schedulers_config_is_no_setting() -> None:
    """`from_config` keeps entries that are not the scheduler's own."""
    solver = DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_order=3)
    ddim = DDIMScheduler.from_config(solver.config)
    assert ddim.config.get("algorithm_type") == "dpmsolver++"
    check(ddim)
