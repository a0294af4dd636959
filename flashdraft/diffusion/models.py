"""Diffusion pipes by name, and the samplers that they may have.

A name is a built-in one, a folder in diffusers' format, or a hub id. A folder's own code never runs
and pickled weights are never read. Knows where pipes come from and what makes a scheduler of
another one's schedule. Does not know what becomes of a pipe.

Diffusers is imported where it is called: whether it is there, `check_extra` says.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

import flashdraft
from flashdraft.errors import (
    CheckpointError,
    FlashDraftError,
    InvalidParameter,
    ModelNotFound,
    first_line,
)
from flashdraft.files import parse_json
from flashdraft.hub import why_unreachable
from flashdraft.pretrained import without_bars
from flashdraft.types import require

__all__ = [
    "BUILTIN_PIPES",
    "DTYPES",
    "SCHEDULERS",
    "builtin_draft",
    "check_extra",
    "eta_of",
    "known_words",
    "load_pipe",
    "with_scheduler",
]

BUILTIN_PIPES = ("digits",)
DTYPES = ("float32", "bfloat16", "float16")
_ASSETS = Path(flashdraft.__file__).with_name("assets")
_PACKAGES = ("diffusers", "PIL")  # of the extra `image`
_INDEX = "model_index.json"
WORDS = "words.json"  # of a pipe's folder: a list of all words that it was trained on
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_HINT = f"give {', '.join(BUILTIN_PIPES)}, a folder with {_INDEX}, or a hub id such as owner/name"


class _Scheduler(NamedTuple):
    """A class of diffusers, and what it is given beside another scheduler's config."""

    name: str
    options: dict[str, object]


SCHEDULERS = {
    "ddpm": _Scheduler("DDPMScheduler", {}),
    "ddim": _Scheduler("DDIMScheduler", {}),
    "sde-dpm++": _Scheduler(
        "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}
    ),
    "euler-a": _Scheduler("EulerAncestralDiscreteScheduler", {}),
    "dpm++": _Scheduler(
        "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}
    ),
}


def check_extra() -> None:
    """Raises FlashDraftError where the packages for images are not installed."""
    for package in _PACKAGES:
        try:
            import_module(package)
        except ImportError as error:
            hint = "pip install 'flashdraft[image]'"
            raise FlashDraftError(f"images need {error.name}", hint=hint) from None


def load_pipe(
    name: str, *, dtype: str = "float32", device: str = "cpu", scheduler: str | None = None
) -> Any:
    """The pipe called `name`, without a progress bar of its own.

    scheduler: one of SCHEDULERS, with the schedule of the pipe's own; None: its own. Raises
    ModelNotFound, CheckpointError for what is no pipe that can be loaded, InvalidParameter.
    """
    check_extra()
    require(dtype in DTYPES, "dtype", dtype, f"one of {', '.join(DTYPES)}")
    if scheduler is not None:
        _check_scheduler(scheduler)
    folder = _folder_of(name)
    options = _options_of(name, folder)

    with _quiet():
        from diffusers import DiffusionPipeline

        try:
            pipe = DiffusionPipeline.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                **options,
            )
        except Exception as error:  # diffusers, transformers and their readers raise what they like
            got = f"cannot load `{name}`: {first_line(error)}"
            raise CheckpointError(got, hint="fetch or write its folder again") from None
        _move(pipe, device)
    pipe.register_to_config(_name_or_path=name)  # not the place of a hub's files on this disk
    pipe.set_progress_bar_config(disable=True)
    return pipe if scheduler is None else with_scheduler(pipe, scheduler)


def with_scheduler(pipe: Any, scheduler: str) -> Any:
    """The pipe itself, with this one of SCHEDULERS in place of its own, on the same schedule."""
    _check_scheduler(scheduler)
    config = pipe.scheduler.config
    if "beta_schedule" not in config:
        got = f"the pipe's own {type(pipe.scheduler).__name__} has no schedule of betas"
        hint = "leave out the scheduler, or take a pipe of Stable Diffusion"
        raise InvalidParameter(got, hint=hint, option="scheduler")

    import diffusers

    kind = getattr(diffusers, SCHEDULERS[scheduler].name)
    # Of latents nothing is clipped unless their own scheduler says so; some kinds would by default.
    clips = config.get("clip_sample", False)
    pipe.scheduler = kind.from_config(config, clip_sample=clips, **SCHEDULERS[scheduler].options)
    return pipe


