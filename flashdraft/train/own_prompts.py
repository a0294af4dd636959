"""Stage 1 without a data set: the target itself writes what its users might ask.

An instruction-tuned model that reads its chat template up to where a user's text would begin goes
on with such a text (Magpie, 2406.08464). What it wrote is sifted (train/sieve.py), and in longer
talks its own answer and a next question follow. Does not know files of other prompts.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

from rich.progress import Progress

from flashdraft.decoding.ending import hidden_tokens
from flashdraft.decoding.prompt import Tokenizer
from flashdraft.decoding.text import TextDecoder
from flashdraft.engine import Request, check
from flashdraft.errors import DataError, InvalidParameter, InvalidPrompt
from flashdraft.feed import feed
from flashdraft.files import check_facts, locked, output_file, read_note, write_note
from flashdraft.generate import Model
from flashdraft.growing import GrowingFile
from flashdraft.train.facts import target_facts
from flashdraft.train.opening import Opening, opening
from flashdraft.train.regenerate import Server
from flashdraft.train.rows import Row
from flashdraft.train.sieve import Sieve
from flashdraft.types import Result, SamplingParams

__all__ = ["Asking", "LocalWriter", "RemoteWriter", "Writer", "write_own_prompts"]

_MADE_BY = "prompts --self"
_SOURCE = "self"
_WINDOW = 8  # beginnings a row of the batch, of which notes are taken together
_TRIALS = 512  # after so many beginnings it shows whether prompts come out of them
_FEWEST = 0.01  # share of them that must be kept
_TOP_P = 0.95
_UNFINISHED = "unfinished"  # reasons beside those of the sieve
_HIDDEN = "with control tokens"
_TOO_LONG = "beyond the context"
_REFUSED = "refused by the server"

Turns = list[dict[str, str]]


@dataclass(frozen=True)
class Asking:
    """How the target asks."""

    turns: int = 1  # questions of a talk, at most, each behind the answer to the one before
    temperatures: tuple[float, ...] = (0.7, 0.85, 1.0)  # in turn
    max_question: int = 128  # tokens
    max_answer: int = 512  # tokens, of the answers within talks, which are greedy
    system: str | None = None  # what the system turn says; None: as the template has it
    seed: int = 0

    def question(self, number: int) -> SamplingParams:
        """How beginning number n goes on."""
        temperature = self.temperatures[number % len(self.temperatures)]
        return SamplingParams(
            temperature=temperature,
            top_p=_TOP_P,
            seed=self.seed + number,
            max_new_tokens=self.max_question,
        )

    @property
    def answer(self) -> SamplingParams:
        return SamplingParams(max_new_tokens=self.max_answer)


class Wanted(NamedTuple):
    """A text that shall be written."""

    number: int
    turns: Turns  # what was said before
    params: SamplingParams


class Written(NamedTuple):
    """What was written. `text` is None where `fault` says why it is none."""

    number: int
    text: str | None
    fault: str = ""


class Writer(Protocol):
    """Who writes: the target here, or behind a server."""

    facts: Row  # whose texts they are
    max_rows: int

    def questions(self, wanted: Sequence[Wanted]) -> Iterator[Written]:
        """Users' turns, in the order in which they end."""

    def answers(self, wanted: Sequence[Wanted]) -> Iterator[Written]:
        """The assistant's."""


def write_own_prompts(
    writer: Writer,
    out: Path,
    count: int,
    asking: Asking,
    *,
    evaluation: Iterable[str] = (),
    quiet: bool = False,
) -> Counter[str]:
    """Append {source, row, prompt, temperature} lines until there are `count`.

    Returns how many beginnings gave none, by reason, in all runs. Run it again to go on: the result
    is the same as without a stop. A prompt of several turns is a list of {role, content}.
    evaluation: entries of evaluation sets; prompts that share 13 words with one are dropped. Raises
    InvalidPrompt where the template cannot be cut, DataError where hardly a prompt comes out.
    """
    path = output_file(out)
    with locked(path):
        held = _PromptFile(path, writer.facts | _facts_of(asking))
        sieve = Sieve(evaluation)
        sieve.counts.update(held.dropped)
        for row in held.rows:
            sieve.remember(_first_question(row))

        with Progress(disable=quiet) as progress:
            shown = progress.add_task("prompts", total=count, completed=len(held.rows))
            while len(held.rows) < count:
                size = _window_size(count - len(held.rows), writer.max_rows)
                numbers = range(held.num_tried, held.num_tried + size)
                for number, made in _window(writer, numbers, asking, sieve):
                    held.num_tried = number + 1
                    if made is not None:
                        held.append(made)
                    if len(held.rows) == count:
                        break
                held.note(sieve.counts)
                progress.update(shown, completed=len(held.rows))
                _check_yield(held, sieve.counts)
    return sieve.counts


