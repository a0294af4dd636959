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

import hashlib
import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashdraft.diffusion import transitions as tables
from flashdraft.diffusion.costs import Costs, KeptCosts, OwnSeconds, facts_of, given_costs
from flashdraft.diffusion.drafts import Draft, ExtrapolatedDraft, FrozenDraft
from flashdraft.diffusion.learned import LearnedDraft
from flashdraft.diffusion.lengths import Lengths, weights_of
from flashdraft.diffusion.sampler import Answer, BlockSampler, Committed, Decision, Image
from flashdraft.diffusion.transitions import Transitions
from flashdraft.errors import CheckpointError, InvalidParameter, UnusableLogits
from flashdraft.process import DOUBLES, INTS

__all__ = ["SpeculativeDiffusion", "Stats"]

Watch = Callable[[int, Image, int, Tensor], None]  # an image's place, itself, step and point

_VOIDS = 2  # blocks in a row that a callback has changed: then blocks have one step


@dataclass
class Stats:
    """What one call of the pipe took.

    steps: of the sampler; rounds: calls of the target, one after the other; rows: that it read in
    them, both branches of guidance counted. accepted_by_lag: (drafted, accepted) by steps since a
    block's first point. predicted: mean chance that a drafted step would stand. defects: by image,
    of tolerance mode. voids: blocks that a callback has changed. measuring: seconds in which the
    target's costs were measured, in the first loop that asks for them; `seconds` are the others.
    """

    exact: bool
    steps: int = 0
    rounds: int = 0
    rows: int = 0
    images: int = 0
    accepted_by_lag: dict[int, tuple[int, int]] = field(default_factory=dict)
    predicted: float = 0.0
    defects: list[float] = field(default_factory=list)
    voids: int = 0
    seconds: float = 0.0
    measuring: float = 0.0
    decisions: list[Decision] = field(default_factory=list, repr=False)

    @property
    def drafted(self) -> int:
        return sum(drafted for drafted, _ in self.accepted_by_lag.values())

    @property
    def accepted(self) -> int:
        return sum(accepted for _, accepted in self.accepted_by_lag.values())

    def count(self, decisions: list[Decision]) -> None:
        """Drafted steps that were judged."""
        for one in decisions:
            drafted, accepted = self.accepted_by_lag.get(one.lag, (0, 0))
            self.accepted_by_lag[one.lag] = drafted + 1, accepted + one.stood
            before = len(self.decisions)
            self.predicted = (self.predicted * before + one.predicted) / (before + 1)
            self.decisions.append(one)

    def __str__(self) -> str:
        """One line for a terminal."""
        kind = "exact" if self.exact else "tolerance"
        told = f"{kind}: {self.steps} steps, {self.rounds} rounds, {self.rows} rows"
        if self.drafted:
            told += f", {self.accepted} of {self.drafted} drafted steps stood"
        if self.defects and not self.exact:
            told += f", defect {max(self.defects):.3f}"
        told += f", {self.seconds:.2f} s"
        if self.measuring:
            told += f"; {self.measuring:.2f} s more for measuring the target's costs, once"
        return told


