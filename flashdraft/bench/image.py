"""Ways to an image side by side: every image by every variant in turn, a line of results for each.

Rounds (calls of the target, one after the other), rows (what it read in them, both branches of
guidance counted) and seconds are told apart: rounds are no latency. Blocks are chosen as if all
calls cost the same, so that rounds are few; the variants called -auto choose them by what calls
cost here, so that seconds are few. The clock runs from the prompt to the latents. Variants take
turns at going first, and a ratio is made of two images of one seed and number of steps.

Knows pipes, turns and what a line of results holds. Does not know what stands in a table.
"""

import hashlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from flashdraft.bench.image_config import AGAIN, ALL, VARIANTS, ImageConfig, Variant
from flashdraft.bench.image_judges import Judges, load_judges
from flashdraft.bench.run import results_file
from flashdraft.diffusion.learned import LearnedDraft
from flashdraft.diffusion.models import builtin_draft, eta_of, load_pipe, with_scheduler
from flashdraft.diffusion.pipeline import SpeculativeDiffusion, Stats
from flashdraft.errors import DataError, FlashDraftError, InvalidParameter
from flashdraft.files import Json, locked, output_file, say
from flashdraft.process import is_terminal
from flashdraft.provenance import provenance
from flashdraft.train.rows import LeftOut, placed_rows, placed_texts

__all__ = ["BINS", "run_image_bench"]

BINS = 20  # of predicted acceptance
_LEARNED = "exact-learned"
_APART = 1_000_003  # between the seeds of an image and of the one that `again` makes
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_LOOKS = ("", "thick", "thin", "slanted", "upright")

Line = Json  # of the results file
Sets = dict[tuple[int, str], list[Tensor]]  # features, by steps and variant


class _Turn(NamedTuple):
    """One image of so many steps, by every variant."""

    number: int  # of the image
    steps: int
    prompt: str
    names: list[str]  # in the order in which they go


class _Made(NamedTuple):
    latents: Tensor
    steps: int
    rounds: int
    rows: int
    seconds: float
    stats: Stats | None


def run_image_bench(config: ImageConfig, *, quiet: bool = False) -> int:
    """Write the header, a line an image, and a line a set of images to config.out.

    Returns the number of images. What can be refused is refused before the file appears.
    """
    if config.out.is_file() and config.out.stat().st_size:
        hint = "name another file; results are not overwritten"
        raise InvalidParameter(f"`{config.out}` exists", hint=hint)
    inputs = [] if config.prompts is None else [Path(config.prompts)]
    out = output_file(config.out, inputs=inputs)
    prompts = _prompts(config)
    judges = load_judges(config.features, config.clip, config.model, config.device)
    bench = _Bench(config, judges)

    plan = list(_plan(config, bench.names, prompts))
    header = provenance() | {"kind": "image", "config": asdict(config)} | bench.facts
    header["images"] = sum(len(turn.names) for turn in plan)
    digest = hashlib.sha256("\n".join(prompts).encode())
    header["prompts_sha256"] = digest.hexdigest()
    bench.warm_up(plan[0])

    is_quiet = quiet or not is_terminal(sys.stderr)
    progress = track(plan, "bench", console=Console(stderr=True), disable=is_quiet)
    with locked(out), results_file(out) as file:
        file.write(json.dumps({"header": header}, default=str) + "\n")
        for turn in progress:
            for line in bench.lines(turn):
                file.write(json.dumps(line) + "\n")
            file.flush()
        for line in bench.set_lines():
            file.write(json.dumps(line) + "\n")
    return int(header["images"])


def _prompts(config: ImageConfig) -> list[str]:
    """Raises DataError for a file without any."""
    prompts: list[str] = []
    if config.prompts is None:
        for look in _LOOKS:
            for digit in _DIGITS:
                prompts.append(f"a {look} {digit}" if look else digit)
        return prompts

    path = Path(config.prompts)
    left_out = LeftOut("prompt")
    if path.suffix == ".txt":
        rows = placed_texts(path, left_out)
    else:
        rows = placed_rows(path, ("prompt",), left_out)
    for place, row in rows:
        prompt = row["prompt"]
        if isinstance(prompt, str) and prompt.strip():
            prompts.append(prompt)
        else:
            left_out.add(place, "its prompt is no text")
    left_out.tell()
    if not prompts:
        raise DataError(f"`{path}` has no prompts", hint="write one a line into a .txt file")
    return prompts


def _plan(config: ImageConfig, names: Sequence[str], prompts: Sequence[str]) -> Iterator[_Turn]:
    """All turns. Variants that take another one's rounds come behind all others."""
    free = [name for name in names if _leader(name) is None]
    bound = [name for name in names if _leader(name) is not None]
    for number in range(config.images):
        for place, steps in enumerate(config.numbers):
            first = (number + place) % len(free)
            order = [*free[first:], *free[:first], *bound]
            yield _Turn(number, steps, prompts[number % len(prompts)], order)


