"""Stage 3: what a drafter reads, the target's hidden states for every answer: stored in 16-bit shards, or computed on the fly.

A shard holds, for sample n: `n.tokens` [tokens] int32 and `n.features` [tokens, F * hidden] bfloat16, of as many tokens as the
target has read (it need not read the last one), and `n.final` [tokens, hidden], the final normed state, if soft labels are to be
made of it; the manifest says where each answer begins, and every shard's checksum.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flashdraft.decoding.ending import ends_itself, turn_end
from flashdraft.errors import DataError, InvalidParameter, InvalidPrompt
from flashdraft.files import (
    Facts,
    check_facts,
    locked,
    output_folder,
    parse_json,
    say,
    write_file,
    write_tensors,
)
from flashdraft.generate import Model
from flashdraft.process import INTS
from flashdraft.train.answers import check_origin
from flashdraft.train.facts import named_target, target_facts
from flashdraft.train.rows import LeftOut, is_whole, placed_rows

__all__ = [
    "SHARD",
    "Data",
    "FeatureSet",
    "OnlineFeatures",
    "Reader",
    "Sample",
    "ShardWriter",
    "Sizes",
    "encode",
]
__all__ += ["check_features_folder", "shard_key", "write_features"]

SHARD = 64  # answers a shard; every answer file is cut anew
Layers = tuple[int, ...]
_SHARD = re.compile(r"[0-9a-f]{16}\.safetensors")


class Sizes(NamedTuple):
    """Of a sample, in tokens."""

    num_prompt: int
    num_tokens: int
    num_final: int | None  # those with a final state; None: none is there


@dataclass(frozen=True)
class Sample:
    """One answer with its prompt, as the target read it."""

    tokens: Tensor  # [n] int64
    features: Tensor  # [n, or n - 2 recorded while decoding, F * hidden]
    num_prompt: int  # tokens before the answer
    final: Tensor | None = None  # [as many, hidden]: the state that the target's lm_head reads

    @property
    def sizes(self) -> Sizes:
        return Sizes(
            self.num_prompt, len(self.tokens), None if self.final is None else len(self.final)
        )


class Reader:
    """The target as a reader of answers: of which layers the outputs are taken, and of how many tokens at most."""

    def __init__(self, model: Model, layers: Layers, max_length: int, final: bool = False) -> None:
        self.model, self.layers, self.max_length, self.final = model, layers, max_length, final
        self.hidden_size = model.target.hidden_size
        self.wanted = (
            (*layers, model.target.num_layers) if final else layers
        )  # what the target is asked for

    def read(self, row: dict[str, Any]) -> Sample:
        """One answer, read by the target; rounded like what is stored."""
        tokens, num_prompt = encode(self.model, row)
        tokens, target = tokens[: self.max_length], self.model.target
        _, features = target.prefill(
            target.new_cache(1, len(tokens)), 0, torch.tensor(tokens, **INTS), self.wanted
        )
        assert features is not None
        return self.sample(tokens, features, num_prompt)

    def sample(self, tokens: list[int], features: Tensor, num_prompt: int) -> Sample:
        """features: of all `wanted` layers."""
        own, final = features.to(torch.bfloat16).tensor_split(
            [len(self.layers) * self.hidden_size], dim=1
        )
        return Sample(torch.tensor(tokens, **INTS), own, num_prompt, final if self.final else None)


class ShardWriter(Reader):
    """A features folder that is being filled: its manifest, and which shards are still to be made.

    Nothing is written before the first shard. Raises InvalidParameter for a folder that holds something else, DataError for one
    that holds features of another kind or of another target.
    """

    def __init__(
        self, model: Model, out: Path, *, layers: Layers, max_length: int, final: bool = False
    ) -> None:
        super().__init__(model, layers, max_length, final)
        self.out = out = output_folder(out).absolute()  # the caller may go elsewhere
        facts = target_facts(model)
        held = _check_folder(out, facts)
        kind: dict[str, Any] = {
            "layers": list(layers),
            "hidden_size": self.hidden_size,
            "max_length": max_length,
            "final": final,
        }
        for name, value in kind.items():
            if held is not None and held.get(name, False) != value:
                got = f"`{out}` holds features of another kind: {name} {held.get(name, False)}, not {value}"
                raise DataError(got, hint="name another folder, or ask for the same")
        new = {"target": model.target.name} | kind | {"shards": {}, "unused": {}}
        self.manifest = new | (held or {})
        if "weights" not in self.manifest and self.manifest["shards"]:
            say(
                f"{out}: nothing says which weights made these features; they are taken as those of `{model.target.name}`"
            )
        for name, value in _as_manifest(facts).items():
            self.manifest.setdefault(name, value)
        found = (self.manifest["unused"] | self.manifest["shards"]).items()
        self.known: dict[str, dict[str, Any]] = {
            key: entry for key, entry in found if (out / f"{key}.safetensors").exists()
        }

    def use(self, keys: Sequence[str]) -> list[str]:
        """Make the set these shards; returns those that are not there yet. The others stay in the folder, unused."""
        self.manifest["shards"] = {key: self.known[key] for key in keys if key in self.known}
        self.manifest["unused"] = {
            key: entry for key, entry in self.known.items() if key not in set(keys)
        }
        if self.known or not keys:
            self._write_manifest()
        return [key for key in keys if key not in self.known]

    def add(self, key: str, samples: Sequence[Sample], *, place: str = "shards") -> None:
        """Write one shard, its manifest entry last."""
        self.out.mkdir(parents=True, exist_ok=True)
        path, tensors = self.out / f"{key}.safetensors", {}
        for n, sample in enumerate(samples):
            tensors[f"{n}.tokens"] = sample.tokens[: self.max_length].to(torch.int32)
            tensors[f"{n}.features"] = sample.features[: self.max_length].contiguous()
            if self.final and sample.final is not None:
                tensors[f"{n}.final"] = sample.final[: self.max_length].contiguous()
        write_tensors(path, tensors)
        entry = {
            "starts": [sample.num_prompt for sample in samples],
            "bytes": path.stat().st_size,
            "sha256": _sha256(path),
        }
        self.manifest[place][key] = self.known[key] = entry
        self._write_manifest()

    def _write_manifest(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        write_file(self.out / "manifest.json", json.dumps(self.manifest).encode())


def _as_manifest(facts: Facts) -> dict[str, Any]:
    """The target's facts as a manifest has them, beside the `target`'s name."""
    return {
        "weights": facts["target"]["id"],
        "template": facts.get("template"),
        "kernel": facts.get("kernel"),
    }


def _made_by(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that a manifest tells."""
    target = {"name": manifest["target"], "id": manifest.get("weights")}
    return {
        "target": target,
        "template": manifest.get("template"),
        "kernel": manifest.get("kernel"),
    }


