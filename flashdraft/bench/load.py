"""A load test of a server: prompts asked by so many streams at a time, drafting off, on and auto in
turn, a line of results for each answer.

A stream asks its next prompt as soon as its last answer has ended. At every number of streams all
modes answer the same prompts, one mode's turn after the other, and take turns at going first: what
a machine does meanwhile hits all of them. Knows prompts, turns and what a line of results holds.
Does not know how a server runs, nor what stands in a table.
"""

import hashlib
import json
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import NamedTuple
from uuid import uuid4

from rich.console import Console
from rich.progress import track

from flashdraft.bench.client import Api, Body, Reply, ServerError
from flashdraft.bench.run import results_file
from flashdraft.bench.tasks import BenchPrompt, read_prompts
from flashdraft.errors import FlashDraftError, InvalidParameter
from flashdraft.files import Json, locked, output_file, say
from flashdraft.process import is_terminal
from flashdraft.provenance import provenance
from flashdraft.types import HIGHEST, check_options, counted_on, option, require

__all__ = ["MODES", "LoadConfig", "run_load"]

MODES = ("off", "on", "auto")
NONE = "none"  # `drafting` of a server that has no such field
MOST_STREAMS = 1024
_WARM_TOKENS = 8

Line = Json  # of the results file


@dataclass(frozen=True)
class LoadConfig:
    """One load test. Raises InvalidParameter for a value outside its range."""

    prompts: Path = field(metadata={"help": "JSON Lines with `prompt` or `turns`, and `task`"})
    out: Path = field(metadata={"help": "results file to write; it must not exist"})
    concurrency: str = option("1,2,4,8,16", "numbers of streams, separated by commas")
    drafting: str = option(
        "off,on,auto", "modes, separated by commas; none: the server has no such field"
    )
    model: str | None = option(None, "the model to ask; may be left out where there is one")
    requests: int | None = option(
        None, "of every mode in a turn; two a stream by default", least=1, most=2**31 - 1
    )
    repeats: int = option(3, "turns of every mode at every level", least=1, most=2**31 - 1)
    max_new_tokens: int = option(64, "tokens per answer, at most", least=1, most=2**31 - 1)
    temperature: float = option(0.0, "0 is greedy", least=0)
    seed: int = option(
        0, "seed of the first prompt; the others count on from it", least=0, most=HIGHEST
    )
    ignore_eos: bool = option(False, "every answer has max_new_tokens; not all servers can")
    reuse: bool = option(
        False,
        "let the prefix cache bring one request's prompt to the next; "
        "else each has a cache_salt of its own, which not all servers can",
    )
    timeout: float = option(600.0, "seconds that a server may be silent", above=0)

    def __post_init__(self) -> None:
        check_options(self)
        levels = self.levels
        modes = self.modes
        are_levels = bool(levels) and all(1 <= level <= MOST_STREAMS for level in levels)
        wanted = f"whole numbers from 1 to {MOST_STREAMS}, separated by commas"
        require(are_levels, "concurrency", self.concurrency, wanted)

        are_modes = modes == (NONE,) or (bool(modes) and set(modes) <= set(MODES))
        wanted = f"some of {', '.join(MODES)}, separated by commas, or {NONE}"
        require(are_modes, "drafting", self.drafting, wanted)

        most = max(levels)
        is_enough = self.requests is None or self.requests >= most
        require(is_enough, "requests", self.requests, f"{most} or more: one for every stream")

    @property
    def levels(self) -> tuple[int, ...]:
        """Numbers of streams, each once; 0 for what is no number."""
        levels = []
        for text in self.concurrency.split(","):
            word = text.strip()
            is_number = word.isascii() and word.isdigit() and len(word) < 10
            levels.append(int(word) if is_number else 0)
        return tuple(dict.fromkeys(levels))

    @property
    def modes(self) -> tuple[str, ...]:
        """Each once."""
        words = [text.strip() for text in self.drafting.split(",")]
        return tuple(dict.fromkeys(words))

    def num_requests(self, level: int) -> int:
        return 2 * level if self.requests is None else self.requests


class _Turn(NamedTuple):
    """What one mode is asked by so many streams at a time."""

    level: int
    mode: str
    repeat: int
    prompts: list[BenchPrompt]


class _Ended(NamedTuple):
    """One request of a turn, answered or refused."""

    prompt: BenchPrompt
    started: float  # seconds since the turn began
    seconds: float
    outcome: Reply | ServerError


def run_load(url: str, config: LoadConfig) -> int:
    """Write the header and one line per request to config.out; returns the number of requests.

    Everything that can be refused is refused before the file appears; it grows turn by turn.
    Raises InvalidParameter, DataError or ServerError. A request that fails once the test runs has
    its line, too, and one message tells how many did.
    """
    prompts = read_prompts(config.prompts)
    _check_new(config.out)
    out = output_file(config.out, inputs=[config.prompts])

    apis = [Api(url, config.timeout) for _ in range(max(config.levels))]
    try:
        model = apis[0].model(config.model)
        _warm_up(config, apis[0], model, prompts[0])
        with locked(out):
            _check_new(out)  # another run may have ended since
            return _measure(config, prompts, out, apis, model)
    finally:
        for api in apis:
            api.close()


def _check_new(path: Path) -> None:
    """Raises InvalidParameter for a file that holds something."""
    if path.is_file() and path.stat().st_size:
        hint = "name another file; results are not overwritten"
        raise InvalidParameter(f"`{path}` exists", hint=hint)


