"""One denoising loop of a pipe, whose steps are read ahead in blocks.

At a step that is not known yet the UNet's call reads a whole block in one batch; at one that is,
nothing is computed. Before a known step is given to the loop, everything that it hangs on is looked
at: latents, prompts, guidance, adapters, the generators. What has changed voids the rest of the
block. A call or a step that is not what it should be is done as it was asked, on its own.

Knows what diffusers' loops do around a UNet and a scheduler. Does not know what a draft or a
coupling is made of.
"""

import functools
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from flashdraft.diffusion import transitions as tables
from flashdraft.diffusion.calls import Call, Settings, unsupported
from flashdraft.diffusion.costs import Costs, KeptCosts, facts_of
from flashdraft.diffusion.drafts import Past
from flashdraft.diffusion.guidance import Guidance, are_close, number
from flashdraft.diffusion.lengths import Lengths
from flashdraft.diffusion.noises import Noises
from flashdraft.diffusion.sampler import (
    Answer,
    BlockSampler,
    Committed,
    Decision,
    Image,
    Round,
    past_behind,
)
from flashdraft.diffusion.stats import Stats
from flashdraft.diffusion.transitions import Prediction, Transitions
from flashdraft.errors import InvalidParameter, UnusableLogits
from flashdraft.process import INTS

if TYPE_CHECKING:
    from flashdraft.diffusion.pipeline import SpeculativeDiffusion

__all__ = ["Run", "Watch"]

Watch = Callable[[int, Image, int, Tensor], None]  # an image's place, itself, step and point

_VOIDS = 2  # blocks in a row that a callback has changed: then blocks have one step
_ALONE = 5.0  # times as far as rounding may an output be from that of a smaller batch
_BESIDE = 0.1  # and from that of a batch of as many rows


class _Known(NamedTuple):
    """A step that the loop has not come to. raw: [branches, ...], the UNet's own outputs; output:
    the loop's, of them; features: of the point, where the draft needs them; decision: of the step,
    where it was drafted."""

    committed: Committed
    raw: Tensor
    output: Tensor
    features: Tensor | None
    decision: Decision | None

    @property
    def defect(self) -> float:
        if self.decision is None or not self.decision.stood:
            return 0.0
        return self.decision.defect


