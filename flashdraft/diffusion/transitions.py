"""One step of a sampler, for many points of different steps at once.

Every sampler here goes from a point x to

    state * x + clean * x0 + noise * eps + before * x0_before + deviation * z

with the target's prediction (x0, eps) at x, that of the step before, and a standard normal z; the
coefficients are functions of the schedule alone. They are read once from the user's own scheduler,
for the steps that it was set to: DDPM (Ho et al. 2006.11239, equation 7), DDIM with any eta (Song
et al. 2010.02502, equation 12), DPM-Solver++ of first order with and without noise and of second
order without (Lu et al. 2211.01095, equations 8 to 10 and algorithm 2), Euler ancestral
(k-diffusion; Karras et al. 2206.00364). Whatever else the scheduler is, is refused by name.

Knows diffusers' schedulers. Does not know pipelines, drafts or couplings.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashdraft.errors import InvalidParameter
from flashdraft.process import DOUBLES

__all__ = ["Prediction", "Transitions", "check", "transitions"]

_RUNS = (
    "DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler or EulerAncestralDiscreteScheduler"
)


class Prediction(NamedTuple):
    """What a model says of points: the clean latents x0 and the noise eps in them, [n, ...]."""

    clean: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Transitions:
    """The steps of a sampler. All tensors are [steps], float64, on the CPU.

    Where a method takes `steps`, they are those of the points, [n], or one number for all points.

    A point before step k is alpha * x0 + sigma * eps; the model reads scale times the point, and
    the time. draws: whether the sampler draws noise in the step, even if its deviation is none.
    """

    alpha: Tensor
    sigma: Tensor
    scale: Tensor
    state: Tensor
    clean: Tensor
    noise: Tensor
    before: Tensor
    deviation: Tensor
    times: Tensor  # of the scheduler's own type
    draws: list[bool]
    predicts: str  # "epsilon", "v_prediction" or "sample"
    limited: Callable[[Tensor], Tensor] | None  # of x0: clipped, or by its own quantile
    noise_dtype: torch.dtype | None = None  # in which noise is drawn; None: the latents' own

    @property
    def num_steps(self) -> int:
        return len(self.state)

    @property
    def is_random(self) -> bool:
        """Whether any step has noise."""
        return bool((self.deviation > 0).any())

    def predicted(self, steps: Tensor | int, points: Tensor, outputs: Tensor) -> Prediction:
        """What the model's outputs say. points, outputs: [n, ...]."""
        alpha, sigma, scale = self._of(points, steps, self.alpha, self.sigma, self.scale)
        if self.predicts == "epsilon":
            clean = (points - sigma * outputs) / alpha
            noise = outputs
        elif self.predicts == "sample":
            clean = outputs
            noise = (points - alpha * outputs) / sigma
        else:
            alpha, sigma = alpha * scale, sigma * scale  # as the model's own schedule has them
            clean = alpha * scale * points - sigma * outputs
            noise = sigma * scale * points + alpha * outputs
        if self.limited is not None:
            clean = self.limited(clean)
        return Prediction(clean, noise)

    def implied(self, steps: Tensor | int, points: Tensor, clean: Tensor) -> Prediction:
        """What it would be to predict these clean latents [n, ...] of the points."""
        alpha, sigma = self._of(points, steps, self.alpha, self.sigma)
        return Prediction(clean, (points - alpha * clean) / sigma)

    def from_noise(self, steps: Tensor | int, points: Tensor, noise: Tensor) -> Prediction:
        """What it would be to predict this noise [n, ...] in the points."""
        alpha, sigma = self._of(points, steps, self.alpha, self.sigma)
        clean = (points - sigma * noise) / alpha
        if self.limited is not None:
            clean = self.limited(clean)
        return Prediction(clean, noise)

    def mean(
        self,
        steps: Tensor | int,
        points: Tensor,
        said: Prediction,
        before: Tensor | None = None,
    ) -> Tensor:
        """Where the step leads without its noise, [n, ...], float32 or wider.

        before: the clean latents that were predicted a step earlier, [n, ...]; None where no step
        asks for them.
        """
        names = (self.state, self.clean, self.noise, self.before)
        state, clean, noise, earlier = self._of(points, steps, *names)
        mean: Tensor = state * points + clean * said.clean + noise * said.noise
        if before is not None:
            mean = mean + earlier * before
        return mean

    def _of(self, points: Tensor, steps: Tensor | int, *tables: Tensor) -> list[Any]:
        """Entries of tables, as wide as the points; numbers where all points are of one step."""
        if isinstance(steps, int):
            return [float(table[steps]) for table in tables]
        shape = (-1, *[1] * (points.dim() - 1))
        return [table[steps.cpu()].to(points).view(shape) for table in tables]


