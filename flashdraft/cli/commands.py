"""The commands that write text, and the options that all commands share: thin functions over the library.

app.py holds the commands' names and help, and prints their errors.
"""

import json as jsonlib
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from flashdraft import hub
from flashdraft.errors import ContextLengthError, InvalidPrompt
from flashdraft.files import say
from flashdraft.generate import Model
from flashdraft.loading import DTYPES, KERNELS, MOST_NODES, NETWORKS, load
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.process import is_terminal
from flashdraft.types import (
    COUNTS,
    SEEDS,
    Allowed,
    Chunk,
    Result,
    SamplingParams,
    check_options,
    option,
    require,
)

PROMPT = "A baker bakes 12 trays of 8 rolls and sells 71 of them. How many rolls are left? Explain step by step."
TARGET_HELP = "built-in name, hub id, folder or GGUF file"
DTYPE_HELP = f"{', '.join(name for name in DTYPES if name != 'auto')}, or auto: as stored"
KERNEL_HELP = f"what runs the weights: {', '.join(KERNELS)}; auto is the fastest exact one, compiled: CUDA graphs"
DRAFT_HELP = "drafter's folder or hub id, or a smaller causal LM's with the same tokenizer; a method, whose shipped drafter is taken "
DRAFT_HELP += f"({', '.join(NETWORKS)}) or that has none (prompt_lookup, autoregressive); two of these joined by +; or auto: "
DRAFT_HELP += "the shipped one, or none"
BLOCK_HELP = f"nodes per proposal, the anchor included, from 1 (nothing is drafted) to {MOST_NODES}; by default as many of what "
BLOCK_HELP += "the drafter was trained for as pay"
Out = Annotated[Path, Option(help="file to write")]


@dataclass(frozen=True)
class TargetOptions:
    """What `load` takes from the command line; without a drafter."""

    target: str = option("smollm2-135m", TARGET_HELP)
    dtype: str = option("auto", DTYPE_HELP, choices=DTYPES)
    device: str = option("cpu", "where the target runs: cpu, cuda, cuda:1, mps")
    kernel: str = option("auto", KERNEL_HELP, choices=KERNELS)

    def __post_init__(self) -> None:
        check_options(self)

    def load(self, **options: Any) -> Model:
        return load(**{"draft": "autoregressive", **vars(self), **options})


@dataclass(frozen=True)
class ModelOptions(TargetOptions):
    """The same with a drafter."""

    draft: str = option("auto", DRAFT_HELP)
    block_size: int | None = option(None, BLOCK_HELP, least=1, most=MOST_NODES)
    tree_nodes: int | None = option(
        None,
        "nodes of a tree of likely tokens, the anchor included; by default a chain is drafted",
        least=2,
        most=MOST_NODES,
    )


def demo(
    model: ModelOptions,
    prompt: Annotated[str, Argument(help="what to ask")] = PROMPT,
    max_new_tokens: Annotated[int, Option(help="tokens, at most"), COUNTS] = 96,
    temperature: Annotated[float, Option(help="0 is greedy"), Allowed(0)] = 0.0,
    seed: Annotated[int, Option(help="the same seed gives the same text"), SEEDS] = 0,
) -> None:
    params = SamplingParams(temperature=temperature, seed=seed, max_new_tokens=max_new_tokens)
    if model.draft == "auto" and hub.builtin_draft(model.target) is None:
        model = replace(model, draft="prompt_lookup")
        print(f"no drafter is shipped for {model.target}: prompt lookup drafts instead\n")
    drafting = model.load(max_rows=1)
    tokens = drafting.encode(prompt)
    plain = replace(drafting, new_drafter=Autoregressive)
    chunks = drafting.stream(tokens, params)
    for each in (plain, drafting):  # the first calls build kernels
        each.generate(tokens, replace(params, max_new_tokens=min(8, max_new_tokens)))
    with_drafts = _show(chunks, origin=True)
    alone: Result = plain.generate(tokens, params)
    both = with_drafts.stats, alone.stats
    speeds = [
        (one.num_tokens - 1) / one.decode_seconds if one.decode_seconds else 0.0 for one in both
    ]
    for label, speed in zip((drafting.new_drafter().name, "autoregressive"), speeds, strict=True):
        print(f"{label:<15} {speed:6.1f} tokens/s")
    print(f"{'ratio':<15} {speeds[0] / (speeds[1] or 1.0):6.2f}")
    print(f"{'tau':<15} {with_drafts.stats.tau:6.2f} tokens per target pass")
    print(f"texts identical: {'yes' if with_drafts.tokens == alone.tokens else 'no'}")


