"""Prompts of a file, answered into a file: generation in large numbers, without a server.

A line of the output is written as its answer ends; a run that was stopped is gone on with. A text
depends on its prompt's number in the file, never on the batch nor on how often the run was stopped.
Knows files of prompts and the engine. Does not know the command line.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import track

from flashdraft.decoding.prompt import as_asked
from flashdraft.engine import Request, check
from flashdraft.errors import DataError, InvalidParameter, InvalidPrompt
from flashdraft.feed import feed
from flashdraft.files import (
    check_facts,
    locked,
    output_file,
    parse_json,
    read_note,
    write_note,
)
from flashdraft.generate import Model
from flashdraft.growing import GrowingFile, HeldLine
from flashdraft.train.facts import named_target, target_facts
from flashdraft.train.rows import LeftOut, PlacedRow, is_whole, placed_rows, placed_texts
from flashdraft.types import Result, SamplingParams

__all__ = ["Done", "Job", "answer_file"]

Row = dict[str, Any]  # a JSON object

_MADE_BY = "generate"
_BEGINNING = b'{"number": '  # of every line that is written here
_OWN = ("id", "prompt", "thinking", "meta")
_NOTES = ("source", "row", "task")  # what `flashdraft prompts` and `tasks` say of where it is from
_SAMPLING = tuple(option.name for option in fields(SamplingParams) if option.metadata)
_FIELDS = (
    f"fields are {', '.join(_OWN)} and {', '.join(_SAMPLING)}; "
    f"{', '.join(_NOTES)} and `meta` are copied as they are"
)
_ANOTHER = "name another file with --out"


@dataclass(frozen=True)
class Job:
    prompts: Path
    out: Path
    params: SamplingParams  # of every prompt that does not say otherwise


class Done(NamedTuple):
    """What one run added."""

    num_answers: int
    num_tokens: int
    tau: float  # mean over the answers; 0 without any
    seconds: float


class _Prompt(NamedTuple):
    number: int  # in its file, from 0: seeds hang on it
    place: str  # as messages name it
    line: Row  # as it stands in the file
    params: SamplingParams


def answer_file(job: Job, target: str, load: Callable[[], Model], *, quiet: bool) -> Done:
    """Append an answer for every prompt that `job.out` lacks.

    A prompt is a line {prompt: text, turns or token ids}, with an `id`, `meta` of any kind,
    `thinking` for the chat template and sampling fields of its own if it likes; a .txt file has one
    text a line. A line of the output is the prompt's, with {number, text, tokens, finish_reason,
    num_prompt_tokens} and the logprobs that were asked for. Without a seed of its own, prompt
    number n has the seed `job.params.seed` + n.

    load: gives the model called `target`, once everything was refused that can be refused without
    it. Raises InvalidParameter for an output that is not ours, DataError for one that was made of
    other prompts or made otherwise, and where no prompt can be answered. A single prompt that
    cannot be is left out; how many, and which first, is told on standard error.
    """
    path = output_file(job.out, inputs=[job.prompts])
    left_out = LeftOut("prompt")
    with locked(path):
        held = _Answers(path)
        held.check({"target": named_target(target), "sampling": _sampling_facts(job.params)})
        num_missing = _count_missing(job, held, left_out)

        model = load()
        held.check(_facts(job, model))
        held.facts = _facts(job, model) | {"prompts": str(job.prompts)}
        ended = _ended(model, _missing(job, held), left_out)
        shown = track(ended, total=num_missing, description="generate", disable=quiet)
        done = _write(shown, held)

        if left_out.count and not done.num_answers and not held.asked:
            raise _no_answer(left_out)
        held.file.mend()  # it is there, even without an answer
    left_out.tell()
    return done


# --- the prompts ----------------------------------------------------------------------------------


def _prompts(job: Job, left_out: LeftOut) -> Iterator[_Prompt]:
    """Those that can be read; `left_out`, which is empty, takes the others. All have a number."""
    num_read = 0
    for place, line in _lines(job.prompts, left_out):
        number = num_read + left_out.count
        try:
            params = _params_of(line, number, job.params)
        except (InvalidParameter, InvalidPrompt) as error:
            left_out.add(place, error)
            continue
        num_read += 1
        yield _Prompt(number, place, line, params)


def _lines(path: Path, left_out: LeftOut) -> Iterator[PlacedRow]:
    if path.suffix == ".txt":
        return placed_texts(path, left_out)
    return placed_rows(path, ("prompt",), left_out)


def _params_of(line: Row, number: int, params: SamplingParams) -> SamplingParams:
    """How this prompt is sampled.

    Raises InvalidPrompt or InvalidParameter for a line that cannot be used.
    """
    own = {}
    for name, value in line.items():
        if name in _SAMPLING:
            own[name] = value
        elif name not in (*_OWN, *_NOTES):
            raise InvalidPrompt(f"unknown field `{name}`", hint=_FIELDS)

    if type(line.get("id", "")) not in (str, int):
        raise InvalidPrompt(f"`id` is {line['id']!r:.60}, not a text or a whole number")
    if not isinstance(line.get("thinking", False), bool):
        raise InvalidPrompt(f"`thinking` is {line['thinking']!r:.60}, not true or false")
    if not is_whole(json.dumps(line, ensure_ascii=False)):
        raise InvalidPrompt("it holds half a character (a lone surrogate)")
    as_asked(line["prompt"])
    return replace(params.numbered(number), **own)


def _count_missing(job: Job, held: "_Answers", left_out: LeftOut) -> int:
    """How many prompts have no answer yet.

    Raises DataError where an answer that is held belongs to another prompt, or to none, and where
    there is nothing to answer.
    """
    num_missing = 0
    unmatched = dict(held.asked)
    for prompt in _prompts(job, left_out):
        digest = unmatched.pop(prompt.number, None)
        if digest is None:
            num_missing += 1
        elif digest != _digest(prompt.line):
            got = f"`{held.path}` holds an answer to another prompt than {prompt.place} is now"
            hint = "the prompts were changed: name another output"
            raise DataError(got, hint=hint)

    if unmatched:
        number = min(unmatched)
        got = f"`{held.path}` holds an answer to prompt number {number}, which is not there"
        raise DataError(f"{got} in `{job.prompts}`", hint="name another output for other prompts")
    if num_missing or held.asked:
        return num_missing
    if left_out.count:
        raise _no_answer(left_out)
    raise DataError(f"`{job.prompts}` holds no prompts", hint='write lines like {"prompt": "Hi."}')


def _missing(job: Job, held: "_Answers") -> Iterator[_Prompt]:
    told_before = LeftOut("prompt")
    for prompt in _prompts(job, told_before):
        if prompt.number not in held.asked:
            yield prompt


def _no_answer(left_out: LeftOut) -> DataError:
    hint = left_out.hint if left_out.hint else "mend these prompts"
    return DataError(f"no prompt could be answered: {left_out}", hint=hint)


# --- the answers ----------------------------------------------------------------------------------


class _Ended(NamedTuple):
    prompt: _Prompt
    result: Result


def _ended(model: Model, prompts: Iterator[_Prompt], left_out: LeftOut) -> Iterator[_Ended]:
    """Answers as they end; a prompt that has none is left out."""
    running: dict[int, _Prompt] = {}

    def requests() -> Iterator[Request]:
        for prompt in prompts:
            try:
                tokens = model.encode(prompt.line["prompt"], thinking=prompt.line.get("thinking"))
                request = model.request(tokens, prompt.params, index=prompt.number)
                check(model.target, request)
            except (InvalidParameter, InvalidPrompt) as error:
                left_out.add(prompt.place, error)
                continue
            running[prompt.number] = prompt
            yield request

    for chunk in feed(model, requests()):
        if chunk.error is not None:
            left_out.add(running.pop(chunk.index).place, chunk.error)
        elif chunk.result is not None:
            yield _Ended(running.pop(chunk.index), chunk.result)


def _write(ended: Iterable[_Ended], held: "_Answers") -> Done:
    """Write every answer as it comes."""
    started = time.perf_counter()
    num_answers = 0
    num_tokens = 0
    sum_of_taus = 0.0
    for prompt, result in ended:
        held.file.append(_line(prompt, result))
        num_answers += 1
        num_tokens += result.stats.num_tokens
        sum_of_taus += result.stats.tau
    tau = sum_of_taus / max(num_answers, 1)
    return Done(num_answers, num_tokens, tau, time.perf_counter() - started)


def _line(prompt: _Prompt, result: Result) -> Row:
    """Nothing in it depends on time, on the batch or on what was drafted."""
    line: Row = {"number": prompt.number, **prompt.line}
    line["text"] = result.text
    line["tokens"] = list(result.tokens)
    line["finish_reason"] = result.finish_reason
    line["num_prompt_tokens"] = result.stats.num_prompt_tokens
    if result.logprobs is not None:
        line["logprobs"] = list(result.logprobs)
    return line


class _Answers:
    """The output as it was found, and where more answers go. Nothing is written before `append`.

    Raises InvalidParameter for a file that holds something else, DataError for a damaged line in
    one that is ours.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GrowingFile(path, self._leave_note)
        self.facts: Row = {}  # what makes the answers that will be written
        note = read_note(path)
        self.note = None if self.file.is_empty else note  # a note may outlive its file
        self.asked: dict[int, bytes] = {}  # what the prompts said that are answered, by number
        if self.file.is_empty:
            return

        if self.note is None:
            raise InvalidParameter(
                f"`{path}` was not written by `flashdraft generate`", hint=_ANOTHER
            )
        if self.note["made_by"] != _MADE_BY:
            got = f"`{path}` was written by `flashdraft {self.note['made_by']}`"
            raise InvalidParameter(got, hint=_ANOTHER)
        for line in self.file.lines():
            self._take(line)
        torn = self.file.torn
        if torn and not torn.startswith(_BEGINNING) and not _BEGINNING.startswith(torn):
            raise self._damaged("the end", "not valid JSON, nor half a line of ours")

    def _take(self, line: HeldLine) -> None:
        where = f"line {line.number}"
        try:
            row = parse_json(line.content)
        except ValueError as error:
            raise self._damaged(where, f"not valid JSON ({error})") from None
        if not isinstance(row, dict) or not {"number", "text", "tokens"} <= row.keys():
            raise self._damaged(where, "not an answer")
        if type(row["number"]) is not int:
            raise self._damaged(where, "not an answer: its `number` is no whole number")
        asked = {name: row[name] for name in (*_OWN, *_NOTES, *_SAMPLING) if name in row}
        self.asked[row["number"]] = _digest(asked)

    def _damaged(self, where: str, wrong: str) -> DataError:
        return DataError(f"{self.path}, {where}: {wrong}", hint="mend or remove that line")

    def check(self, facts: Row) -> None:
        """Raises DataError where another target, template, arithmetic or sampling made it."""
        if self.note is not None:
            check_facts(self.path, self.note, facts)

    def _leave_note(self) -> None:
        if self.note is None:
            write_note(self.path, _MADE_BY, self.facts)


def _facts(job: Job, model: Model) -> Row:
    return {"sampling": _sampling_facts(job.params), **target_facts(model)}


def _sampling_facts(params: SamplingParams) -> Row:
    """All of it, as JSON has it: at temperature 0, too, where a prompt may have another one."""
    facts: Row = json.loads(json.dumps(vars(params), default=repr))
    return facts


def _digest(asked: Row) -> bytes:
    content = json.dumps(asked, sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).digest()