def transitions(scheduler: Any, *, eta: float = 0.0, first: int = 0) -> Transitions:
    """The steps that `scheduler.set_timesteps` has set, from the first one that is done (image to
    image begins late). eta: of DDIM, as `scheduler.step` takes it.

    Raises InvalidParameter for a scheduler or a setting of one that is not known here.
    """
    read = _reader(scheduler)
    table = read(scheduler, eta)
    # Nothing is known of a step before the first.
    clean = table.clean[first:].clone()
    before = table.before[first:].clone()
    clean[0] += before[0]
    before[0] = 0.0
    return replace(
        table,
        alpha=table.alpha[first:],
        sigma=table.sigma[first:],
        scale=table.scale[first:],
        state=table.state[first:],
        clean=clean,
        noise=table.noise[first:],
        before=before,
        deviation=table.deviation[first:],
        times=table.times[first:],
        draws=table.draws[first:],
    )


def check(scheduler: Any) -> None:
    """Raises InvalidParameter for a scheduler that `transitions` would refuse, before it is set."""
    _reader(scheduler)


def _reader(scheduler: Any) -> "Callable[[Any, float], Transitions]":
    name = type(scheduler).__name__
    readers: dict[str, Callable[[Any, float], Transitions]] = {
        "DDPMScheduler": _ddpm,
        "DDIMScheduler": _ddim,
        "DPMSolverMultistepScheduler": _dpm_solver,
        "EulerAncestralDiscreteScheduler": _euler_ancestral,
    }
    for kind in type(scheduler).__mro__:
        if kind.__name__ in readers:
            _refuse_unknown_settings(scheduler)
            return readers[kind.__name__]
    raise _refusal(f"the scheduler is a {name}", f"it takes {_RUNS}")


def _refusal(got: str, hint: str) -> InvalidParameter:
    return InvalidParameter(got, hint=hint, option="scheduler")


def _refuse_unknown_settings(scheduler: Any) -> None:
    config = scheduler.config
    kind = config.get("variance_type")
    if kind in ("learned", "learned_range"):
        got = f"variance_type is {kind!r}: the target's own variances are not the draft's"
        raise _refusal(got, "block speculation needs variances that the schedule fixes")
    is_ddpm = "variance_type" in vars(scheduler)
    if is_ddpm and kind not in ("fixed_small", "fixed_small_log", "fixed_large"):
        raise _refusal(f"variance_type is {kind!r}", "it takes fixed_small or fixed_large")
    if config.prediction_type not in ("epsilon", "v_prediction", "sample"):
        got = f"prediction_type is {config.prediction_type!r}"
        raise _refusal(got, "it takes epsilon, v_prediction or sample")
    if config.prediction_type == "sample" and "is_scale_input_called" in vars(scheduler):
        raise _refusal(
            "prediction_type is 'sample', which Euler's ancestral scheduler has not",
            "it takes epsilon or v_prediction",
        )
    # Of another scheduler's config there may be more entries than the scheduler has settings.
    if hasattr(scheduler, "dpm_solver_first_order_update"):
        _refuse_other_solvers(config)


def _refuse_other_solvers(config: Any) -> None:
    kind = config.algorithm_type
    if kind not in ("dpmsolver++", "sde-dpmsolver++"):
        raise _refusal(f"algorithm_type is {kind!r}", "it takes dpmsolver++ or sde-dpmsolver++")
    most = 1 if kind == "sde-dpmsolver++" else 2
    if config.solver_order > most:
        got = f"solver_order is {config.solver_order} with {kind}"
        raise _refusal(got, f"it takes solver_order={most}")
    if config.use_flow_sigmas:
        raise _refusal("use_flow_sigmas is set", "flow matching's schedule is not known here")


# ---- variance-preserving schedules ---------------------------------------------------------------


def _ddpm(scheduler: Any, eta: float) -> Transitions:
    del eta
    times = scheduler.timesteps.cpu()
    total = scheduler.alphas_cumprod.to(**DOUBLES)
    own = total[times]
    later = torch.cat([own[1:], torch.ones(1, **DOUBLES)])
    kept = own / later
    clean = later.sqrt() * (1 - kept) / (1 - own)
    state = kept.sqrt() * (1 - later) / (1 - own)
    small = ((1 - later) / (1 - own) * (1 - kept)).clamp(min=1e-20)

    kind = scheduler.config.variance_type
    deviation = (1 - kept).sqrt() if kind == "fixed_large" else small.sqrt()
    draws = times > 0
    deviation = torch.where(draws, deviation, 0.0)
    none = torch.zeros_like(state)
    return Transitions(
        alpha=own.sqrt(),
        sigma=(1 - own).sqrt(),
        scale=torch.ones_like(state),
        state=state,
        clean=clean,
        noise=none,
        before=none,
        deviation=deviation,
        times=times,
        draws=draws.tolist(),
        predicts=scheduler.config.prediction_type,
        limited=_limit(scheduler),
    )


