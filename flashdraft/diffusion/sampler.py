"""Rounds of block speculation over the steps of a sampler.

A round: the draft makes points for the next steps of every image, the target reads them all in one
batched call, and the walk keeps what stands. Two modes, never mixed. `exact` keeps a draft's point
where the coupling allows it, so that every image is drawn from the sampler's own law. `tolerance`,
for samplers without noise, keeps a draft's step where it is within `tol` of the target's, and sums
up by how much it was not the target's.

Every round commits at least one step of every image in it: the block's first point is a committed
one, and the last step of a block is the target's own. A block of one step is the sampler itself.

Knows transitions, drafts and couplings. Does not know pipelines: the target is a function.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from flashdraft.diffusion.coupling import Coupled, acceptance, couple, distance
from flashdraft.diffusion.drafts import Draft, Past
from flashdraft.diffusion.transitions import Prediction, Transitions
from flashdraft.process import INTS

__all__ = [
    "Answer",
    "BlockSampler",
    "Committed",
    "Decision",
    "Evaluate",
    "Image",
    "Round",
    "Singles",
    "past_behind",
]

_TINY = 1e-12


class Answer(NamedTuple):
    """What the target says of points: outputs [m, ...], and its hidden states [m, channels, h, w]
    there, where a draft needs them."""

    outputs: Tensor
    features: Tensor | None = None


# Of places of images [m], steps [m] and points [m, ...].
Evaluate = Callable[[list[int], Tensor, Tensor], Answer]


@dataclass
class Image:
    """One image on its way.

    point: [...], float32, before `step`. noise_of, uniform_of: what a step takes, always the same:
    standard normal [...], and a number in [0, 1). defect: summed over the steps, of tolerance mode.
    """

    point: Tensor
    noise_of: Callable[[int], Tensor]
    uniform_of: Callable[[int], float]
    step: int = 0
    past: Past | None = None
    defect: float = 0.0


class Committed(NamedTuple):
    """A step that is done: the points before and behind it, and the clean latents that the target
    saw in the first."""

    step: int
    point: Tensor
    clean: Tensor
    result: Tensor


class Singles(NamedTuple):
    """One step of many images, [n, ...]: the points behind it, and the clean latents that the
    target saw before it."""

    results: Tensor
    clean: Tensor


class Decision(NamedTuple):
    """Whether a drafted step stood. predicted: the chance of that, in exact mode; defect: in
    tolerance mode; each 0 in the other."""

    step: int
    lag: int
    stood: bool
    predicted: float
    defect: float


@dataclass
class Round:
    """What one call of the target brought. committed: by image, in order."""

    committed: list[list[Committed]]
    decisions: list[Decision] = field(default_factory=list)
    num_points: int = 0  # that the target read


@dataclass
class _Block:
    """Points of all images, image by image and lag by lag.

    drafted: the means of the steps behind them, None for the last of an image: it is the target's.
    """

    places: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    lags: list[int] = field(default_factory=list)
    points: list[Tensor] = field(default_factory=list)
    noises: list[Tensor] = field(default_factory=list)
    drafted: list[Tensor | None] = field(default_factory=list)


@dataclass
class BlockSampler:
    """tol: of tolerance mode; None: exact mode."""

    table: Transitions
    draft: Draft
    tol: float | None = None

    def round(self, images: Sequence[Image], lengths: Sequence[int], evaluate: Evaluate) -> Round:
        """One call of the target, of at most `lengths` points of every image, and at least one."""
        block = _Block()
        for place, image in enumerate(images):
            length = self.length(image, lengths[place])
            self._add(block, place, image, length)
        points = torch.stack(block.points)
        steps = torch.tensor(block.steps, **INTS)
        answer = evaluate(block.places, steps, points)
        return self._walk(images, block, points, answer)

    def single(self, images: Sequence[Image], points: Tensor, answer: Answer) -> Singles:
        """One step of images that are all before the same, without a draft: the sampler itself.

        points: [n, ...], theirs. What `round` does for blocks of one step, in few operations: where
        a call of the target takes milliseconds, they count.
        """
        table = self.table
        step = images[0].step
        said = table.predicted(step, points, answer.outputs)
        before = self._clean_before(images, step)
        results = table.mean(step, points, said, before)
        if table.draws[step]:
            noises = torch.stack([image.noise_of(step) for image in images])
            results = results + float(table.deviation[step]) * noises

        for place, image in enumerate(images):
            own = Prediction(said.clean[place], said.noise[place])
            features = None if answer.features is None else answer.features[place]
            image.past = past_behind(image.past, step, own, features)
            image.point = results[place]
            image.step = step + 1
        return Singles(results, said.clean)

    def _clean_before(self, images: Sequence[Image], step: int) -> Tensor | None:
        """What the target saw in the step before this one, [n, ...], where the sampler asks."""
        if float(self.table.before[step]) == 0:
            return None
        seen = []
        for image in images:
            if image.past is None:
                seen.append(torch.zeros_like(image.point))
            else:
                seen.append(image.past.said.clean)
        return torch.stack(seen)

    def length(self, image: Image, wanted: int) -> int:
        """Of the block that `round` makes where so many points are wanted."""
        if image.past is None:  # nothing to draft from
            return 1
        left = self.table.num_steps - image.step
        return max(min(wanted, left), 1)

    # ---- drafting --------------------------------------------------------------------------------

    def _add(self, block: _Block, place: int, image: Image, length: int) -> None:
        """The points of one image."""
        noises = [image.noise_of(image.step + lag) for lag in range(length)]
        predict = None
        if image.past is not None and length > 1:
            own = torch.stack(noises[:-1])
            predict = self.draft.block(self.table, image.past, image.point, own)

        point = image.point
        before = None if image.past is None else image.past.said.clean[None]
        for lag in range(length):
            step = image.step + lag
            block.places.append(place)
            block.steps.append(step)
            block.lags.append(lag)
            block.points.append(point)
            block.noises.append(noises[lag])
            if predict is None or lag + 1 == length:
                block.drafted.append(None)
                continue
            said = predict(lag, step, point[None])
            means = self.table.mean(step, point[None], said, before)
            mean = means[0]
            before = said.clean
            block.drafted.append(mean)
            deviation = float(self.table.deviation[step])
            point = mean + deviation * noises[lag]

    # ---- verifying -------------------------------------------------------------------------------

    def _walk(
        self, images: Sequence[Image], block: _Block, points: Tensor, answer: Answer
    ) -> Round:
        """All steps are judged at once; an image keeps those before its first refusal, and that."""
        steps = torch.tensor(block.steps, **INTS)
        outputs, features = answer
        said = self.table.predicted(steps, points, outputs)
        before = self._before(images, block, said, steps)
        means = self.table.mean(steps, points, said, before)
        drafted = means.clone()  # the last step of a block is the target's own
        for row, mean in enumerate(block.drafted):
            if mean is not None:
                drafted[row] = mean
        judged = self._judged(images, block, drafted, means)
        stood = judged.coupled.accepted.tolist()

        done = Round([[] for _ in images], num_points=len(points))
        has_ended = [False] * len(images)
        for row, place in enumerate(block.places):
            if has_ended[place]:
                continue
            image = images[place]
            is_last = block.drafted[row] is None
            result = judged.coupled.sample[row]
            if stood[row] and not is_last:
                result = points[row + 1]  # the very point that the target has read
            if not is_last:
                decision = judged.decision(block, row, stood[row])
                done.decisions.append(decision)
                image.defect += decision.defect if stood[row] else 0.0
            committed = Committed(image.step, points[row], said.clean[row], result)
            done.committed[place].append(committed)
            verified = Prediction(said.clean[row], said.noise[row])
            hidden = None if features is None else features[row]
            image.past = past_behind(image.past, image.step, verified, hidden)
            image.point = result
            image.step += 1
            has_ended[place] = is_last or not stood[row]
        return done

    def _before(
        self, images: Sequence[Image], block: _Block, said: Prediction, steps: Tensor
    ) -> Tensor | None:
        """What the target said of the clean latents a step before each point: [m, ...], where the
        sampler asks."""
        if not bool(self.table.before[steps].any()):
            return None
        before = []
        for row, lag in enumerate(block.lags):
            past = images[block.places[row]].past
            if lag > 0:
                before.append(said.clean[row - 1])
            elif past is not None:
                before.append(past.said.clean)
            else:
                before.append(torch.zeros_like(said.clean[row]))
        return torch.stack(before)

    def _judged(
        self, images: Sequence[Image], block: _Block, drafted: Tensor, means: Tensor
    ) -> "_Judged":
        noises = torch.stack(block.noises)
        steps = torch.tensor(block.steps, **INTS)
        deviation = self.table.deviation[steps].to(means.device)
        if self.tol is None:
            uniforms = []
            for place, step in zip(block.places, block.steps, strict=True):
                uniforms.append(images[place].uniform_of(step))
            drawn = torch.tensor(uniforms, dtype=torch.float64, device=means.device)
            coupled = couple(noises, drafted, means, deviation, drawn)
            apart = distance(drafted, means, deviation)
            chances = acceptance(apart)
            return _Judged(coupled, chances.tolist(), [0.0] * len(means))

        size = _norm(means).clamp(min=_TINY)
        gaps = _norm(drafted - means) / size
        accepted = gaps <= self.tol
        num_further = means.dim() - 1
        is_kept = accepted.view(-1, *[1] * num_further)
        sample = torch.where(is_kept, drafted, means)
        coupled = Coupled(sample, accepted)
        return _Judged(coupled, [0.0] * len(means), gaps.tolist())


class _Judged(NamedTuple):
    """Of every point: what comes behind it, the chance that it stands, and its defect."""

    coupled: Coupled
    chances: list[float]
    defects: list[float]

    def decision(self, block: _Block, row: int, stood: bool) -> Decision:
        return Decision(
            step=block.steps[row],
            lag=block.lags[row],
            stood=stood,
            predicted=self.chances[row],
            defect=self.defects[row],
        )


def _norm(values: Tensor) -> Tensor:
    rows = values.double().flatten(1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms


def past_behind(past: Past | None, step: int, said: Prediction, features: Tensor | None) -> Past:
    if past is None:
        return Past(step, said, features=features)
    return past.then(step, said, features)