def _measure(
    config: LoadConfig, prompts: list[BenchPrompt], out: Path, apis: list[Api], model: str
) -> int:
    plan = list(_plan(config, prompts))
    header = provenance() | {"kind": "load", "config": asdict(config)}
    header |= {"url": apis[0].url, "model": model}
    header["answers"] = sum(len(turn.prompts) for turn in plan)
    header["prompts_sha256"] = hashlib.sha256(config.prompts.read_bytes()).hexdigest()

    failures: list[ServerError] = []
    console = Console(stderr=True)
    progress = track(plan, "bench", console=console, disable=not is_terminal(sys.stderr))
    with results_file(out) as file:
        file.write(json.dumps({"header": header}, default=str) + "\n")
        for turn in progress:
            for ended in _answers(config, turn, apis, model):
                file.write(json.dumps(_line(turn, ended)) + "\n")
                if isinstance(ended.outcome, ServerError):
                    failures.append(ended.outcome)
            file.flush()

    if failures:
        say(f"{len(failures)} of {header['answers']} requests failed: {failures[0].args[0]}")
    return int(header["answers"])


def _plan(config: LoadConfig, prompts: Sequence[BenchPrompt]) -> Iterator[_Turn]:
    """The turns in order. Every level goes on in the file where the one before has ended.

    A server that keeps prompts has then seen none of them, as long as the file lasts.
    """
    first = 0
    for repeat in range(config.repeats):
        for place, level in enumerate(config.levels):
            count = config.num_requests(level)
            own = []
            for number in range(first, first + count):
                own.append(prompts[number % len(prompts)])
            first += count

            modes = config.modes
            rotation = (repeat + place) % len(modes)
            for mode in modes[rotation:] + modes[:rotation]:
                yield _Turn(level, mode, repeat, own)


def _body(config: LoadConfig, model: str, mode: str, prompt: BenchPrompt) -> Body:
    asked = prompt.asked
    messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    body: Body = {
        "model": model,
        "messages": messages,
        "max_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "seed": counted_on(config.seed, prompt.number),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if config.ignore_eos:
        body["ignore_eos"] = True
    if mode != NONE:
        body["drafting"] = mode
    if not config.reuse:
        body["cache_salt"] = uuid4().hex
    return body


def _warm_up(config: LoadConfig, api: Api, model: str, prompt: BenchPrompt) -> None:
    """Ask for a little in every mode: what the server refuses is known before a file appears.

    Raises ServerError.
    """
    for mode in config.modes:
        body = _body(config, model, mode, prompt)
        body["max_tokens"] = min(_WARM_TOKENS, config.max_new_tokens)
        try:
            api.ask(body)
        except ServerError as error:
            hint = _hint_against(error) or error.hint
            raise ServerError(error.args[0], hint=hint, status=error.status) from None


def _hint_against(error: ServerError) -> str | None:
    """What to leave out where the server has no such field; None: it is something else."""
    if error.status not in (400, 422):
        return None
    ways = {
        "cache_salt": "it has no cache_salt: add --reuse",
        "drafting": f"it has no drafting: add --drafting {NONE}",
        "ignore_eos": "it has no ignore_eos: leave --ignore-eos out",
    }
    for name, way in ways.items():
        if name in str(error.args[0]):
            return way
    return None


# --- one turn -----------------------------------------------------------------------------------


def _answers(config: LoadConfig, turn: _Turn, apis: Sequence[Api], model: str) -> Iterator[_Ended]:
    """Requests as they end. Ctrl-C waits for none: threads do not keep the process alive."""
    waiting = deque(turn.prompts)
    ended: SimpleQueue[_Ended | BaseException] = SimpleQueue()
    began = time.perf_counter()

    def ask_on(api: Api) -> None:
        while True:
            try:
                prompt = waiting.popleft()
            except IndexError:
                return
            body = _body(config, model, turn.mode, prompt)
            started = time.perf_counter()
            outcome = _outcome(api, body)
            seconds = time.perf_counter() - started
            ended.put(_Ended(prompt, started - began, seconds, outcome))

    def ask_on_or_tell(api: Api) -> None:
        try:
            ask_on(api)
        except BaseException as error:  # raised below, where somebody hears it
            ended.put(error)

    for api in apis[: turn.level]:
        Thread(target=ask_on_or_tell, args=[api], daemon=True).start()
    try:
        for _ in turn.prompts:
            one = ended.get()
            if isinstance(one, BaseException):
                raise one
            yield one
    finally:
        waiting.clear()


def _outcome(api: Api, body: Body) -> Reply | ServerError:
    try:
        return api.ask(body)
    except ServerError as error:
        return error


def _line(turn: _Turn, ended: _Ended) -> Line:
    """What a request cost, in the order of the results file.

    `started`: seconds since the turn began; `arrivals`: of every piece of text, since the request
    was sent; `text`: the answer's checksum; `error`: why there is none.
    """
    line: Line = {
        "task": ended.prompt.task,
        "prompt": ended.prompt.number,
        "streams": turn.level,
        "drafting": turn.mode,
        "repeat": turn.repeat,
        "started": round(ended.started, 5),
        "seconds": round(ended.seconds, 5),
    }
    outcome = ended.outcome
    if isinstance(outcome, FlashDraftError):
        return line | {"error": str(outcome.args[0]), "num_tokens": 0, "arrivals": []}

    checksum = hashlib.sha256(outcome.text.encode(errors="replace")).hexdigest()
    line |= {
        "num_prompt_tokens": outcome.num_prompt_tokens,
        "num_cached": outcome.num_cached,
        "num_tokens": outcome.num_tokens,
        "finish": outcome.finish,
        "text": checksum[:16],
        "drafts": outcome.drafts,
        "arrivals": [round(moment, 5) for moment in outcome.arrivals],
    }
    return line | {"error": None}
