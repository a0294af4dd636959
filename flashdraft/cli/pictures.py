"""Pictures into files, and words about them: what `flashdraft image` does.

Needs the extra `image`.
"""

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from PIL.Image import Image
from rich.progress import Progress

from flashdraft.bench.report import print_table
from flashdraft.cli.image import LOOKABLE, ImageOptions
from flashdraft.diffusion import drawing
from flashdraft.diffusion.drawing import Asked, Compared, Drawn, Way
from flashdraft.diffusion.models import eta_of, known_words, load_pipe
from flashdraft.diffusion.pipeline import SpeculativeDiffusion
from flashdraft.diffusion.sheet import SheetRow, contact_sheet, enlarged
from flashdraft.files import locked, say, write_own
from flashdraft.process import is_terminal

__all__ = ["draw_pictures", "draw_sheet"]

_UNDRAFTED = 2  # steps: the first one has nothing to draft from, the last one is the model's own
_WAYS = 5  # of `compare`


def draw_pictures(
    prompt: str, files: Sequence[Path], options: ImageOptions, draft: str | Path | None
) -> None:
    """One by one, each written as it is done."""
    pipe, asked = _loaded(prompt, options)
    way = _way(pipe, options, draft)
    told = _Told()
    with _progress(options.steps * len(files)) as on_step:
        for seed, file in zip(options.seeds, files, strict=True):
            drawn = drawing.draw(way, asked, seed, on_step)
            _write(file, _shown(drawn.picture, options), _facts(asked, options, drawn))
            told.add(file, drawn)

    assert way.fast is not None
    print(f"{_name_of_sampler(way)}, {options.mode} mode, draft {way.fast.draft.name}\n")
    told.show(options)


def draw_sheet(prompt: str, out: Path, options: ImageOptions, draft: str | Path | None) -> None:
    """The ways to draw, side by side."""
    pipe, asked = _loaded(prompt, options)
    exact = _drafted(pipe, options, "exact", draft)
    tolerant = _drafted(pipe, options, "tolerance", None)
    with _progress(_WAYS * options.steps * len(options.seeds)) as on_step:
        compared = drawing.compare(exact, tolerant, asked, options.seeds, on_step)

    rows = []
    is_exact = True
    for way in compared:
        pictures = [drawn.picture for drawn in way.drawn]
        starts_group = way.is_exact != is_exact
        is_exact = way.is_exact
        rows.append(SheetRow(way.name, _notes(way), pictures, starts_group))
    columns = [f"seed {seed}" for seed in options.seeds]
    title = f"{asked.prompt}: DDIM, guidance {asked.guidance:g}"
    sheet = contact_sheet(title, columns, rows)
    _write(out, sheet, {"prompt": asked.prompt, "options": _given(options)})
    _print_compared(compared)
    print(f"\n{out}: {len(rows)} ways by {len(columns)} seeds")


def _loaded(prompt: str, options: ImageOptions) -> tuple[Any, Asked]:
    """The pipe, and what it is asked for; what it would refuse or cut is refused here."""
    pipe = load_pipe(
        options.model, dtype=options.dtype, device=options.device, scheduler=_scheduler(options)
    )
    asked = Asked(prompt, options.steps, options.guidance, options.negative, options.pixels)
    drawing.check_asked(pipe, asked)
    unknown = drawing.unknown_words(pipe, f"{prompt} {options.negative or ''}")
    if unknown:
        named = ", ".join(f"`{word}`" for word in unknown)
        say(f"note: this model does not know {named}; its words are:")
        say(f"      {' '.join(known_words(pipe))}")
    return pipe, asked


def _scheduler(options: ImageOptions) -> str | None:
    if options.compare:
        return "ddim"
    if options.scheduler is None and options.mode == "tolerance":
        return "ddim"
    return options.scheduler


def _drafted(
    pipe: object, options: ImageOptions, mode: str, draft: str | Path | None
) -> SpeculativeDiffusion:
    usual = "flat" if options.compare else "measured"
    return SpeculativeDiffusion(
        pipe,
        draft=draft,
        mode=mode,
        block=options.block_size,
        tol=options.tol if mode == "tolerance" else None,
        costs=options.costs or usual,
    )


# ---- pictures one by one -------------------------------------------------------------------------


def _way(pipe: Any, options: ImageOptions, draft: str | Path | None) -> Way:
    is_exact = options.mode == "exact"
    eta = eta_of(pipe.scheduler, options.eta, is_exact=is_exact)
    drawing.check_way(pipe, eta, is_exact=is_exact)
    return Way(pipe, eta, _drafted(pipe, options, options.mode, draft))