def _window_size(num_missing: int, max_rows: int) -> int:
    """Beginnings: enough to keep the batch full, hardly more than prompts are missing."""
    likely = num_missing * 5 // 4  # a fifth is left out, or more
    return min(_WINDOW * max_rows, max(max_rows, likely))


def _facts_of(asking: Asking) -> Row:
    facts: Row = json.loads(json.dumps(vars(asking)))
    return {"asking": facts}


def _first_question(row: Row) -> str:
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return prompt
    for turn in prompt:
        if turn["role"] == "user":
            return str(turn["content"])
    return ""


def _check_yield(held: "_PromptFile", dropped: Counter[str]) -> None:
    if held.num_tried < _TRIALS or len(held.rows) >= _FEWEST * held.num_tried:
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common(3))
    raise DataError(
        f"of {held.num_tried} beginnings {len(held.rows)} gave a prompt: {reasons}",
        hint="this target does not write users' turns: name prompts instead",
    )


# --- a window of beginnings -----------------------------------------------------------------------


def _window(
    writer: Writer, numbers: Iterable[int], asking: Asking, sieve: Sieve
) -> Iterator[tuple[int, Row | None]]:
    """Of every beginning in order: its row, or None. What is kept depends on those before alone."""
    before: Turns = []
    if asking.system is not None:
        before.append({"role": "system", "content": asking.system})
    talks = {number: list(before) for number in numbers}
    order = sorted(talks)
    firsts = _in_order(writer.questions(_wanted(talks, order, asking)), order)

    for first in firsts:
        if first.text is None:
            sieve.counts[first.fault] += 1
        elif sieve.keep(first.text):
            talks[first.number].append({"role": "user", "content": first.text})

    is_open = [number for number in order if len(talks[number]) > len(before)]
    for _ in range(1, asking.turns):
        is_open = _gone_on(writer, talks, is_open, asking, sieve)

    for number in order:
        turns = talks[number]
        has_question = len(turns) > len(before)
        yield number, _row(number, turns, asking) if has_question else None


def _wanted(talks: Mapping[int, Turns], numbers: Sequence[int], asking: Asking) -> list[Wanted]:
    return [Wanted(number, talks[number], asking.question(number)) for number in numbers]


def _gone_on(
    writer: Writer, talks: dict[int, Turns], numbers: Sequence[int], asking: Asking, sieve: Sieve
) -> list[int]:
    """An answer and a next question for these talks; those that went on.

    A talk ends before an answer or a question that cannot be used.
    """
    wanted = [Wanted(number, talks[number], asking.answer) for number in numbers]
    answered = {}
    for written in _in_order(writer.answers(wanted), numbers):
        if written.text:
            answer = {"role": "assistant", "content": written.text}
            answered[written.number] = [*talks[written.number], answer]

    went_on = []
    again = sorted(answered)
    for written in _in_order(writer.questions(_wanted(answered, again, asking)), again):
        if written.text is not None and sieve.reason(written.text) is None:
            question = {"role": "user", "content": written.text}
            talks[written.number] = [*answered[written.number], question]
            went_on.append(written.number)
    return went_on


def _in_order(written: Iterable[Written], numbers: Sequence[int]) -> list[Written]:
    by_number = {one.number: one for one in written}
    return [by_number[number] for number in numbers]


def _row(number: int, turns: Turns, asking: Asking) -> Row:
    is_one_question = len(turns) == 1
    prompt: str | Turns = turns[0]["content"] if is_one_question else turns
    temperature = asking.question(number).temperature
    return {"source": _SOURCE, "row": number, "prompt": prompt, "temperature": temperature}


# --- who writes -----------------------------------------------------------------------------------


class LocalWriter:
    """The target in this process."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.facts: Row = target_facts(model)
        self.max_rows = model.max_rows
        self._hidden = frozenset(hidden_tokens(model.tokenizer))

    def questions(self, wanted: Sequence[Wanted]) -> Iterator[Written]:
        requests = []
        for one in wanted:
            begun = opening(self.model.tokenizer, self.model.target.name, one.turns)
            requests.append(self._request(one, begun))
        yield from self._written(requests)

    def answers(self, wanted: Sequence[Wanted]) -> Iterator[Written]:
        requests = []
        for one in wanted:
            request = self.model.request(one.turns, one.params, index=one.number)
            requests.append(request)
        yield from self._written(requests)

    def _request(self, one: Wanted, begun: Opening) -> Request:
        """It ends where the template ends a user's turn."""
        ends = self.model.eos
        if begun.end_token is not None:
            ends = ends | {begun.end_token}
        params = one.params
        if begun.end_text:
            params = replace(params, stop=(begun.end_text,))
        decoder = TextDecoder(self.model.tokenizer, params.stop)
        return Request(list(begun.tokens), params, decoder, ends, one.number)

    def _written(self, requests: Sequence[Request]) -> Iterator[Written]:
        possible = []
        for request in requests:
            try:
                check(self.model.target, request)
            except InvalidPrompt:  # a talk that fills the context
                yield Written(request.index, None, _TOO_LONG)
                continue
            possible.append(request)

        ends = {request.index: request.ends for request in possible}
        for chunk in feed(self.model, possible):
            if chunk.error is not None:
                raise chunk.error
            if chunk.result is not None:
                yield self._judged(chunk.index, chunk.result, ends[chunk.index])

    def _judged(self, number: int, result: Result, ends: frozenset[int]) -> Written:
        if result.finish_reason != "stop":
            return Written(number, None, _UNFINISHED)
        said = result.tokens
        if said and said[-1] in ends:
            said = said[:-1]
        if self._hidden.intersection(said):
            return Written(number, None, _HIDDEN)
        return Written(number, result.text.strip())


