"""Stage 2: the target's own answers to the prompts. A drafter must learn what the target writes, not what others wrote."""

import os
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import requests
import torch
from rich.progress import track
from torch import Tensor
from urllib3.util import Retry

from flashdraft.engine import check
from flashdraft.errors import DataError, FlashDraftError, InvalidParameter, InvalidPrompt
from flashdraft.files import parse_json
from flashdraft.generate import Model
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.train.answers import open_answers, question, sampling_facts
from flashdraft.train.facts import named_target, target_facts
from flashdraft.train.features import SHARD, Sample, ShardWriter, encode, shard_key
from flashdraft.train.questions import as_prompt
from flashdraft.train.rows import LeftOut, is_whole, placed_rows
from flashdraft.types import COUNTS, Allowed, Rows, SamplingParams, check_option, require

__all__ = ["Later", "Server", "mixed", "regenerate"]

_WINDOW = 1024  # prompts handed to the engine at a time
_AGAIN = Retry(
    3,
    allowed_methods=None,
    status_forcelist=[429, *range(500, 600)],
    backoff_factor=2.0,
    raise_on_status=False,
)
_TIMEOUT = 1800.0  # seconds for one answer of a server
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
_NO_TEXT = (
    "content_filter",
    "tool_calls",
    "function_call",
)  # why an answer ended whose text is not the target's, or not whole

Row = dict[str, Any]
Answer = Row | InvalidPrompt  # its fields, or why there is none
Law = Callable[[int], SamplingParams]  # how prompt number n is answered


@dataclass(frozen=True)
class Later:
    """A target that is loaded once everything was refused that can be refused without it, and its shards, if any are kept."""

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
    """Append {source, row, prompt, response, finish, num_tokens, tokens} for prompts that `out` lacks; returns how many.

    Every line is written as its answer ends; run it again to go on. What `out` holds must be answers to these prompts by this
    target, made alike: see train/answers.py. A prompt that cannot be answered (beyond the context, refused by the chat template
    or the server, not readable) is left out; how many, and which first, is told on standard error. Sampled
    answers are seeded by params.seed and the prompt's number, or `params` says how prompt number n is answered. A prompt's
    `thinking` is passed to the chat template and kept. With `shards`, what the target saw while it wrote is kept there,
    under the names that `flashdraft features` gives, which then makes only what is missing. A Server gives no tokens.
    """
    if shards and isinstance(model, Server):
        raise InvalidParameter("a server shows no features to keep", hint="leave out `shards`")
    law = params if callable(params) else mixed(params)
    left_out = LeftOut("prompt")
    numbered = _read(prompts, left_out)
    with open_answers(out, prompts) as held:
        held.check_prompts(numbered)
        facts = {"sampling": law.facts} if isinstance(law, _Mixed) else {}
        if isinstance(model, Later):
            held.check_facts(facts | {"target": named_target(model.name)})
            model, shards = model.load()
        facts |= (
            {"target": {"name": model.model, "id": None}}
            if isinstance(model, Server)
            else target_facts(model)
        )
        held.check_facts(facts)
        if isinstance(model, Model):
            held.check_vocabulary(model.target.vocab_size)
        held.begin(facts | {"prompts": str(prompts)})

        answered = held.answered
        missing = [row for row in numbered[:limit] if question(row) not in answered]
        keep = _Keeper(shards, len(held.answers)) if shards else None
        windows = [missing[i : i + _WINDOW] for i in range(0, len(missing), _WINDOW)]
        count = 0
        for window in track(windows, description="regenerate", disable=quiet):
            for row, answer in (
                model.answers(window, law)
                if isinstance(model, Server)
                else _decoded(model, window, law, keep)
            ):
                if isinstance(answer, InvalidPrompt):
                    left_out.add(row["place"], answer)
                    continue
                line = {
                    key: row[key] for key in ("source", "row", "prompt", "thinking") if key in row
                } | answer
                held.append(line)
                count += 1
                if keep:
                    keep.take(line)
        if left_out.count and not (count or held.answers):
            raise DataError(
                f"no prompt could be answered: {left_out}",
                hint=left_out.hint or "mend these prompts",
            )
    left_out.tell()
    return count


def mixed(params: SamplingParams, greedy_share: float = 0.0) -> Law:
    """Seeded by params.seed and the prompt's number; this share of the prompts is answered greedily."""
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
        params, greedy = (
            self.params,
            random.Random(f"{self.params.seed} {number}").random() < self.greedy_share,
        )
        own = params.numbered(number)
        return replace(own, temperature=0.0) if greedy else own

    @property
    def facts(self) -> Row:
        return sampling_facts(self.params, self.greedy_share)


