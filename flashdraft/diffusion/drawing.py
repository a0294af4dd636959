"""Pictures of a prompt, one seed after the other: plainly, by block speculation, or side by side.

Pictures are drawn alone: drafted in blocks of a given length, the third of four is the one that its
seed gives by itself. Where the length follows what pays, a seed gives another picture of the same
law. Knows pipes, their words and their limits. Does not know files, nor how a picture is shown.
"""

import inspect
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from flashdraft.diffusion import transitions as tables
from flashdraft.diffusion.models import known_words, set_steps
from flashdraft.diffusion.pipeline import SpeculativeDiffusion, Stats
from flashdraft.errors import (
    ContextLengthError,
    FlashDraftError,
    InvalidParameter,
    InvalidPrompt,
)

__all__ = [
    "Asked",
    "Compared",
    "Drawn",
    "Way",
    "check_asked",
    "check_way",
    "compare",
    "draw",
    "unknown_words",
]

_SIDE = 8  # of a picture in pixels: a multiple of it


@dataclass(frozen=True)
class Asked:
    """What a pipe is asked for. size: width and height in pixels; None: the model's own."""

    prompt: str
    steps: int
    guidance: float
    negative: str | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Way:
    """How pictures are drawn. fast: None: by the pipe alone; eta: of DDIM; None: it has none."""

    pipe: Any
    eta: float | None = None
    fast: SpeculativeDiffusion | None = None


class Drawn(NamedTuple):
    """is_hidden: the model's safety checker has blackened the picture."""

    seed: int
    picture: Image.Image
    stats: Stats
    is_hidden: bool


class Compared(NamedTuple):
    """Pictures of one way, by seed.

    error: relative L2 distance of their pixels to those of the sampler alone, in the mean; None
    where that would say nothing.
    """

    name: str
    is_exact: bool
    drawn: list[Drawn]
    error: float | None = None


# ---- what can be asked ---------------------------------------------------------------------------


