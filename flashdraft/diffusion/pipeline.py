"""Block speculation inside a user's own diffusers pipeline.

    with SpeculativeDiffusion(pipe) as fast:
        image = fast("a thick seven", num_inference_steps=100, eta=1.0).images[0]
    print(fast.last_stats)

The pipe's own loop runs as it is. Within the context its UNet's `forward` and its scheduler's
`set_timesteps`, `scale_model_input` and `step` are ours: at a step that is not known yet, the
UNet's call reads a whole block in one batch; at one that is, nothing is computed, and loop and
callbacks see the very outputs and latents of that step. Noise is drawn from the pipe's generators
in the order in which the sampler alone would draw it, so that a block of one step is the pipe as it
was.

Knows diffusers pipelines with a UNet. Does not know what a draft or a coupling is made of.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flashdraft.diffusion import transitions as tables
from flashdraft.diffusion.calls import Call, signature_of, unsupported
from flashdraft.diffusion.costs import given_costs
from flashdraft.diffusion.drafts import Draft, ExtrapolatedDraft, FrozenDraft
from flashdraft.diffusion.learned import LearnedDraft
from flashdraft.diffusion.loop import Run, Watch
from flashdraft.diffusion.pace import Pace
from flashdraft.diffusion.patches import Mark, Patch, called_name, is_marked
from flashdraft.diffusion.stats import Stats
from flashdraft.errors import CheckpointError, InvalidParameter

__all__ = ["TOL", "SpeculativeDiffusion", "Stats"]

TOL = 0.001  # of tolerance mode, where none is given


class SpeculativeDiffusion:
    """A pipe whose steps are drafted in blocks. Used as a context, or called like the pipe.

    draft: "frozen-x0", "extrapolated", the folder of a trained one, or a Draft. mode: "exact" (a
    sampler with noise; every image is drawn from its law) or "tolerance" (one without; steps within
    `tol` of the target's, relative to the latents' norm, 0.001 by default). block: steps, or
    "auto": as many as bring most steps a second by `costs`, down to one where no block pays. costs:
    "measured" (seconds of a UNet call by its number of rows: measured in the first loop, kept in
    the cache folder); "flat": every call costs the same, so that rounds are few whatever they take;
    or seconds by number of rows, as {1: 0.02, 8: 0.03}. What a seed gives in exact mode hangs on
    where blocks end: a number as `block` makes it the same everywhere, "auto" learns from image to
    image.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        draft: str | Path | Draft | None = None,
        mode: str = "exact",
        block: int | str = "auto",
        tol: float | None = None,
        costs: Mapping[int, float] | str = "measured",
    ) -> None:
        """Raises InvalidParameter for a pipe or an option that is not known here."""
        _check_pipe(pipe)
        if mode not in ("exact", "tolerance"):
            raise InvalidParameter(
                f"mode is {mode!r}", hint="it is exact or tolerance", option="mode"
            )
        is_count = isinstance(block, int) and not isinstance(block, bool) and block > 0
        if block != "auto" and not is_count:
            raise InvalidParameter(
                f"block is {block!r}", hint='a number of steps, or "auto"', option="block"
            )
        if tol is not None and not 0 <= tol < math.inf:
            raise InvalidParameter(f"tol is {tol!r}", hint="0 or more", option="tol")
        if tol is not None and mode == "exact":
            got = f"tol is {tol:g}, but exact mode has none"
            hint = 'leave it out, or give mode="tolerance"'
            raise InvalidParameter(got, hint=hint, option="tol")
        self.pipe = pipe
        self.mode = mode
        self.block = block
        self.tol = None
        if mode == "tolerance":
            self.tol = TOL if tol is None else tol
        self.draft = _draft(draft, mode)
        self.pace = Pace(given_costs(costs))
        self.last_stats: Stats | None = None
        self.checked: Any = None  # a UNet as it was set when its rows were seen to be independent
        self._run: Run | None = None
        self._is_entered = False
        self._reading: int | None = None  # thread in which the UNet's own forward runs
        self._unet: list[Patch | Mark] = []
        self._scheduler: list[Patch | Mark] = []
        self._patched: tuple[object, object] = (None, None)  # UNet and scheduler
        self._hidden: Tensor | None = None  # of the UNet's last call, before its last layer
        self._hook: Any = None
        self.watch: Watch | None = None  # of every committed step of blocks of one
        if isinstance(self.draft, LearnedDraft):
            self.draft.check(pipe.unet)
            self.draft.model.to(pipe.unet.device)

    def __enter__(self) -> "SpeculativeDiffusion":
        self._take_scheduler()
        try:
            self._take_unet()
        except BaseException:
            self.__exit__()
            raise
        self._is_entered = True
        return self

    def __exit__(self, *_: object) -> None:
        self._leave(self._unet)
        self._leave(self._scheduler)
        self._patched = (None, None)
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._hidden = None
        self._run = None
        self._is_entered = False

    def _take_scheduler(self) -> None:
        """The pipe's own: users put another one into it, in the middle of a context, too."""
        scheduler = self.pipe.scheduler
        if scheduler is self._patched[1]:
            return
        tables.check(scheduler)
        is_wrapped = "step" in vars(scheduler) and not is_marked(scheduler)
        if is_wrapped:
            name = type(scheduler).__name__
            raise unsupported(f"somebody has replaced its {name}'s `step`, which is not called")
        self._leave(self._scheduler)
        self._patched = self._patched[0], None  # should the next lines refuse
        self._scheduler = [
            Mark(scheduler),
            Patch(scheduler, "set_timesteps", self._set_timesteps),
            Patch(scheduler, "scale_model_input", self._scale_model_input),
            Patch(scheduler, "step", self._step),
        ]
        self._patched = self._patched[0], scheduler

    def _take_unet(self) -> None:
        """Its present forward: another UNet may have come, or another patch (accelerate puts its
        own on anew after every call, where models are offloaded)."""
        unet = self.pipe.unet
        is_known = unet is self._patched[0]
        if is_known and all(one.is_in_place for one in self._unet):
            return
        if not is_known:
            _check_pipe(self.pipe)
            if isinstance(self.draft, LearnedDraft):
                self.draft.check(unet)
        self._leave(self._unet)
        self._unet = [Mark(unet), Patch(unet, called_name(unet), self._forward)]
        self._patched = unet, self._patched[1]
        if self.draft.needs_features:
            if self._hook is not None:
                self._hook.remove()
            self._hook = unet.conv_out.register_forward_pre_hook(self._keep_hidden)

    def _leave(self, taken: list[Patch | Mark]) -> None:
        while taken:
            taken.pop().undo()

    def _keep_hidden(self, module: object, inputs: tuple[Tensor, ...]) -> None:
        del module
        self._hidden = inputs[0]

    def forward_of_unet(self) -> Any:
        """What is called where the UNet is, under our patch."""
        return [one.original for one in self._unet if isinstance(one, Patch)]

    def features(self, count: int) -> Tensor | None:
        """The UNet's hidden states [count, ...] of its last call, of the branch with the text."""
        return None if self._hidden is None else self._hidden[-count:]

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """What the pipe returns."""
        if not self._is_entered:
            with self:
                return self(*args, **kwargs)
        self._take_scheduler()
        self._take_unet()
        started = time.perf_counter()
        output = self.pipe(*args, **kwargs)
        if self.last_stats is not None:
            seconds = time.perf_counter() - started
            self.last_stats.seconds = seconds - self.last_stats.measuring
        return output

    # ---- what the pipe's loop calls --------------------------------------------------------------

    def _set_timesteps(self, own: Callable[..., object], *args: object, **kwargs: object) -> Any:
        result = own(*args, **kwargs)
        if self._is_entered:
            self._start()
        return result

    def _start(self) -> None:
        self._take_unet()
        self.last_stats = Stats(exact=self.tol is None)
        self._run = Run(self, self.last_stats)

    def _scale_model_input(
        self, own: Callable[..., Any], sample: Tensor, *args: object, **kwargs: object
    ) -> Any:
        scaled = own(sample, *args, **kwargs)
        if self._run is not None:
            self._run.on_scale(sample, scaled)
        return scaled

    def _forward(self, own: Callable[..., object], *args: object, **kwargs: object) -> Any:
        if not self._is_entered or self._reading == threading.get_ident():
            return own(*args, **kwargs)
        if self.pipe.scheduler is not self._patched[1]:
            self._take_scheduler()
            self._start()
        if self._run is None:
            return own(*args, **kwargs)

        def read(*args: object, **kwargs: object) -> Any:
            self._reading = threading.get_ident()  # a patch over this one may call this one
            try:
                return own(*args, **kwargs)
            finally:
                self._reading = None

        call = Call.bound(read, *args, **kwargs)
        output = self._run.on_model(call)
        if not call.wants_dict:
            return (output,)
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=output)

    def _step(self, own: Callable[..., object], *args: object, **kwargs: object) -> Any:
        if self._run is None:
            return own(*args, **kwargs)
        method = type(self.pipe.scheduler).step
        asked = signature_of(method).bind(None, *args, **kwargs).arguments
        latents, clean = self._run.on_step(asked)
        is_solver = hasattr(self.pipe.scheduler, "dpm_solver_first_order_update")
        if not asked.get("return_dict", True):
            return (latents,) if is_solver else (latents, clean)
        if is_solver:
            from diffusers.schedulers.scheduling_utils import SchedulerOutput

            return SchedulerOutput(prev_sample=latents)
        from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput

        return DDPMSchedulerOutput(prev_sample=latents, pred_original_sample=clean)