class SpeculativeDiffusion:
    """A pipe whose steps are drafted in blocks. Used as a context, or called like the pipe.

    draft: "frozen-x0", "extrapolated", the folder of a trained one, or a Draft. mode: "exact" (a
    sampler with noise; every image is drawn from its law) or "tolerance" (one without; steps within
    `tol` of the target's, relative to the latents' norm). block: steps, or "auto": as many as bring
    most steps a second by `costs`, down to one where no block pays. costs: "measured" (seconds of
    a UNet call by its number of rows: measured in the first loop, kept in the cache folder);
    "flat": every call costs the same, so that rounds are few whatever they take; or seconds by
    number of rows, as {1: 0.02, 8: 0.03}. What a seed gives in exact mode hangs on where blocks
    end: a number as `block` makes it the same everywhere, "auto" learns from image to image.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        draft: str | Path | Draft | None = None,
        mode: str = "exact",
        block: int | str = "auto",
        tol: float = 0.005,
        costs: Mapping[int, float] | str = "measured",
    ) -> None:
        """Raises InvalidParameter for a pipe or an option that is not known here."""
        _check_pipe(pipe)
        if mode not in ("exact", "tolerance"):
            raise InvalidParameter(
                f"mode is {mode!r}", hint="it is exact or tolerance", option="mode"
            )
        if block != "auto" and (not isinstance(block, int) or block < 1):
            raise InvalidParameter(
                f"block is {block!r}", hint='a number of steps, or "auto"', option="block"
            )
        if not tol >= 0:
            raise InvalidParameter(f"tol is {tol!r}", hint="0 or more", option="tol")
        self.pipe = pipe
        self.mode = mode
        self.block = block
        self.tol = tol if mode == "tolerance" else None
        self.draft = _draft(draft, mode)
        self.pace = _Pace(given_costs(costs))
        self.last_stats: Stats | None = None
        self._run: _Run | None = None
        self._is_entered = False
        self._hidden: Tensor | None = None  # of the UNet's last call, before its last layer
        self._hook: Any = None
        self.watch: Watch | None = None  # of every committed step of blocks of one
        if isinstance(self.draft, LearnedDraft):
            self.draft.check(pipe.unet)
            self.draft.model.to(pipe.unet.device)

    def __enter__(self) -> "SpeculativeDiffusion":
        unet, scheduler = self.pipe.unet, self.pipe.scheduler
        for one in (unet, scheduler):
            if getattr(one, "_flashdraft", None) is not None:
                raise InvalidParameter(
                    "this pipe is in another SpeculativeDiffusion context",
                    hint="leave that one first",
                )
        tables.check(scheduler)
        self._patched = [
            _Patch(unet, "forward", self._forward),
            _Patch(scheduler, "set_timesteps", self._set_timesteps),
            _Patch(scheduler, "scale_model_input", self._scale_model_input),
            _Patch(scheduler, "step", self._step),
        ]
        if self.draft.needs_features:
            self._hook = unet.conv_out.register_forward_pre_hook(self._keep_hidden)
        unet.__dict__["_flashdraft"] = self
        scheduler.__dict__["_flashdraft"] = self
        self._is_entered = True
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self._patched:
            patch.undo()
        for one in (self._patched[0].owner, self._patched[1].owner):
            del one.__dict__["_flashdraft"]
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._hidden = None
        self._run = None
        self._is_entered = False

    def _keep_hidden(self, module: Any, inputs: tuple[Tensor, ...]) -> None:
        del module
        self._hidden = inputs[0]

    def features(self, count: int) -> Tensor | None:
        """The UNet's hidden states [count, ...] of its last call, of the branch with the text."""
        return None if self._hidden is None else self._hidden[-count:]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the pipe returns."""
        if not self._is_entered:
            with self:
                return self(*args, **kwargs)
        started = time.perf_counter()
        output = self.pipe(*args, **kwargs)
        if self.last_stats is not None:
            seconds = time.perf_counter() - started
            self.last_stats.seconds = seconds - self.last_stats.measuring
        return output

    # ---- what the pipe's loop calls --------------------------------------------------------------

    def _set_timesteps(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = own(*args, **kwargs)
        self.last_stats = Stats(exact=self.tol is None)
        self._run = _Run(self, self.last_stats)
        return result

    def _scale_model_input(
        self, own: Callable[..., Any], sample: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if self._run is not None:
            self._run.incoming = sample
        return own(sample, *args, **kwargs)

    def _forward(
        self, own: Callable[..., Any], sample: Tensor, timestep: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if self._run is None:
            return own(sample, timestep, *args, **kwargs)
        bound = inspect.signature(own).bind(sample, timestep, *args, **kwargs).arguments
        call = _Call(own, bound)
        output = self._run.on_model(call)
        if bound.get("return_dict", True):
            from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

            return UNet2DConditionOutput(sample=output)
        return (output,)

    def _step(
        self,
        own: Callable[..., Any],
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if self._run is None:
            return own(model_output, timestep, sample, *args, **kwargs)
        bound = inspect.signature(own).bind(model_output, timestep, sample, *args, **kwargs)
        latents, clean = self._run.on_step(bound.arguments)
        if not bound.arguments.get("return_dict", True):
            return (latents, clean)
        from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput

        return DDPMSchedulerOutput(prev_sample=latents, pred_original_sample=clean)


# ---- one denoising loop --------------------------------------------------------------------------


class _Call:
    """What the pipe's loop asked of its UNet, for all its images and branches of guidance."""

    def __init__(self, own: Callable[..., Any], bound: Mapping[str, Any]) -> None:
        for name in bound:
            if "residual" in name and bound[name] is not None:
                raise _unsupported(
                    f"the pipe gives its UNet `{name}`: those are of one point, not of a block"
                )
        self.own = own
        self.sample: Tensor = bound["sample"]
        self.timestep = bound["timestep"]
        self.conditions = dict(bound)
        for name in ("sample", "timestep", "return_dict"):
            self.conditions.pop(name, None)

    def as_asked(self) -> Tensor:
        """The UNet's output for the call as it is."""
        output: Tensor = self.own(self.sample, self.timestep, **self.conditions, return_dict=False)[
            0
        ]
        return output

    def of_points(
        self, places: list[int], num_images: int, points: Tensor, times: Tensor
    ) -> Tensor:
        """The outputs [branches, m, ...] for other points [m, ...] of its images."""
        rows_in_call = len(self.sample)
        branches = rows_in_call // num_images
        rows = []
        for branch in range(branches):
            rows += [branch * num_images + place for place in places]
        own = torch.tensor(rows, dtype=torch.int64, device=self.sample.device)
        samples = torch.cat([points] * branches)
        further = self.sample[own, points.shape[1] :]  # a mask's channels, of an inpainting UNet
        samples = torch.cat([samples, further], dim=1)

        def of_rows(value: Any) -> Any:
            if isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows_in_call:
                return value[own]
            if isinstance(value, dict):
                return {name: of_rows(part) for name, part in value.items()}
            return value

        conditions = of_rows(self.conditions)
        output = self.own(samples, torch.cat([times] * branches), **conditions, return_dict=False)[
            0
        ]
        split: Tensor = output.view(branches, len(places), *output.shape[1:])
        return split

    def is_like(self, other: "_Call") -> bool:
        """Whether it asks under the same conditions."""
        if len(self.sample) != len(other.sample):
            return False
        return _are_equal(self.conditions, other.conditions)