def _leader(name: str) -> str | None:
    """The variant whose rounds are this one's steps."""
    steps = VARIANTS[name].steps if name in VARIANTS else ALL
    return steps if steps in VARIANTS else None


class _Bench:
    """The pipe with all its samplers, what was learned of blocks, and the judges."""

    def __init__(self, config: ImageConfig, judges: Judges) -> None:
        self.config = config
        self.judges = judges
        self.pipe = load_pipe(config.model, dtype=config.dtype, device=config.device)
        self._own = type(self.pipe.scheduler).__name__
        self._total = int(self.pipe.scheduler.config.num_train_timesteps)
        self._check_steps()
        self._draft = self._learned_draft()
        self.names = self._names()
        self._schedulers: dict[tuple[str, int], object] = {}
        self._fast: dict[tuple[str, int], SpeculativeDiffusion] = {}
        self._sets: Sets = defaultdict(list)

    @property
    def facts(self) -> Json:
        noisy = self.config.noisy(self._own)
        return {
            "pipe": type(self.pipe).__name__,
            "noisy": noisy,
            "still": self.config.scheduler_of(Variant(True), self._own),
            "variants": self.names,
            "distance": self.judges.distance,
            "agreement": self.judges.agreement,
        }

    def warm_up(self, turn: _Turn) -> None:
        """Make one image by every variant: first calls build kernels, and costs are measured."""
        rounds: dict[str, int] = {}
        for name in turn.names:
            made = self._make(name, turn, rounds)
            rounds[name] = made.rounds
        self._fast.clear()  # what an image teaches of blocks counts from the first one on

    def lines(self, turn: _Turn) -> Iterator[Line]:
        """Of every variant, when all have made theirs."""
        made: dict[str, _Made] = {}
        rounds: dict[str, int] = {}
        for name in turn.names:
            made[name] = self._make(name, turn, rounds)
            rounds[name] = made[name].rounds
        for name, own in made.items():
            base = None if name == AGAIN else made.get(VARIANTS[name].base)
            yield self._line(name, turn, own, base)

    def set_lines(self) -> Iterator[Line]:
        """How far every variant's images are from plain ones of other seeds."""
        for (steps, name), features in self._sets.items():
            others = self._sets.get((steps, AGAIN))
            if name == AGAIN or others is None:
                continue
            distance = self.judges.apart(features, others)
            yield {"set": name, "steps": steps, "images": len(features), "distance": distance}

    # ---- what is asked for -----------------------------------------------------------------------

    def _learned_draft(self) -> str | None:
        """The folder or hub id of exact-learned's draft; None: there is none."""
        config = self.config
        draft: str | None = config.draft
        if config.draft == "auto":
            shipped = builtin_draft(config.model)
            draft = None if shipped is None else str(shipped)
        if _LEARNED not in config.names:
            if config.draft != "auto":
                got = f"draft is {config.draft}, but no variant uses it"
                raise InvalidParameter(got, hint=f"add {_LEARNED} to variants, or leave it out")
            return None
        if draft is not None:
            LearnedDraft.from_pretrained(draft).check(self.pipe.unet)
        elif config.variants.strip() != ALL:
            got = f"`{config.model}` has no learned draft for {_LEARNED}"
            hint = "give --draft FOLDER, which flashdraft image-train writes"
            raise InvalidParameter(got, hint=hint)
        return draft

    def _names(self) -> list[str]:
        names = list(self.config.names)
        if self._draft is None and _LEARNED in names:
            names.remove(_LEARNED)
            say(f"{_LEARNED} is left out: no learned draft is known for `{self.config.model}`")
        if self.judges.distance is not None:
            names.append(AGAIN)
        return names

    def _check_steps(self) -> None:
        """Raises InvalidParameter for more than there are; DPM-Solver's spacing takes one more."""
        wanted = max(self.config.numbers)
        noisy = self.config.noisy(self._own)
        most = self._total - 1 if "dpm++" in noisy else self._total
        if wanted > most:
            got = f"steps is {wanted}, and the model was trained on {self._total}"
            hint = f"steps are at most {most} with {noisy}"
            raise InvalidParameter(got, hint=hint, option="steps")

    # ---- an image --------------------------------------------------------------------------------

    def _make(self, name: str, turn: _Turn, rounds: dict[str, int]) -> _Made:
        variant = VARIANTS[name] if name != AGAIN else VARIANTS["plain"]
        steps = _steps_of(variant, turn.steps, rounds)
        scheduler = self._scheduler(variant, steps)
        self.pipe.scheduler = scheduler
        asked = self._asked(turn, steps, name == AGAIN)
        eta = eta_of(scheduler, None, is_exact=not variant.is_still)
        if eta is not None:
            asked["eta"] = eta

        sample = self.pipe
        if variant.mode is not None:
            sample = self._fast_pipe(name, turn.steps)
        self._wait()
        started = time.perf_counter()
        latents: Tensor = sample(**asked).images
        self._wait()
        seconds = time.perf_counter() - started

        if isinstance(sample, SpeculativeDiffusion):
            stats = sample.last_stats
            assert stats is not None
            own_seconds = seconds - stats.measuring
            return _Made(latents, stats.steps, stats.rounds, stats.rows, own_seconds, stats)
        taken = len(scheduler.timesteps)
        branches = 2 if self.pipe.do_classifier_free_guidance else 1
        return _Made(latents, taken, taken, branches * taken, seconds, None)

    def _asked(self, turn: _Turn, steps: int, is_again: bool) -> dict[str, Any]:
        """Of the pipe. The noise is drawn on the CPU, so that a seed is the same everywhere."""
        seed = self.config.seed + turn.number + (_APART if is_again else 0)
        return {
            "prompt": turn.prompt,
            "num_inference_steps": steps,
            "guidance_scale": self.config.guidance,
            "generator": torch.Generator("cpu").manual_seed(seed),
            "output_type": "latent",
        }

    def _scheduler(self, variant: Variant, steps: int) -> Any:
        """A scheduler of its own for every number of steps."""
        name = self.config.scheduler_of(variant, self._own)
        key = (name, steps)
        if key not in self._schedulers:
            scheduler = with_scheduler(self.pipe, name).scheduler
            scheduler.set_timesteps(steps)
            if int(scheduler.timesteps.max()) >= self._total:  # there is no such training step
                scheduler.register_to_config(steps_offset=0)
            self._schedulers[key] = scheduler
        return self._schedulers[key]

    def _fast_pipe(self, name: str, steps: int) -> SpeculativeDiffusion:
        """One for every variant and number of steps: what it learned of blocks, it keeps."""
        variant = VARIANTS[name]
        assert variant.mode is not None
        if (name, steps) not in self._fast:
            self._fast[name, steps] = SpeculativeDiffusion(
                self.pipe,
                draft=self._draft if variant.draft == "learned" else None,
                mode=variant.mode,
                block=self.config.block_size,
                tol=self.config.tol if variant.mode == "tolerance" else None,
                costs=variant.costs,
            )
        return self._fast[name, steps]

    def _wait(self) -> None:
        if torch.device(self.config.device).type == "cuda":
            torch.cuda.synchronize()

    # ---- what a line tells -----------------------------------------------------------------------

    def _line(self, name: str, turn: _Turn, made: _Made, base: _Made | None) -> Line:
        """relative_l2: of the latents, to the sequential image of the same seed and sampler."""
        line: Line = {"variant": name, "steps": turn.steps, "image": turn.number}
        line |= {"prompt": turn.prompt, "taken": made.steps, "rounds": made.rounds}
        line |= {"rows": made.rows, "seconds": made.seconds}
        line |= {"base": None if name == AGAIN else VARIANTS[name].base, "relative_l2": None}
        if base is not None and VARIANTS[name].is_still:
            gap = (made.latents.double() - base.latents.double()).norm()
            line["relative_l2"] = float(gap / base.latents.double().norm())
        line |= _drafting(made.stats)

        look = self.judges.look(self._picture(made.latents), turn.prompt)
        line["agreement"] = look.agreement
        if look.features is not None:
            self._sets[turn.steps, name].append(look.features)
        return line

    @torch.no_grad()
    def _picture(self, latents: Tensor) -> Tensor:
        """[channels, h, w] in [0, 1]."""
        vae = self.pipe.vae
        made = vae.decode(latents / vae.config.scaling_factor).sample
        if not bool(made.isfinite().all()):
            hint = "float16 is too narrow for some decoders: give --dtype bfloat16"
            raise FlashDraftError("the decoded image is NaN or infinite", hint=hint)
        picture: Tensor = (made[0].float() / 2 + 0.5).clamp(0, 1)
        return picture


def _steps_of(variant: Variant, steps: int, rounds: dict[str, int]) -> int:
    if variant.steps == ALL:
        return steps
    if variant.steps == "half":
        return max(steps // 2, 1)
    return rounds[variant.steps] if variant.steps in rounds else int(variant.steps)


def _drafting(stats: Stats | None) -> Line:
    """bins: of predicted acceptance, how many steps, their chances summed, how many stood."""
    names = ("drafted", "accepted", "predicted", "defect", "bins")
    if stats is None:
        return dict.fromkeys(names)
    line: Line = {"drafted": stats.drafted, "accepted": stats.accepted}
    line["predicted"] = stats.predicted if stats.exact else None
    line["defect"] = None if stats.exact else stats.defects[0]
    line["bins"] = None
    if stats.exact:
        bins = [[0, 0.0, 0] for _ in range(BINS)]
        for one in stats.decisions:
            own = bins[min(int(one.predicted * BINS), BINS - 1)]
            own[0] += 1
            own[1] += one.predicted
            own[2] += one.stood
        line["bins"] = bins
    return line
