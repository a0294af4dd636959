"""Stage 2: the target's own answers to the prompts.

A drafter must learn what the target writes, not what others wrote. The target runs here, or behind
a server's API; what it answered is written line by line (train/answers.py). Does not know drafters.
"""

import os
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import NamedTuple

import requests
import torch
from rich.progress import track
from torch import Tensor
from urllib3.util import Retry

from flashdraft.engine import Request, check
from flashdraft.errors import DataError, FlashDraftError, InvalidParameter, InvalidPrompt
from flashdraft.feed import feed
from flashdraft.files import parse_json
from flashdraft.generate import Model
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.train.answers import AnswerFile, open_answers, question, sampling_facts
from flashdraft.train.facts import named_target, target_facts
from flashdraft.train.features import SHARD, Sample, ShardWriter, encode, shard_key
from flashdraft.train.questions import as_prompt
from flashdraft.train.rows import LeftOut, Row, is_whole, placed_rows
from flashdraft.types import COUNTS, Allowed, Rows, SamplingParams, check_option, require

__all__ = ["Later", "Server", "mixed", "regenerate"]

_KEPT = ("source", "row", "prompt", "thinking")  # fields of a prompt that go into its answer's line
_AGAIN = Retry(
    3,
    allowed_methods=None,
    status_forcelist=[429, *range(500, 600)],
    backoff_factor=2.0,
    raise_on_status=False,
)
_TIMEOUT = 1800.0  # seconds for one answer of a server
# parameters that the API of a server does not have
_OURS = (
    "top_k",
    "min_p",
    "ignore_eos",
    "repetition_penalty",
    "logit_bias",
    "logits_processor",
    "logprobs",
)
_REFUSED = (400, 413, 422)  # this prompt; the next one may be answered
# why an answer ended whose text is not the target's, or not whole
_NO_TEXT = ("content_filter", "tool_calls", "function_call")

Law = Callable[[int], SamplingParams]  # how prompt number n is answered


class Answered(NamedTuple):
    row: Row  # the prompt
    answer: Row | InvalidPrompt  # the answer's fields, or why there is none


@dataclass(frozen=True)
class Later:
    """A target that is loaded once everything was refused that can be refused without it.

    `load` gives it with its shards, if any are kept.
    """

    name: str
    load: Callable[[], "tuple[Model, ShardWriter | None]"]


def regenerate(
    model: "Model | Later | Server",
    prompts: Path,
    out: Path,
    *,
    params: SamplingParams | Law,
    limit: int | None = None,
    shards: ShardWriter | None = None,
    quiet: bool = False,
) -> int:
    """Append an answer for every prompt that `out` lacks; returns how many.

    A line is {source, row, prompt, response, finish, num_tokens, tokens}, and is written as its
    answer ends; run it again to go on. What `out` holds must be answers to these prompts by this
    target, made alike: see train/answers.py. A prompt that cannot be answered (beyond the context,
    refused by the chat template or the server, not readable) is left out; how many, and which
    first, is told on standard error. Sampled answers are seeded by params.seed and the prompt's
    number, or `params` says how prompt number n is answered. A prompt's `thinking` is passed to the
    chat template and kept. With `shards`, what the target saw while it wrote is kept there, under
    the names that `flashdraft features` gives, which then makes only what is missing. A Server
    gives no tokens.
    """
    if shards and isinstance(model, Server):
        raise InvalidParameter("a server shows no features to keep", hint="leave out `shards`")

    law = params if callable(params) else mixed(params)
    left_out = LeftOut("prompt")
    asked = _read(prompts, left_out)
    with open_answers(out, prompts) as held:
        held.check_prompts(asked)
        facts: Row = {"sampling": law.facts} if isinstance(law, _Mixed) else {}
        if isinstance(model, Later):
            held.check_facts(facts | {"target": named_target(model.name)})
            model, shards = model.load()
        facts |= _target_of(model)
        held.check_facts(facts)
        if isinstance(model, Model):
            held.check_vocabulary(model.target.vocab_size)
        held.begin(facts | {"prompts": str(prompts)})

        keep = _Keeper(shards, len(held.answers)) if shards else None
        answered = held.answered
        missing = [row for row in asked[:limit] if question(row) not in answered]
        answers = _answers(model, missing, law, keep)
        shown = track(answers, total=len(missing), description="regenerate", disable=quiet)
        count = _write(shown, held, keep, left_out)

        if left_out.count and not count and not held.answers:
            hint = left_out.hint if left_out.hint else "mend these prompts"
            raise DataError(f"no prompt could be answered: {left_out}", hint=hint)
    left_out.tell()
    return count


