"""Training of a learned block draft on recorded trajectories.

A sample: an image, a step that the target saw last, and the steps of a block behind it. The loss is
that of the block's own acceptance: for every lag the negative logarithm of the chance 2 Phi(-d / 2)
that its step is accepted, weighted by the chance that it is reached at all. What is told is the
expected number of accepted steps of a block, on images that are never trained on, beside the frozen
draft's.

A run can be killed at any time: started again it goes on with its last checkpoint to the same
weights. Knows recorded trajectories and the network. Does not know pipelines.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor

from flashdraft.diffusion.coupling import SMALLEST
from flashdraft.diffusion.learned import BlockDraftModel, log_level, unit_scale
from flashdraft.diffusion.lengths import weights_of
from flashdraft.diffusion.trajectories import Trajectories
from flashdraft.diffusion.transitions import Transitions
from flashdraft.errors import DataError, FlashDraftError, InvalidParameter
from flashdraft.files import locked, write_file
from flashdraft.process import INTS, is_terminal
from flashdraft.train.config import (
    check_run_folder,
    last_checkpoint,
    load_checkpoint,
    save_checkpoint,
)

__all__ = ["DraftTrainOptions", "Held", "train_draft"]


@dataclass(frozen=True)
class DraftTrainOptions:
    """samples: blocks a step; lags: of a block; held_out: share of the images that are only
    measured on; ema: decay of the average of the weights that is measured and kept."""

    steps: int = 3000
    samples: int = 24
    lags: int = 8
    lr: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.01
    ema: float = 0.995
    held_out: float = 0.1
    width: int = 48
    blocks: int = 3
    seed: int = 0
    eval_every: int = 250
    save_every: int = 250


class Held(NamedTuple):
    """Expected accepted steps of a block on held-out images, and the frozen draft's."""

    learned: float
    frozen: float


class _Blocks(NamedTuple):
    """Samples, [n, lags, ...] or [n, ...]."""

    points: Tensor  # where the frozen draft comes to
    clean: Tensor  # what the target says there
    seen: Tensor  # [n, ...], what it said last
    features: Tensor  # [n, channels, h, w]
    steps: Tensor  # [n, lags]
    last: Tensor  # [n], the step that it saw last
    exists: Tensor  # [n, lags], bool: the sampler has that step


def train_draft(data: Path, out: Path, options: DraftTrainOptions, *, quiet: bool = False) -> Held:
    """Train on a recorded folder; the draft with the best held-out acceptance is in out/best.

    Raises DataError, and InvalidParameter for a folder of another run.
    """
    trajectories = Trajectories(data)
    run = _Run(trajectories, out, options)
    with locked(out.absolute()):
        return run.run(quiet=quiet)