def _ddim(scheduler: Any, eta: float) -> Transitions:
    times = scheduler.timesteps.cpu()
    total = scheduler.alphas_cumprod.to(**DOUBLES)
    own = total[times]
    # As `step` has it: so many training steps earlier, wherever the next one really is.
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    targets = times - stride
    final = scheduler.final_alpha_cumprod.to(**DOUBLES)
    later = torch.where(targets >= 0, total[targets.clamp(min=0)], final)
    variance = (1 - later) / (1 - own) * (1 - own / later)
    deviation = eta * variance.clamp(min=0).sqrt()
    noise = (1 - later - deviation**2).clamp(min=0).sqrt()
    none = torch.zeros_like(own)
    return Transitions(
        alpha=own.sqrt(),
        sigma=(1 - own).sqrt(),
        scale=torch.ones_like(own),
        state=none,
        clean=later.sqrt(),
        noise=noise,
        before=none,
        deviation=deviation,
        times=times,
        draws=[eta > 0] * len(times),
        predicts=scheduler.config.prediction_type,
        limited=_limit(scheduler),
    )


def _dpm_solver(scheduler: Any, eta: float) -> Transitions:
    del eta
    config = scheduler.config
    is_random = config.algorithm_type == "sde-dpmsolver++"
    ratios = scheduler.sigmas.to(**DOUBLES)  # noise to signal, one more than there are steps
    alphas = 1 / (ratios**2 + 1).sqrt()
    sigmas = ratios * alphas
    alpha, sigma = alphas[1:], sigmas[1:]
    log_snr = -ratios.log()  # half of it; infinite behind the last step
    gain = log_snr[1:] - log_snr[:-1]
    powers = 2.0 if is_random else 1.0
    clean = alpha * (1 - torch.exp(-powers * gain))
    state = sigma / sigmas[:-1]
    deviation = torch.zeros_like(state)
    if is_random:
        state = state * torch.exp(-gain)
        deviation = sigma * (1 - torch.exp(-2 * gain)).sqrt()

    before = torch.zeros_like(state)
    if config.solver_order == 2:
        before = _second_order(config, gain, alpha, len(scheduler.timesteps))
        clean = clean - before
    return Transitions(
        alpha=alphas[:-1],
        sigma=sigmas[:-1],
        scale=torch.ones_like(state),
        state=state,
        clean=clean,
        noise=torch.zeros_like(state),
        before=before,
        deviation=deviation,
        times=scheduler.timesteps.cpu(),
        draws=[is_random] * len(state),
        predicts=config.prediction_type,
        limited=scheduler._threshold_sample if config.thresholding else None,
        noise_dtype=torch.float32,
    )


def _second_order(config: Any, gain: Tensor, alpha: Tensor, steps: int) -> Tensor:
    """What the prediction of the step before is taken times: [steps]; that of the step itself is
    taken times as much less."""
    ratio = torch.ones_like(gain)
    ratio[1:] = gain[:-1] / gain[1:]
    decay = torch.exp(-gain) - 1
    if config.solver_type == "midpoint":
        weight = -0.5 * alpha * decay
    else:
        weight = alpha * (decay / gain + 1)
    before = -weight / ratio
    before[0] = 0.0  # nothing is known of a step before
    few = config.lower_order_final and steps < 15
    if config.euler_at_final or few or config.final_sigmas_type == "zero":
        before[-1] = 0.0
    return before


# ---- variance-exploding schedules ----------------------------------------------------------------


def _euler_ancestral(scheduler: Any, eta: float) -> Transitions:
    del eta
    sigmas = scheduler.sigmas.to(**DOUBLES)
    start, end = sigmas[:-1], sigmas[1:]
    deviation = (end**2 * (start**2 - end**2) / start**2).sqrt()
    down = (end**2 - deviation**2).clamp(min=0).sqrt()
    none = torch.zeros_like(start)
    return Transitions(
        alpha=torch.ones_like(start),
        sigma=start,
        scale=1 / (start**2 + 1).sqrt(),
        state=down / start,
        clean=1 - down / start,
        noise=none,
        before=none,
        deviation=deviation,
        times=scheduler.timesteps.cpu(),
        draws=[True] * len(start),
        predicts=scheduler.config.prediction_type,
        limited=None,
    )


def _limit(scheduler: Any) -> Callable[[Tensor], Tensor] | None:
    """What the scheduler does to predicted clean latents."""
    config = scheduler.config
    if config.thresholding:
        threshold: Callable[[Tensor], Tensor] = scheduler._threshold_sample
        return threshold
    if not config.clip_sample:
        return None
    reach = config.clip_sample_range
    return lambda clean: clean.clamp(-reach, reach)