# ---- what is taken -------------------------------------------------------------------------------


def _check_pipe(pipe: object) -> None:
    from diffusers import UNet2DConditionModel

    name = type(pipe).__name__
    if not hasattr(pipe, "unet") or not hasattr(pipe, "scheduler"):
        raise unsupported(f"a {name} has no UNet")
    unet = pipe.unet
    own = getattr(unet, "_orig_mod", unet)  # where torch.compile has wrapped it
    if not isinstance(own, UNet2DConditionModel):
        raise unsupported(f"the UNet of a {name} is a {type(own).__name__}")
    if getattr(pipe, "controlnet", None) is not None:
        raise unsupported("a ControlNet's residuals are of one point, not of a block")
    if getattr(pipe, "adapter", None) is not None:
        raise unsupported("a T2I adapter's residuals are of one point, not of a block")


def _draft(draft: str | Path | Draft | None, mode: str) -> Draft:
    if draft is None:
        return FrozenDraft() if mode == "exact" else ExtrapolatedDraft()
    if not isinstance(draft, str | Path):
        return draft
    known: dict[str, Callable[[], Draft]] = {
        "frozen-x0": FrozenDraft,
        "extrapolated": ExtrapolatedDraft,
    }
    if draft in known:
        return known[str(draft)]()
    try:
        return LearnedDraft.from_pretrained(draft)
    except CheckpointError:
        if Path(draft).exists() or "/" in str(draft):
            raise
        hint = f"it is one of {', '.join(known)}, or a trained draft's folder"
        raise InvalidParameter(f"draft is {draft!r}", hint=hint, option="draft") from None