def _read(prompts: Path, left_out: LeftOut) -> list[Row]:
    """The prompts with their numbers and places.

    A line that asks nothing is left out, and has a number all the same: seeds hang on the numbers.
    """
    rows: list[Row] = []
    for place, row in placed_rows(prompts, ("row", "prompt"), left_out):
        number = len(rows) + left_out.count
        if "task" in row:  # as `flashdraft tasks` writes them
            row = {"source": row["task"], **row}
        try:
            _check_fields(row)
            prompt = as_prompt(row)
        except ValueError as error:
            left_out.add(place, error)
            continue
        rows.append(row | {"prompt": prompt, "number": number, "place": place})

    if not rows:
        why = f": {left_out}" if left_out.count else ""
        raise DataError(f"`{prompts}` holds no prompts{why}", hint="run `flashdraft prompts` first")
    return rows


def _check_fields(row: Row) -> None:
    """Raises ValueError for a prompt whose place or thinking cannot be used."""
    if "source" not in row:
        raise ValueError("no field `source`")
    if not isinstance(row.get("thinking", False), bool):
        raise ValueError(f"`thinking` is {row['thinking']!r}, not true or false")
    if not is_whole(f"{row['source']}{row['row']}"):
        raise ValueError("`source` or `row` holds half a character (a lone surrogate)")


def _target_of(model: "Model | Server") -> Row:
    """What made the answers, besides the sampling."""
    if isinstance(model, Server):
        return {"target": {"name": model.model, "id": None}}
    return target_facts(model)


def _answers(
    model: "Model | Server", rows: Sequence[Row], law: Law, keep: "_Keeper | None"
) -> Iterator[Answered]:
    """Of these prompts, in the order in which they end."""
    if isinstance(model, Server):
        return model.answers(rows, law)
    return _decoded(model, rows, law, keep)


def _write(
    answers: Iterable[Answered], held: AnswerFile, keep: "_Keeper | None", left_out: LeftOut
) -> int:
    """Write every answer as it comes; returns how many."""
    count = 0
    for row, answer in answers:
        if isinstance(answer, InvalidPrompt):
            left_out.add(row["place"], answer)
            continue
        line = {key: row[key] for key in _KEPT if key in row}
        line |= answer
        held.append(line)
        count += 1
        if keep:
            keep.take(line)
    return count


# --- how a prompt is answered ---------------------------------------------------------------------


def mixed(params: SamplingParams, greedy_share: float = 0.0) -> Law:
    """Seeded by params.seed and the prompt's number.

    This share of the prompts is answered greedily.
    """
    check_option("greedy_share", greedy_share, float, Allowed(0, 1))
    if greedy_share and not params.temperature:
        raise InvalidParameter(
            f"greedy_share is {greedy_share}, but all is greedy at temperature 0",
            hint="set temperature",
        )
    return _Mixed(params, greedy_share)


@dataclass(frozen=True)
class _Mixed:
    params: SamplingParams
    greedy_share: float

    def __call__(self, number: int) -> SamplingParams:
        own = self.params.numbered(number)
        coin = random.Random(f"{self.params.seed} {number}").random()
        is_greedy = coin < self.greedy_share
        return replace(own, temperature=0.0) if is_greedy else own

    @property
    def facts(self) -> Row:
        return sampling_facts(self.params, self.greedy_share)


# --- answered here --------------------------------------------------------------------------------


def _decoded(
    model: Model, rows: Sequence[Row], law: Law, keep: "_Keeper | None"
) -> Iterator[Answered]:
    """Answers as they end, and prompts that cannot be answered."""
    refused: deque[Answered] = deque()
    by_number = {row["number"]: row for row in rows}

    def requests() -> Iterator[Request]:
        for row in rows:
            try:
                tokens = model.encode(row["prompt"], thinking=row.get("thinking"))
                request = model.request(tokens, law(row["number"]), index=row["number"])
                check(model.target, request)
            except InvalidPrompt as error:
                refused.append(Answered(row, error))
                continue
            yield request

    lm = replace(model, new_drafter=lambda: keep, keeps=False) if keep else model
    for chunk in feed(lm, requests()):
        while refused:
            yield refused.popleft()
        if chunk.error is not None:
            raise chunk.error
        result = chunk.result
        if result is None:
            continue
        answer: Row = {
            "response": result.text,
            "finish": result.finish_reason,
            "num_tokens": len(result.tokens),
            "tokens": list(result.tokens),
        }
        yield Answered(by_number[chunk.index], answer)
    yield from refused


