"""Stage 3: the target's hidden states for every answer, in 16 bits, as safetensors shards with a manifest.

A shard holds, for sample n: `n.tokens` [tokens] int32 and `n.features` [tokens, F * hidden] bfloat16; the
manifest says where each answer begins. Features of the last token are stored too, although nothing is drafted behind it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flashdraft.checkpoint import write_file, write_tensors
from flashdraft.errors import DataError
from flashdraft.generate import Model
from flashdraft.train.prompts import read_jsonl

__all__ = ["FeatureSet", "Sample", "write_features"]

_SHARD = 64  # answers a shard


@dataclass(frozen=True)
class Sample:
    """One answer with its prompt, as the target read it."""

    tokens: Tensor  # [n] int64
    features: Tensor  # [n, F * hidden]
    num_prompt: int  # tokens before the answer


def write_features(
    model: Model, answers: Sequence[Path], out: Path, *, layers: tuple[int, ...], max_length: int, quiet: bool = False
) -> int:
    """Read every answer once with the target and store what the drafter will see; shards that exist are not made again.

    The set is then these answers, each once; shards of an earlier call that hold others, or the same ones cut in another
    way, are kept as unused. Returns the number of shards.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = [row for path in answers for row in read_jsonl(path, ("prompt", "response"))]
    manifest: dict[str, Any] = {"target": model.target.name, "layers": list(layers), "hidden_size": model.target.hidden_size}
    manifest |= {"max_length": max_length, "shards": {}, "unused": {}}
    known: dict[str, list[int]] = {}
    path = out / "manifest.json"
    if path.exists():
        old = _read_manifest(out)
        if any(old[key] != manifest[key] for key in manifest if key not in ("shards", "unused")):
            raise DataError(f"`{out}` holds features of another kind", hint="name another folder, or remove that one")
        known = old.get("unused", {}) | old["shards"]
        known = {key: starts for key, starts in known.items() if (out / f"{key}.safetensors").exists()}
    parts = {_key(rows[start : start + _SHARD]): rows[start : start + _SHARD] for start in range(0, len(rows), _SHARD)}
    manifest["shards"] = {key: known[key] for key in parts if key in known}
    manifest["unused"] = {key: starts for key, starts in known.items() if key not in parts}
    write_file(path, json.dumps(manifest).encode())
    missing = [key for key in parts if key not in known]
    for key in track(missing, description="features", disable=quiet):
        manifest["shards"][key] = _write_shard(model, parts[key], out / f"{key}.safetensors", layers, max_length)
        write_file(path, json.dumps(manifest).encode())
    return len(manifest["shards"])


def _key(rows: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        if missing := {"target", "layers", "hidden_size", "max_length", "shards"} - set(manifest):
            raise ValueError(f"it lacks {min(missing)}")
    except FileNotFoundError:
        raise DataError(f"`{folder}` holds no manifest.json", hint="run `flashdraft features` first") from None
    except (OSError, ValueError) as error:
        raise DataError(
            f"`{path}` cannot be read: {error}", hint="remove the folder and run `flashdraft features` again"
        ) from None
    return manifest


def encode(model: Model, row: dict[str, Any]) -> tuple[list[int], int]:
    """Tokens of prompt and answer, and how many are the prompt's. An answer without token ids is encoded again."""
    prompt = model.encode(row["prompt"])
    answer = row.get("tokens")
    if answer is None:
        answer = model.tokenizer.encode(row["response"], add_special_tokens=False)
        if row.get("finish") == "stop":
            answer = [*answer, min(model.eos)]
    return [*prompt, *answer], len(prompt)


def _write_shard(model: Model, rows: list[dict[str, Any]], path: Path, layers: tuple[int, ...], max_length: int) -> list[int]:
    tensors: dict[str, Tensor] = {}
    starts = []
    for n, row in enumerate(rows):
        tokens, num_prompt = encode(model, row)
        tokens = tokens[:max_length]
        cache = model.target.new_cache(1, len(tokens))
        _, features = model.target.prefill(cache, 0, torch.tensor(tokens), layers)
        assert features is not None
        tensors[f"{n}.tokens"] = torch.tensor(tokens, dtype=torch.int32)
        tensors[f"{n}.features"] = features.to(torch.bfloat16)
        starts.append(num_prompt)
    write_tensors(path, tensors)
    return starts


class FeatureSet:
    """The samples of a features folder, in an order that a seed and an epoch fix."""

    def __init__(self, folder: Path) -> None:
        manifest = _read_manifest(folder)
        self.folder = folder
        self.layers = tuple(manifest["layers"])
        self.hidden_size = int(manifest["hidden_size"])
        self.target = str(manifest["target"])
        self.index = [(key, n, start) for key, starts in sorted(manifest["shards"].items()) for n, start in enumerate(starts)]
        if not self.index:
            raise DataError(f"`{folder}` holds no samples", hint="run `flashdraft features` on a file with answers")

    def __len__(self) -> int:
        return len(self.index)

    def answer_tokens(self, i: int) -> list[int]:
        tokens: list[int] = self._read(i, "tokens")[self.index[i][2] :].tolist()
        return tokens

    def __getitem__(self, i: int) -> Sample:
        return Sample(self._read(i, "tokens").long(), self._read(i, "features"), self.index[i][2])

    def _read(self, i: int, name: str) -> Tensor:
        key, n, _ = self.index[i]
        path = self.folder / f"{key}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(f"{n}.{name}")
                return tensor
        except (SafetensorError, OSError) as error:
            raise DataError(f"`{path}` cannot be read: {error}", hint="remove it and run `flashdraft features` again") from None
