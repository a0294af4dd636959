"""The commands that train an image draft: thin functions over flashdraft.diffusion.

They need the extra `image`; their help does not.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from flashdraft.cli.options import Folder
from flashdraft.diffusion import models
from flashdraft.diffusion.options import DraftTrainOptions, RecordOptions
from flashdraft.errors import DataError, InvalidParameter, first_line
from flashdraft.process import is_terminal
from flashdraft.train.config import check_run_folder
from flashdraft.types import COUNTS, check_options, option

_MODEL_HELP = (
    f"built-in {', '.join(models.BUILTIN_PIPES)}, a folder in diffusers' format, or a hub id"
)
_NOISY = tuple(name for name in models.SCHEDULERS if name != "dpm++")


@dataclass(frozen=True)
class PipeOptions:
    """How the pipe is loaded."""

    scheduler: str | None = option(
        None, f"{', '.join(_NOISY)}; by default the model's own", choices=_NOISY
    )
    device: str = option("cpu", "cpu, cuda, cuda:1, mps")
    dtype: str = option("float32", ", ".join(models.DTYPES), choices=models.DTYPES)

    def __post_init__(self) -> None:
        check_options(self)


def image_record(
    model: Annotated[str, Argument(help=_MODEL_HELP)],
    out: Folder,
    options: RecordOptions,
    loaded: PipeOptions,
    prompts: Annotated[Path | None, Option(help="text file with a prompt a line")] = None,
    prompt: Annotated[list[str] | None, Option(help="a prompt; may be given several times")] = None,
    images: Annotated[
        int | None, Option(help="how many, the prompts in turn; by default one a prompt"), COUNTS
    ] = None,
) -> None:
    """Image draft 1: what a sampler does; run again to resume.

    Examples:
        flashdraft image-record digits --prompts captions.txt --out data --images 400
        flashdraft image-record owner/model --prompt 'a cat' --out data --scheduler ddim
    """
    asked = _asked(prompts, prompt, images)
    models.check_extra()
    from flashdraft.diffusion.trajectories import check_recorded, record

    check_recorded(out)
    pipe = models.load_pipe(
        model, dtype=loaded.dtype, device=loaded.device, scheduler=loaded.scheduler
    )
    record(pipe, asked, out, options, quiet=not is_terminal(sys.stdout))
    print(f"{len(asked)} images of {options.steps} steps in {out}")


def image_train(
    data: Annotated[
        list[Path], Argument(metavar="DATA", help="folders that `flashdraft image-record` wrote")
    ],
    out: Folder,
    options: DraftTrainOptions,
    device: Annotated[str, Option(help="cpu, cuda, cuda:1, mps")] = "cpu",
) -> None:
    """Image draft 2: the draft; run again to resume.

    Examples:
        flashdraft image-train data --out run
        flashdraft image-train data-20-steps data-100-steps --out run --steps 6000
    """
    check_run_folder(out, inputs=data)
    models.check_extra()
    from flashdraft.diffusion.training import train_draft

    best = train_draft(data, out, options, device=device, quiet=not is_terminal(sys.stdout))
    accepted = f"best accepted steps {best.learned:.3f} (frozen {best.frozen:.3f})"
    print(f"{accepted} of {options.lags}; the draft: {out / 'best'}")


def _asked(file: Path | None, prompts: list[str] | None, images: int | None) -> list[str]:
    """The prompt of every image. Raises InvalidParameter, or DataError for a file without any."""
    if (file is None) == (not prompts):
        hint = "give --prompts FILE, or --prompt once or several times"
        raise InvalidParameter("prompts come from a file or from the command line", hint=hint)
    known = list(prompts or ())
    if file is not None:
        known = _read(file)
    for prompt in known:
        if not prompt.strip():
            raise InvalidParameter("a prompt is empty", hint="say what to draw")
    count = len(known) if images is None else images
    if count < len(known):
        got = f"images is {count}, and there are {len(known)} prompts"
        raise InvalidParameter(got, hint="images must be as many as the prompts, or more")
    return [known[number % len(known)] for number in range(count)]


def _read(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        got = f"`{file}` is no UTF-8 text: {first_line(error)}"
        raise DataError(got, hint="give a text file with a prompt a line") from None
    prompts = []
    for line in text.splitlines():
        prompt = line.strip()
        if prompt:
            prompts.append(prompt)
    if not prompts:
        raise DataError(f"`{file}` holds no prompts", hint="a line is a prompt")
    return prompts