class _Kept(NamedTuple):
    line: Row  # the answer's, as it was written
    sample: Sample


class _Keeper(Autoregressive):
    """Plain decoding that keeps what the target sees.

    It goes into the shards that `flashdraft features` would cut the file into.
    """

    def __init__(self, shards: ShardWriter, num_done: int) -> None:
        self.shards = shards
        self.layers = shards.wanted
        self.skip = -num_done % SHARD  # the rest of a shard that an earlier run began
        self.seen: dict[int, list[Tensor]] = {}  # by slot
        # prompt and answer -> features of all that was read
        self.finished: dict[tuple[int, ...], Tensor] = {}
        self.kept: list[_Kept] = []

    def observe(
        self, rows: Rows, tokens: Sequence[Tensor], features: Sequence[Tensor] | None
    ) -> None:
        assert features is not None
        for slot, new in zip(rows.slots, features, strict=True):
            self.seen.setdefault(slot, []).append(new.to(torch.bfloat16, copy=True))

    def resume(self, source: int, slot: int, count: int) -> int:
        return 0  # every token of a sample has to be seen

    def end(self, rows: Rows) -> None:
        for slot, history in zip(rows.slots, rows.histories, strict=True):
            self.finished[tuple(history)] = torch.cat(self.seen.pop(slot))

    def take(self, line: Row) -> None:
        """Keep the sample of an answer that was written, and write a shard that is full."""
        tokens, num_prompt = encode(self.shards.model, line)
        features = self.finished.pop(tuple(tokens), None)
        if self.skip:
            self.skip -= 1
            return

        if features is None:  # the same prompt and answer ended in the same step
            sample = self.shards.read(line)
        else:
            sample = self.shards.sample(tokens, features, num_prompt)
        self.kept.append(_Kept(line, sample))
        if len(self.kept) == SHARD:
            self._write()

    def _write(self) -> None:
        key = shard_key([kept.line for kept in self.kept])
        samples = [kept.sample for kept in self.kept]
        self.shards.add(key, samples, place="unused")
        self.kept = []


# --- answered by a server -------------------------------------------------------------------------

# an answer, or an error that ends the run; None: a thread has nothing left to do
Ended = SimpleQueue[Answered | BaseException | None]


@dataclass(frozen=True)
class Server:
    """A target behind an OpenAI-compatible API.

    The key, if it wants one, is in the environment's OPENAI_API_KEY.
    """

    url: str  # up to /v1
    model: str
    max_rows: int  # requests at a time

    def __post_init__(self) -> None:
        is_url = self.url.startswith(("http://", "https://"))
        require(is_url, "url", self.url, "like http://host:port/v1")
        check_option("max_rows", self.max_rows, int, COUNTS)

    @cached_property
    def session(self) -> requests.Session:
        session = requests.Session()
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if key:
            session.headers["Authorization"] = f"Bearer {key}"
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=self.max_rows, max_retries=_AGAIN)
        session.mount(self.url, adapter)
        return session

    def answers(self, rows: Sequence[Row], law: Law) -> Iterator[Answered]:
        """Answers as they end. After an error nothing new is sent, and it is raised last.

        Ctrl-C waits for no request that is under way: the threads that wait for their answers do
        not keep the process alive.
        """
        waiting = deque(rows)
        ended: Ended = SimpleQueue()

        def ask_on() -> None:
            while True:
                try:
                    row = waiting.popleft()
                except IndexError:
                    ended.put(None)
                    return
                try:
                    ended.put(Answered(row, self._ask(row, law(row["number"]))))
                except InvalidPrompt as error:
                    ended.put(Answered(row, error))
                except BaseException as error:  # raised below, where somebody hears it
                    waiting.clear()
                    ended.put(error)

        num_threads = min(self.max_rows, len(rows))
        for _ in range(num_threads):
            Thread(target=ask_on, daemon=True).start()
        try:
            yield from _received(ended, num_threads)
        finally:  # also after Ctrl-C, and where nobody reads on
            waiting.clear()

    def _ask(self, row: Row, params: SamplingParams) -> Row:
        """The answer's fields; of a row with `tokens`, what comes behind these.

        Raises InvalidPrompt for a prompt that the server refuses or has no text for.
        """
        is_raw = "tokens" in row
        body = self._body(row, params)
        path = "completions" if is_raw else "chat/completions"
        endpoint = f"{self.url.rstrip('/')}/{path}"
        try:
            got = self.session.post(endpoint, json=body, timeout=_TIMEOUT)
        except requests.RequestException as error:
            raise self._error(row["place"], str(error)) from None

        if got.status_code in _REFUSED:
            refused = f"the server refuses it: {got.status_code} {got.text}"
            raise InvalidPrompt(refused, hint="see what the server says of it")
        if got.status_code != 200:
            raise self._error(row["place"], f"{got.status_code} {got.text}")
        try:
            reply = parse_json(got.content)
            return _raw_fields_of(reply) if is_raw else _fields_of(reply)
        except InvalidPrompt:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            kind = "completion" if is_raw else "chat completion"
            raise self._error(row["place"], f"not a {kind} ({error!r})") from None

    def _body(self, row: Row, params: SamplingParams) -> Row:
        """The request. Raises InvalidParameter for what the API cannot say."""
        default = SamplingParams()
        for name in _OURS:
            if getattr(params, name) != getattr(default, name):
                raise InvalidParameter(
                    f"{name} is set, but the API of a server has none", hint="leave it out"
                )

        body: Row = {
            "model": self.model,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": params.seed,
        }
        if params.presence_penalty:
            body["presence_penalty"] = params.presence_penalty
        if params.frequency_penalty:
            body["frequency_penalty"] = params.frequency_penalty
        body["max_tokens"] = params.max_new_tokens
        if params.stop:
            body["stop"] = params.stop
        if "thinking" in row:
            body["chat_template_kwargs"] = {"enable_thinking": row["thinking"]}
        if "tokens" in row:
            body["prompt"] = row["tokens"]
            if "stop_token_ids" in row:  # of vLLM and SGLang
                body["stop_token_ids"] = row["stop_token_ids"]
            return body

        prompt = row["prompt"]
        is_text = isinstance(prompt, str)
        body["messages"] = [{"role": "user", "content": prompt}] if is_text else prompt
        return body

    def _error(self, place: str, cause: str) -> FlashDraftError:
        one_line = " ".join(cause.split())
        return FlashDraftError(
            f"`{self.url}` gave no answer to {place}: {one_line:.300}",
            hint=f"see that it serves `{self.model}`, "
            "set OPENAI_API_KEY if it wants one, run again",
        )


