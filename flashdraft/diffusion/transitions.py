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

_BY_STEP = (
    "alpha",
    "sigma",
    "scale",
    "state",
    "clean",
    "noise",
    "before",
    "deviation",
    "times",
    "draws",
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
    limited: Callable[[Tensor], Tensor] | None = None  # of x0: clipped, or by its own quantile
    noise_dtype: torch.dtype | None = None  # in which noise is drawn; None: the latents' own

    @property
    def num_steps(self) -> int:
        return len(self.state)

    @property
    def is_random(self) -> bool:
        """Whether any step has noise."""
        has_noise = self.deviation > 0
        return bool(has_noise.any())

    def predicted(self, steps: Tensor | int, points: Tensor, outputs: Tensor) -> Prediction:
        """What the model's outputs say. points, outputs: [n, ...]."""
        if self.predicts == "epsilon":
            return self.from_noise(steps, points, outputs)
        if self.predicts == "sample":
            said = self.implied(steps, points, outputs)
        else:
            said = self._from_velocity(steps, points, outputs)
        return Prediction(self._as_limited(said.clean), said.noise)

    def _from_velocity(self, steps: Tensor | int, points: Tensor, velocity: Tensor) -> Prediction:
        """Salimans and Ho 2202.00512, appendix D: v = alpha * eps - sigma * x0, of the point as the
        model reads it."""
        scale = self._of(points, steps, self.scale)
        alpha = self._of(points, steps, self.alpha) * scale
        sigma = self._of(points, steps, self.sigma) * scale
        read = scale * points
        clean = alpha * read - sigma * velocity
        noise = sigma * read + alpha * velocity
        return Prediction(clean, noise)

    def implied(self, steps: Tensor | int, points: Tensor, clean: Tensor) -> Prediction:
        """What it would be to predict these clean latents [n, ...] of the points."""
        alpha = self._of(points, steps, self.alpha)
        sigma = self._of(points, steps, self.sigma)
        noise = (points - alpha * clean) / sigma
        return Prediction(clean, noise)

    def from_noise(self, steps: Tensor | int, points: Tensor, noise: Tensor) -> Prediction:
        """What it would be to predict this noise [n, ...] in the points."""
        alpha = self._of(points, steps, self.alpha)
        sigma = self._of(points, steps, self.sigma)
        clean = (points - sigma * noise) / alpha
        return Prediction(self._as_limited(clean), noise)

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
        of_point = self._of(points, steps, self.state) * points
        of_clean = self._of(points, steps, self.clean) * said.clean
        of_noise = self._of(points, steps, self.noise) * said.noise
        mean: Tensor = of_point + of_clean + of_noise
        if before is not None:
            mean = mean + self._of(points, steps, self.before) * before
        return mean

    def _as_limited(self, clean: Tensor) -> Tensor:
        return clean if self.limited is None else self.limited(clean)

    def _of(self, points: Tensor, steps: Tensor | int, table: Tensor) -> Any:
        """Entries of a table, as wide as the points; a number where all points are of one step."""
        if isinstance(steps, int):
            return float(table[steps])
        entries = table[steps.cpu()].to(points)
        num_further = points.dim() - 1
        return entries.view(-1, *[1] * num_further)


def transitions(scheduler: object, *, eta: float = 0.0, first: int = 0) -> Transitions:
    """The steps that `scheduler.set_timesteps` has set, from the first one that is done (image to
    image begins late). eta: of DDIM, as `scheduler.step` takes it.

    Raises InvalidParameter for a scheduler or a setting of one that is not known here.
    """
    read = _reader(scheduler)
    table = read(scheduler, eta)
    cut: dict[str, Any] = {}
    for name in _BY_STEP:
        entries = getattr(table, name)
        cut[name] = entries[first:]

    # Nothing is known of a step before the first.
    clean = cut["clean"].clone()
    before = cut["before"].clone()
    clean[0] += before[0]
    before[0] = 0.0
    cut["clean"] = clean
    cut["before"] = before
    return replace(table, **cut)


def check(scheduler: object) -> None:
    """Raises InvalidParameter for a scheduler that `transitions` would refuse, before it is set."""
    _reader(scheduler)


_Reader = Callable[[Any, float], Transitions]  # of a scheduler and eta


def _reader(scheduler: object) -> _Reader:
    readers: dict[str, _Reader] = {
        "DDPMScheduler": _ddpm,
        "DDIMScheduler": _ddim,
        "DPMSolverMultistepScheduler": _dpm_solver,
        "EulerAncestralDiscreteScheduler": _euler_ancestral,
    }
    own: Any = type(scheduler)
    for kind in own.__mro__:
        if kind.__name__ in readers:
            if own.step is not kind.step:
                got = f"{own.__name__} has a `step` of its own"
                raise _refusal(got, f"what is done is {kind.__name__}'s")
            _refuse_unknown_settings(scheduler)
            return readers[kind.__name__]
    raise _refusal(f"the scheduler is a {own.__name__}", f"it takes {_RUNS}")


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


def _blank(scheduler: Any, alpha: Tensor, sigma: Tensor) -> Transitions:
    """As many steps as there are entries: all coefficients are none, and nothing is drawn."""
    none = torch.zeros_like(alpha)
    return Transitions(
        alpha=alpha,
        sigma=sigma,
        scale=torch.ones_like(alpha),
        state=none,
        clean=none,
        noise=none,
        before=none,
        deviation=none,
        times=scheduler.timesteps.cpu(),
        draws=[False] * len(alpha),
        predicts=scheduler.config.prediction_type,
    )


# ---- variance-preserving schedules ---------------------------------------------------------------


def _ddpm(scheduler: Any, eta: float) -> Transitions:
    """Equations 6 and 7: mean and variance of q(x_(t-1) | x_t, x0), a_bar the signal's power."""
    del eta
    times = scheduler.timesteps.cpu()
    powers = scheduler.alphas_cumprod.to(**DOUBLES)
    a_bar = powers[times]
    behind_last = torch.ones(1, **DOUBLES)
    a_bar_later = torch.cat([a_bar[1:], behind_last])
    a = a_bar / a_bar_later
    beta = 1 - a

    power_of_noise = 1 - a_bar
    share = (1 - a_bar_later) / power_of_noise
    clean = a_bar_later.sqrt() * beta / power_of_noise
    state = a.sqrt() * share
    variance = beta
    if scheduler.config.variance_type != "fixed_large":
        posterior = share * beta
        variance = posterior.clamp(min=1e-20)

    draws = times > 0
    deviation = torch.where(draws, variance.sqrt(), 0.0)
    table = _blank(scheduler, a_bar.sqrt(), power_of_noise.sqrt())
    return replace(
        table,
        state=state,
        clean=clean,
        deviation=deviation,
        draws=draws.tolist(),
        limited=_limit(scheduler),
    )


def _ddim(scheduler: Any, eta: float) -> Transitions:
    """Equations 12 and 16, a_bar the signal's power (alpha in the paper)."""
    times = scheduler.timesteps.cpu()
    powers = scheduler.alphas_cumprod.to(**DOUBLES)
    a_bar = powers[times]
    # As `step` has it: so many training steps earlier, wherever the next one really is.
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    targets = times - stride
    a_bar_final = scheduler.final_alpha_cumprod.to(**DOUBLES)
    a_bar_target = powers[targets.clamp(min=0)]
    a_bar_later = torch.where(targets >= 0, a_bar_target, a_bar_final)

    power_of_noise = 1 - a_bar
    power_later = 1 - a_bar_later
    variance = power_later / power_of_noise * (1 - a_bar / a_bar_later)
    variance = variance.clamp(min=0)
    deviation = eta * variance.sqrt()
    power_of_direction = power_later - deviation**2
    noise = power_of_direction.clamp(min=0).sqrt()
    table = _blank(scheduler, a_bar.sqrt(), power_of_noise.sqrt())
    return replace(
        table,
        clean=a_bar_later.sqrt(),
        noise=noise,
        deviation=deviation,
        draws=[eta > 0] * len(times),
        limited=_limit(scheduler),
    )


def _dpm_solver(scheduler: Any, eta: float) -> Transitions:
    """h: the gain of a step in log(alpha / sigma), lambda in the paper."""
    del eta
    config = scheduler.config
    is_random = config.algorithm_type == "sde-dpmsolver++"
    ratios = scheduler.sigmas.to(**DOUBLES)  # sigma / alpha, one more than there are steps
    powers = ratios**2 + 1
    alphas = 1 / powers.sqrt()
    sigmas = ratios * alphas
    alpha_later = alphas[1:]
    sigma_later = sigmas[1:]
    log_ratios = ratios.log()
    h = log_ratios[:-1] - log_ratios[1:]  # infinite where the last noise is none

    state = sigma_later / sigmas[:-1]
    deviation = torch.zeros_like(state)
    if is_random:
        decay = torch.exp(-2 * h)
        state = state * torch.exp(-h)
        deviation = sigma_later * (1 - decay).sqrt()
    else:
        decay = torch.exp(-h)
    clean = alpha_later * (1 - decay)

    before = torch.zeros_like(state)
    if config.solver_order == 2:
        before = _second_order(config, h, alpha_later)
        clean = clean - before
    table = _blank(scheduler, alphas[:-1], sigmas[:-1])
    return replace(
        table,
        state=state,
        clean=clean,
        before=before,
        deviation=deviation,
        draws=[is_random] * len(state),
        limited=scheduler._threshold_sample if config.thresholding else None,
        noise_dtype=torch.float32,
    )


def _second_order(config: Any, h: Tensor, alpha: Tensor) -> Tensor:
    """What the prediction of the step before is taken times: [steps]; that of the step itself is
    taken times as much less. h, alpha: [steps], alpha of the points behind them."""
    r = torch.ones_like(h)
    r[1:] = h[:-1] / h[1:]
    fall = torch.exp(-h) - 1
    weight = alpha * (fall / h + 1)
    if config.solver_type == "midpoint":
        weight = -0.5 * alpha * fall
    before = -weight / r
    before[0] = 0.0  # nothing is known of a step before

    has_few = config.lower_order_final and len(h) < 15
    ends_clean = config.final_sigmas_type == "zero"
    if config.euler_at_final or has_few or ends_clean:
        before[-1] = 0.0
    return before


def _limit(scheduler: Any) -> Callable[[Tensor], Tensor] | None:
    """What DDPM's and DDIM's schedulers do to predicted clean latents."""
    config = scheduler.config
    if config.thresholding:
        threshold: Callable[[Tensor], Tensor] = scheduler._threshold_sample
        return threshold
    if not config.clip_sample:
        return None
    reach = config.clip_sample_range
    return lambda clean: clean.clamp(-reach, reach)


# ---- variance-exploding schedules ----------------------------------------------------------------


def _euler_ancestral(scheduler: Any, eta: float) -> Transitions:
    del eta
    sigmas = scheduler.sigmas.to(**DOUBLES)
    sigma = sigmas[:-1]
    sigma_later = sigmas[1:]
    power = sigma**2
    power_later = sigma_later**2
    power_up = power_later * (power - power_later) / power
    power_down = power_later - power_up
    sigma_down = power_down.clamp(min=0).sqrt()
    state = sigma_down / sigma
    scale = 1 / (power + 1).sqrt()
    table = _blank(scheduler, torch.ones_like(sigma), sigma)
    return replace(
        table,
        scale=scale,
        state=state,
        clean=1 - state,
        deviation=power_up.sqrt(),
        draws=[True] * len(sigma),
    )
