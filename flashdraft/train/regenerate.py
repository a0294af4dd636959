"""Stage 2: the target's own answers to the prompts. A drafter must learn what the target writes, not what others wrote."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import track

from flashdraft.engine import check
from flashdraft.errors import ContextLengthError
from flashdraft.generate import Model
from flashdraft.train.features import SHARD, Recorder, Sample, ShardWriter, as_sample, encode, shard_key, wanted_layers
from flashdraft.train.prompts import read_jsonl
from flashdraft.types import Chunk, SamplingParams

__all__ = ["regenerate"]

_WINDOW = 1024  # prompts handed to the engine at a time


def regenerate(
    model: Model,
    prompts: Path,
    out: Path,
    *,
    params: SamplingParams,
    limit: int | None = None,
    shards: ShardWriter | None = None,
    quiet: bool = False,
) -> int:
    """Append {source, row, prompt, response, finish, num_tokens, tokens} for prompts that `out` lacks; returns how many.

    Every line is written as its answer ends; run it again to go on. A prompt beyond the context is left out. Sampled
    answers are seeded by params.seed and the prompt's number. With `shards`, what the target saw while it wrote is kept
    there, under the names that `flashdraft features` gives, which then makes only what is missing.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    _drop_torn_line(out)
    done = {(row["source"], row["row"]) for row in read_jsonl(out, ("source", "row"))} if out.exists() else set()
    numbered = [row | {"number": n} for n, row in enumerate(read_jsonl(prompts, ("source", "row", "prompt")))][:limit]
    missing = [row for row in numbered if (row["source"], row["row"]) not in done]
    keep = _Keeper(model, shards, len(done)) if shards else None
    lm = Model(model.target, model.tokenizer, keep.new, eos=model.eos, max_rows=model.max_rows) if keep else model
    count = 0
    with out.open("a", encoding="utf-8") as file:
        windows = [missing[i : i + _WINDOW] for i in range(0, len(missing), _WINDOW)]
        for window in track(windows, description="regenerate", disable=quiet):
            rows = [row for row in window if _fits(model, row, params)]
            each = [replace(params, seed=params.seed + row["number"]) for row in rows]
            for chunk in lm.stream([row["prompt"] for row in rows], each):
                if chunk.result is not None:
                    line = _line(rows[chunk.index], chunk)
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    file.flush()
                    count += 1
                    if keep:
                        keep.take(line)
    return count


class _Keeper:
    """Groups finished answers into the shards that `flashdraft features` would cut the file into."""

    def __init__(self, model: Model, shards: ShardWriter, num_done: int) -> None:
        self.model, self.shards = model, shards
        self.skip = -num_done % SHARD  # the rest of a shard that an earlier run began
        self.lines: list[dict[str, Any]] = []
        self.samples: list[Sample] = []

    def new(self) -> Recorder:
        self.recorder = Recorder(wanted_layers(self.model, self.shards.layers, self.shards.final))
        return self.recorder

    def take(self, line: dict[str, Any]) -> None:
        tokens, num_prompt = encode(self.model, line)
        features = self.recorder.finished.pop(tuple(tokens))
        if self.skip:
            self.skip -= 1
            return
        self.lines.append(line)
        self.samples.append(as_sample(tokens, features, num_prompt, self.model.target.hidden_size * self.shards.final))
        if len(self.lines) == SHARD:
            self.shards.add(shard_key(self.lines), self.samples, place="unused")
            self.lines, self.samples = [], []


def _line(row: dict[str, Any], chunk: Chunk) -> dict[str, Any]:
    result = chunk.result
    assert result is not None
    answer = {"response": result.text, "finish": result.finish_reason, "num_tokens": len(result.tokens)}
    return {"source": row["source"], "row": row["row"], "prompt": row["prompt"], **answer, "tokens": list(result.tokens)}


def _fits(model: Model, row: dict[str, Any], params: SamplingParams) -> bool:
    try:
        check(model.target, model.request(row["prompt"], params))
    except ContextLengthError:
        return False
    return True


def _drop_torn_line(path: Path) -> None:
    """A kill may leave half a line at the end; the answers before it are whole."""
    if path.exists():
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)  # in place: a kill here loses no answer
