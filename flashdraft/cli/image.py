"""The command that draws pictures: its options, and what can be refused before anything is loaded.

What it does stands in `pictures`, which needs the extra `image`.
"""

import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from flashdraft.diffusion import models
from flashdraft.errors import InvalidParameter, InvalidPrompt
from flashdraft.files import check_replaceable, output_file
from flashdraft.types import HIGHEST, check_options, option

_LARGEST = 4096  # pixels of a side
_MOST_COLUMNS = 16
_COLUMNS = 6  # of a contact sheet, by default
_DRAFTS = ("frozen-x0", "extrapolated")
LOOKABLE = 256  # pixels: smaller pictures are enlarged
TOL = 0.001

OutPicture = Annotated[
    Path, Option(help="PNG to write; of several pictures NAME-1.png, NAME-2.png and so on")
]


@dataclass(frozen=True)
class ImageOptions:
    """What a picture is drawn by."""

    model: str = option(
        "digits",
        f"built-in {', '.join(models.BUILTIN_PIPES)}, a folder in diffusers' format, or a hub id",
    )
    mode: str = option(
        "exact",
        "exact: drawn from the sampler's own law; "
        "tolerance: of a sampler without noise, each drafted step within --tol of the model's",
        choices=("exact", "tolerance"),
    )
    steps: int = option(100, "of the sampler", least=1, most=2**31 - 1)
    scheduler: str | None = option(
        None,
        f"{', '.join(models.SCHEDULERS)}; by default the model's own, in tolerance mode ddim",
        choices=tuple(models.SCHEDULERS),
    )
    eta: float | None = option(
        None, "noise of ddim; by default 1 in exact mode and 0 in tolerance mode", least=0, most=1
    )
    draft: str | None = option(
        None,
        "frozen-x0 (by default in exact mode), extrapolated (in tolerance mode), "
        "learned: the shipped one, or a trained one's folder or hub id",
    )
    block: str = option(
        "auto",
        "steps that are drafted together; auto: as many as pay; a number: "
        "a seed gives its picture everywhere",
    )
    costs: str | None = option(
        None,
        "of auto; measured (by default): what calls cost here, kept in the cache folder; "
        "flat (with --compare): all calls cost the same, for fewest rounds",
        choices=("measured", "flat"),
    )
    tol: float | None = option(None, f"of tolerance mode, relative; by default {TOL}", least=0)
    guidance: float = option(3.0, "towards the prompt; 1 is none", least=0, most=1000)
    negative: str | None = option(None, "what to steer away from")
    seed: int = option(
        0, "of the first picture; the next ones have the next", least=0, most=HIGHEST
    )
    count: int | None = option(
        None, f"pictures, or columns of a contact sheet ({_COLUMNS} by default)", least=1, most=1000
    )
    size: str | None = option(None, "pixels, as in 512 or 768x512; by default the model's own")
    scale: int | None = option(
        None,
        f"pixels in a row for one of the model's; by default small pictures get {LOOKABLE}",
        least=1,
        most=64,
    )
    compare: bool = option(
        False, "a contact sheet: plain, exact, tolerance and fewer steps at equal seeds"
    )
    device: str = option("cpu", "cpu, cuda, cuda:1")
    dtype: str = option("float32", ", ".join(models.DTYPES), choices=models.DTYPES)

    def __post_init__(self) -> None:
        check_options(self)
        self._check_block()
        self._check_size()
        if self.compare:
            self._check_compare()
        elif self.tol is not None and self.mode == "exact":
            got = f"tol is {self.tol:g}, but exact mode has none"
            raise InvalidParameter(got, hint="leave it out, or give --mode tolerance")

    def _check_block(self) -> None:
        is_count = re.fullmatch(r"\d{1,9}", self.block) is not None and int(self.block) > 0
        if self.block != "auto" and not is_count:
            hint = "block is auto, or a number of steps, 1 or more"
            raise InvalidParameter(f"block is {self.block!r}", hint=hint, option="block")
        if self.block != "auto" and self.costs is not None:
            got = f"costs is {self.costs}, but blocks of {self.block} steps ask for none"
            raise InvalidParameter(got, hint="leave out one of the two")

    def _check_size(self) -> None:
        if self.size is None:
            return
        match = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", self.size)
        sides = [int(side) for side in match.groups() if side] if match else []
        if not sides or min(sides) < 8 or max(sides) > _LARGEST:
            hint = f"size is pixels from 8 to {_LARGEST}, as in 512 or 768x512"
            raise InvalidParameter(f"size is {self.size!r}", hint=hint, option="size")

    def _check_compare(self) -> None:
        given = {"scheduler": self.scheduler, "eta": self.eta, "scale": self.scale}
        for name, value in given.items():
            if value is not None:
                got = f"{name} is {value}, but a contact sheet is by DDIM with eta 1 and eta 0"
                raise InvalidParameter(got, hint=f"leave out --{name}, or --compare")
        if self.mode != "exact":
            got = f"mode is {self.mode}, but a contact sheet shows both"
            raise InvalidParameter(got, hint="leave out --mode, or --compare")
        if self.num_pictures > _MOST_COLUMNS:
            got = f"a contact sheet of {self.count} columns can't be read"
            raise InvalidParameter(got, hint=f"count is {_MOST_COLUMNS} or fewer with --compare")

    @property
    def num_pictures(self) -> int:
        if self.count is not None:
            return self.count
        return _COLUMNS if self.compare else 1

    @property
    def seeds(self) -> list[int]:
        return [self.seed + number for number in range(self.num_pictures)]

    @property
    def pixels(self) -> tuple[int, int] | None:
        """Width and height."""
        if self.size is None:
            return None
        width, _, height = self.size.partition("x")
        return int(width), int(height or width)

    @property
    def block_size(self) -> int | str:
        return self.block if self.block == "auto" else int(self.block)