def _are_equal(left: Any, right: Any) -> bool:
    if left is right:
        return True
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.shape == right.shape and bool(torch.equal(left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_are_equal(left[k], right[k]) for k in left)
    return bool(left == right)


class _Run:
    """One loop of the pipe over its steps; `index` is the step that it is at."""

    def __init__(self, owner: SpeculativeDiffusion, stats: Stats) -> None:
        self.incoming: Tensor | None = None  # what the loop last gave to `scale_model_input`
        self._owner = owner
        self._stats = stats
        self._table: Transitions | None = None
        self._index = 0
        self._images: list[Image] = []
        self._done: list[dict[int, Committed]] = []  # by image and step, not given to the loop yet
        self._raw: list[dict[int, Tensor]] = []  # [branches, ...], of those
        self._call: _Call | None = None  # the last that read anything
        self._is_asked = False  # that call was the loop's own: its step is a single one
        self._lengths: Lengths | None = None
        self._known_costs: Costs | None = None
        self._guidance: tuple[float, float] = (1.0, 0.0)
        self._given: Tensor | None = None  # the latents that the loop has from us
        self._voids = 0  # blocks in a row

    # ---- the UNet's call -------------------------------------------------------------------------

    def on_model(self, call: _Call) -> Tensor:
        """The output that the loop asks for; a block is read where it is not known."""
        if self._table is None:
            self._first_output = self._as_asked(call)
            return self._first_output

        num_images = len(self._images)
        assert self.incoming is not None
        self._void_if_changed(call, self.incoming[:num_images])
        lacking = [place for place in range(num_images) if self._index not in self._done[place]]
        if lacking:
            lengths = self._planned(call, lacking)
            if len(lengths) == num_images and max(lengths.values()) == 1:
                return self._as_asked(call)
            self._read(call, lengths)
        raw = torch.stack([self._raw[place][self._index] for place in range(num_images)], dim=1)
        return raw.flatten(0, 1)

    def _as_asked(self, call: _Call) -> Tensor:
        """The pipe's own call, for a step that all images take alone."""
        self._call = call
        self._guidance = self._guidance_now()
        self._is_asked = True
        self._stats.rounds += 1
        self._stats.rows += len(call.sample)
        return call.as_asked()

    def _void_if_changed(self, call: _Call, latents: Tensor) -> None:
        """A callback may have changed latents, prompts or guidance: what was read of later steps is
        void, and so is the past, which has seen their noises."""
        assert self._call is not None
        assert self._given is not None
        is_same = latents is self._given or bool(torch.equal(latents, self._given))
        if is_same and call.is_like(self._call) and self._guidance == self._guidance_now():
            return
        if any(own for own in self._done):
            self._voids += 1
            self._stats.voids += 1
        for place, image in enumerate(self._images):
            image.point = latents[place].float()
            image.step = self._index
            image.past = None
            self._done[place].clear()
            self._raw[place].clear()

    def _planned(self, call: _Call, lacking: list[int]) -> dict[int, int]:
        """Points of the next round, by image: blocks of all that have steps to do, so that batches
        stay whole; or one step of those that lack theirs."""
        lengths = {}
        for place, image in enumerate(self._images):
            if image.step < self._sampler.table.num_steps:
                lengths[place] = image.step
        branches = len(call.sample) // len(self._images)
        wanted = self._length_of(call, branches, len(lengths))
        for place, step in lengths.items():
            lengths[place] = self._sampler.length(self._images[place], wanted(step))
        if max(lengths.values()) > 1:
            return lengths
        return dict.fromkeys(lacking, 1)

    def _length_of(self, call: _Call, branches: int, num_images: int) -> Callable[[int], int]:
        """Of a block, by the step that it begins with."""
        block = self._owner.block
        if self._voids >= _VOIDS:
            return lambda step: 1
        if isinstance(block, int):
            return lambda step: block
        pace = self._owner.pace
        if self._lengths is None:
            self._lengths = pace.lengths(self._sampler, self._guidance_now())
        costs = self._costs(call)
        own = pace.own

        def seconds(length: int) -> float:
            points = num_images * length
            besides = own(points) if pace.is_measured and length > 1 else 0.0
            return costs(branches * points) + besides

        chosen = self._lengths
        return lambda step: chosen.choose(step, seconds)

    def _costs(self, call: _Call) -> Costs:
        """Of the target, measured now where nothing is known of such calls."""
        pace = self._owner.pace
        rows_a_step = len(call.sample)
        if pace.given is not None:
            return pace.given
        if self._known_costs is None:
            unet = self._owner.pipe.unet
            tensors = [one for one in call.conditions.values() if isinstance(one, Tensor)]
            kept = KeptCosts(facts_of(unet, call.sample, tensors))
            self._known_costs = kept.read(rows_a_step)
        if self._known_costs is None:
            started = time.perf_counter()
            self._known_costs = kept.measure(self._calls_of(call), rows_a_step)
            self._stats.measuring += time.perf_counter() - started
        return self._known_costs

    def _calls_of(self, call: _Call) -> Callable[[int], object]:
        """The loop's call with any number of rows, done when it returns."""
        num_images = len(self._images)
        branches = len(call.sample) // num_images
        some = call.sample[:num_images, : self._images[0].point.shape[0]]
        device = call.sample.device

        def run(rows: int) -> None:
            places = [row % num_images for row in range(rows // branches)]
            points = some[torch.tensor(places, dtype=torch.int64, device=device)]
            times = self._sampler.table.times[torch.full([len(places)], self._index, **INTS)]
            call.of_points(places, num_images, points, times.to(device))
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return run

    def _read(self, call: _Call, lengths: dict[int, int]) -> None:
        """One call of the UNet for these images' next blocks."""
        started = time.perf_counter()
        reading = 0.0
        table = self._sampler.table
        self._call = call
        self._is_asked = False
        self._guidance = self._guidance_now()
        raw_of_rows: list[Tensor] = []
        places = list(lengths)

        def evaluate(rows: list[int], steps: Tensor, points: Tensor) -> Answer:
            nonlocal reading
            begun = time.perf_counter()
            scale = table.scale[steps].to(points).view(-1, *[1] * (points.dim() - 1))
            times = table.times[steps].to(call.sample.device)
            scaled = (points * scale).to(call.sample.dtype)
            own = [places[row] for row in rows]
            raw = call.of_points(own, len(self._images), scaled, times)
            raw_of_rows.extend(raw.unbind(1))
            outputs = _finite(self._guided(raw)).float()
            reading = time.perf_counter() - begun
            return Answer(outputs, self._owner.features(len(rows)))

        images = [self._images[place] for place in places]
        branches = len(call.sample) // len(self._images)
        starts = [image.step for image in images]
        done = self._sampler.round(images, list(lengths.values()), evaluate)
        self._stats.rounds += 1
        self._stats.rows += done.num_points * branches
        self._note(done.decisions)

        row = 0
        for own_place, place in enumerate(places):
            for committed in done.committed[own_place]:
                self._done[place][committed.step] = committed
                lag = committed.step - starts[own_place]
                self._raw[place][committed.step] = raw_of_rows[row + lag]
                if self._owner.watch is not None:
                    self._owner.watch(place, self._images[place], committed.step, committed.point)
            row += lengths[place]
        own_seconds = time.perf_counter() - started - reading
        self._owner.pace.own.take(done.num_points, own_seconds)

    def _note(self, decisions: list[Decision]) -> None:
        self._stats.count(decisions)
        self._stats.defects = [image.defect for image in self._images]
        if self._lengths is not None:
            self._lengths.learn(decisions)

    def _guidance_now(self) -> tuple[float, float]:
        pipe = self._owner.pipe
        scale = getattr(pipe, "_guidance_scale", 1.0)
        rescale = getattr(pipe, "_guidance_rescale", 0.0)
        return scale, rescale

    def _guided(self, raw: Tensor) -> Tensor:
        """As the pipe's loop does it. raw: [branches, m, ...]."""
        if len(raw) == 1:
            return raw[0]
        scale, rescale = self._guidance_now()
        without, with_text = raw
        guided: Tensor = without + scale * (with_text - without)
        if rescale > 0:
            dims = list(range(1, guided.dim()))
            ratio = with_text.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
            guided = rescale * (guided * ratio) + (1 - rescale) * guided
        return guided

    # ---- the scheduler's step --------------------------------------------------------------------

    def on_step(self, asked: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The latents behind this step, and the clean ones that were predicted."""
        output: Tensor = asked["model_output"]
        if self._table is None:
            self._begin(asked)
        latents, clean = self._single(output) if self._is_asked else self._popped(output)
        self._given = latents
        self._index += 1
        self._stats.steps = self._index
        scheduler = self._owner.pipe.scheduler
        if hasattr(scheduler, "_step_index"):
            if scheduler._step_index is None:
                scheduler._init_step_index(asked["timestep"])
            scheduler._step_index += 1
        return latents, clean

    def _begin(self, asked: Mapping[str, Any]) -> None:
        """The loop's first step: everything that it needs is known now."""
        output, latents = asked["model_output"], asked["sample"]
        scheduler = self._owner.pipe.scheduler
        first = _first_step(scheduler, asked["timestep"])
        eta = asked.get("eta") or 0.0
        self._table = tables.transitions(scheduler, eta=eta, first=first)
        _check_mode(scheduler, self._table, self._owner.tol is None)
        num_images = len(latents)
        assert self._call is not None
        self._check_call(self._call, num_images, output)

        noises = _Noises(self._table, output, asked.get("generator"))
        for place in range(num_images):
            image = Image(
                latents[place].float(),
                lambda step, place=place: noises.of(step, place),  # type: ignore[misc]
                lambda step, place=place: noises.uniform(step, place),  # type: ignore[misc]
            )
            self._images.append(image)
            self._done.append({})
            self._raw.append({})
        self._stats.images = num_images
        self._guidance = self._guidance_now()

        self._sampler = BlockSampler(self._table, self._owner.draft, self._owner.tol)
        self._stats.defects = [0.0] * num_images

    def _single(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """The step behind a call that was the loop's own."""
        answer = Answer(_finite(output).float(), self._owner.features(len(output)))
        points = torch.stack([image.point for image in self._images])
        done = self._sampler.single(self._images, points, answer)
        if self._owner.watch is not None:
            for place, image in enumerate(self._images):
                self._owner.watch(place, image, self._index, points[place])
        return done.results.to(output.dtype), done.clean.to(output.dtype)

    def _popped(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """A step that was done in a block."""
        done = [own.pop(self._index) for own in self._done]
        for own in self._raw:
            own.pop(self._index)
        latents = torch.stack([one.result for one in done])
        clean = torch.stack([one.clean for one in done])
        return latents.to(output.dtype), clean.to(output.dtype)

    def _check_call(self, call: _Call, num_images: int, output: Tensor) -> None:
        """Whether guidance is what we take it for."""
        raw = self._first_output.view(-1, num_images, *self._first_output.shape[1:])
        if raw.shape[2:] != output.shape[1:]:
            raise _unsupported("its UNet gives more channels than latents have")
        if len(raw) > 2:
            raise _unsupported(f"its guidance has {len(raw)} branches")
        if not torch.allclose(self._guided(raw), _finite(output), rtol=1e-3, atol=1e-4):
            raise _unsupported("its guidance is not the one of Stable Diffusion")


class _Pace:
    """What is known of seconds and of lengths, from call to call of the pipe."""

    def __init__(self, given: Costs | None) -> None:
        self.given = given
        self.own = OwnSeconds()
        self._lengths: dict[tuple[object, ...], Lengths] = {}

    @property
    def is_measured(self) -> bool:
        return self.given is None

    def lengths(self, sampler: BlockSampler, guidance: tuple[float, float]) -> Lengths:
        """Of one schedule and guidance."""
        key = (*guidance, *weights_of(sampler.table).tolist())
        if key not in self._lengths:
            self._lengths[key] = Lengths(sampler.table, sampler.tol)
        return self._lengths[key]


class _Noises:
    """What the sampler draws, in its own order and from its own generators, step by step."""

    def __init__(self, table: Transitions, output: Tensor, generator: Any) -> None:
        self._table = table
        self._like = output
        self._generator = generator
        self._drawn: list[Tensor | None] = []
        seeds = _seeds(generator, len(output), output.device)
        uniforms = []
        for seed in seeds:
            own = torch.Generator("cpu").manual_seed(seed)
            uniforms.append(torch.rand(table.num_steps, generator=own, **DOUBLES))
        self._uniforms = torch.stack(uniforms)

    def of(self, step: int, place: int) -> Tensor:
        """[...], float32."""
        while len(self._drawn) <= step:
            self._drawn.append(self._next() if self._table.draws[len(self._drawn)] else None)
        noise = self._drawn[step]
        if noise is None:
            return torch.zeros_like(self._like[place], dtype=torch.float32)
        return noise[place].float()

    def uniform(self, step: int, place: int) -> float:
        return float(self._uniforms[place, step])

    def _next(self) -> Tensor:
        from diffusers.utils.torch_utils import randn_tensor

        like = self._like
        noise: Tensor = randn_tensor(
            like.shape, generator=self._generator, device=like.device, dtype=like.dtype
        )
        return noise


def _seeds(generator: Any, count: int, device: torch.device) -> list[int]:
    """Of the coins, by image: from the generators' states, of which nothing is drawn."""
    generators = generator if isinstance(generator, list) else [generator] * count
    seeds = []
    for place, own in enumerate(generators):
        if own is not None:
            state = own.get_state()
        elif device.type == "cuda":
            state = torch.cuda.get_rng_state(device)
        else:
            state = torch.get_rng_state()
        digest = hashlib.sha256(state.cpu().numpy().tobytes() + place.to_bytes(8, "little"))
        seeds.append(int.from_bytes(digest.digest()[:7], "little"))
    return seeds


# ---- what is taken -------------------------------------------------------------------------------


class _Patch:
    """A method of one object that is another function for a while."""

    def __init__(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self.owner = owner
        self._name = name
        self._had_own = name in owner.__dict__
        original = getattr(owner, name)
        self._original = original

        @wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            return function(original, *args, **kwargs)

        owner.__dict__[name] = call

    def undo(self) -> None:
        if self._had_own:
            self.owner.__dict__[self._name] = self._original
        else:
            del self.owner.__dict__[self._name]


def _check_pipe(pipe: Any) -> None:
    name = type(pipe).__name__
    if not hasattr(pipe, "unet") or not hasattr(pipe, "scheduler"):
        raise _unsupported(f"a {name} has no UNet")
    if not hasattr(pipe.unet, "config") or not hasattr(pipe.unet.config, "cross_attention_dim"):
        raise _unsupported(f"the UNet of a {name} is a {type(pipe.unet).__name__}")
    if getattr(pipe, "controlnet", None) is not None:
        raise _unsupported("a ControlNet's residuals are of one point, not of a block")


def _unsupported(got: str) -> InvalidParameter:
    hint = "Stable Diffusion's pipelines work: text to image, image to image, inpainting, XL"
    return InvalidParameter(f"this pipe can't be drafted: {got}", hint=hint, option="pipe")


def _check_mode(scheduler: Any, table: Transitions, is_exact: bool) -> None:
    name = type(scheduler).__name__
    if is_exact and not table.is_random:
        got = f"{name} as it is set draws no noise, so that no drafted step could be exact"
        hint = 'give the pipe eta=1.0 with DDIM, or mode="tolerance"'
        raise InvalidParameter(got, hint=hint, option="mode")
    if not is_exact and table.is_random:
        got = f"{name} as it is set draws noise: tolerance mode is for samplers without"
        raise InvalidParameter(got, hint='give mode="exact"', option="mode")


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


def _first_step(scheduler: Any, timestep: Any) -> int:
    begin = getattr(scheduler, "_begin_index", None)
    if begin is not None:
        return int(begin)
    times: list[float] = scheduler.timesteps.tolist()
    return times.index(float(timestep))


def _finite(output: Tensor) -> Tensor:
    if not bool(output.isfinite().all()):
        hint = "float16 is too narrow for some UNets: load it with torch_dtype=torch.bfloat16"
        raise UnusableLogits("the UNet's output is NaN or infinite", hint=hint)
    return output