class Run:
    """One loop of the pipe over its steps; `_index` is the step that it is at."""

    def __init__(self, owner: "SpeculativeDiffusion", stats: Stats) -> None:
        self._owner = owner
        self._stats = stats
        self._thread = threading.get_ident()
        self._incoming: Tensor | None = None  # what the loop gave to `scale_model_input`
        self._scaled: Tensor | None = None  # and what it got
        self._begun: BlockSampler | None = None  # from the loop's first step on
        self._index = 0
        self._images: list[Image] = []
        self._noises: Noises
        self._eta = 0.0
        self._generator: object = None
        self._known: list[dict[int, _Known]] = []  # by image and step
        self._call: Call | None = None  # the last that read anything
        self._first_output: Tensor
        self._lengths: Lengths | None = None
        self._known_costs: Costs | None = None
        self._guidance = Guidance(owner.pipe)
        self._scales: tuple[float, float] = (1.0, 0.0)  # of guidance, and the UNet's settings,
        self._settings: Settings | None = None  # under which the known steps were read
        self._given: Tensor  # a copy of the latents that the loop has from us
        self._results: list[Tensor] = []  # the same, by image, as wide as they are computed
        self._pasts: list[Past | None] = []  # behind the last step that the loop took
        self._is_asked = False  # the UNet has read this step's own points, as the loop asked
        self._voids = 0  # blocks in a row
        self._read_at = 0  # step at which the last block was read

    @property
    def _sampler(self) -> BlockSampler:
        assert self._begun is not None
        return self._begun

    @property
    def _table(self) -> Transitions:
        return self._sampler.table

    @property
    def _num_channels(self) -> int:
        return len(self._images[0].point)

    def on_scale(self, sample: Tensor, scaled: Tensor) -> None:
        """The loop has its latents scaled for the UNet, every branch of guidance."""
        self._incoming = sample
        self._scaled = scaled

    # ---- the UNet's call -------------------------------------------------------------------------

    def on_model(self, call: Call) -> Tensor:
        """The output that the loop asks for; a block is read where it is not known."""
        self._check_thread()
        if self._begun is None:
            self._first_output = self._as_asked(call)
            return self._first_output
        if self._index == self._table.num_steps:
            return call.as_asked()  # the loop is over

        latents = self._latents_of(call)
        if latents is None:  # somebody asks of something else
            return self._as_asked(call)
        self._void_if_changed(call, latents)
        lacking = self._lacking()
        if lacking:
            lengths = self._planned(call, lacking)
            has_all = len(lengths) == len(self._images)
            if has_all and max(lengths.values()) == 1:
                return self._as_asked(call)
            self._check_rows(call)
            self._read(call, lengths)
        raw = torch.stack([own[self._index].raw for own in self._known], dim=1)
        return raw.flatten(0, 1)

    def _lacking(self) -> list[int]:
        """Images of whose present step nothing is known."""
        lacking = []
        for place, known in enumerate(self._known):
            if self._index not in known:
                lacking.append(place)
        return lacking

    def _check_thread(self) -> None:
        if threading.get_ident() != self._thread:
            raise InvalidParameter(
                "two threads draw with one pipe at the same time",
                hint="give each thread a pipe of its own, with its own scheduler",
                option="pipe",
            )

    def _as_asked(self, call: Call) -> Tensor:
        """The pipe's own call, for a step that all images take alone."""
        self._call = call
        self._is_asked = True
        self._stats.rounds += 1
        self._stats.rows += len(call.sample)
        return call.as_asked()

    def _latents_of(self, call: Call) -> Tensor | None:
        """The latents [images, ...] that the UNet is asked of; None where it is asked of something
        else than the loop's latents at its step."""
        num_images = len(self._images)
        is_now = call.time == float(self._table.times[self._index])
        if not is_now or len(call.sample) % num_images != 0:
            return None
        seen = call.sample[:, : self._num_channels]
        if self._incoming is None or self._scaled is None:  # nobody has scaled them
            if float(self._table.scale[self._index]) != 1.0:
                return None
            self._incoming = self._scaled = seen
        branches = len(call.sample) // num_images
        expected = torch.cat([self._scaled[:num_images]] * branches)
        return self._incoming[:num_images] if _is_same(seen, expected) else None

    def _void_if_changed(self, call: Call, latents: Tensor) -> None:
        """A callback may have changed latents, prompts, guidance or adapters."""
        if not _is_same(latents, self._given):
            self._void(latents)
            return
        if not any(self._known):
            return  # nothing hangs on the rest
        assert self._call is not None
        is_like = call.is_like(self._call, self._num_channels)
        has_guidance = self._scales == self._guidance.now()
        has_settings = self._settings is not None and self._settings.are_now()
        if not is_like or not has_guidance or not has_settings:
            self._void(None)

    def _void(self, latents: Tensor | None) -> None:
        """What was read of later steps is void, and with it the past that has seen their noises.
        latents: where the loop goes on; None: where it is."""
        if any(self._known):
            self._voids += 1
            self._stats.voids += 1
        for place, image in enumerate(self._images):
            image.point = self._results[place] if latents is None else latents[place].float()
            image.step = self._index
            image.past = self._pasts[place]
            for known in self._known[place].values():
                image.defect -= known.defect
            self._known[place].clear()
        if latents is not None:
            self._given = latents.clone()

    def _planned(self, call: Call, lacking: list[int]) -> dict[int, int]:
        """Points of the next round, by image: blocks of all that have steps to do, so that batches
        stay whole; or one step of those that lack theirs."""
        lengths = {}
        for place, image in enumerate(self._images):
            if image.step < self._table.num_steps:
                lengths[place] = image.step
        branches = len(call.sample) // len(self._images)
        wanted = self._length_of(call, branches, len(lengths))
        for place, step in lengths.items():
            lengths[place] = self._longest(self._images[place], wanted(step))
        if max(lengths.values()) > 1:
            return lengths
        return dict.fromkeys(lacking, 1)

    def _longest(self, image: Image, wanted: int) -> int:
        """Of a block of this image, where so many points are wanted."""
        past = image.past
        if self._owner.draft.needs_features and (past is None or past.features is None):
            return 1
        return self._sampler.length(image, wanted)

    def _length_of(self, call: Call, branches: int, num_images: int) -> Callable[[int], int]:
        """Of a block, by the step that it begins with."""
        block = self._owner.block
        if self._voids >= _VOIDS:
            return lambda step: 1
        if isinstance(block, int):
            return lambda step: block
        pace = self._owner.pace
        if self._lengths is None:
            self._lengths = pace.lengths(self._sampler, self._guidance.now())
        costs = self._costs(call)
        own = pace.own

        def seconds(length: int) -> float:
            points = num_images * length
            besides = own(points) if pace.is_measured and length > 1 else 0.0
            return costs(branches * points) + besides

        chosen = self._lengths
        return lambda step: chosen.choose(step, seconds)

    def _costs(self, call: Call) -> Costs:
        """Of the target, measured now where nothing is known of such calls."""
        pace = self._owner.pace
        rows_a_step = len(call.sample)
        if pace.given is not None:
            return pace.given
        if self._known_costs is None:
            unet = self._owner.pipe.unet
            kept = KeptCosts(facts_of(unet, call.sample, call.tensors()))
            self._known_costs = kept.read(rows_a_step)
        if self._known_costs is None:
            started = time.perf_counter()
            self._known_costs = kept.measure(self._calls_of(call), rows_a_step)
            self._stats.measuring += time.perf_counter() - started
        return self._known_costs

    def _calls_of(self, call: Call) -> Callable[[int], object]:
        """The loop's call with any number of rows, done when it returns."""
        num_images = len(self._images)
        branches = len(call.sample) // num_images
        some = call.sample[:num_images, : self._num_channels]
        device = call.sample.device
        time_now = self._table.times[self._index].to(device)

        def run(rows: int) -> None:
            places = torch.arange(rows // branches, **INTS) % num_images
            points = some[places.to(device)]
            times = time_now.expand(len(places))
            call.of_points(places.tolist(), num_images, points, times)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return run

    def _check_rows(self, call: Call) -> None:
        """A row's output must hang on nothing but the row: not on the rest of its batch (attention
        over images), nor on the calls before (a cache of features). Seen once, for a UNet as it is
        set: what it says of the loop's point alone, and beside two others of another step."""
        forward = self._owner.forward_of_unet()
        if self._owner.checked is not None:
            checked_forward, checked = self._owner.checked
            if checked_forward == forward and checked.are_now():
                self._settings = checked
                return
        point = self._images[0].point
        places = [0, 0]
        steps = torch.tensor([self._index, self._table.num_steps - 1], **INTS)
        other_way = steps.flip(0)
        try:
            first = self._of_points(call, places, steps, torch.stack([point, -point]))
            second = self._of_points(call, places, other_way, torch.stack([3 * point, point]))
            alone = self._of_points(call, [0], steps[:1], point[None])
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            reason = str(error).split("\n")[0]
            got = f"its UNet can't read points of different steps in one batch: {reason}"
            raise unsupported(got) from error
        self._stats.checked_rows += 5 * len(alone)
        hangs_on_batch = not are_close(second[:, 1], first[:, 0], _BESIDE)
        if hangs_on_batch or not are_close(first[:, :1], alone, _ALONE):
            raise unsupported(
                "what its UNet says of a point hangs on the rest of the batch or on earlier calls"
            )
        self._settings = Settings(self._owner.pipe.unet)
        self._owner.checked = forward, self._settings

    def _of_points(self, call: Call, places: list[int], steps: Tensor, points: Tensor) -> Tensor:
        """The UNet's outputs [branches, m, ...] at points [m, ...] before these steps [m]."""
        scale = self._table.scale[steps].to(points).view(-1, *[1] * (points.dim() - 1))
        times = self._table.times[steps].to(call.sample.device)
        scaled = (points * scale).to(call.sample.dtype)
        return call.of_points(places, len(self._images), scaled, times)

    def _read(self, call: Call, lengths: dict[int, int]) -> None:
        """One call of the UNet for these images' next blocks."""
        started = time.perf_counter()
        reading = 0.0
        call.keep(self._num_channels)
        self._call = call
        self._read_at = self._index
        self._scales = self._guidance.now()
        places = list(lengths)
        said: list[tuple[Tensor, Tensor, Tensor | None]] = []

        def evaluate(rows: list[int], steps: Tensor, points: Tensor) -> Answer:
            nonlocal reading
            begun = time.perf_counter()
            own = [places[row] for row in rows]
            raw = self._of_points(call, own, steps, points)
            outputs = self._guidance.of(raw)
            features = self._owner.features(len(rows))
            said.append((raw, outputs, features))
            reading = time.perf_counter() - begun
            return Answer(outputs.float(), features)

        images = [self._images[place] for place in places]
        branches = len(call.sample) // len(self._images)
        done = self._sampler.round(images, list(lengths.values()), evaluate)
        self._stats.rounds += 1
        self._stats.rows += done.num_points * branches
        self._stats.count(done.decisions)
        self._keep(done, lengths, said[0])
        own_seconds = time.perf_counter() - started - reading
        self._owner.pace.own.take(done.num_points, own_seconds)

    def _keep(
        self, done: Round, lengths: dict[int, int], said: tuple[Tensor, Tensor, Tensor | None]
    ) -> None:
        """What a round has brought. said: of its points, image by image and lag by lag: the UNet's
        outputs [branches, m, ...], the loop's [m, ...], and features."""
        raw, outputs, features = said
        decisions = iter(done.decisions)
        row_of_image = 0
        for place, steps in zip(lengths, done.committed, strict=True):
            for lag, committed in enumerate(steps):
                row = row_of_image + lag
                decision = None
                if lag + 1 < lengths[place]:  # drafted, and judged
                    decision = next(decisions)
                _check_finite(outputs[row])
                hidden = None if features is None else features[row]
                known = _Known(committed, raw[:, row], outputs[row], hidden, decision)
                self._known[place][committed.step] = known
                if self._owner.watch is not None:
                    self._owner.watch(place, self._images[place], committed.step, committed.point)
            row_of_image += lengths[place]

    # ---- the scheduler's step --------------------------------------------------------------------

    def on_step(self, asked: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The latents behind this step, and the clean ones that were predicted."""
        self._check_thread()
        _check_step(asked)
        output: Tensor = asked["model_output"]
        if self._begun is None:
            self._begin(asked)
        else:
            self._check_order(asked)
        has_own_noise = self._noises.take(self._index)
        if self._is_known(asked) and has_own_noise:
            latents, clean = self._popped()
        else:
            if any(self._known) or not _is_same(asked["sample"], self._given):
                self._void(asked["sample"])
            latents, clean = self._single(output)
        latents = latents.to(output.dtype)
        self._given = latents.clone()  # the loop's own may be changed in place
        self._stats.defects = self._defects()
        self._noises.forget(self._index)
        self._incoming = None
        self._scaled = None
        self._is_asked = False
        self._index += 1
        self._stats.steps = self._index
        _count_step(self._owner.pipe.scheduler, asked["timestep"])
        return latents, clean.to(output.dtype)

    def _defects(self) -> list[float]:
        """Of the images, without those of steps that the loop has not come to."""
        defects = []
        for image, known in zip(self._images, self._known, strict=True):
            defect = image.defect
            for ahead in known.values():
                defect -= ahead.defect
            defects.append(defect)
        return defects

    def _check_order(self, asked: Mapping[str, Any]) -> None:
        """Whether a further step is the scheduler's next."""
        if self._index == self._table.num_steps:
            raise unsupported("its loop goes on behind the scheduler's last step")
        if float(asked["timestep"]) != float(self._table.times[self._index]):
            raise unsupported("its loop leaves the order of the scheduler's timesteps")
        is_own = _is_generator(asked.get("generator"), self._generator)
        if _eta(asked) != self._eta or not is_own:
            raise unsupported("its loop changes eta or the generator between two steps")

    def _is_known(self, asked: Mapping[str, Any]) -> bool:
        """Whether the loop asks for the very step that was read."""
        if self._lacking() or not _is_same(asked["sample"], self._given):
            return False
        outputs = [own[self._index].output for own in self._known]
        return are_close(torch.stack(outputs), asked["model_output"])

    def _popped(self) -> tuple[Tensor, Tensor]:
        """A step that was done in a block."""
        known = [own.pop(self._index) for own in self._known]
        self._learn(known)
        if self._index > self._read_at:
            self._voids = 0  # the last block was worth reading
        self._results = []
        cleans = []
        for one in known:
            self._results.append(one.committed.result)
            cleans.append(one.committed.clean)
        if any(self._known):  # the images' own pasts have seen what is ahead
            self._pasts = self._pasts_behind(known)
        else:
            self._pasts = [image.past for image in self._images]
        return torch.stack(self._results), torch.stack(cleans)

    def _learn(self, known: list[_Known]) -> None:
        """Of a step that is over. What is ahead may become void, and is then done anew with its own
        noises and coins: no block's length may hang on what they made of it before."""
        if self._lengths is None:
            return
        decisions = [one.decision for one in known if one.decision is not None]
        self._lengths.learn(decisions)

    def _pasts_behind(self, known: list[_Known]) -> list[Past | None]:
        """Of the images, once their present step, which was done in a block, is taken."""
        points = []
        outputs = []
        for one in known:
            points.append(one.committed.point)
            outputs.append(one.output.float())
        said = self._table.predicted(self._index, torch.stack(points), torch.stack(outputs))

        pasts: list[Past | None] = []
        for place, one in enumerate(known):
            own = Prediction(said.clean[place], said.noise[place])
            past = past_behind(self._pasts[place], self._index, own, one.features)
            pasts.append(past)
        return pasts

    def _single(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """The step by the output [images, ...] that the loop itself has made."""
        _check_finite(output)
        # Hidden states of a block have seen later noises.
        features = self._owner.features(len(output)) if self._is_asked else None
        answer = Answer(output.float(), features)
        points = torch.stack([image.point for image in self._images])
        done = self._sampler.single(self._images, points, answer)
        self._results = list(done.results)
        self._pasts = [image.past for image in self._images]
        if self._owner.watch is not None:
            for place, image in enumerate(self._images):
                self._owner.watch(place, image, self._index, points[place])
        return done.results, done.clean

    def _begin(self, asked: Mapping[str, Any]) -> None:
        """The loop's first step: everything that it needs is known now."""
        output, latents = asked["model_output"], asked["sample"]
        scheduler = self._owner.pipe.scheduler
        first = _first_step(scheduler, asked["timestep"])
        self._eta = _eta(asked)
        self._generator = asked.get("generator")
        table = tables.transitions(scheduler, eta=self._eta, first=first)
        _check_mode(scheduler, table, self._owner.tol is None)
        self._check_call(latents, output)

        noises = Noises(table.draws, output, self._generator, table.noise_dtype)
        for place in range(len(latents)):
            noise_of = functools.partial(noises.of, place=place)
            uniform_of = functools.partial(noises.uniform, place=place)
            image = Image(latents[place].float(), noise_of, uniform_of)
            self._images.append(image)
            self._known.append({})
        self._noises = noises
        self._given = latents.clone()
        self._pasts = [None] * len(latents)
        self._stats.images = len(latents)
        self._begun = BlockSampler(table, self._owner.draft, self._owner.tol)

    def _check_call(self, latents: Tensor, output: Tensor) -> None:
        """Whether the loop's first step is made of the UNet's outputs as Stable Diffusion's are."""
        call = self._call
        if call is None:
            raise unsupported("its loop takes a step without its UNet")
        if latents.device.type == "mps":
            raise unsupported("it is on mps, which has no float64 to judge drafts in")
        num_images = len(latents)
        said = self._first_output
        if len(said) % num_images != 0:
            raise unsupported(f"its UNet gives {len(said)} rows for {num_images} images")
        raw = said.view(-1, num_images, *said.shape[1:])
        if raw.shape[2:] != output.shape[1:]:
            raise unsupported("its UNet's outputs have not the latents' shape")
        if len(raw) > 2:
            raise unsupported(f"its guidance has {len(raw)} branches")
        if self._scaled is not None:
            seen = call.sample[:, : latents.shape[1]]
            expected = torch.cat([self._scaled[:num_images]] * len(raw))
            if not _is_same(seen, expected):
                raise unsupported("its UNet reads something else than the latents")
        _check_finite(output)
        if not self._guidance.explains(raw, output):
            raise unsupported("its guidance is not the one of Stable Diffusion")


def _is_same(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and bool(torch.equal(left, right))


def _eta(asked: Mapping[str, object]) -> float:
    eta = asked.get("eta")
    return 0.0 if eta is None else number(eta, "eta")


def _is_generator(one: object, other: object) -> bool:
    if not isinstance(one, list) or not isinstance(other, list):
        return one is other
    if len(one) != len(other):
        return False
    return all(left is right for left, right in zip(one, other, strict=True))


def _check_step(asked: Mapping[str, object]) -> None:
    if asked.get("variance_noise") is not None:
        raise unsupported("it gives `variance_noise` to the scheduler's step")
    if asked.get("use_clipped_model_output"):
        raise unsupported("it gives `use_clipped_model_output` to the scheduler's step")


def _check_mode(scheduler: object, table: Transitions, is_exact: bool) -> None:
    if table.num_steps == 1:
        return  # nothing is drafted; DDPM's last step has no noise
    name = type(scheduler).__name__
    if is_exact and not table.is_random:
        got = f"{name} as it is set draws no noise, so that no drafted step could be exact"
        hint = 'give the pipe eta=1.0 with DDIM, or mode="tolerance"'
        raise InvalidParameter(got, hint=hint, option="mode")
    if not is_exact and table.is_random:
        got = f"{name} as it is set draws noise: tolerance mode is for samplers without"
        raise InvalidParameter(got, hint='give mode="exact"', option="mode")


def _first_step(scheduler: Any, timestep: Any) -> int:
    begin = getattr(scheduler, "_begin_index", None)
    if begin is not None:
        return int(begin)
    if hasattr(scheduler, "index_for_timestep"):
        return int(scheduler.index_for_timestep(timestep))
    times: list[float] = scheduler.timesteps.tolist()
    if float(timestep) not in times:
        raise unsupported(f"its loop begins at {float(timestep)}, which is no timestep of its own")
    return times.index(float(timestep))


def _count_step(scheduler: Any, timestep: object) -> None:
    """As the scheduler's own step does."""
    if not hasattr(scheduler, "_step_index"):
        return
    if scheduler._step_index is None:
        scheduler._init_step_index(timestep)
    scheduler._step_index += 1


def _check_finite(output: Tensor) -> None:
    if not bool(output.isfinite().all()):
        hint = "look at the UNet's weights, and at what it is given"
        if output.dtype == torch.float16:
            hint = "float16 is too narrow for some UNets: give bfloat16 as its dtype"
        raise UnusableLogits("the UNet's output is NaN or infinite", hint=hint)