def image(
    prompt: Annotated[str, Argument(help="what to draw")],
    out: OutPicture,
    options: ImageOptions,
) -> None:
    """Draw pictures of a text by block speculation, or compare ways.

    Examples:
        flashdraft image 'a thick seven' --out seven.png
        flashdraft image 'a slanted nine' --out nine.png --steps 50 --compare
    """
    if not prompt.strip():
        raise InvalidPrompt("the prompt is empty", hint="say what to draw")
    files = _files(out, options)
    draft = _draft(options)
    models.check_extra()
    pictures = import_module("flashdraft.cli.pictures")
    if options.compare:
        pictures.draw_sheet(prompt, out, options, draft)
    else:
        pictures.draw_pictures(prompt, files, options, draft)


def _files(out: Path, options: ImageOptions) -> list[Path]:
    """Where the pictures go. Raises InvalidParameter for files that are not ours to write."""
    if out.suffix.lower() != ".png":
        hint = f"name it {out.stem or 'image'}.png"
        raise InvalidParameter(f"`{out}` would be a PNG", hint=hint)
    files = [out]
    if options.num_pictures > 1 and not options.compare:
        numbers = range(1, options.num_pictures + 1)
        files = [out.with_name(f"{out.stem}-{number}{out.suffix}") for number in numbers]
    for file in files:
        check_replaceable(output_file(file), "image", ("prompt",))
    return files


def _draft(options: ImageOptions) -> str | Path | None:
    """A name that the library knows, or a folder or hub id. Raises InvalidParameter."""
    name = options.draft
    if name != "learned":
        if name is None or name in _DRAFTS or "/" in name or Path(name).is_dir():
            return name
        hint = f"draft is one of {', '.join(_DRAFTS)}, learned, or a trained one's folder"
        raise InvalidParameter(f"draft is {name!r}", hint=hint, option="draft")
    shipped = models.builtin_draft(options.model)
    if shipped is None:
        got = f"no learned draft is shipped for `{options.model}`"
        hint = "give --draft the folder of a trained one, or frozen-x0"
        raise InvalidParameter(got, hint=hint)
    return shipped
