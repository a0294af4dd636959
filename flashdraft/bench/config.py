"""What one run of the benchmark is asked to do: its options, checked before anything is loaded.

Knows the names of methods, of kernels and of other engines' files. Does not know how a method runs.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from flashdraft.bench.specs import Spec, names_a_drafter, parts_of, read_specs
from flashdraft.errors import InvalidParameter
from flashdraft.loading import DTYPES, KERNELS, MOST_NODES
from flashdraft.types import HIGHEST, SamplingParams, check_options, option, require

__all__ = ["DFLASH", "METHODS", "OURS", "THEIRS", "BenchConfig", "Setting", "is_ours"]

OURS = ("autoregressive", "dflash", "eagle3", "medusa", "draft_model", "prompt_lookup")
THEIRS = ("transformers", "transformers_lookup", "transformers_assisted", "transformers_dflash")
METHODS = OURS + THEIRS
DFLASH = {"dflash", "transformers_dflash"}  # these draft with the network that `draft` names
METHODS_HELP = (
    f"comma-separated, of {', '.join(METHODS)}; "
    "trees: dflash_tree, dflash_tree32; two at once: dflash+prompt_lookup; "
    "another drafter: NAME=FOLDER; ours may name a kernel, dflash:int8; "
    "other engines: NAME=FILE.py:FUNCTION:ARG"
)
MOST_THREADS = 1024  # more than a machine has; beyond, the system refuses to make them


class Setting(NamedTuple):
    """What a prompt is answered under. Answers of two settings are never compared."""

    temperature: float
    max_rows: int
    threads: int


def is_ours(spec: Spec) -> bool:
    """Whether our own engine runs it, instead of transformers or an engine of somebody's file."""
    return spec.kind not in THEIRS and not spec.is_engine


