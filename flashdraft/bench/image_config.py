"""What one run of the image benchmark is asked to do: its options, and the variants that it knows.

Knows names. Does not know pipes, judges or results.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from flashdraft.diffusion.models import BUILTIN_PIPES, DTYPES, SCHEDULERS
from flashdraft.errors import InvalidParameter
from flashdraft.types import HIGHEST, check_options, option, require

__all__ = ["AGAIN", "ALL", "VARIANTS", "ImageConfig", "Variant"]

ALL = "all"
AGAIN = "again"
MOST_STEPS = 10_000
# a scheduler with noise, and the one without that stands beside it
STILL = {"ddpm": "ddim", "ddim": "ddim", "sde-dpm++": "dpm++", "euler-a": "ddim"}


class Variant(NamedTuple):
    """A way to an image.

    is_still: by the sampler without noise. steps: all, half, a number, or the variant whose rounds
    for the same image are its steps. mode: of block speculation; None: one step a round.
    """

    is_still: bool
    steps: str = ALL
    mode: str | None = None
    draft: str | None = None
    costs: str = "flat"
    scheduler: str | None = None

    @property
    def base(self) -> str:
        """What its seconds and its image are compared with."""
        return "still" if self.is_still else "plain"


VARIANTS = {
    "plain": Variant(False),
    "exact": Variant(False, mode="exact"),
    "exact-learned": Variant(False, mode="exact", draft="learned"),
    "exact-auto": Variant(False, mode="exact", costs="measured"),
    "half": Variant(False, "half"),
    "matched": Variant(False, "exact"),
    "still": Variant(True),
    "tolerance": Variant(True, mode="tolerance"),
    "tolerance-auto": Variant(True, mode="tolerance", costs="measured"),
    "still-half": Variant(True, "half"),
    "still-matched": Variant(True, "tolerance"),
    "dpm++20": Variant(True, "20", scheduler="dpm++"),
}
_VARIANTS_HELP = (
    f"{ALL}, or some of {', '.join(VARIANTS)}, separated by commas; plain: with noise, one step a "
    "round; exact: blocks where calls cost the same; -auto: by measured costs; half: half the "
    "steps; matched: as many as exact had rounds; still, tolerance, still-...: without noise"
)


@dataclass(frozen=True)
class ImageConfig:
    """One run. Raises InvalidParameter for a value outside its range."""

    out: Path = field(metadata={"help": "results file to write; it must not exist"})
    model: str = option(
        "digits", f"built-in {', '.join(BUILTIN_PIPES)}, a folder in diffusers' format, or a hub id"
    )
    draft: str = option(
        "auto", "folder or hub id of exact-learned's draft; auto: the shipped one, if there is one"
    )
    steps: str = option("20,50,100,250,1000", "numbers of steps, separated by commas")
    variants: str = option(ALL, _VARIANTS_HELP)
    images: int = option(8, "of every variant at every number of steps", least=1, most=1_000_000)
    prompts: str | None = option(
        None, "file of prompts: .jsonl with `prompt`, or a .txt line each; of digits: its own words"
    )
    scheduler: str | None = option(
        None,
        f"the sampler with noise: {', '.join(STILL)}; "
        "by default the model's own where it is one of these, else ddim",
        choices=tuple(STILL),
    )
    guidance: float = option(3.0, "towards the prompt; 1 is none", least=0, most=1000)
    block: str = option("auto", "steps of a block, or auto: as many as pay")
    tol: float = option(0.001, "of tolerance mode, relative", least=0)
    seed: int = option(0, "of the first image; the others count on", least=0, most=HIGHEST)
    features: str = option(
        "auto",
        "what sets of images are compared by: inception, a judge's folder, or none; "
        "auto: of digits the shipped judge, else none",
    )
    clip: str | None = option(
        None, "folder or hub id of a CLIP for CLIPScore; else a judge tells whether digits agree"
    )
    device: str = option("cpu", "cpu, cuda, cuda:1, mps")
    dtype: str = option("float32", ", ".join(DTYPES), choices=DTYPES)

    def __post_init__(self) -> None:
        check_options(self)
        are_steps = bool(self.numbers) and all(1 <= one <= MOST_STEPS for one in self.numbers)
        wanted = f"whole numbers from 1 to {MOST_STEPS}, separated by commas"
        require(are_steps, "steps", self.steps, wanted)
        self._check_variants()
        is_block = self.block == "auto" or _number(self.block) > 0
        require(is_block, "block", self.block, "auto, or a number of steps, 1 or more")
        is_built_in = self.model in BUILTIN_PIPES
        if self.prompts is None and not is_built_in:
            hint = "prompts is a file with one a line, name.txt"
            raise InvalidParameter(f"no prompts for `{self.model}`", hint=hint, option="prompts")

    def _check_variants(self) -> None:
        known = ", ".join(VARIANTS)
        for name in self.names:
            if name not in VARIANTS:
                hint = f"variants are {ALL}, or some of {known}"
                raise InvalidParameter(f"no variant {name!r}", hint=hint, option="variants")
            other = VARIANTS[name].steps
            if other in VARIANTS and other not in self.names:
                got = f"{name} takes as many steps as {other} had rounds, which is not measured"
                hint = f"variants lack {other}"
                raise InvalidParameter(got, hint=hint, option="variants")

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of steps, each once; 0 for what is no number."""
        return tuple(dict.fromkeys(_number(text) for text in self.steps.split(",")))

    @property
    def names(self) -> tuple[str, ...]:
        """Of variants, each once."""
        if self.variants.strip() == ALL:
            return tuple(VARIANTS)
        return tuple(dict.fromkeys(text.strip() for text in self.variants.split(",")))

    @property
    def block_size(self) -> int | str:
        """As SpeculativeDiffusion takes it."""
        return self.block if self.block == "auto" else int(self.block)

    def noisy(self, own: str) -> str:
        """The scheduler with noise, of SCHEDULERS. own: the class of the model's."""
        if self.scheduler is not None:
            return self.scheduler
        for name in STILL:
            if SCHEDULERS[name].name == own and name != "sde-dpm++":
                return name
        return "ddim"

    def scheduler_of(self, variant: Variant, own: str) -> str:
        if variant.scheduler is not None:
            return variant.scheduler
        noisy = self.noisy(own)
        return STILL[noisy] if variant.is_still else noisy


def _number(text: str) -> int:
    """0 for what is no whole number."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*", text, re.ASCII)
    return int(match[1]) if match else 0
