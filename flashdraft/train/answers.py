"""The file of answers that grows: whose it is, what made it, which prompts it answers already.

Its note says which target, chat template, arithmetic and sampling made it; a run that has others
does not go on with it. A file without a note (of an earlier version, or made by hand) is taken,
with one line that says so, unless a line contradicts. Does not know how answers are made.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from flashdraft.errors import DataError, FlashDraftError, InvalidParameter
from flashdraft.files import Facts, check_facts, locked, output_file, read_note, say, write_note
from flashdraft.growing import GrowingFile, HeldLine
from flashdraft.train.rows import Row
from flashdraft.types import SamplingParams

__all__ = ["AnswerFile", "check_origin", "open_answers", "question", "sampling_facts"]

_MADE_BY = "regenerate"
_FIELDS = ("source", "row", "prompt", "response")
_BEGINNING = b'{"source": '  # of every line that is written here
_CHANGES_NO_TEXT = {"logprobs", "top_logprobs", "prompt_logprobs"}
_GREEDY_IGNORES = {"seed", "top_k", "top_p", "min_p"}


def sampling_facts(params: SamplingParams, greedy_share: float = 0.0) -> Row:
    """What of the sampling changes a text, as JSON has it."""
    ignored = _CHANGES_NO_TEXT
    if params.temperature == 0:
        ignored = ignored | _GREEDY_IGNORES
    given = {name: value for name, value in vars(params).items() if name not in ignored}
    given["greedy_share"] = greedy_share
    facts: Row = json.loads(json.dumps(given, default=_hook_name))
    return facts


def _hook_name(hook: object) -> str:
    """In the place of what JSON cannot hold: the logits processor."""
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))


def check_origin(path: Path, now: Facts, *, tell: bool = True) -> None:
    """Raises DataError where a file of answers was made by another target or chat template.

    `now` tells which ones are there now, the file's note which ones made it. Without a note the
    answers are taken, and one line says so, or none without `tell`. What a server wrote has a name
    alone, which tells nothing.
    """
    note = read_note(path)
    if note is None:
        if tell and path.stat().st_size:
            say(
                f"{path}: nothing says what wrote these answers; they are taken as the target's own"
            )
        return

    if note["made_by"] != _MADE_BY:
        raise DataError(
            f"`{path}` was written by `flashdraft {note['made_by']}`",
            hint="give what `flashdraft regenerate` wrote",
        )
    is_by_server = "template" not in note
    if is_by_server:
        return
    wanted = {name: now[name] for name in ("target", "template") if name in now}
    hint = "regenerate the answers with this target, or name the one that wrote them"
    check_facts(path, note, wanted, hint=hint)


@contextmanager
def open_answers(out: Path, prompts: Path) -> Iterator["AnswerFile"]:
    """The file of answers to `prompts`, which no other process writes meanwhile.

    Raises a FlashDraftError if it is not ours.
    """
    path = output_file(out, inputs=[prompts])
    with locked(path):
        held = AnswerFile(path)
        yield held
        held.close()


class _Held(NamedTuple):
    """What is remembered of an answer."""

    number: int  # of its line
    question: str
    place: str
    num_tokens: object  # as it says
    lowest: int  # token id; 0 without tokens
    highest: int


class AnswerFile:
    """Answers as they were found, and where more of them go. Nothing is written before `append`.

    Raises InvalidParameter for a file that holds something else, DataError for a damaged line in
    one that is ours.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GrowingFile(path, self._leave_note)
        note = read_note(path)
        self.note = None if self._file.is_empty else note  # a note may outlive its file
        self.answers: list[_Held] = []
        for line in self._file.lines():
            self.answers.append(self._read(line))

        if self.note is not None and self.note["made_by"] != _MADE_BY:
            got = f"`{path}` was written by `flashdraft {self.note['made_by']}`"
            raise InvalidParameter(got, hint="name another file with --out")
        if self._file.torn:
            self._check_torn(self._file.torn)

    def _read(self, line: HeldLine) -> _Held:
        encoding = "utf-8-sig" if line.number == 1 else "utf-8"
        try:
            row = json.loads(line.content.decode(encoding))
        except ValueError as error:
            raise self._odd_line(line.number, f"not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise self._odd_line(line.number, "not a JSON object")
        for field in _FIELDS:
            if field not in row:
                raise self._odd_line(line.number, f"no field `{field}`")

        tokens = row.get("tokens")
        ids = []
        if isinstance(tokens, list):
            ids = [token for token in tokens if isinstance(token, int)]
        return _Held(
            line.number,
            question(row),
            _place(row),
            row.get("num_tokens"),
            lowest=min(ids, default=0),
            highest=max(ids, default=0),
        )

    def _odd_line(self, number: int, wrong: str) -> FlashDraftError:
        if self.note is not None:
            where = f"{self.path}, line {number}"
            return DataError(f"{where}: {wrong}", hint="mend or remove that line")
        got = f"`{self.path}` holds no answers of `flashdraft regenerate`: line {number}: {wrong}"
        return InvalidParameter(got, hint="name another file with --out")

    def _check_torn(self, tail: bytes) -> None:
        """Half a line may be cut off only where a kill of ours can have left it."""
        if tail.startswith(_BEGINNING):
            return
        is_known = self.note is not None or bool(self.answers)
        if is_known and _BEGINNING.startswith(tail):
            return
        raise self._odd_line(len(self.answers) + 1, "not valid JSON, nor half a line of ours")

    @property
    def answered(self) -> set[str]:
        """The `question`s of all answers."""
        return {answer.question for answer in self.answers}

    def check_prompts(self, asked: Sequence[Row]) -> None:
        """Raises DataError where an answer is to another text than its prompt has now.

        With a note, also where it is to a prompt that is not asked.
        """
        now: dict[str, set[str]] = {}  # by place
        for row in asked:
            now.setdefault(_place(row), set()).add(question(row))

        for answer in self.answers:
            where = f"`{self.path}`, line {answer.number}"
            wanted = now.get(answer.place)
            if wanted is None:
                if self.note is None:
                    continue
                got = f"an answer to {_where(answer)}, which is not among the prompts"
                hint = "name another output for another set of prompts"
                raise DataError(f"{where}: {got}", hint=hint)
            if answer.question not in wanted:
                got = f"{_change(answer.question, min(wanted))} in {_where(answer)} since"
                hint = "the prompts were changed: name another output, or remove such answers"
                raise DataError(f"{where}: {got}", hint=hint)

    def check_facts(self, facts: Facts) -> None:
        """Raises DataError where another target, template, arithmetic or sampling made answers."""
        if self.note is not None:
            check_facts(self.path, self.note, facts)
            return

        most = facts.get("sampling", {}).get("max_new_tokens")
        if most is None:
            return
        for answer in self.answers:
            if isinstance(answer.num_tokens, int) and answer.num_tokens > most:
                where = f"`{self.path}`, line {answer.number}"
                got = f"an answer of {answer.num_tokens} tokens, but max_new_tokens is {most}"
                hint = "go on with what it was made with, or name another output"
                raise DataError(f"{where}: {got}", hint=hint)

    def check_vocabulary(self, size: int) -> None:
        """Raises DataError for a token that the target does not have."""
        for answer in self.answers:
            if answer.lowest >= 0 and answer.highest < size:
                continue
            beyond = answer.lowest if answer.lowest < 0 else answer.highest
            where = f"`{self.path}`, line {answer.number}"
            raise DataError(
                f"{where}: token {beyond} is none of the target's {size}",
                hint="another target wrote it: name another output",
            )

    def begin(self, facts: Facts) -> None:
        """From now on answers made so may be appended."""
        self.facts = dict(facts)
        if self.answers and self.note is None:
            say(
                f"{self.path}: nothing says what wrote its {len(self.answers)} answers; "
                "they are taken as this target's, made alike"
            )

    def append(self, line: Mapping[str, object]) -> None:
        """Write one answer, at once."""
        self._file.append(line)

    def close(self) -> None:
        """The file is there, even without an answer."""
        self._file.mend()

    def _leave_note(self) -> None:
        if self.note is not None:
            return
        facts = dict(self.facts)
        if self.answers:
            facts["taken"] = len(self.answers)
        write_note(self.path, _MADE_BY, facts)


def question(row: Row) -> str:
    """What tells a prompt from every other one: its place, its text, and its thinking."""
    return json.dumps([row["source"], row["row"], row["prompt"], row.get("thinking")])


def _change(before: str, now: str) -> str:
    """What differs between two questions of one place."""
    _, _, old_prompt, old_thinking = json.loads(before)
    _, _, new_prompt, new_thinking = json.loads(now)
    if old_prompt == new_prompt:
        return f"thinking {old_thinking} became {new_thinking}"
    return f"the prompt {old_prompt!r:.60} became {new_prompt!r:.60}"


def _place(row: Row) -> str:
    """What tells the place of a prompt from every other one."""
    return json.dumps([row["source"], row["row"]])


def _where(answer: _Held) -> str:
    """Its prompt's place, as messages name it."""
    source, row = json.loads(answer.place)
    return f"row {row} of `{source}`"
