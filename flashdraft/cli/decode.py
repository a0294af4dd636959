"""The commands that write text: thin functions over `load`, `generate` and `stream`."""

import json as jsonlib
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, NamedTuple

from typer import Argument, BadParameter, Option

from flashdraft import hub
from flashdraft.cli.options import ModelOptions
from flashdraft.errors import ContextLengthError, InvalidParameter, InvalidPrompt
from flashdraft.files import say
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.process import is_terminal
from flashdraft.types import (
    COUNTS,
    SEEDS,
    Allowed,
    Chunk,
    Result,
    SamplingParams,
    Stats,
    check_options,
    option,
    require,
)

PROMPT = (
    "A baker bakes 12 trays of 8 rolls and sells 71 of them. "
    "How many rolls are left? Explain step by step."
)
_FEW = 8  # tokens of the texts that come first, with which kernels are built


def demo(
    model: ModelOptions,
    prompt: Annotated[str, Argument(help="what to ask")] = PROMPT,
    max_new_tokens: Annotated[int, Option(help="tokens, at most"), COUNTS] = 96,
    temperature: Annotated[float, Option(help="0 is greedy"), Allowed(0)] = 0.0,
    seed: Annotated[int, Option(help="the same seed gives the same text"), SEEDS] = 0,
) -> None:
    """Answer a prompt with and without drafting, and compare.

    Examples:
        flashdraft demo
        flashdraft demo 'Write a haiku about rain.' --temperature 0.7 --seed 1
    """
    params = SamplingParams(temperature=temperature, seed=seed, max_new_tokens=max_new_tokens)
    if model.draft == "auto" and hub.builtin_draft(model.target) is None:
        model = replace(model, draft="prompt_lookup")
        print(f"no drafter is shipped for {model.target}: prompt lookup drafts instead\n")

    drafting = model.load(max_rows=1)
    plain = replace(drafting, new_drafter=Autoregressive)
    tokens = drafting.encode(prompt)
    chunks = drafting.stream(tokens, params)  # refuses what cannot run before anything does
    for each in (plain, drafting):
        each.generate(tokens, replace(params, max_new_tokens=min(_FEW, max_new_tokens)))

    drafted = _show(chunks, origin=True)
    alone: Result = plain.generate(tokens, params)
    drafted_speed = _decoding_speed(drafted.stats)
    plain_speed = _decoding_speed(alone.stats)
    is_same_text = drafted.tokens == alone.tokens
    print(f"{drafting.new_drafter().name:<15} {drafted_speed:6.1f} tokens/s")
    print(f"{'autoregressive':<15} {plain_speed:6.1f} tokens/s")
    print(f"{'ratio':<15} {drafted_speed / (plain_speed or 1.0):6.2f}")
    print(f"{'tau':<15} {drafted.stats.tau:6.2f} tokens per target pass")
    print(f"texts identical: {'yes' if is_same_text else 'no'}")


class _NoPrompts(BadParameter):
    """A slip of usage that no single parameter's absence makes."""

    def format_message(self) -> str:
        return self.message


@dataclass(frozen=True)
class FileOptions:
    """Prompts of a file, and where their answers go."""

    prompts: str | None = option(
        None, "answer the prompts of this file instead: .jsonl with `prompt`, or a .txt line each"
    )
    out: str | None = option(
        None, "with --prompts: the file of answers; the same command goes on with it"
    )

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def job(self) -> tuple[Path, Path] | None:
        """The file that is read and the one that grows; None where neither is given."""
        if self.prompts is None and self.out is None:
            return None
        if self.prompts is None or self.out is None:
            raise InvalidParameter("--prompts and --out go together", hint="give both, or neither")
        return Path(self.prompts), Path(self.out)


def generate(
    model: ModelOptions,
    params: SamplingParams,
    file: FileOptions,
    max_rows: Annotated[int, Option(help="prompts decoded together, at most"), COUNTS] = 8,
    json: Annotated[bool, Option("--json", help="one JSON object per answer")] = False,
    logprobs: Annotated[
        bool, Option("--logprobs", help="log-probabilities of the tokens, in the JSON object")
    ] = False,
    asked: Annotated[
        list[str] | None,
        Argument(metavar="PROMPTS", help="what to ask; - reads standard input"),
    ] = None,
) -> None:
    """Print the answers to prompts, or write those of a file.

    Examples:
        flashdraft generate 'Why is the sky blue?' --temperature 0.8
        flashdraft generate --prompts prompts.jsonl --out answers.jsonl --max-rows 16
    """
    params = replace(params, logprobs=logprobs)
    job = file.job
    if job is not None:
        if asked:
            got = "prompts are given twice: by --prompts and as arguments"
            raise InvalidParameter(got, hint="leave out one of the two")
        require(not json, "json", json, "left out with --out, which is JSON Lines")
        _answer_file(*job, params, model, max_rows)
        return

    if not asked:
        raise _NoPrompts("Missing prompts: give a text, - or --prompts FILE")
    require(json or not logprobs, "logprobs", logprobs, "left out without --json, which shows them")
    texts = [_standard_input() if prompt == "-" else prompt for prompt in asked]
    if not all(texts):
        raise InvalidPrompt("the prompt is empty", hint="give at least one token of text")

    lm = model.load(max_rows=max_rows)
    if len(texts) == 1 and not json:
        _show(lm.stream(texts[0], params))
        return

    for number, result in enumerate(lm.generate(texts, params)):
        if json:
            record = result.to_dict() | {"tokens_per_second": _speed(result)}
            print(jsonlib.dumps(record, ensure_ascii=False))
        else:
            if number > 0:
                print()
            print(result.text)