def _check_folder(out: Path, facts: Facts) -> dict[str, Any] | None:
    """The manifest of a features folder of this target; None for a new folder."""
    if (out / "manifest.json").exists():
        manifest = _read_manifest(out)
        check_facts(out, _made_by(manifest), facts)
        return manifest
    theirs = [
        path for path in (out / "config.json", *sorted(out.glob("*.safetensors"))) if path.exists()
    ]
    for path in theirs:
        if not _SHARD.fullmatch(path.name):  # a shard of ours may lie there after a kill
            raise InvalidParameter(
                f"`{out}` is no folder of features: it holds `{path.name}`",
                hint="name a new folder",
            )
    return None


def check_features_folder(out: Path, target: str, *, inputs: Sequence[Path] = ()) -> None:
    """What can be refused before the target is loaded: a folder that is not ours, and answers or features of another target."""
    real, facts = output_folder(out, inputs=inputs), {"target": named_target(target)}
    _check_folder(real, facts)
    for path in inputs:
        if not path.is_file():
            raise DataError(f"no file `{path}`", hint="give what `flashdraft regenerate` wrote")
        check_origin(path, facts, tell=False)


def write_features(
    model: Model,
    answers: Sequence[Path],
    out: Path,
    *,
    layers: Layers,
    max_length: int,
    final: bool = False,
    quiet: bool = False,
) -> int:
    """Read every answer once with the target and store what the drafter will see; shards that exist are not made again.

    The set is then these answers, each once; other shards of an earlier call are kept as unused. Returns the number of shards.
    """
    writer = ShardWriter(model, out, layers=layers, max_length=max_length, final=final)
    left_out = LeftOut("answer")
    parts = _shards(answers, left_out)
    for path in answers:
        check_origin(path, target_facts(model))
    with locked(writer.out):
        for key in track(writer.use(list(parts)), description="features", disable=quiet):
            writer.add(key, _readable(writer, parts[key], left_out))
    _tell_left_out(
        left_out, sum(len(entry["starts"]) for entry in writer.manifest["shards"].values())
    )
    return len(parts)


def _readable(
    reader: Reader, part: Sequence[tuple[str, dict[str, Any]]], left_out: LeftOut
) -> list[Sample]:
    """The samples of a shard's answers, without those that the target cannot read."""
    samples = []
    for place, row in part:
        try:
            samples.append(reader.read(row))
        except InvalidPrompt as error:
            left_out.add(place, error)
    return samples