def eta_of(scheduler: object, eta: float | None, *, is_exact: bool = True) -> float | None:
    """What a pipe is given as `eta`: 1 for DDIM in exact mode and 0 in tolerance mode, unless
    another one is asked for; None for schedulers that have none.

    Raises InvalidParameter for one that would have no effect.
    """
    if type(scheduler).__name__ == "DDIMScheduler":
        usual = 1.0 if is_exact else 0.0
        return usual if eta is None else eta
    if eta is not None:
        got = f"eta is {eta}, and {type(scheduler).__name__} has none"
        raise InvalidParameter(got, hint="leave it out, or take the scheduler ddim", option="eta")
    return None


def set_steps(scheduler: Any, steps: int) -> None:
    """`scheduler.set_timesteps(steps)`. Raises InvalidParameter for more or fewer of them than its
    schedule allows."""
    trained = scheduler.config.num_train_timesteps
    got = f"steps is {steps}, more than the model's schedule has"
    if steps > trained:
        raise InvalidParameter(got, hint=f"steps is {trained} or fewer", option="steps")
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, IndexError) as error:
        name = type(scheduler).__name__
        got = f"steps is {steps}, which {name} refuses: {first_line(error)}"
        raise InvalidParameter(got, hint="take more steps", option="steps") from None
    if float(scheduler.timesteps.max()) >= trained:
        raise InvalidParameter(got, hint=f"steps is {steps - 1} or fewer", option="steps")


def builtin_draft(pipe: str) -> Path | None:
    """The folder of the learned draft shipped for a built-in pipe, or None."""
    folder = _ASSETS / f"{pipe}-draft"
    is_shipped = pipe in BUILTIN_PIPES and (folder / "config.json").is_file()
    return folder if is_shipped else None


def known_words(pipe: Any) -> list[str]:
    """All words that the model was trained on, as its folder's words.json says; none: any."""
    name = str(pipe.config.get("_name_or_path", ""))
    folder = _ASSETS / name if name in BUILTIN_PIPES else Path(name).expanduser()
    path = folder / WORDS
    if not path.is_file():
        return []
    try:
        words = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [str(word) for word in words] if isinstance(words, list) else []


def _check_scheduler(name: str) -> None:
    require(name in SCHEDULERS, "scheduler", name, f"one of {', '.join(SCHEDULERS)}")


def _folder_of(name: str) -> Path:
    """On this disk; a hub's pipe is fetched if need be."""
    if name in BUILTIN_PIPES:
        return _ASSETS / name
    path = Path(name).expanduser()
    if path.is_dir() and name.strip():
        return path
    if path.is_file():
        hint = "give a folder in diffusers' format: its from_single_file and save_pretrained"
        raise ModelNotFound(f"`{name}` is a file, not a pipe's folder", hint=hint)
    if _HUB_ID.fullmatch(name) is None:
        raise ModelNotFound(f"no folder `{name}`", hint=_HINT)
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    """Its index comes first: what cannot be drafted is not fetched. What was fetched before works
    offline."""
    from huggingface_hub import HfApi, hf_hub_download

    unreachable: Exception | None = None
    # The downloads ask the same without a time limit.
    try:
        HfApi().model_info(name, timeout=10)
    except Exception as error:  # the HTTP library's errors pass through
        unreachable = error
    is_offline = unreachable is not None
    with _quiet():
        from diffusers import DiffusionPipeline

        try:
            index = hf_hub_download(name, _INDEX, local_files_only=is_offline)
            _check_index(name, Path(index))
            fetched = DiffusionPipeline.download(
                name, use_safetensors=True, local_files_only=is_offline
            )
            return Path(fetched)
        except FlashDraftError:
            raise
        except Exception as error:
            advice = why_unreachable(error if unreachable is None else unreachable)
            got = f"no folder `{name}`, and as a hub id: {advice.cause}"
            raise ModelNotFound(got, hint=advice.hint) from None