@dataclass(frozen=True)
class BenchConfig:
    """One run. Raises InvalidParameter for a value outside its range.

    temperature, max_rows and threads may be single numbers.
    """

    prompts: Path = field(metadata={"help": "JSON Lines with `prompt` or `turns`, and `task`"})
    out: Path = field(metadata={"help": "results file to write; it must not exist"})
    methods: str = option("autoregressive,dflash,prompt_lookup,transformers", METHODS_HELP)
    target: str = option("smollm2-135m", "built-in name, hub id, folder or GGUF file")
    draft: str = option(
        "auto", "folder or hub id of dflash's drafter; auto is the one shipped for the target"
    )
    assistant: str | None = option(
        None,
        "folder or hub id of transformers_assisted's small model, which has the same tokenizer",
    )
    block_size: int | None = option(
        None,
        "nodes of a chain, the anchor included; a tree is as deep; "
        "by default as many of what was trained as pay",
        least=1,
        most=MOST_NODES,
    )
    dtype: str = option(
        "float32", f"of all methods alike: {', '.join(DTYPES)} (as stored)", choices=DTYPES
    )
    kernel: str = option(
        "auto",
        f"what runs our methods' weights, where a method names none: {', '.join(KERNELS)}",
        choices=KERNELS,
    )
    max_new_tokens: int = option(
        128, "tokens per answer and turn, at most", least=1, most=2**31 - 1
    )
    turns: int = option(
        1,
        "turns of a prompt with several that are asked at most, each after the method's own answer",
        least=1,
        most=2**31 - 1,
    )
    temperature: tuple[float, ...] = option(
        (0.0,), "0 is greedy; may be given several times", least=0
    )
    seed: int = option(
        0, "seed of the first prompt; the others count on from it", least=0, most=HIGHEST
    )
    repeats: int = option(
        1, "times that every prompt is answered by every method", least=1, most=2**31 - 1
    )
    transformers_prompts: int | None = option(
        None, "run transformers on each task's first prompts only", least=1, most=2**31 - 1
    )
    threads: tuple[int, ...] = option(
        (),
        "of all methods, or several; else torch's own, and transformers' better of 1, 2",
        least=1,
        most=MOST_THREADS,
    )
    max_rows: tuple[int, ...] = option(
        (1,),
        "prompts of a task that ours decode together; may be given several times",
        least=1,
        most=1 << 16,
    )

    def __post_init__(self) -> None:
        self._make_tuples()
        check_options(self)
        require(bool(self.temperature), "temperature", self.temperature, "at least one number")
        require(bool(self.max_rows), "max_rows", self.max_rows, "at least one number")
        self._drop_repeated_numbers()

        for spec in self.specs.values():
            if spec.is_engine:
                self._check_engine(spec)
            else:
                _check_method(spec)
        self._check_draft()
        self._check_that_all_is_used()

    @cached_property
    def specs(self) -> dict[str, Spec]:
        """By name in the results."""
        return {spec.name: spec for spec in read_specs(self.methods)}

    @property
    def kinds(self) -> set[str]:
        """Of all methods; of those that are joined with +, each."""
        found: set[str] = set()
        for spec in self.specs.values():
            found.update(parts_of(spec.kind))
        return found

    def params(self, number: int, temperature: float) -> SamplingParams:
        """How the prompt of that number is answered."""
        params = SamplingParams(
            temperature=temperature, seed=self.seed, max_new_tokens=self.max_new_tokens
        )
        return params.numbered(number)

    def _make_tuples(self) -> None:
        for name in Setting._fields:
            value = getattr(self, name)
            numbers = tuple(value) if isinstance(value, list | tuple) else (value,)
            object.__setattr__(self, name, numbers)

    def _drop_repeated_numbers(self) -> None:
        for name in Setting._fields:
            different = tuple(dict.fromkeys(getattr(self, name)))
            object.__setattr__(self, name, different)

    def _check_engine(self, spec: Spec) -> None:
        is_there = Path(spec.kind).is_file()
        require(is_there, "an engine's file", spec.kind, "there: NAME=FILE.py:FUNCTION:TEXT")

        highest = max(self.temperature)
        require(
            not any(self.temperature),
            "temperature",
            highest,
            "0 beside engines that are greedy here",
        )
        require(
            len(self.threads) < 2,
            "threads",
            self.threads,
            "one number beside engines that keep theirs",
        )

    def _check_draft(self) -> None:
        if self.draft in METHODS:
            raise InvalidParameter(
                f"draft is {self.draft!r}",
                hint="draft names dflash's drafter; other methods go into methods",
            )

    def _check_that_all_is_used(self) -> None:
        """Refuse an option that no method reads, and an assistant's method without an assistant."""
        kinds = self.kinds
        users = {
            "draft": DFLASH,
            "block_size": kinds - {"autoregressive", *THEIRS},
            "assistant": {"transformers_assisted"},
            "transformers_prompts": set(THEIRS),
        }
        for name, methods in users.items():
            value = getattr(self, name)
            is_given = value is not None and value != "auto"
            if is_given and not methods & kinds:
                got = f"{name} is {value}, but no method uses it"
                raise InvalidParameter(got, hint=f"for {', '.join(sorted(methods))}")

        if "transformers_assisted" in kinds:
            is_given = self.assistant is not None
            hint = "the folder of transformers_assisted's small model"
            require(is_given, "assistant", self.assistant, hint)

        needs_kernel = any(_takes_the_kernel(spec) for spec in self.specs.values())
        if self.kernel != "auto" and not needs_kernel:
            got = f"kernel is {self.kernel!r}, but every method names its own"
            raise InvalidParameter(got, hint="leave one out")


def _check_method(spec: Spec) -> None:
    """Raises InvalidParameter for one that is no method and no drafter, and for no kernel of it."""
    kernels: tuple[str, ...] = ()
    if is_ours(spec):
        kernels = KERNELS
        for part in parts_of(spec.kind):
            if not names_a_drafter(part, OURS):
                hint = f"methods are {', '.join(METHODS)}, or a drafter's folder"
                raise InvalidParameter(f"no method {part!r}", hint=hint)

    if spec.variant and spec.variant not in kernels:
        hint = f"kernels are {', '.join(KERNELS)}"
        raise InvalidParameter(f"no kernel {spec.variant!r}", hint=hint)


def _takes_the_kernel(spec: Spec) -> bool:
    """Whether the run's `kernel` says what runs its weights: it names none of its own."""
    return not spec.variant and spec.kind not in THEIRS