class RemoteWriter:
    """The target behind an OpenAI-compatible API, of which raw completions are asked.

    tokenizer: the target's own, whose template is cut here.
    """

    def __init__(self, server: Server, tokenizer: Tokenizer, name: str) -> None:
        self.server = server
        self.tokenizer = tokenizer
        self.name = name
        self.facts: Row = {"target": {"name": server.model, "id": None}}
        self.max_rows = server.max_rows

    def questions(self, wanted: Sequence[Wanted]) -> Iterator[Written]:
        rows = []
        for one in wanted:
            begun = opening(self.tokenizer, self.name, one.turns)
            row: Row = {"number": one.number, "tokens": begun.tokens, "params": one.params}
            if begun.end_text:
                row["params"] = replace(one.params, stop=(begun.end_text,))
            if begun.end_token is not None:
                row["stop_token_ids"] = [begun.end_token]
            rows.append(row | {"place": f"beginning {one.number}"})
        yield from self._judged(rows)

    def answers(self, wanted: Sequence[Wanted]) -> Iterator[Written]:
        rows = []
        for one in wanted:
            asked: Row = {"number": one.number, "prompt": one.turns, "params": one.params}
            rows.append(asked | {"place": f"beginning {one.number}"})
        yield from self._judged(rows)

    def _judged(self, rows: Sequence[Row]) -> Iterator[Written]:
        params = {row["number"]: row["params"] for row in rows}
        for row, answer in self.server.answers(rows, params.__getitem__):
            number = row["number"]
            if isinstance(answer, InvalidPrompt):
                yield Written(number, None, _REFUSED)
            elif answer["finish"] != "stop":
                yield Written(number, None, _UNFINISHED)
            else:
                yield Written(number, str(answer["response"]).strip())


# --- the file -------------------------------------------------------------------------------------


class _PromptFile:
    """Prompts as they were found, and where more of them go.

    Its note says what made them, how many beginnings were tried, and what became of these.
    """

    def __init__(self, path: Path, facts: Row) -> None:
        self.path = path
        self.facts = facts
        self.rows: list[Row] = []
        self.num_tried = 0
        self.dropped: Counter[str] = Counter()
        self._ahead: set[int] = set()  # rows that a kill left behind those that the note knows of
        self._file = GrowingFile(path, self._leave_note)

        note = read_note(path)
        if self._file.is_empty:
            return
        if note is None or note["made_by"] != _MADE_BY:
            got = f"`{path}` was not written by `flashdraft {_MADE_BY}`"
            raise InvalidParameter(got, hint="name another file with --out")
        check_facts(path, note, facts)
        self.num_tried = int(note["tried"])
        self.dropped.update(note["dropped"])
        self._read(int(note["kept"]))

    def _read(self, count: int) -> None:
        """The rows that the note knows of; what stands behind them will be made again, the same."""
        for line in self._file.lines():
            try:
                row = json.loads(line.content)
                number = int(row["row"])
            except (ValueError, KeyError, TypeError) as error:
                got = f"`{self.path}`, line {line.number} is no prompt of ours ({error!r:.60})"
                raise DataError(got, hint="name another file with --out") from None
            if number < self.num_tried:
                self.rows.append(row)
            else:
                self._ahead.add(number)
        if len(self.rows) != count:
            got = f"`{self.path}` holds {len(self.rows)} prompts, and its note says {count}"
            raise DataError(got, hint="it was changed since: name another file with --out")

    def append(self, row: Row) -> None:
        self.rows.append(row)
        if row["row"] not in self._ahead:
            self._file.append(row)

    def note(self, dropped: Counter[str]) -> None:
        self.dropped = dropped
        self._file.mend()
        self._leave_note()

    def _leave_note(self) -> None:
        facts = {
            **self.facts,
            "tried": self.num_tried,
            "kept": len(self.rows),
            "dropped": dict(self.dropped),
        }
        write_note(self.path, _MADE_BY, facts)