def shard_key(rows: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def _shards(
    answers: Sequence[Path], left_out: LeftOut
) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """The answers with their places, by the key of the shard that they go into."""
    parts = {}
    for path in answers:
        placed = list(placed_rows(path, ("prompt", "response"), left_out))
        for start in range(0, len(placed), SHARD):
            part = placed[start : start + SHARD]
            parts[shard_key([row for _, row in part])] = part
    return parts


def _tell_left_out(left_out: LeftOut, num_left: int) -> None:
    """Raises DataError where nothing is left."""
    if left_out.count and not num_left:
        raise DataError(
            f"no answer can be read: {left_out}",
            hint=left_out.hint or "give what `flashdraft regenerate` wrote",
        )
    left_out.tell()


def _identity(shards: Mapping[str, Any], max_length: int) -> str:
    """What tells a set of samples from another one, stored or not."""
    return hashlib.sha256(json.dumps([sorted(shards), max_length]).encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
        if missing := {"target", "layers", "hidden_size", "max_length", "shards", "unused"} - set(
            manifest
        ):
            raise ValueError(f"it lacks {min(missing)}")
        return manifest
    except FileNotFoundError:
        raise DataError(
            f"`{folder}` holds no manifest.json", hint="run `flashdraft features` first"
        ) from None
    except NotADirectoryError:
        hint = "name the folder that `flashdraft features` wrote, or add --online to read answers"
        raise DataError(f"`{folder}` is a file, not a folder of features", hint=hint) from None
    except (OSError, ValueError) as error:
        hint = "name another folder, or make these features again if they are yours"
        raise DataError(f"`{path}` cannot be read: {error}", hint=hint) from None


def encode(model: Model, row: dict[str, Any]) -> tuple[list[int], int]:
    """Tokens of prompt and answer, and how many are the prompt's. An answer without token ids is encoded again.

    Raises InvalidPrompt for a row that the target cannot read.
    """
    thinking, answer = row.get("thinking"), row.get("tokens")
    if thinking is not None and not isinstance(thinking, bool):
        raise InvalidPrompt(f"`thinking` is {thinking!r:.40}, not true or false")
    prompt = model.encode(row["prompt"], thinking=thinking)
    if answer is None:
        answer = _encoded_text(model, row["response"])
        if ends_itself(row):
            answer += _ending(model)
    elif not isinstance(answer, (list, tuple)):
        raise InvalidPrompt("`tokens` is no list of token ids")
    elif answer:
        answer = model.encode(answer)
    return [*prompt, *answer], len(prompt)


def _encoded_text(model: Model, response: Any) -> list[int]:
    if not isinstance(response, str):
        raise InvalidPrompt("`response` is no text")
    if not is_whole(response):
        raise InvalidPrompt("`response` holds half a character (a lone surrogate)")
    return list(model.tokenizer.encode(response, add_special_tokens=False))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A shard. Raises DataError for one that cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"`{path}` cannot be read: {error}",
            hint="remove it and run `flashdraft features` again",
        ) from None


def _ending(model: Model) -> list[int]:
    """The token that ends an answer: the template's, or else the tokenizer's, or else the only one that there is."""
    by_template, by_tokenizer = (
        turn_end(model.tokenizer),
        getattr(model.tokenizer, "eos_token_id", None),
    )
    if by_template is not None:
        return [by_template]
    if by_tokenizer is not None and (by_tokenizer in model.eos or not model.eos):
        return [by_tokenizer]
    return [min(model.eos)] if model.eos else []


class FeatureSet:
    """The samples of a features folder, in an order that a seed and an epoch fix."""

    def __init__(self, folder: Path) -> None:
        manifest = _read_manifest(folder)
        self.folder, self.name, self.target = (
            folder.absolute(),
            str(folder),
            str(manifest["target"]),
        )
        self._made_by = _made_by(manifest)
        self.layers = self.stored = tuple(manifest["layers"])
        self.hidden_size, self.final = (
            int(manifest["hidden_size"]),
            bool(manifest.get("final", False)),
        )
        self.shards: dict[str, dict[str, Any]] = dict(sorted(manifest["shards"].items()))
        self.index = [
            (key, n, start)
            for key, entry in self.shards.items()
            for n, start in enumerate(entry["starts"])
        ]
        if not self.index:
            raise DataError(
                f"`{folder}` holds no samples",
                hint="run `flashdraft features` on a file with answers",
            )
        self.identity = _identity(self.shards, manifest["max_length"])

    def check_target(self, facts: Facts, *, tell: bool = True) -> None:
        """Raises DataError where another target or chat template made these features than `facts` tell.

        What an earlier version made is taken, and one line says so, unless the target that it names lies there and is another.
        """
        wanted = {name: facts[name] for name in ("target", "template") if name in facts}
        hint = "run `flashdraft features` with this target, or name the one that made them"
        is_unnoted = self._made_by["target"]["id"] is None
        target = named_target(self.target) if is_unnoted else self._made_by["target"]
        if target["id"] is not None:
            check_facts(self.folder, self._made_by | {"target": target}, wanted, hint)
        if is_unnoted and tell and facts["target"]["id"] is not None:
            say(
                f"{self.folder}: only the name `{self.target}` says what made these features; they are taken as this target's"
            )

    def only(self, layers: Layers) -> None:
        """From now on samples hold these layers. Raises DataError where one is not stored."""
        if missing := [layer for layer in layers if layer not in self.stored]:
            got = f"`{self.name}` holds layers {self.stored}, the drafter reads {layers}"
            raise DataError(
                got,
                hint=f"run `flashdraft features` for this drafter: layer {missing[0]} is missing",
            )
        self.layers = layers

    def __len__(self) -> int:
        return len(self.index)

    def check(self, *, contents: bool = False) -> None:
        """Raises DataError naming a shard that is gone or cut short; with `contents`, also one whose checksum differs."""
        for key, entry in self.shards.items():
            path = self.folder / f"{key}.safetensors"
            size = path.stat().st_size if path.exists() else 0
            wrong = (
                "is gone"
                if not size
                else f"has {size} bytes of {entry['bytes']}"
                if size != entry["bytes"]
                else ""
            )
            if not wrong and contents and _sha256(path) != entry["sha256"]:
                wrong = "is not what was written: its checksum differs"
            if wrong:
                raise DataError(
                    f"`{path}` {wrong}", hint="remove it and run `flashdraft features` again"
                )

    def describe(self, i: int) -> str:
        key, n, _ = self.index[i]
        return f"sample {n} of `{self.folder / key}.safetensors`"

    def answer_tokens(self, i: int) -> list[int]:
        return self._read(i, "tokens")[0][self.index[i][2] :].tolist()

    def sizes(self) -> list[Sizes]:
        """Of all samples, without reading them."""
        found = []
        for key, entry in self.shards.items():
            path = self.folder / f"{key}.safetensors"
            with _opened(path) as file:
                for n, start in enumerate(entry["starts"]):
                    num_tokens = file.get_slice(f"{n}.tokens").get_shape()[0]
                    num_final = None
                    if self.final:
                        num_final = file.get_slice(f"{n}.final").get_shape()[0]
                    found.append(Sizes(start, num_tokens, num_final))
        return found

    def __getitem__(self, i: int) -> Sample:
        tokens, features, *final = self._read(i, "tokens", "features", *("final",) * self.final)
        if self.layers != self.stored:
            places = [self.stored.index(layer) for layer in self.layers]
            features = features.view(len(features), len(self.stored), -1)[:, places].flatten(1)
        return Sample(tokens.long(), features, self.index[i][2], *final)

    def _read(self, i: int, *names: str) -> list[Tensor]:
        key, n, _ = self.index[i]
        path = self.folder / f"{key}.safetensors"
        with _opened(path) as file:
            return [file.get_tensor(f"{n}.{name}") for name in names]


class OnlineFeatures(Reader):
    """The same samples without a folder: the target reads an answer again whenever it is asked for; nothing is stored."""

    def __init__(
        self,
        model: Model,
        answers: Sequence[Path],
        *,
        layers: Layers,
        max_length: int,
        final: bool = False,
    ) -> None:
        super().__init__(model, layers, max_length, final)
        self.name, self.target = ", ".join(map(str, answers)), model.target.name
        left_out = LeftOut("answer")
        parts = _shards(answers, left_out)
        for path in answers:
            check_origin(path, target_facts(model))
        self.identity = _identity(parts, max_length)
        self.rows, self._sizes = list[dict[str, Any]](), list[Sizes]()
        for _, part in sorted(parts.items()):  # a FeatureSet's order
            for place, row in part:
                try:
                    tokens, num_prompt = encode(model, row)
                except InvalidPrompt as error:
                    left_out.add(place, error)
                    continue
                length = min(len(tokens), max_length)
                self.rows.append(row)
                self._sizes.append(Sizes(num_prompt, length, length if final else None))
        _tell_left_out(left_out, len(self.rows))
        if not self.rows:
            raise DataError(
                f"`{self.name}` holds no answers", hint="run `flashdraft regenerate` first"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def check(self) -> None:
        pass

    def check_target(self, facts: Facts) -> None:
        pass  # it reads now

    def only(self, layers: Layers) -> None:
        assert layers == self.layers, "the target is asked for the layers that the drafter reads"

    def describe(self, i: int) -> str:
        return f"the answer to {self.rows[i]['prompt']!r:.60}"

    def sizes(self) -> list[Sizes]:
        """Of all samples, without reading them."""
        return self._sizes

    def answer_tokens(self, i: int) -> list[int]:
        tokens, num_prompt = encode(self.model, self.rows[i])
        return tokens[: self.max_length][num_prompt:]

    def __getitem__(self, i: int) -> Sample:
        return self.read(self.rows[i])


Data = FeatureSet | OnlineFeatures