def _options_of(name: str, folder: Path) -> dict[str, Any]:
    """What loading this folder takes beside it. A safety checker that was left out of it is none.

    Raises CheckpointError for what is no pipe with a UNet.
    """
    path = folder / _INDEX
    if not path.is_file():
        got = f"`{name}` is no diffusers pipe: it has no {_INDEX}"
        raise CheckpointError(got, hint=_HINT)
    index = _check_index(name, path)
    _check_parts(name, folder, index)
    options: dict[str, object] = {}
    checker = index.get("safety_checker", [None])
    if checker[0] is not None and not (folder / "safety_checker").is_dir():
        options = {"safety_checker": None, "requires_safety_checker": False}
    return options


def _check_index(name: str, path: Path) -> dict[str, Any]:
    """What a pipe's model_index.json says.

    Raises CheckpointError for one that names code outside diffusers and transformers, or no UNet.
    """
    index = _read_index(name, path)
    kind = index.get("_class_name")
    if not isinstance(kind, str):
        got = f"`{name}` brings code of its own: its class is {kind!r}"
        raise CheckpointError(got, hint="a folder's code never runs here; take one of diffusers'")
    if "unet" not in index:
        got = f"`{name}` is a {kind}, which has no UNet"
        raise CheckpointError(got, hint="take a Stable Diffusion, or its kin")

    from diffusers import pipelines

    for part, held in index.items():
        if not isinstance(held, list) or held[:1] in ([None], ["diffusers"], ["transformers"]):
            continue
        if not held or not isinstance(held[0], str) or not hasattr(pipelines, held[0]):
            got = f"`{name}` brings code of its own: its {part} is {held!r}"
            hint = "a folder's code never runs here; take one of diffusers' and transformers' parts"
            raise CheckpointError(got, hint=hint)
    return index


def _check_parts(name: str, folder: Path, index: dict[str, object]) -> None:
    """Raises CheckpointError for a part that the index names and the folder lacks: some readers
    make an empty one of it."""
    for part, held in index.items():
        is_part = isinstance(held, list) and held[:1] != [None]
        if is_part and part != "safety_checker" and not (folder / part).is_dir():
            got = f"`{name}` lacks its {part}"
            raise CheckpointError(got, hint="fetch or write its folder again")


def _read_index(name: str, path: Path) -> dict[str, Any]:
    try:
        index = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        got = f"cannot read {_INDEX} of `{name}`: {first_line(error)}"
        raise CheckpointError(got, hint="fetch or write it again") from None
    if not isinstance(index, dict):
        got = f"{_INDEX} of `{name}` is no JSON object"
        raise CheckpointError(got, hint="fetch or write it again")
    return index


def _move(pipe: Any, device: str) -> None:
    try:
        place = torch.device(device)
        require(place.type != "meta", "device", device, "one that holds numbers")
        pipe.to(place)
    except (RuntimeError, AssertionError) as error:  # torch was built without it, or has no room
        hint = "device must be one that torch can use: cpu, cuda, cuda:1, mps"
        got = f"device is {device!r}: {first_line(error)}"
        raise InvalidParameter(got, hint=hint, option="device") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither diffusers nor transformers draws bars or gives advice; what they were set to comes
    back."""
    from diffusers.utils import logging
    from transformers.utils import logging as logging_of_transformers

    had_bars = logging.is_progress_bar_enabled()
    level = logging.get_verbosity()
    level_of_transformers = logging_of_transformers.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    logging_of_transformers.set_verbosity_error()
    try:
        with without_bars():
            yield
    finally:
        logging_of_transformers.set_verbosity(level_of_transformers)
        logging.set_verbosity(level)
        if had_bars:
            logging.enable_progress_bar()
