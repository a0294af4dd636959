"""Training of a learned block draft on recorded trajectories.

A sample: an image, a step that the target saw last, and the points of a block behind it. The loss
is that of the block's own acceptance: for every lag the negative logarithm of the chance
2 Phi(-d / 2) that its step is accepted, weighted by the chance that it is reached at all. What is
told is the expected number of accepted steps of a block, on images that are never trained on,
beside the frozen draft's.

A run can be killed at any time: started again it goes on with its last checkpoint to the same
weights. Knows recorded trajectories and the network. Does not know pipelines.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor

import flashdraft
from flashdraft.diffusion.coupling import SMALLEST
from flashdraft.diffusion.learned import (
    BlockDraftModel,
    DraftShape,
    Seen,
    frozen_points,
    innovations,
    seen_at,
)
from flashdraft.diffusion.lengths import weights_of
from flashdraft.diffusion.options import DraftTrainOptions
from flashdraft.diffusion.trajectories import Trajectories
from flashdraft.errors import DataError, FlashDraftError, InvalidParameter
from flashdraft.files import locked, write_file
from flashdraft.process import BOOLS, DOUBLES, INTS, signals_told
from flashdraft.provenance import provenance
from flashdraft.train.config import (
    check_run_folder,
    full_disk_named,
    last_checkpoint,
    load_checkpoint,
    save_checkpoint,
)

__all__ = ["DraftTrainer", "Held", "Split", "train_draft"]

_CARD = Path(flashdraft.__file__).with_name("assets") / "image_card.md"
_FREE = ("steps", "eval_every", "save_every")  # settings that a run may go on without
_MEASURED = 384  # blocks of held-out images
_AT_ONCE = 64
_SEED_OF_MEASURED = 12345


class Held(NamedTuple):
    """Expected accepted steps of a block on held-out images, and the frozen draft's."""

    learned: float
    frozen: float


class Split(NamedTuple):
    """Numbers of images: those that are trained on, and those that are only measured on."""

    seen: Tensor
    held: Tensor

    @classmethod
    def of(cls, count: int, share: float) -> "Split":
        """Those that are held out lie evenly among all. Raises DataError for a single image."""
        if count < 2:
            got = "one image cannot be trained on and measured on"
            raise DataError(got, hint="record more")
        num_held = min(max(round(count * share), 1), count - 1)
        held = (2 * torch.arange(num_held, **INTS) + 1) * count // (2 * num_held)
        is_held = torch.zeros(count, **BOOLS)
        is_held[held] = True
        return cls((~is_held).nonzero()[:, 0], held)


class _Blocks(NamedTuple):
    """n samples. scale: [n, lags], of a distance of clean latents, to be one of the means in
    deviations; exists: [n, lags] bool, whether the sampler has that step."""

    seen: Seen
    innovations: Tensor  # [n, lags, ...]
    levels: Tensor  # [n, lags]
    clean: Tensor  # [n, lags, ...], what the target says there
    scale: Tensor
    exists: Tensor


def train_draft(
    data: Sequence[Path],
    out: Path,
    options: DraftTrainOptions,
    *,
    device: str = "cpu",
    quiet: bool = False,
) -> Held:
    """Train on recorded folders of one UNet; the draft with the best held-out acceptance is in
    out/best, and its figures are returned.

    SIGTERM and SIGINT write a checkpoint and leave with exit code 128 + signal. Raises DataError,
    and InvalidParameter for a folder of another run.
    """
    trainer = DraftTrainer([Trajectories(folder) for folder in data], out, options, device)
    return trainer.run(quiet=quiet)