def check_asked(pipe: Any, asked: Asked) -> None:
    """Raises InvalidParameter, InvalidPrompt and its kin for what this pipe would refuse, or
    silently cut."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    if "image" in parameters or "callback_on_step_end" not in parameters:
        got = f"a {type(pipe).__name__} does not draw from a text alone"
        hint = "in a program it works: flashdraft.diffusion.pipeline.SpeculativeDiffusion"
        raise InvalidParameter(got, hint=hint, option="model")
    if asked.size is not None:
        width, height = asked.size
        if width % _SIDE or height % _SIDE:
            got = f"size is {width}x{height}"
            raise InvalidParameter(got, hint=f"size is in multiples of {_SIDE}", option="size")
    if asked.negative is not None and asked.guidance <= 1:
        got = f"without guidance (it is {asked.guidance:g}) a negative prompt has no effect"
        raise InvalidParameter(got, hint="give a guidance above 1, or leave it out")
    if not asked.prompt.strip():
        raise InvalidPrompt("the prompt is empty", hint="say what to draw")
    for text in (asked.prompt, asked.negative or ""):
        _check_length(pipe, text)
    set_steps(pipe.scheduler, asked.steps)


def _check_length(pipe: Any, text: str) -> None:
    count = len(pipe.tokenizer(text).input_ids)
    most = pipe.tokenizer.model_max_length
    if count > most:
        got = f"the prompt has {count} tokens, its two ends included, and this model reads {most}"
        words = known_words(pipe)
        hint = f"its words are: {' '.join(words)}" if words else "say it in fewer words"
        raise ContextLengthError(got, hint=hint)


def check_way(pipe: Any, eta: float | None, *, is_exact: bool) -> None:
    """Raises InvalidParameter where the pipe's scheduler, which is set to its steps, is none for
    this mode."""
    scheduler = pipe.scheduler
    try:
        table = tables.transitions(scheduler, eta=eta or 0.0)
    except InvalidParameter as error:
        got = f"this model's sampler can't be drafted: {error.args[0]}"
        raise InvalidParameter(got, hint="--scheduler ddim takes another one") from None
    name = type(scheduler).__name__
    if is_exact and not table.is_random and table.num_steps == 1:
        got = f"a single step of {name} draws no noise, so that there is nothing to draft"
        raise InvalidParameter(got, hint="steps must be 2 or more", option="steps")
    if is_exact and not table.is_random:
        got = f"{name} as it is set draws no noise, so that no drafted step could be exact"
        hint = "--scheduler ddim draws some, with --eta 1; or give --mode tolerance"
        raise InvalidParameter(got, hint=hint)
    if not is_exact and table.is_random:
        got = f"{name} as it is set draws noise, and tolerance mode is for samplers without"
        raise InvalidParameter(got, hint="--scheduler ddim with --eta 0 draws none")


def unknown_words(pipe: object, text: str) -> list[str]:
    """Those of a text that are none of `known_words`."""
    known = known_words(pipe)
    if not known:
        return []
    said = re.findall(r"\w+", text.lower())
    return [word for word in dict.fromkeys(said) if word not in known]


# ---- drawing -------------------------------------------------------------------------------------


def draw(way: Way, asked: Asked, seed: int, on_step: Callable[[], None] | None = None) -> Drawn:
    """One picture. Raises FlashDraftError where the device has no memory for it."""
    options = _options_of(way, asked, seed, on_step)
    started = time.perf_counter()
    try:
        output = (way.pipe if way.fast is None else way.fast)(**options)
    except RuntimeError as error:  # torch's own is one; a CPU's allocator has no other
        if "memory" not in str(error):
            raise
        got = f"{way.pipe.device} has no memory for this picture"
        hint = "a smaller --size, --dtype float16, or a shorter --block"
        raise FlashDraftError(got, hint=hint) from None

    if way.fast is None:
        stats = _stats_of_plain(way.pipe, asked.steps, time.perf_counter() - started)
    else:
        assert way.fast.last_stats is not None
        stats = way.fast.last_stats
    hidden = getattr(output, "nsfw_content_detected", None) or [False]
    return Drawn(seed, output.images[0], stats, bool(hidden[0]))


def _options_of(
    way: Way, asked: Asked, seed: int, on_step: Callable[[], None] | None
) -> dict[str, Any]:
    def on_step_end(
        pipe: object, step: int, time: object, tensors: dict[str, object]
    ) -> dict[str, Any]:
        del pipe, step, time, tensors
        if on_step is not None:
            on_step()
        return {}

    options: dict[str, object] = {
        "prompt": asked.prompt,
        "num_inference_steps": asked.steps,
        "guidance_scale": asked.guidance,
        "generator": torch.Generator("cpu").manual_seed(seed),
        "callback_on_step_end": on_step_end,
    }
    if way.eta is not None:
        options["eta"] = way.eta
    if asked.negative is not None:
        options["negative_prompt"] = asked.negative
    if asked.size is not None:
        options["width"], options["height"] = asked.size
    return options


def _stats_of_plain(pipe: Any, steps: int, seconds: float) -> Stats:
    branches = 2 if pipe.do_classifier_free_guidance else 1
    return Stats(
        exact=True,
        steps=steps,
        rounds=steps,
        rows=steps * branches,
        images=1,
        seconds=seconds,
    )


# ---- ways side by side ---------------------------------------------------------------------------


def compare(
    exact: SpeculativeDiffusion,
    tolerant: SpeculativeDiffusion,
    asked: Asked,
    seeds: Sequence[int],
    on_step: Callable[[], None] | None = None,
) -> list[Compared]:
    """The same seeds by DDIM with noise (eta 1), alone and drafted, and without (eta 0), alone,
    drafted within a tolerance, and in so few steps as that took rounds.

    exact, tolerant: on one pipe, whose scheduler is DDIM and set to its steps.
    """
    pipe = exact.pipe
    check_way(pipe, 1.0, is_exact=True)

    def drawn_by(way: Way, steps: int) -> list[Drawn]:
        own = Asked(asked.prompt, steps, asked.guidance, asked.negative, asked.size)
        return [draw(way, own, seed, on_step) for seed in seeds]

    with_noise = drawn_by(Way(pipe, 1.0), asked.steps)
    by_exact = drawn_by(Way(pipe, 1.0, exact), asked.steps)
    without = drawn_by(Way(pipe, 0.0), asked.steps)
    by_tolerance = drawn_by(Way(pipe, 0.0, tolerant), asked.steps)
    rounds = sum(one.stats.rounds for one in by_tolerance) / len(seeds)
    fewer = drawn_by(Way(pipe, 0.0), max(round(rounds), 1))
    return [
        Compared("plain, eta 1", True, with_noise),
        Compared("exact", True, by_exact),
        Compared("plain, eta 0", False, without),
        Compared("tolerance", False, by_tolerance, _error(by_tolerance, without)),
        Compared("fewer steps", False, fewer, _error(fewer, without)),
    ]


def _error(drawn: Sequence[Drawn], alone: Sequence[Drawn]) -> float:
    """Relative L2 distance of the pixels, in the mean over seeds."""
    total = 0.0
    for one, other in zip(drawn, alone, strict=True):
        pixels = np.asarray(one.picture, dtype=np.float64)
        wanted = np.asarray(other.picture, dtype=np.float64)
        apart = float(np.linalg.norm(pixels - wanted))
        length = float(np.linalg.norm(wanted))
        total += apart / max(length, 1.0)
    return total / len(drawn)