class _Run:
    def __init__(self, data: Trajectories, out: Path, options: DraftTrainOptions) -> None:
        self.table = data.table
        self.options = options
        self.out = out
        self.facts = {"data": data.facts, "options": asdict(options)}
        self._check_folder()
        self.tensors = data.load()
        num_held = max(round(options.held_out * len(data)), 1)
        if num_held >= len(data):
            raise DataError("there are too few recorded images", hint="record more")
        self.held = torch.arange(num_held, **INTS)
        self.seen = torch.arange(num_held, len(data), **INTS)

        torch.manual_seed(options.seed)
        self.model = self._new_model()
        self.average = self._new_model()
        self.average.load_state_dict(self.model.state_dict())
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=options.lr, weight_decay=options.weight_decay
        )
        self.step = 0
        self.best = 0.0
        self._resume()

    def run(self, *, quiet: bool) -> Held:
        out, options = self.out, self.options
        out.mkdir(parents=True, exist_ok=True)
        write_file(out / "run.json", json.dumps(self.facts, indent=2).encode())
        measured = self.measure()
        with Progress(disable=quiet or not is_terminal(None)) as bar:
            task = bar.add_task("train", total=options.steps, completed=self.step)
            while self.step < options.steps:
                loss = self._train_step()
                is_last = self.step == options.steps
                if is_last or self.step % options.eval_every == 0:
                    measured = self.measure()
                    self._log(loss, measured)
                    self._keep_best(measured)
                if is_last or self.step % options.save_every == 0:
                    self._save()
                told = f"accepted {measured.learned:.2f} (frozen {measured.frozen:.2f})"
                bar.update(task, advance=1, description=told)
        return measured

    def _new_model(self) -> BlockDraftModel:
        facts = self.facts["data"]
        options = self.options
        model: BlockDraftModel = BlockDraftModel(
            latent_channels=facts["channels"],
            feature_channels=facts["features"],
            width=options.width,
            blocks=options.blocks,
            unet=facts["unet"],
        )
        return model

    # ---- a step ----------------------------------------------------------------------------------

    def _train_step(self) -> float:
        options = self.options
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * _schedule(self.step, options)
        generator = torch.Generator("cpu").manual_seed(options.seed * 1_000_003 + self.step)
        blocks = self._drawn(self.seen, options.samples, generator)
        log_chances = self._log_chances(blocks, self._added(self.model, blocks))
        reached = _reached(log_chances).detach() * blocks.exists
        loss = -(reached * log_chances).sum() / reached.sum()
        if not bool(loss.isfinite()):
            got = f"the loss is {float(loss)} at step {self.step + 1}"
            raise FlashDraftError(got, hint="lower the learning rate")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self._take_average()
        return float(loss.detach())

    @torch.no_grad()
    def _take_average(self) -> None:
        kept = min(self.options.ema, (self.step + 1) / (self.step + 10))
        pairs = zip(self.average.parameters(), self.model.parameters(), strict=True)
        for average, weight in pairs:
            average.lerp_(weight, 1 - kept)

    def _drawn(self, images: Tensor, count: int, generator: torch.Generator) -> _Blocks:
        """Blocks of these images at random places."""
        steps = self.table.num_steps
        own = images[torch.randint(len(images), [count], generator=generator, **INTS)]
        last = torch.randint(steps - 1, [count], generator=generator, **INTS)
        return self._blocks(own, last)

    def _blocks(self, images: Tensor, last: Tensor) -> _Blocks:
        held = self.tensors
        lags = self.options.lags
        steps = last[:, None] + 1 + torch.arange(lags, **INTS)
        exists = steps < self.table.num_steps
        steps = steps.clamp(max=self.table.num_steps - 1)
        rows = images[:, None]
        noises = held["noises"][rows, steps]
        seen = held["clean"][images, last]
        start = held["points"][images, steps[:, 0]]
        points = _frozen_points(self.table, start, seen, steps, noises)
        features = held["features"][images, last].float()
        clean = held["clean"][rows, steps]
        return _Blocks(points, clean, seen, features, steps, last, exists)

    def _added(self, model: BlockDraftModel, blocks: _Blocks) -> Tensor:
        """What the network adds to the clean latents, [n, lags, ...]."""
        count, lags = blocks.steps.shape
        steps = blocks.steps.flatten()
        unit = unit_scale(self.table, steps).float().view(-1, 1, 1, 1)
        level = log_level(self.table, steps).float()
        seen_level = log_level(self.table, blocks.last).float().repeat_interleave(lags)
        said: Tensor = model(
            blocks.points.flatten(0, 1) * unit,
            blocks.seen.repeat_interleave(lags, 0),
            blocks.features.repeat_interleave(lags, 0),
            level,
            seen_level,
        )
        shaped: Tensor = said.view(count, lags, *said.shape[1:])
        return shaped

    def _log_chances(self, blocks: _Blocks, added: Tensor | float) -> Tensor:
        """Of every lag to be accepted, [n, lags]."""
        gaps = blocks.seen[:, None] + added - blocks.clean
        lengths = torch.linalg.vector_norm(gaps.flatten(2), dim=2)
        scale = weights_of(self.table).sqrt()[blocks.steps].float()
        is_random = self.table.deviation[blocks.steps] >= SMALLEST
        distances = torch.where(is_random, scale * lengths, 0.0)
        chances: Tensor = math.log(2.0) + torch.special.log_ndtr(-distances / 2)
        return chances

    # ---- what is measured ------------------------------------------------------------------------

    @torch.no_grad()
    def measure(self) -> Held:
        """On the same blocks of the held-out images, every time."""
        generator = torch.Generator("cpu").manual_seed(12345)
        learned = 0.0
        frozen = 0.0
        rounds = 8
        for _ in range(rounds):
            blocks = self._drawn(self.held, 64, generator)
            chances = self._log_chances(blocks, self._added(self.average, blocks))
            learned += _accepted(chances, blocks.exists) / rounds
            frozen += _accepted(self._log_chances(blocks, 0.0), blocks.exists) / rounds
        return Held(learned, frozen)

    def _keep_best(self, measured: Held) -> None:
        if measured.learned > self.best:
            self.best = measured.learned
            self.average.save_pretrained(self.out / "best")

    def _log(self, loss: float, measured: Held) -> None:
        line = {"step": self.step, "loss": loss, **measured._asdict()}
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    # ---- the run's folder ------------------------------------------------------------------------

    def _check_folder(self) -> None:
        begun = check_run_folder(self.out)
        if begun and begun.get("data") != self.facts["data"]:
            got = f"`{self.out}` was begun with other trajectories"
            raise InvalidParameter(got, hint="name another folder")
        free = ("steps", "eval_every", "save_every")
        for name, value in asdict(self.options).items():
            if begun and name not in free and begun["options"].get(name) != value:
                got = f"`{self.out}` was begun with {name} {begun['options'].get(name)}"
                raise InvalidParameter(got, hint="name another folder, or the settings of its run")

    def _save(self) -> None:
        optimizer = {}
        for index, entries in self.optimizer.state_dict()["state"].items():
            for name, tensor in entries.items():
                optimizer[f"{index}.{name}"] = tensor
        groups = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": optimizer,
        }
        save_checkpoint(self.out / "checkpoints", self.step, groups, {"best": self.best})

    def _resume(self) -> None:
        path = last_checkpoint(self.out / "checkpoints")
        if path is None:
            return
        groups, state = load_checkpoint(path)
        self.model.load_state_dict(groups["model"])
        self.average.load_state_dict(groups["average"])
        held = self.optimizer.state_dict()
        for name, tensor in groups["optimizer"].items():
            index, _, entry = name.partition(".")
            held["state"].setdefault(int(index), {})[entry] = tensor
        self.optimizer.load_state_dict(held)
        self.step = state["step"]
        self.best = state["best"]


def _frozen_points(
    table: Transitions, start: Tensor, clean: Tensor, steps: Tensor, noises: Tensor
) -> Tensor:
    """[n, lags, ...]: where the frozen draft comes to from `start`, by the noises before each."""
    points = [start]
    for lag in range(steps.shape[1] - 1):
        own = steps[:, lag]
        mean = table.mean(own, points[-1], table.implied(own, points[-1], clean))
        deviation = table.deviation[own].float().view(-1, *[1] * (start.dim() - 1))
        points.append(mean + deviation * noises[:, lag])
    return torch.stack(points, dim=1)


def _reached(log_chances: Tensor) -> Tensor:
    """The chance that a lag's draft is judged at all, [n, lags]: all before it stand."""
    sums = log_chances.cumsum(1)
    before = torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1]], dim=1)
    return before.exp()


def _accepted(log_chances: Tensor, exists: Tensor) -> float:
    """Expected accepted steps of a block."""
    stands = log_chances.cumsum(1).exp() * exists
    return float(stands.sum(1).mean())


def _schedule(step: int, options: DraftTrainOptions) -> float:
    if step < options.warmup:
        return (step + 1) / options.warmup
    done = (step - options.warmup) / max(options.steps - options.warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * done))