def _raw_fields_of(reply: Row) -> Row:
    """The fields of what was written behind raw tokens. Errors as in `_fields_of`."""
    choice: Row = reply["choices"][0]
    text: str = choice["text"]
    if not is_whole(text):
        raise InvalidPrompt("the server's text holds half a character (a lone surrogate)")
    return {"response": text, "finish": choice["finish_reason"]}


def _fields_of(reply: Row) -> Row:
    """The fields of the answer in a chat completion.

    Raises InvalidPrompt where it has no text; an AttributeError, IndexError, KeyError, TypeError or
    ValueError where it is no chat completion of a plain answer.
    """
    choice: Row = reply["choices"][0]
    message: Row = choice["message"]
    finish = choice["finish_reason"]
    if message.get("reasoning_content") or message.get("reasoning"):
        raise ValueError(
            "thoughts stand apart from the answer; start the server without a reasoning parser"
        )
    if message["content"] is None or finish in _NO_TEXT:
        raise InvalidPrompt(
            f"the server has no text for it: finish_reason {finish!r}",
            hint="a drafter learns from texts: leave out tools and filters",
        )
    if not is_whole(message["content"]):
        raise InvalidPrompt("the server's answer holds half a character (a lone surrogate)")

    usage = reply.get("usage")
    num_tokens = usage.get("completion_tokens") if usage else None
    fields: Row = {"response": message["content"], "finish": finish, "num_tokens": num_tokens}
    stop_reason = choice.get("stop_reason", choice.get("matched_stop"))  # of vLLM, of SGLang
    if isinstance(stop_reason, str):  # the stop string that ended it
        fields["stop_reason"] = stop_reason
    return fields


def _received(ended: Ended, num_threads: int) -> Iterator[Answered]:
    """What threads put into a queue until all have ended. The first error is raised last.

    After Ctrl-C, what has arrived already.
    """
    errors: list[BaseException] = []
    while num_threads:
        try:
            one = ended.get()
        except KeyboardInterrupt as error:
            errors.insert(0, error)
            yield from _arrived(ended)
            break
        if one is None:
            num_threads -= 1
        elif isinstance(one, BaseException):
            errors.append(one)
        else:
            yield one
    if errors:
        raise errors[0]


def _arrived(ended: Ended) -> Iterator[Answered]:
    """The answers that are in the queue now."""
    while not ended.empty():
        one = ended.get()
        if isinstance(one, Answered):
            yield one
