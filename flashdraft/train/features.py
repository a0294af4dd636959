"""Stage 3: what a drafter reads, the target's hidden states for every answer.

They are stored in shards of 16-bit numbers (ShardWriter, FeatureSet), or computed whenever they are
asked for (OnlineFeatures). A shard holds, for sample n: `n.tokens` [tokens] int32 and `n.features`
[tokens, F * hidden] bfloat16, of as many tokens as the target has read (it need not read the last
one), and `n.final` [tokens, hidden], the final normed state, if soft labels are to be made of it.
The manifest says where each answer begins, and every shard's checksum.
Knows answers, targets and shards. Does not know drafters or losses.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

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
from flashdraft.train.rows import LeftOut, PlacedRow, Row, is_whole, placed_rows

__all__ = [
    "SHARD",
    "Data",
    "FeatureSet",
    "OnlineFeatures",
    "Reader",
    "Sample",
    "ShardWriter",
    "Sizes",
    "check_features_folder",
    "encode",
    "shard_key",
    "write_features",
]

SHARD = 64  # answers a shard; every answer file is cut anew
Layers = tuple[int, ...]
Manifest = dict[str, Any]  # manifest.json
_MANIFEST_KEYS = {"target", "layers", "hidden_size", "max_length", "shards", "unused"}
_SHARD = re.compile(r"[0-9a-f]{16}\.safetensors")
_AGAIN = "remove it and run `flashdraft features` again"


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
        num_final = None if self.final is None else len(self.final)
        return Sizes(self.num_prompt, len(self.tokens), num_final)


class ShardEntry(TypedDict):
    """What a manifest says of a shard."""

    starts: list[int]  # of every sample: the tokens before its answer
    bytes: int
    sha256: str
    file: NotRequired[str]  # the name of that of the answers; older folders lack it


class _Part(NamedTuple):
    """What goes into a shard."""

    file: str  # the name of that of the answers
    answers: list[PlacedRow]


class _Place(NamedTuple):
    """Where a sample lies."""

    shard: str  # its key
    number: int  # in the shard
    num_prompt: int


class Reader:
    """The target as a reader of answers.

    layers: of which the outputs are taken. max_length: of how many tokens at most. final: whether
    the final normed state is taken too. Raises InvalidParameter for a layer that has no output.
    """

    def __init__(self, model: Model, layers: Layers, max_length: int, final: bool = False) -> None:
        if min(layers, default=0) < 0:
            got = "the drafter reads the target's embeddings, too (layer -1)"
            raise InvalidParameter(got, hint="such drafters run here, and are not trained")

        self.model = model
        self.layers = layers
        self.max_length = max_length
        self.final = final
        self.hidden_size = model.target.hidden_size
        self.wanted = layers  # what the target is asked for
        if final:
            self.wanted = (*layers, model.target.num_layers)

    def read(self, row: Row) -> Sample:
        """One answer, read by the target; rounded like what is stored."""
        tokens, num_prompt = encode(self.model, row)
        tokens = tokens[: self.max_length]
        target = self.model.target
        cache = target.new_cache(1, len(tokens))
        _, features = target.prefill(cache, 0, torch.tensor(tokens, **INTS), self.wanted)
        assert features is not None
        return self.sample(tokens, features, num_prompt)

    def sample(self, tokens: list[int], features: Tensor, num_prompt: int) -> Sample:
        """features: [n, hidden of all `wanted` layers], side by side."""
        stored = features.to(torch.bfloat16)
        width = len(self.layers) * self.hidden_size
        own, final = stored.tensor_split([width], dim=1)
        return Sample(torch.tensor(tokens, **INTS), own, num_prompt, final if self.final else None)


# --- written --------------------------------------------------------------------------------------


class ShardWriter(Reader):
    """A features folder that is being filled: its manifest, and which shards are still to be made.

    Nothing is written before the first shard. Raises InvalidParameter for a folder that holds
    something else, DataError for one that holds features of another kind or of another target.
    """

    def __init__(
        self, model: Model, out: Path, *, layers: Layers, max_length: int, final: bool = False
    ) -> None:
        super().__init__(model, layers, max_length, final)
        self.out = output_folder(out).absolute()  # the caller may go elsewhere
        facts = target_facts(model)
        held = _check_folder(self.out, facts)
        kind = self._kind()
        if held is not None:
            self._check_kind(held, kind)

        self.manifest: Manifest = {"target": model.target.name, **kind, "shards": {}, "unused": {}}
        if held is not None:
            self.manifest |= held
        if "weights" not in self.manifest and self.manifest["shards"]:
            say(
                f"{self.out}: nothing says which weights made these features; "
                f"they are taken as those of `{model.target.name}`"
            )
        for name, value in _as_manifest(facts).items():
            self.manifest.setdefault(name, value)
        self.known = self._find_shards()
        self.files: Mapping[str, str] = {}  # of a shard, by its key

    def _kind(self) -> Manifest:
        """What of the features a manifest says, as it says it."""
        return {
            "layers": list(self.layers),
            "hidden_size": self.hidden_size,
            "max_length": self.max_length,
            "final": self.final,
        }

    def _check_kind(self, held: Manifest, kind: Manifest) -> None:
        for name, value in kind.items():
            there = held.get(name, False)
            if there != value:
                raise DataError(
                    f"`{self.out}` holds features of another kind: {name} {there}, not {value}",
                    hint="name another folder, or ask for the same",
                )

    def _find_shards(self) -> dict[str, ShardEntry]:
        """Those of the manifest that are there."""
        noted: dict[str, ShardEntry] = self.manifest["unused"] | self.manifest["shards"]
        found = {}
        for key, entry in noted.items():
            if _shard_path(self.out, key).exists():
                found[key] = entry
        return found

    def use(self, files: Mapping[str, str]) -> list[str]:
        """Make the set these shards; returns those that are not there yet.

        files: the answers' file by a shard's key. The other shards stay in the folder, unused.
        """
        self.files = files
        missing = []
        used = {}
        for key, file in files.items():
            if key in self.known:
                self.known[key]["file"] = file
                used[key] = self.known[key]
            else:
                missing.append(key)

        self.manifest["shards"] = used
        self.manifest["unused"] = {
            key: entry for key, entry in self.known.items() if key not in files
        }
        if self.known or not files:
            self._write_manifest()
        return missing

    def add(self, key: str, samples: Sequence[Sample], *, place: str = "shards") -> None:
        """Write one shard, its manifest entry last; `place` is the part of the manifest."""
        self.out.mkdir(parents=True, exist_ok=True)
        path = _shard_path(self.out, key)
        write_tensors(path, self._tensors(samples))
        entry: ShardEntry = {
            "starts": [sample.num_prompt for sample in samples],
            "bytes": path.stat().st_size,
            "sha256": _sha256(path),
        }
        if key in self.files:
            entry["file"] = self.files[key]
        self.manifest[place][key] = entry
        self.known[key] = entry
        self._write_manifest()

    def _tensors(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """A shard's contents."""
        most = self.max_length
        tensors = {}
        for n, sample in enumerate(samples):
            tensors[f"{n}.tokens"] = sample.tokens[:most].to(torch.int32)
            tensors[f"{n}.features"] = sample.features[:most].contiguous()
            if self.final and sample.final is not None:
                tensors[f"{n}.final"] = sample.final[:most].contiguous()
        return tensors

    def _write_manifest(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        write_file(self.out / "manifest.json", json.dumps(self.manifest).encode())


def _shard_path(folder: Path, key: str) -> Path:
    return folder / f"{key}.safetensors"


def _as_manifest(facts: Facts) -> Manifest:
    """The target's facts as a manifest has them, beside the `target`'s name."""
    return {
        "weights": facts["target"]["id"],
        "template": facts.get("template"),
        "kernel": facts.get("kernel"),
    }


def _made_by(manifest: Manifest) -> dict[str, Any]:
    """The facts that a manifest tells."""
    return {
        "target": {"name": manifest["target"], "id": manifest.get("weights")},
        "template": manifest.get("template"),
        "kernel": manifest.get("kernel"),
    }


def _check_folder(out: Path, facts: Facts) -> Manifest | None:
    """The manifest of a features folder of this target; None for a new folder."""
    if (out / "manifest.json").exists():
        manifest = _read_manifest(out)
        check_facts(out, _made_by(manifest), facts)
        return manifest

    for path in (out / "config.json", *sorted(out.glob("*.safetensors"))):
        is_ours = _SHARD.fullmatch(path.name)  # a shard may lie there after a kill
        if path.exists() and not is_ours:
            raise InvalidParameter(
                f"`{out}` is no folder of features: it holds `{path.name}`",
                hint="name a new folder",
            )
    return None


def _read_manifest(folder: Path) -> Manifest:
    path = folder / "manifest.json"
    try:
        manifest: Manifest = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError("it is no JSON object")
        missing = _MANIFEST_KEYS - set(manifest)
        if missing:
            raise ValueError(f"it lacks {min(missing)}")
    except FileNotFoundError:
        hint = "run `flashdraft features` first"
        raise DataError(f"`{folder}` holds no manifest.json", hint=hint) from None
    except NotADirectoryError:
        hint = "name the folder that `flashdraft features` wrote; `train --online` reads answers"
        raise DataError(f"`{folder}` is a file, not a folder of features", hint=hint) from None
    except (OSError, ValueError) as error:
        hint = "name another folder, or make these features again if they are yours"
        raise DataError(f"`{path}` cannot be read: {error}", hint=hint) from None
    return manifest


def check_features_folder(out: Path, target: str, *, inputs: Sequence[Path] = ()) -> None:
    """What can be refused before the target is loaded.

    That is a folder that is not ours, and answers or features of another target.
    """
    real = output_folder(out, inputs=inputs)
    facts = {"target": named_target(target)}
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
    """Read every answer once with the target and store what the drafter will see.

    Shards that exist are not made again. The set is then these answers, each once; other shards of
    an earlier call are kept as unused. Returns the number of shards.
    """
    writer = ShardWriter(model, out, layers=layers, max_length=max_length, final=final)
    left_out = LeftOut("answer")
    parts = _shards(answers, left_out)
    for path in answers:
        check_origin(path, target_facts(model))

    with locked(writer.out):
        missing = writer.use({key: part.file for key, part in parts.items()})
        for key in track(missing, description="features", disable=quiet):
            writer.add(key, _readable(writer, parts[key].answers, left_out))

    entries: dict[str, ShardEntry] = writer.manifest["shards"]
    num_samples = sum(len(entry["starts"]) for entry in entries.values())
    _tell_left_out(left_out, num_samples)
    return len(parts)


def _shards(answers: Sequence[Path], left_out: LeftOut) -> dict[str, _Part]:
    """The answers with their places, by the key of the shard that they go into."""
    parts = {}
    for path in answers:
        placed = list(placed_rows(path, ("prompt", "response"), left_out))
        for start in range(0, len(placed), SHARD):
            part = placed[start : start + SHARD]
            key = shard_key([answer.row for answer in part])
            parts[key] = _Part(path.name, part)
    return parts


def shard_key(rows: list[Row]) -> str:
    """The name of the shard of these answers."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def _readable(reader: Reader, part: Sequence[PlacedRow], left_out: LeftOut) -> list[Sample]:
    """The samples of a shard's answers, without those that the target cannot read."""
    samples = []
    for place, row in part:
        try:
            samples.append(reader.read(row))
        except InvalidPrompt as error:
            left_out.add(place, error)
    return samples


def _tell_left_out(left_out: LeftOut, num_left: int) -> None:
    """Raises DataError where nothing is left."""
    if left_out.count and not num_left:
        hint = left_out.hint if left_out.hint else "give what `flashdraft regenerate` wrote"
        raise DataError(f"no answer can be read: {left_out}", hint=hint)
    left_out.tell()


def _identity(shards: Mapping[str, object], max_length: int) -> str:
    """What tells a set of samples from another one, stored or not."""
    text = json.dumps([sorted(shards), max_length])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- an answer's tokens ---------------------------------------------------------------------------


def encode(model: Model, row: Row) -> tuple[list[int], int]:
    """Tokens of prompt and answer, and how many are the prompt's.

    An answer without token ids is encoded again. Raises InvalidPrompt for a row that the target
    cannot read.
    """
    thinking = row.get("thinking")
    if thinking is not None and not isinstance(thinking, bool):
        raise InvalidPrompt(f"`thinking` is {thinking!r:.40}, not true or false")
    prompt = model.encode(row["prompt"], thinking=thinking)
    answer = _answer_tokens(model, row)
    return [*prompt, *answer], len(prompt)


def _answer_tokens(model: Model, row: Row) -> Sequence[int]:
    tokens = row.get("tokens")
    if tokens is None:
        return _encoded_response(model, row)
    if not isinstance(tokens, (list, tuple)):
        raise InvalidPrompt("`tokens` is no list of token ids")
    return model.encode(tokens) if tokens else []


def _encoded_response(model: Model, row: Row) -> list[int]:
    """The tokens of an answer's text, and the one that ended it."""
    response = row["response"]
    if not isinstance(response, str):
        raise InvalidPrompt("`response` is no text")
    if not is_whole(response):
        raise InvalidPrompt("`response` holds half a character (a lone surrogate)")

    tokens: list[int] = list(model.tokenizer.encode(response, add_special_tokens=False))
    ending = _ending(model) if ends_itself(row) else None
    if ending is not None:
        tokens.append(ending)
    return tokens


def _ending(model: Model) -> int | None:
    """The token that ends an answer; None where there is none.

    It is the template's, or else the tokenizer's, or else the lowest one that ends a text.
    """
    by_template = turn_end(model.tokenizer)
    if by_template is not None:
        return by_template
    by_tokenizer: int | None = getattr(model.tokenizer, "eos_token_id", None)
    if by_tokenizer is not None and (by_tokenizer in model.eos or not model.eos):
        return by_tokenizer
    return min(model.eos, default=None)


# --- read -----------------------------------------------------------------------------------------


class FeatureSet:
    """The samples of a features folder, in the order of their shards' names."""

    def __init__(self, folder: Path) -> None:
        manifest = _read_manifest(folder)
        self.folder = folder.absolute()
        self.name = str(folder)
        self.target = str(manifest["target"])
        self.stored: Layers = tuple(manifest["layers"])
        self.layers = self.stored
        self.hidden_size = int(manifest["hidden_size"])
        self.final = bool(manifest.get("final", False))
        self._made_by = _made_by(manifest)

        self.shards: dict[str, ShardEntry] = dict(sorted(manifest["shards"].items()))
        self.index: list[_Place] = []
        for key, entry in self.shards.items():
            for n, start in enumerate(entry["starts"]):
                self.index.append(_Place(key, n, start))
        if not self.index:
            hint = "run `flashdraft features` on a file with answers"
            raise DataError(f"`{folder}` holds no samples", hint=hint)
        self.identity = _identity(self.shards, manifest["max_length"])

    def check_target(self, facts: Facts, *, tell: bool = True) -> None:
        """Raises DataError where another target or chat template made these features.

        `facts` tell which ones are there now. What an earlier version made is taken, and one line
        says so, unless the target that it names lies there and is another.
        """
        wanted = {name: facts[name] for name in ("target", "template") if name in facts}
        is_unnoted = self._made_by["target"]["id"] is None
        target = named_target(self.target) if is_unnoted else self._made_by["target"]
        if target["id"] is not None:
            noted = self._made_by | {"target": target}
            hint = "run `flashdraft features` with this target, or name the one that made them"
            check_facts(self.folder, noted, wanted, hint)
        if is_unnoted and tell and facts["target"]["id"] is not None:
            say(
                f"{self.folder}: only the name `{self.target}` says what made these features; "
                "they are taken as this target's"
            )

    def only(self, layers: Layers) -> None:
        """From now on samples hold these layers. Raises DataError where one is not stored."""
        for layer in layers:
            if layer not in self.stored:
                raise DataError(
                    f"`{self.name}` holds layers {self.stored}, the drafter reads {layers}",
                    hint=f"run `flashdraft features` for this drafter: layer {layer} is missing",
                )
        self.layers = layers

    def __len__(self) -> int:
        return len(self.index)

    def check(self, *, contents: bool = False) -> None:
        """Raises DataError naming a shard that is gone or cut short.

        With `contents`, also one whose checksum differs.
        """
        for key, entry in self.shards.items():
            path = _shard_path(self.folder, key)
            damage = _damage(path, entry, contents)
            if damage:
                raise DataError(f"`{path}` {damage}", hint=_AGAIN)

    def describe(self, i: int) -> str:
        place = self.index[i]
        return f"sample {place.number} of `{_shard_path(self.folder, place.shard)}`"

    def file_of(self, i: int) -> str:
        """The name of the file that an answer came from; empty where that is not noted."""
        return self.shards[self.index[i].shard].get("file", "")

    def answer_tokens(self, i: int) -> list[int]:
        tokens = self._read(i, ["tokens"])["tokens"]
        answer: list[int] = tokens[self.index[i].num_prompt :].tolist()
        return answer

    def sizes(self) -> list[Sizes]:
        """Of all samples, without reading them."""
        found = []
        for key, entry in self.shards.items():
            with _opened(_shard_path(self.folder, key)) as file:
                for n, start in enumerate(entry["starts"]):
                    num_tokens = file.get_slice(f"{n}.tokens").get_shape()[0]
                    num_final = None
                    if self.final:
                        num_final = file.get_slice(f"{n}.final").get_shape()[0]
                    found.append(Sizes(start, num_tokens, num_final))
        return found

    def __getitem__(self, i: int) -> Sample:
        names = ["tokens", "features"]
        if self.final:
            names.append("final")
        tensors = self._read(i, names)

        features = tensors["features"]
        if self.layers != self.stored:
            columns = [self.stored.index(layer) for layer in self.layers]
            by_layer = features.view(len(features), len(self.stored), -1)
            features = by_layer[:, columns].flatten(1)
        num_prompt = self.index[i].num_prompt
        return Sample(tensors["tokens"].long(), features, num_prompt, tensors.get("final"))

    def _read(self, i: int, names: Sequence[str]) -> dict[str, Tensor]:
        """These tensors of a sample."""
        place = self.index[i]
        with _opened(_shard_path(self.folder, place.shard)) as file:
            return {name: file.get_tensor(f"{place.number}.{name}") for name in names}


def _damage(path: Path, entry: ShardEntry, contents: bool) -> str:
    """What is wrong with a shard; empty: nothing."""
    size = path.stat().st_size if path.exists() else 0
    if not size:
        return "is gone"
    if size != entry["bytes"]:
        return f"has {size} bytes of {entry['bytes']}"
    if contents and _sha256(path) != entry["sha256"]:
        return "is not what was written: its checksum differs"
    return ""


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A shard. Raises DataError for one that cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise DataError(f"`{path}` cannot be read: {error}", hint=_AGAIN) from None


class OnlineFeatures(Reader):
    """The same samples without a folder; nothing is stored.

    The target reads an answer again whenever it is asked for.
    """

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
        self.name = ", ".join(str(path) for path in answers)
        self.target = model.target.name
        left_out = LeftOut("answer")
        parts = _shards(answers, left_out)
        for path in answers:
            check_origin(path, target_facts(model))
        self.identity = _identity(parts, max_length)

        self.rows: list[Row] = []
        self._files: list[str] = []
        self._sizes: list[Sizes] = []
        for key in sorted(parts):  # a FeatureSet's order
            for answer in parts[key].answers:
                self._take(answer, parts[key].file, left_out)
        _tell_left_out(left_out, len(self.rows))
        if not self.rows:
            hint = "run `flashdraft regenerate` first"
            raise DataError(f"`{self.name}` holds no answers", hint=hint)

    def _take(self, answer: PlacedRow, file: str, left_out: LeftOut) -> None:
        """Make an answer a sample, if the target can read it."""
        try:
            tokens, num_prompt = encode(self.model, answer.row)
        except InvalidPrompt as error:
            left_out.add(answer.place, error)
            return
        num_tokens = min(len(tokens), self.max_length)
        num_final = num_tokens if self.final else None
        self.rows.append(answer.row)
        self._files.append(file)
        self._sizes.append(Sizes(num_prompt, num_tokens, num_final))

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

    def file_of(self, i: int) -> str:
        """The name of the file that an answer came from."""
        return self._files[i]

    def answer_tokens(self, i: int) -> list[int]:
        tokens, num_prompt = encode(self.model, self.rows[i])
        return tokens[num_prompt : self.max_length]

    def __getitem__(self, i: int) -> Sample:
        return self.read(self.rows[i])


Data = FeatureSet | OnlineFeatures