def _name_of_sampler(way: Way) -> str:
    name = type(way.pipe.scheduler).__name__.removesuffix("Scheduler")
    return name if way.eta is None else f"{name} with eta {way.eta:g}"


def _shown(picture: Image, options: ImageOptions) -> Image:
    """As it is written: a thumbnail of a model is enlarged."""
    width = LOOKABLE if options.scale is None else picture.width * options.scale
    return enlarged(picture, width)


@dataclass
class _Told:
    """What is said of pictures that are written; they themselves are not kept."""

    rows: list[list[str]] = field(default_factory=list)
    hidden: list[int] = field(default_factory=list)  # seeds
    drafted: int = 0
    measuring: float = 0.0

    def add(self, file: Path, drawn: Drawn) -> None:
        stats = drawn.stats
        share, last = "-", "-"
        if stats.drafted:
            share = f"{stats.accepted / stats.drafted:.2f}"
            last = f"{stats.predicted:.2f}"
        if not stats.exact:
            last = f"{sum(stats.defects):.4f}"
        counts = [drawn.seed, stats.steps, stats.rounds, stats.rows]
        figures = [str(count) for count in counts]
        self.rows.append([str(file), *figures, share, last, f"{stats.seconds:.2f}"])
        self.drafted += stats.drafted
        self.measuring += stats.measuring
        if drawn.is_hidden:
            self.hidden.append(drawn.seed)

    def show(self, options: ImageOptions) -> None:
        last = "predicted" if options.mode == "exact" else "defect"
        head = ["picture", "seed", "steps", "rounds", "rows", "accepted", last, "seconds"]
        print_table(head, self.rows)
        if self.measuring:
            print(f"\n{self.measuring:.2f} s more for measuring what calls cost here, once")
        could_draft = options.block == "auto" and options.steps > _UNDRAFTED
        if could_draft and self.drafted == 0:
            print("\nnothing was drafted: no block of steps pays here; --block N drafts anyway")
        for seed in self.hidden:
            say(f"note: the model's safety checker has blackened the picture of seed {seed}")


# ---- contact sheets ------------------------------------------------------------------------------


class _Means(NamedTuple):
    """Of one way's pictures."""

    steps: int
    rounds: float
    rows: float
    seconds: float
    accepted: float | None  # share of the drafted steps; None: none were drafted


def _means(way: Compared) -> _Means:
    stats = [drawn.stats for drawn in way.drawn]
    drafted = sum(one.drafted for one in stats)
    accepted = sum(one.accepted for one in stats)
    return _Means(
        steps=stats[0].steps,
        rounds=fmean(one.rounds for one in stats),
        rows=fmean(one.rows for one in stats),
        seconds=fmean(one.seconds for one in stats),
        accepted=accepted / drafted if drafted else None,
    )


def _notes(way: Compared) -> list[str]:
    means = _means(way)
    notes = [f"{means.steps} steps, {means.rounds:.3g} rounds"]
    if way.error is not None:
        notes.append(f"pixels {way.error:.1%} off plain")
    elif means.accepted is not None:
        notes.append("drawn from the same law")
    return notes


def _print_compared(compared: Sequence[Compared]) -> None:
    head = ["way", "steps", "rounds", "rows", "accepted", "off plain", "seconds"]
    rows = []
    for way in compared:
        means = _means(way)
        accepted = "-" if means.accepted is None else f"{means.accepted:.2f}"
        error = "-" if way.error is None else f"{way.error:.1%}"
        counts = [str(means.steps), f"{means.rounds:.1f}", f"{means.rows:.1f}"]
        rows.append([way.name, *counts, accepted, error, f"{means.seconds:.2f}"])
    print_table(head, rows)


# ---- files and bars ------------------------------------------------------------------------------


def _write(path: Path, picture: Image, facts: dict[str, object]) -> None:
    content = io.BytesIO()
    picture.save(content, "PNG")
    with locked(path):
        write_own(path, {path.name: content.getvalue()}, "image", facts)


def _given(options: ImageOptions) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if value is not None}


def _facts(asked: Asked, options: ImageOptions, drawn: Drawn) -> dict[str, Any]:
    """What the note beside a picture says: enough to draw it again."""
    stats = drawn.stats
    given = _given(options) | {"seed": drawn.seed, "count": 1}
    taken = {"steps": stats.steps, "rounds": stats.rounds, "rows": stats.rows}
    return {"prompt": asked.prompt, "options": given, "taken": taken}


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar over so many steps, where somebody looks."""
    with Progress(transient=True, disable=not is_terminal(sys.stdout)) as bar:
        task = bar.add_task("steps", total=total)
        yield lambda: bar.advance(task)
