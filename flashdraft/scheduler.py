"""Which requests wait, which have a row, and what finished rows have left. No tensors.

The life of a row: a waiting request is *placed* in it, if the tokens that it may come to fit beside
the others'; its prompt is *read* in parts, between the decoding steps of others; it *runs*; and
when it is finished its tokens are *kept*, until the row or the room is needed. A request begins
with what another row of the same owner shares with its prompt.

Knows rows, token ids and the number of tokens that there is room for. Does not know what a row's
keys and values are, nor who drafts.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

from flashdraft.errors import ContextLengthError

__all__ = ["Part", "Placement", "Scheduler"]

_SHARED = 16  # tokens that must be the same before a request waits for another to read them
_ALONE = 4  # parts of prompts that are read at once where nobody waits for the next step
_STEP = 16  # where reading is timed, a part of the prompts has a multiple of so many tokens
_LONGEST = 512  # and no more, however quick the machine
_QUICK = 0.6  # of the time that it may take: then a part may be half as long again
_LOSS = 64  # tokens of a kept row that may be lost where a request takes it as it is


class Scheduled(Protocol):
    """What is read of a request."""

    prompt: list[int]
    history: list[int]
    index: int
    owner: str

    @property
    def most_tokens(self) -> int:
        """The slots that it may come to need."""

    @property
    def shares(self) -> bool:
        """Whether it may begin with what another row has read."""


R = TypeVar("R", bound=Scheduled)


class Placement(NamedTuple, Generic[R]):
    """A request and its row."""

    request: R
    row: int
    source: int | None  # the row, maybe the same, whose tokens it begins with
    num_shared: int  # so many of them, at most


class Part(NamedTuple):
    """The tokens of a prompt that are read next."""

    row: int
    start: int
    end: int


@dataclass
class _Reading(Generic[R]):
    """A row whose prompt is not wholly read."""

    request: R
    num_read: int = 0

    @property
    def num_left(self) -> int:
        return len(self.request.prompt) - self.num_read


@dataclass(frozen=True)
class _Kept:
    """What a finished row holds."""

    tokens: list[int]
    owner: str


class _Match(NamedTuple):
    """The row that shares most with a prompt."""

    row: int | None
    num_shared: int  # tokens that it holds already
    hoped: int  # tokens that some row will hold once its own prompt is read


@dataclass
class Scheduler(Generic[R]):
    """First come, first served.

    keeps: finished rows are kept for requests that begin alike. max_tokens: how many tokens all
    rows together may hold, each counted as long as it may become; None: any number. longest: the
    same of a single row, where every row takes the room of the longest one. chunk: how many tokens
    of prompts are read between two decoding steps. pause: seconds that reading them may take; where
    it is given, `chunk` follows what reading has taken. spare: rows beside those that may be in
    use, for finished ones. can_give: how many of the first tokens, by row and number, another row
    can begin with; None: all that are read.
    """

    max_rows: int = 1
    keeps: bool = False
    max_tokens: int | None = None
    longest: int | None = None
    pause: float | None = None
    spare: int = 0
    chunk: int = 512
    can_give: Callable[[int, int], int] | None = None
    waiting: deque[R] = field(default_factory=deque)
    reading: dict[int, _Reading[R]] = field(default_factory=dict)  # by row, as they came
    running: dict[int, R] = field(default_factory=dict)  # by row
    # By row, those first that nobody has wanted for longest.
    kept: OrderedDict[int, _Kept] = field(default_factory=OrderedDict)

    @property
    def num_rows(self) -> int:
        return self.max_rows + self.spare

    @property
    def num_free(self) -> int:
        """Rows that nobody reads or runs in."""
        return self.max_rows - len(self.reading) - len(self.running)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.reading or self.running)

    @property
    def num_promised(self) -> int:
        """Tokens that the rows in use may come to hold."""
        return sum(request.most_tokens for request in self.requests().values())

    @property
    def num_kept(self) -> int:
        """Tokens of finished rows."""
        return sum(len(kept.tokens) for kept in self.kept.values())

    def requests(self) -> dict[int, R]:
        """All that have a row, by row."""
        reading = {row: own.request for row, own in self.reading.items()}
        return reading | self.running

    def submit(self, request: R) -> None:
        """Raises ContextLengthError for a request that would never fit."""
        most = request.most_tokens
        limits = [limit for limit in (self.max_tokens, self.longest) if limit is not None]
        limit = min(limits, default=most)
        if most > limit:
            got = f"prompt and new tokens may come to {most}, but the cache holds {limit}"
            raise ContextLengthError(got, hint="ask for fewer new tokens, or give more memory")
        self.waiting.append(request)

    # ---- placing ---------------------------------------------------------------------------------

    def place(self) -> Placement[R] | None:
        """The next request that can have a row; None: there is none.

        The row that it names may have to give up what it keeps. Call it until it gives None.
        """
        for request in self.waiting:
            if self.num_free == 0 or not self._fits(request):
                return None  # nobody overtakes: a long request must come to its turn
            match = self._longest_match(request)
            if match.hoped > match.num_shared + _SHARED:
                continue  # what it shares is being read: it waits for that
            self.waiting.remove(request)
            return self._placed(request, match)
        return None

    def _fits(self, request: R) -> bool:
        """Whether there is room beside the rows in use; what is kept gives way."""
        if self.max_tokens is None:
            return True
        return self.num_promised + request.most_tokens <= self.max_tokens

    def _placed(self, request: R, match: _Match) -> Placement[R]:
        source = match.row
        row = self._row_for(match)
        self.kept.pop(row, None)
        if source is not None and source in self.kept:
            self.kept.move_to_end(source)  # such as a system prompt's: others will want it, too
        self.reading[row] = _Reading(request)
        return Placement(request, row, source, match.num_shared)

    def _row_for(self, match: _Match) -> int:
        """The matching row itself if it is finished and loses little, else an empty one, else the
        one that was kept longest."""
        source = self.kept.get(match.row) if match.row is not None else None
        if source is not None and len(source.tokens) - match.num_shared <= _LOSS:
            assert match.row is not None
            return match.row

        used = self.reading.keys() | self.running.keys() | self.kept.keys()
        for row in range(self.num_rows):
            if row not in used:
                return row
        others = [row for row in self.kept if row != match.row]
        return next(iter(others or self.kept))

    def _longest_match(self, request: R) -> _Match:
        best = _Match(None, 0, 0)
        if not request.shares:
            return best
        most = len(request.prompt) - 1  # the last one has to be read: its logits are needed
        for row, tokens, num_read in self._held(request.owner):
            # One token less than they share: some drafters know a token by the one behind it.
            shared = min(_num_shared(request.prompt, tokens) - 1, most)
            count = min(shared, num_read)
            if self.can_give is not None:
                count = self.can_give(row, count)
            hoped = shared if num_read < shared else count
            best = best._replace(hoped=max(best.hoped, hoped))
            if count > best.num_shared:
                best = best._replace(row=row, num_shared=count)
        return best

    def _held(self, owner: str) -> Iterable[tuple[int, Sequence[int], int]]:
        """By row of this owner: its tokens, and how many of them were read."""
        if not self.keeps:
            return
        for row, own in self.reading.items():
            if own.request.owner == owner:
                yield row, own.request.prompt, own.num_read
        for row, request in self.running.items():
            if request.owner == owner:
                yield row, request.history, len(request.history) - 1
        for row, kept in self.kept.items():
            if kept.owner == owner:
                yield row, kept.tokens, len(kept.tokens)

    # ---- reading and running ---------------------------------------------------------------------

    def parts(self) -> list[Part]:
        """What is read next of all prompts: `chunk` tokens in all, a few times more where that is
        timed and nobody runs meanwhile.

        Half of them are the oldest prompt's, so that it comes to its end; the others are the
        shortest prompts', so that these need not wait for long ones.
        """
        if not self.reading:
            return []
        oldest = next(iter(self.reading))
        is_hurried = self.pause is None or bool(self.running)
        most = self.chunk if is_hurried else max(_ALONE * self.chunk, _LONGEST)
        first_share = max(most // 2, 1)
        counts = {oldest: min(self.reading[oldest].num_left, first_share)}
        left = most - counts[oldest]
        by_length = sorted(self.reading, key=lambda row: self.reading[row].num_left)
        for row in [*by_length, oldest]:
            given = counts.get(row, 0)
            more = min(self.reading[row].num_left - given, left)
            counts[row] = given + more
            left -= more

        parts = []
        for row, count in counts.items():
            if count > 0:
                start = self.reading[row].num_read
                parts.append(Part(row, start, start + count))
        return parts

    def resumed(self, row: int, count: int) -> None:
        """The row that was placed begins with so many tokens of another."""
        self.reading[row].num_read = count

    def read(self, part: Part) -> bool:
        """This part of a prompt was read; whether it was the last one, and the row runs."""
        own = self.reading[part.row]
        own.num_read = part.end
        if own.num_left > 0:
            return False
        del self.reading[part.row]
        self.running[part.row] = own.request
        return True

    def took(self, count: int, seconds: float) -> None:
        """So many tokens of prompts were read in so many seconds: behind a long text it takes more.

        `chunk` follows: at once where it takes too long, in steps where there is time left.
        """
        if self.pause is None or count > self.chunk:
            return
        if seconds > self.pause:
            fits = int(count * self.pause / seconds)
            self.chunk = max(fits // _STEP * _STEP, _STEP)
        elif count == self.chunk and seconds < _QUICK * self.pause:
            more = self.chunk // 2 // _STEP * _STEP + _STEP
            self.chunk = min(self.chunk + more, _LONGEST)

    # ---- leaving ---------------------------------------------------------------------------------

    def row_of(self, index: int) -> int | None:
        """The row of the request with this number, if it has one."""
        for row, request in self.requests().items():
            if request.index == index:
                return row
        return None

    def withdraw(self, index: int) -> None:
        """Forget the waiting request with this number, if there is one."""
        self.waiting = deque(request for request in self.waiting if request.index != index)

    def finish(self, row: int, tokens: list[int]) -> None:
        """The row's request has ended. tokens: what the row holds, if it shall be kept."""
        request = self.requests()[row]
        self.reading.pop(row, None)
        self.running.pop(row, None)
        if self.keeps and tokens:
            self.kept[row] = _Kept(tokens, request.owner)

    def crowded_out(self) -> list[int]:
        """The kept rows whose room is needed, which are kept no longer: the oldest ones."""
        rows = []
        while self._is_crowded() and self.kept:
            row, _ = self.kept.popitem(last=False)
            rows.append(row)
        return rows

    def _is_crowded(self) -> bool:
        if self.max_tokens is None:
            return False
        return self.num_promised + self.num_kept > self.max_tokens


def _num_shared(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two texts begin with alike.

    By halves, as slices are compared quickly.
    """
    low = 0
    high = min(len(left), len(right))
    if left[:high] == right[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle
    return low