def generate(
    prompts: Annotated[list[str], Argument(help="what to ask; - reads standard input")],
    model: ModelOptions,
    params: SamplingParams,
    max_rows: Annotated[int, Option(help="prompts decoded together, at most"), COUNTS] = 8,
    json: Annotated[bool, Option("--json", help="one JSON object per answer")] = False,
    logprobs: Annotated[
        bool, Option("--logprobs", help="log-probabilities of the tokens, in the JSON object")
    ] = False,
) -> None:
    require(json or not logprobs, "logprobs", logprobs, "left out without --json, which shows them")
    params = replace(params, logprobs=logprobs)
    texts = [_standard_input() if prompt == "-" else prompt for prompt in prompts]
    if not all(texts):
        raise InvalidPrompt("the prompt is empty", hint="give at least one token of text")
    lm = model.load(max_rows=max_rows)
    if len(texts) == 1 and not json:
        _show(lm.stream(texts[0], params))
        return
    for number, result in enumerate(lm.generate(texts, params)):
        record = result.to_dict() | {"tokens_per_second": _speed(result)}
        print(
            jsonlib.dumps(record, ensure_ascii=False)
            if json
            else ("\n" if number else "") + result.text
        )


def _standard_input() -> str:
    """What is piped in, without the end of its last line, which `echo` and editors add."""
    return sys.stdin.read().removesuffix("\n").removesuffix("\r")


def chat(model: ModelOptions, params: SamplingParams) -> None:
    lm = model.load(max_rows=1)
    interactive = is_terminal(sys.stdin) and is_terminal(sys.stdout)
    turns: list[dict[str, str]] = []
    with suppress(EOFError):
        while (line := input("> " if interactive else "").strip()) != "/exit":
            if line == "/reset":
                turns = []
            if line in ("", "/reset"):
                continue

            asked = [*turns, {"role": "user", "content": line}]
            said: list[str] = []
            try:
                result = _show(lm.stream(asked, params), said=said)
            except ContextLengthError as error:
                if not interactive:
                    raise
                hint = "begin again with /reset, or ask for fewer new tokens"
                say(f"error: {error.args[0]}\nhint: {hint}")
                continue
            except (
                KeyboardInterrupt
            ):  # ends the answer; once more, before the next one, ends the talk
                if not interactive:
                    raise
                say("(stopped; Ctrl-C once more ends the talk)")
                turns = [*asked, {"role": "assistant", "content": "".join(said)}] if said else turns
                continue

            turns = [*asked, {"role": "assistant", "content": result.text}]
            figures = f"tau {result.stats.tau:.2f}, {_speed(result):.1f} tokens/s"
            if interactive:
                print(f"\033[2m{figures}\033[0m" if _styled() else f"({figures})")
            else:
                say(f"({figures})")  # beside the answers, not among them


def _show(
    chunks: Iterable[Chunk], *, origin: bool = False, said: list[str] | None = None
) -> Result:
    """Write an answer as it comes; with `origin`, a legend first, and what was drafted in green or, without colours, brackets.

    said: takes the pieces that were written, for one who is interrupted.
    """
    inside, marks, chunk = False, ("", ""), None
    if origin:
        marks = ("\033[4;32m", "\033[0m") if _styled() else ("⟨", "⟩")
        print(f"{marks[0]}drafted and accepted{marks[1]}, the target's own\n")
    try:
        for chunk in chunks:
            for piece in chunk.pieces:
                if piece.text:
                    print(
                        ("" if piece.drafted == inside else marks[inside]) + piece.text,
                        end="",
                        flush=True,
                    )
                    inside = piece.drafted
                    if said is not None:
                        said.append(piece.text)
    finally:
        if chunk is not None:
            print(marks[1] if inside else "", end="\n\n" if origin else "\n")
    assert chunk is not None
    assert chunk.result is not None
    return chunk.result


def _styled() -> bool:
    return is_terminal(sys.stdout) and not os.environ.get("NO_COLOR")


def _speed(result: Result) -> float:
    return result.stats.num_tokens / sum(result.stats.seconds.values())