def _answer_file(
    prompts: Path, out: Path, params: SamplingParams, model: ModelOptions, max_rows: int
) -> None:
    from flashdraft.offline import Job, answer_file  # late: a single prompt needs none of it

    job = Job(prompts, out, params)
    done = answer_file(
        job,
        model.target,
        lambda: model.load(max_rows=max_rows),
        quiet=not is_terminal(sys.stdout),
    )
    print(f"{done.num_answers} new answers in {job.out}")
    if done.num_answers:
        speed = done.num_tokens / done.seconds
        print(f"{done.num_tokens} tokens, {speed:.1f} tokens/s, tau {done.tau:.2f}")


def _standard_input() -> str:
    """What is piped in, without the end of its last line, which `echo` and editors add."""
    return sys.stdin.read().removesuffix("\n").removesuffix("\r")


def chat(model: ModelOptions, params: SamplingParams) -> None:
    """Talk to a model; /reset forgets the talk, /exit ends it.

    Examples:
        flashdraft chat
        flashdraft chat --target Qwen/Qwen3-8B --draft z-lab/Qwen3-8B-DFlash-b16
    """
    session = model.load(max_rows=1).session()  # what was read of the talk stays
    interactive = is_terminal(sys.stdin) and is_terminal(sys.stdout)
    turns: list[dict[str, str]] = []
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line == "/reset":
            turns = []
            continue
        if line == "":
            continue

        asked = [*turns, {"role": "user", "content": line}]
        said: list[str] = []
        try:
            result = _show(session.stream(asked, params), said=said)
        except ContextLengthError as error:
            if not interactive:
                raise
            hint = "begin again with /reset, or ask for fewer new tokens"
            say(f"error: {error.args[0]}\nhint: {hint}")
            continue
        except KeyboardInterrupt:  # ends the answer; once more, before the next one, ends the talk
            if not interactive:
                raise
            say("(stopped; Ctrl-C once more ends the talk)")
            if said:
                turns = [*asked, {"role": "assistant", "content": "".join(said)}]
            continue

        turns = [*asked, {"role": "assistant", "content": result.text}]
        figures = f"tau {result.stats.tau:.2f}, {_speed(result):.1f} tokens/s"
        if not interactive:
            say(f"({figures})")  # beside the answers, not among them
        elif _styled():
            print(f"\033[2m{figures}\033[0m")
        else:
            print(f"({figures})")


class _Marks(NamedTuple):
    """What is written before and after drafted text."""

    before: str
    after: str


_NO_MARKS = _Marks("", "")
_BRACKETS = _Marks("⟨", "⟩")
_GREEN = _Marks("\033[4;32m", "\033[0m")


def _show(
    chunks: Iterable[Chunk], *, origin: bool = False, said: list[str] | None = None
) -> Result:
    """Write an answer as it comes.

    origin: a legend comes first, and what was drafted is green or, without colours, in brackets.
    said: takes the pieces that were written, for one who is interrupted.
    """
    marks = _NO_MARKS
    if origin:
        marks = _GREEN if _styled() else _BRACKETS
        print(f"{marks.before}drafted and accepted{marks.after}, the target's own\n")

    chunk = None
    is_marked = False
    try:
        for chunk in chunks:
            for piece in chunk.pieces:
                if not piece.text:
                    continue
                text = piece.text
                if piece.drafted and not is_marked:
                    text = marks.before + text
                elif is_marked and not piece.drafted:
                    text = marks.after + text
                is_marked = piece.drafted
                print(text, end="", flush=True)
                if said is not None:
                    said.append(piece.text)
    finally:
        if chunk is not None:
            last = marks.after if is_marked else ""
            print(last, end="\n\n" if origin else "\n")
    assert chunk is not None
    assert chunk.result is not None
    return chunk.result


def _styled() -> bool:
    return is_terminal(sys.stdout) and not os.environ.get("NO_COLOR")


def _speed(result: Result) -> float:
    """Tokens a second, the prompt's reading included."""
    return result.stats.num_tokens / sum(result.stats.seconds.values())


def _decoding_speed(stats: Stats) -> float:
    """Tokens a second behind the first one."""
    if not stats.decode_seconds:
        return 0.0
    return (stats.num_tokens - 1) / stats.decode_seconds