@dataclass(frozen=True)
class Server:
    """A target behind an OpenAI-compatible API; the key, if it wants one, is in the environment's OPENAI_API_KEY."""

    url: str  # up to /v1
    model: str
    max_rows: int  # requests at a time

    def __post_init__(self) -> None:
        require(
            self.url.startswith(("http://", "https://")),
            "url",
            self.url,
            "like http://host:port/v1",
        )
        check_option("max_rows", self.max_rows, int, COUNTS)

    @cached_property
    def session(self) -> requests.Session:
        session, key = requests.Session(), os.environ.get("OPENAI_API_KEY", "").strip()
        session.headers.update({"Authorization": f"Bearer {key}"} if key else {})
        session.mount(
            self.url, requests.adapters.HTTPAdapter(pool_maxsize=self.max_rows, max_retries=_AGAIN)
        )
        return session

    def answers(self, rows: Sequence[Row], law: Law) -> Iterator[tuple[Row, Answer]]:
        """Rows and the fields of their answers as they end. After an error nothing new is sent, and it is raised last.

        Ctrl-C waits for no request that is under way: the threads that wait for their answers do not keep the process alive.
        """
        waiting = deque(rows)
        ended: SimpleQueue[tuple[Row, Answer] | BaseException | None] = (
            SimpleQueue()
        )  # None: a thread has nothing left to do

        def ask_on() -> None:
            while True:
                try:
                    row = waiting.popleft()
                except IndexError:
                    ended.put(None)
                    return
                try:
                    ended.put((row, self._ask(row, law(row["number"]))))
                except InvalidPrompt as error:
                    ended.put((row, error))
                except BaseException as error:  # raised below, where somebody hears it
                    waiting.clear()
                    ended.put(error)

        threads = [Thread(target=ask_on, daemon=True) for _ in range(min(self.max_rows, len(rows)))]
        for thread in threads:
            thread.start()
        try:
            yield from _received(ended, len(threads))
        finally:  # also after Ctrl-C, and where nobody reads on
            waiting.clear()

    def _ask(self, row: Row, params: SamplingParams) -> Row:
        """The answer's fields. Raises InvalidPrompt for a prompt that the server refuses or has no text for."""
        if unknown := [
            name for name in _OURS if getattr(params, name) != getattr(SamplingParams(), name)
        ]:
            raise InvalidParameter(
                f"{unknown[0]} is set, but the API of a server has none", hint="leave it out"
            )
        prompt = row["prompt"]
        body: Row = {
            "model": self.model,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": params.seed,
        }
        body |= {
            name: value
            for name in ("presence_penalty", "frequency_penalty")
            if (value := getattr(params, name))
        }
        body |= {"max_tokens": params.max_new_tokens} | (
            {"stop": params.stop} if params.stop else {}
        )
        body |= (
            {"chat_template_kwargs": {"enable_thinking": row["thinking"]}}
            if "thinking" in row
            else {}
        )
        body |= {
            "messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        }
        try:
            got = self.session.post(
                f"{self.url.rstrip('/')}/chat/completions", json=body, timeout=_TIMEOUT
            )
        except requests.RequestException as error:
            raise self._error(row["place"], str(error)) from None
        if got.status_code in _REFUSED:
            raise InvalidPrompt(
                f"the server refuses it: {got.status_code} {got.text}",
                hint="see what the server says of it",
            )
        if got.status_code != 200:
            raise self._error(row["place"], f"{got.status_code} {got.text}")
        try:
            reply = parse_json(got.content)
            message, finish = reply["choices"][0]["message"], reply["choices"][0]["finish_reason"]
            if message.get("reasoning_content") or message.get("reasoning"):
                raise ValueError(
                    "thoughts stand apart from the answer; start the server without a reasoning parser"
                )
            if message["content"] is None or finish in _NO_TEXT:
                got_none = f"the server has no text for it: finish_reason {finish!r}"
                raise InvalidPrompt(
                    got_none, hint="a drafter learns from texts: leave out tools and filters"
                )
            if not is_whole(message["content"]):
                raise InvalidPrompt("the server's answer holds half a character (a lone surrogate)")
            num_tokens = (reply.get("usage") or {}).get("completion_tokens")
            told = _stop_reason(reply["choices"][0])
            return {
                "response": message["content"],
                "finish": finish,
                "num_tokens": num_tokens,
            } | told
        except InvalidPrompt:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise self._error(row["place"], f"not a chat completion ({error!r})") from None

    def _error(self, place: str, cause: str) -> FlashDraftError:
        message = f"`{self.url}` gave no answer to {place}: {' '.join(cause.split()):.300}"
        return FlashDraftError(
            message,
            hint=f"see that it serves `{self.model}`, set OPENAI_API_KEY if it wants one, run again",
        )


def _received(ended: "SimpleQueue[Any]", num_threads: int) -> Iterator[tuple[Row, Answer]]:
    """What threads put into a queue until all have ended; after Ctrl-C what has arrived already. The first error comes last."""
    errors: list[BaseException] = []
    while num_threads:
        try:
            one = ended.get()
        except KeyboardInterrupt as error:
            errors.insert(0, error)
            while not ended.empty():
                arrived = ended.get()
                if isinstance(arrived, tuple):
                    yield arrived
            break
        if one is None:
            num_threads -= 1
        elif isinstance(one, BaseException):
            errors.append(one)
        else:
            yield one
    if errors:
        raise errors[0]


def _stop_reason(choice: Row) -> Row:
    """The stop string that ended an answer, where the server tells it, as vLLM and SGLang do."""
    told = choice.get("stop_reason", choice.get("matched_stop"))
    return {"stop_reason": told} if isinstance(told, str) else {}


def _read(prompts: Path, left_out: LeftOut) -> list[Row]:
    """The prompts with their numbers and places. A line that asks nothing is left out, and has a number."""
    rows: list[Row] = []
    for place, row in placed_rows(prompts, ("row", "prompt"), left_out):
        number = len(rows) + left_out.count
        if "task" in row:  # as `flashdraft tasks` writes them
            row = {"source": row["task"], **row}
        try:
            if "source" not in row:
                raise ValueError("no field `source`")
            if not isinstance(row.get("thinking", False), bool):
                raise ValueError(f"`thinking` is {row['thinking']!r}, not true or false")
            if not is_whole(f"{row['source']}{row['row']}"):
                raise ValueError("`source` or `row` holds half a character (a lone surrogate)")
            rows.append(row | {"prompt": as_prompt(row), "number": number, "place": place})
        except ValueError as error:
            left_out.add(place, error)
    if not rows:
        why = f": {left_out}" if left_out.count else ""
        raise DataError(f"`{prompts}` holds no prompts{why}", hint="run `flashdraft prompts` first")
    return rows


class _Keeper(Autoregressive):
    """Plain decoding that keeps what the target sees, in the shards that `flashdraft features` would cut the file into."""

    def __init__(self, shards: ShardWriter, num_done: int) -> None:
        self.shards, self.layers = shards, shards.wanted
        self.skip = -num_done % SHARD  # the rest of a shard that an earlier run began
        self.seen: dict[int, list[Tensor]] = {}  # by slot
        self.finished: dict[
            tuple[int, ...], Tensor
        ] = {}  # prompt and answer -> features of all that was read
        self.kept: list[tuple[Row, Sample]] = []

    def observe(
        self, rows: Rows, tokens: Sequence[Tensor], features: Sequence[Tensor] | None
    ) -> None:
        assert features is not None
        for slot, new in zip(rows.slots, features, strict=True):
            self.seen.setdefault(slot, []).append(new.to(torch.bfloat16, copy=True))

    def end(self, rows: Rows) -> None:
        for slot, history in zip(rows.slots, rows.histories, strict=True):
            self.finished[tuple(history)] = torch.cat(self.seen.pop(slot))

    def take(self, line: Row) -> None:
        tokens, num_prompt = encode(self.shards.model, line)
        features = self.finished.pop(tuple(tokens), None)
        if self.skip:
            self.skip -= 1
            return
        sample = None if features is None else self.shards.sample(tokens, features, num_prompt)
        self.kept.append(
            (line, sample or self.shards.read(line))
        )  # none if the same prompt and answer ended in the same step
        if len(self.kept) == SHARD:
            self.shards.add(
                shard_key([row for row, _ in self.kept]),
                [kept for _, kept in self.kept],
                place="unused",
            )
            self.kept = []


def _decoded(
    model: Model, rows: Sequence[Row], law: Law, keep: _Keeper | None
) -> Iterator[tuple[Row, Answer]]:
    """Rows and the fields of their answers, as they end; first those that cannot be answered."""
    lm = replace(model, new_drafter=lambda: keep) if keep else model
    fitting = []
    for row in rows:
        try:
            tokens, params = (
                model.encode(row["prompt"], thinking=row.get("thinking")),
                law(row["number"]),
            )
            check(model.target, model.request(tokens, params))
        except InvalidPrompt as error:
            yield row, error
            continue
        fitting.append((row, tokens, params))
    for chunk in lm.stream(
        [tokens for _, tokens, _ in fitting], [params for *_, params in fitting]
    ):
        if (result := chunk.result) is not None:
            answer: Row = {
                "response": result.text,
                "finish": result.finish_reason,
                "num_tokens": len(result.tokens),
            }
            yield fitting[chunk.index][0], answer | {"tokens": list(result.tokens)}