class DraftTrainer:
    """What is left of a run is its folder `out`: `checkpoints/`, `best/` (a draft's folder),
    metrics.jsonl, run.json."""

    def __init__(
        self,
        data: Sequence[Trajectories],
        out: Path,
        options: DraftTrainOptions,
        device: str = "cpu",
    ) -> None:
        _check_alike(data)
        self.data = data
        self.out = out.absolute()
        self.options = options
        self.device = torch.device(device)
        self.origin = provenance() | {"config": asdict(options)}
        identities = []
        self.splits = []
        for one in data:
            identities.append(one.identity)
            self.splits.append(Split.of(len(one), options.held_out))
        self.origin["inputs"] = {"data": identities}
        self._check_folder()

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.model = self._new_model()
        self.average = self._new_model()
        self.average.load_state_dict(self.model.state_dict())
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=options.lr, weight_decay=options.weight_decay
        )
        self.step = 0
        self.measured: list[tuple[int, Held]] = []
        self.stopped = 0  # the signal that this process got
        self._resume()

    @property
    def best(self) -> Held:
        """Of all measurements so far."""
        return max((held for _, held in self.measured), default=Held(0.0, 0.0))

    def run(self, *, quiet: bool = False) -> Held:
        """As `train_draft`."""
        with locked(self.out):
            return self._run(quiet=quiet)

    def _run(self, *, quiet: bool) -> Held:
        options = self.options
        self._begin()
        full_disk = full_disk_named(self.out / "checkpoints", f"a file of `{self.out}`")
        with Progress(disable=quiet) as bar, signals_told(self._stop), full_disk:
            task = bar.add_task("train", total=options.steps, completed=self.step)
            while self.step < options.steps:
                loss = self.train_step()
                is_last = self.step == options.steps
                if is_last or self.step % options.eval_every == 0:
                    self._measure_and_log(loss)
                if is_last or self.stopped or self.step % options.save_every == 0:
                    self._save()
                told = f"loss {loss:.3f}"
                if self.measured:
                    learned, frozen = self.measured[-1][1]
                    told = f"{told}  accepted {learned:.2f} (frozen {frozen:.2f})"
                bar.update(task, advance=1, description=told)
                if self.stopped:
                    raise SystemExit(128 + self.stopped)
        return self.best

    def _stop(self, number: int) -> None:
        """The step ends first."""
        self.stopped = number

    def _new_model(self) -> BlockDraftModel:
        facts = self.data[0].facts
        shape = DraftShape(
            latent_channels=facts["channels"],
            feature_channels=facts["features"],
            width=self.options.width,
            blocks=self.options.blocks,
        )
        return BlockDraftModel(shape, self.data[0].unet).to(self.device)

    # ---- a step ----------------------------------------------------------------------------------

    def train_step(self) -> float:
        """The loss. Raises FlashDraftError where loss or gradient is not finite."""
        options = self.options
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * _schedule(self.step, options)
        seed = (options.seed * 1_000_003 + self.step) % 2**63
        generator = torch.Generator("cpu").manual_seed(seed)
        source = self._source(generator)
        images = self.splits[source].seen
        blocks = self._drawn(source, images, options.samples, generator)

        log_chances = _log_chances(blocks, self._added(self.model, blocks))
        reached = _reached(log_chances).detach() * blocks.exists
        loss = -(reached * log_chances).sum() / reached.sum()
        self._check_finite("loss", loss, source)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)
        self._check_finite("gradient's norm", norm, source)
        self.optimizer.step()
        self.step += 1
        self._take_average()
        return float(loss.detach())

    def _source(self, generator: torch.Generator) -> int:
        """One of the folders, by their numbers of images."""
        total = sum(len(split.seen) for split in self.splits)
        drawn = int(torch.randint(total, [1], generator=generator, **INTS))
        for number, split in enumerate(self.splits):
            if drawn < len(split.seen):
                return number
            drawn -= len(split.seen)
        raise AssertionError("it was drawn below the total")

    def _check_finite(self, what: str, value: Tensor, source: int) -> None:
        if not bool(value.isfinite()):
            place = f"at step {self.step + 1}, in `{self.data[source].folder}`"
            hint = "look at that data, or lower the learning rate; the last checkpoint is whole"
            raise FlashDraftError(f"the {what} is {float(value.detach())} {place}", hint=hint)

    @torch.no_grad()
    def _take_average(self) -> None:
        kept = min(self.options.ema, (self.step + 1) / (self.step + 10))
        pairs = zip(self.average.parameters(), self.model.parameters(), strict=True)
        for average, weight in pairs:
            average.lerp_(weight, 1 - kept)

    def _drawn(
        self, source: int, images: Tensor, count: int, generator: torch.Generator
    ) -> _Blocks:
        """Blocks of these images at random places."""
        num_steps = self.data[source].table.num_steps
        own = images[torch.randint(len(images), [count], generator=generator, **INTS)]
        last = torch.randint(num_steps - 1, [count], generator=generator, **INTS)
        return self._blocks(self.data[source], own.tolist(), last)

    def _blocks(self, data: Trajectories, images: list[int], last: Tensor) -> _Blocks:
        table = data.table
        lags = self.options.lags
        steps = last[:, None] + 1 + torch.arange(lags, **INTS)
        exists = steps < table.num_steps
        steps = steps.clamp(max=table.num_steps - 1)
        parts = self._read(data, images, last.tolist())

        start, seen_point = parts["points"][:, 1], parts["points"][:, 0]
        seen_clean = parts["clean"][:, 0]
        seen = seen_at(table, last, seen_clean, seen_point, parts["features"][:, 0])
        points = frozen_points(table, start, seen_clean, steps, parts["noises"])
        moved, levels = innovations(table, seen, last, steps, points)
        is_judged = exists & (table.deviation[steps] >= SMALLEST)
        scale = torch.where(is_judged, weights_of(table).sqrt()[steps], 0.0)
        return _Blocks(
            seen,
            moved,
            levels,
            parts["clean"][:, 1:],
            scale.to(points),
            exists.to(self.device),
        )

    def _read(self, data: Trajectories, images: list[int], last: list[int]) -> dict[str, Tensor]:
        """points: [n, 2, ...], clean: [n, 1 + lags, ...], noises: [n, lags, ...] of the steps
        behind the last ones, features: [n, 1, ...]. Zeros where the sampler has ended."""
        lags = self.options.lags
        asked = {"points": (0, 2), "clean": (0, 1 + lags), "noises": (1, lags), "features": (0, 1)}
        parts = {}
        for name, (first, count) in asked.items():
            rows = []
            for image, step in zip(images, last, strict=True):
                row = data.read(name, image, step + first, count)
                padded = row.new_zeros(count, *row.shape[1:])
                padded[: len(row)] = row
                rows.append(padded)
            parts[name] = torch.stack(rows).to(self.device)
        return parts

    def _added(self, model: BlockDraftModel, blocks: _Blocks) -> Tensor:
        added: Tensor = model(blocks.seen, blocks.innovations, blocks.levels)
        return added

    # ---- what is measured ------------------------------------------------------------------------

    @torch.no_grad()
    def measure(self) -> list[Held]:
        """By folder, on the same blocks of its held-out images every time."""
        measured = []
        for source, split in enumerate(self.splits):
            generator = torch.Generator("cpu").manual_seed(_SEED_OF_MEASURED)
            learned = 0.0
            frozen = 0.0
            for _ in range(_MEASURED // _AT_ONCE):
                blocks = self._drawn(source, split.held, _AT_ONCE, generator)
                added = self._added(self.average, blocks)
                learned += _accepted(_log_chances(blocks, added), blocks.exists)
                frozen += _accepted(_log_chances(blocks, 0 * added), blocks.exists)
            rounds = _MEASURED // _AT_ONCE
            measured.append(Held(learned / rounds, frozen / rounds))
        return measured

    def _measure_and_log(self, loss: float) -> None:
        by_source = self.measure()
        learned, frozen = torch.tensor(by_source, **DOUBLES).mean(0).tolist()
        is_best = not self.measured or learned > self.best.learned
        self.measured.append((self.step, Held(learned, frozen)))
        if is_best:
            self.average.save_pretrained(self.out / "best", readme=self._card())
        line: dict[str, object] = {"step": self.step, "loss": loss}
        line |= {"learned": learned, "frozen": frozen}
        if len(by_source) > 1:
            line["by_folder"] = by_source
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _card(self) -> str:
        rows = []
        for data, split in zip(self.data, self.splits, strict=True):
            own = data.options
            eta = "" if own.eta is None else f"{own.eta:g}"
            sampler = data.facts["scheduler"]["name"]
            counts = f"{len(data)} | {len(split.held)}"
            rows.append(f"| {counts} | {sampler} | {own.steps} | {own.guidance:g} | {eta} |")
        measured = []
        for step, held in self.measured:
            measured.append(f"| {step} | {held.learned:.2f} | {held.frozen:.2f} |")
        settings = []
        for name, value in asdict(self.options).items():
            settings.append(f"{name} {value}")
        where = "the mean over the rows above" if len(self.data) > 1 else "at random steps"
        facts: dict[str, object] = {
            "pipe": Path(self.data[0].facts["pipe"]["name"]).name,
            "num_weights": sum(weight.numel() for weight in self.model.parameters()),
            "step": self.step,
            "num_blocks": self.step * self.options.samples,
            "data": "\n".join(rows),
            "settings": ", ".join(settings),
            "measured": "\n".join(measured),
            "where": where,
        }
        facts |= asdict(self.model.shape) | self.origin["versions"] | self.origin
        template = _CARD.read_text(encoding="utf-8")
        return template.format_map(facts | {"lags": self.options.lags})

    # ---- the run's folder ------------------------------------------------------------------------

    def _check_folder(self) -> None:
        """Raises InvalidParameter for the folder of another run."""
        begun = check_run_folder(self.out, inputs=[one.folder for one in self.data])
        if not begun:
            return
        if begun.get("inputs") != self.origin["inputs"]:
            got = f"`{self.out}` was begun with other trajectories"
            raise InvalidParameter(got, hint="name another folder, or the data of its run")
        for name, value in asdict(self.options).items():
            held = begun["config"].get(name)
            if name not in _FREE and held != value:
                got = f"`{self.out}` was begun with {name} {held}, not {value}"
                hint = "name another folder, or the settings of its run.json"
                raise InvalidParameter(got, hint=hint)

    def _begin(self) -> None:
        """Write whose folder this is, and forget what was measured behind the last checkpoint: it
        comes again."""
        self.out.mkdir(parents=True, exist_ok=True)
        write_file(self.out / "run.json", json.dumps(self.origin, indent=1).encode())
        log = self.out / "metrics.jsonl"
        if not log.exists():
            return
        kept = []
        for line in log.read_text(encoding="utf-8").splitlines(keepends=True):
            is_whole = line.endswith("\n")  # a kill may cut the last one off
            if is_whole and json.loads(line)["step"] <= self.step:
                kept.append(line)
        write_file(log, "".join(kept).encode())

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
        save_checkpoint(self.out / "checkpoints", self.step, groups, {"measured": self.measured})

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
        self.measured = [(step, Held(*held)) for step, held in state["measured"]]


def _check_alike(data: Sequence[Trajectories]) -> None:
    """Raises DataError for folders of different UNets."""
    first = data[0]
    for other in data[1:]:
        if not first.unet.is_like(other.unet):
            got = f"`{other.folder}` was recorded with another UNet than `{first.folder}`"
            raise DataError(got, hint="a draft is of one UNet")


# ---- chances -------------------------------------------------------------------------------------


def _log_chances(blocks: _Blocks, added: Tensor) -> Tensor:
    """Of every lag to be accepted, [n, lags]. added: [n, lags, ...], to the clean latents that were
    seen."""
    gaps = blocks.seen.clean[:, None] + added - blocks.clean
    distances = blocks.scale * torch.linalg.vector_norm(gaps.flatten(2), dim=2)
    chances: Tensor = math.log(2.0) + torch.special.log_ndtr(-distances / 2)
    return chances


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
    """Linear warm-up, then a cosine to zero."""
    rising = max(1, round(options.steps * options.warmup))
    falling = math.pi * max(0, step - rising) / max(1, options.steps - rising)
    return min((step + 1) / rising, 0.5 * (1 + math.cos(falling)))
