"""Targets whose weights were packed before: kept in the cache folder, one file each.

What reads a model (transformers' modelling files, every check of the folder, the packing itself)
takes several seconds, and gives the same each time. So what is left behind it is written to
`packed-*.safetensors`, once a model was read whole, and read while nothing that it was made of has
changed: the folder's files by name, size, times and number; our own code, the kernels and the
processor; the releases of torch and transformers. A file that is damaged or of other things is
passed over and written anew; it may be deleted at any time. The bytes are the same, so the texts
are.

The file is mapped, not read: that is quicker to load, two processes share one copy, and decoding is
no slower (quicker where the file system has huge pages). Knows folders and LeanTargets. Does not
know drafters or texts.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flashdraft.files import appears_whole
from flashdraft.hub import cache_dir, cache_lasts
from flashdraft.models import native
from flashdraft.models.blocks import PackedBlock
from flashdraft.models.lean import LeanTarget, known_torch_seconds, quicker_than
from flashdraft.pretrained import (
    Json,
    Source,
    Theirs,
    Tokenizer,
    read_their_config,
    read_tokenizer,
    tokenizer_of,
)

__all__ = ["Shelf", "StoredConfig"]

_FORMATS = {"auto": "compact", "compact": "compact", "float32": "float32", "int8": "int8"}
_LEAST = 16 * 2**20  # bytes of weights below which reading a model anew costs no more
_SHARE = 4  # a file is kept where the disk has room for so many of its size
_SCRATCH = ".tmp-packed-"  # begins the folders in which entries are written, and nothing else
_LONGEST_WRITE = 24 * 3600.0  # seconds behind which the process that wrote one was killed
_ALIGNED = 64  # bytes of a cache line, with which the first tensor begins
_DTYPES = {torch.float32: "F32", torch.uint8: "U8"}
_LINEARS = ("qkv", "out", "gate_up", "down")
# What an entry that cannot be used may raise: it is cut short, of another kind, or made up.
_UNUSABLE = (
    OSError,
    SafetensorError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    AssertionError,
)


class Shelf:
    """The place of one folder's weights, for one dtype and one of our kernels."""

    def __init__(self, source: Source, dtype: str, kernel: str) -> None:
        self._source = source
        self._dtype = dtype
        self._kernel = kernel
        self._format = _FORMATS.get(kernel)
        self._held: Json = {}  # what the entry says of itself, once it was read
        self._before = self._facts()  # before anything is read of the folder

    @cached_property
    def path(self) -> Path:
        """Of the entry, which may be there or not."""
        folder = os.path.realpath(self._source.folder)
        place = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
        return cache_dir() / f"packed-{place}-{self._format}-{self._dtype}.safetensors"

    def _facts(self) -> str | None:
        """All that an entry depends on, as a text; None where none is kept."""
        if self._format is None or not cache_lasts():
            return None
        folder = Path(os.path.realpath(self._source.folder))
        try:
            facts = {
                "files": _files_of(folder),
                "kernels": native.fingerprint(),
                "code": _code(),
                "torch": torch.__version__,
                "transformers": version("transformers"),
            }
        except (OSError, PackageNotFoundError):  # a bundle may lack sources, or releases' names
            return None
        return json.dumps(facts, sort_keys=True)

    def target(self) -> LeanTarget | None:
        """The target as it was kept; None where it has to be read from the folder."""
        # os.path asks no permission: a folder that may not be looked into holds nothing.
        if self._before is None or not os.path.exists(self.path) or native.library() is None:
            return None
        try:
            with safe_open(self.path, framework="pt") as entry:
                told = entry.metadata() or {}
                if told.get("facts") != self._before:
                    return None
                held = json.loads(told["held"])
                config = StoredConfig(self._source, held["config"])
                # The kernel is chosen by times; torch's are measured with the whole model.
                rival = known_torch_seconds(config) if self._kernel == "auto" else None
                if self._kernel == "auto" and rival is None:
                    return None
                tensors = {name: entry.get_tensor(name) for name in entry.keys()}  # noqa: SIM118
            made = _restored(self._source.name, config, held, tensors, str(self._format))
        except _UNUSABLE:
            return None

        if rival is not None and not quicker_than(rival, made):
            return None
        self._held = held
        return made

    def tokenizer(self) -> Tokenizer:
        """The tokenizer beside what `target` gave. Raises CheckpointError."""
        kind = self._held["tokenizer"]
        if kind is not None:
            with suppress(Exception):  # transformers raises what it likes; below it is explained
                return tokenizer_of(kind, self._source)
        return read_tokenizer(self._source)

    def keep(self, target: object, tokenizer: Tokenizer) -> None:
        """Write the entry of what was read. A cache that cannot be written costs time, no more."""
        if self._before is None or not isinstance(target, LeanTarget):
            return
        if not target.decoder.native or target.nbytes < _LEAST or self._facts() != self._before:
            return
        with suppress(OSError, ValueError, TypeError):  # the last two: a config that is no JSON
            self._write(target, tokenizer)

    def _write(self, target: LeanTarget, tokenizer: Tokenizer) -> None:
        held = {
            "folder": os.path.realpath(self._source.folder),
            "config": StoredConfig.of(target.config),
            "scaling": target.decoder.rotaries[0].scaling,
            "linears": _shapes_of(target),
            "tokenizer": self._kind_of(tokenizer),
        }
        told = {"facts": str(self._before), "held": json.dumps(held)}
        tensors = _tensors_of(target)
        size = sum(tensor.nbytes for tensor in tensors.values())

        cache = self.path.parent
        cache.mkdir(parents=True, exist_ok=True)
        _tidy(cache)
        if shutil.disk_usage(cache).free < _SHARE * size:
            return
        with appears_whole(self.path, _SCRATCH) as made:
            _write(made, tensors, told)

    def _kind_of(self, tokenizer: Tokenizer) -> str | None:
        """The tokenizer's class, where that alone makes the same of the folder's files."""
        kind = f"{type(tokenizer).__module__}:{type(tokenizer).__qualname__}"
        try:
            again = tokenizer_of(kind, self._source)
        except Exception:  # transformers raises what it likes
            return None
        return kind if _described(again) == _described(tokenizer) else None


def _files_of(folder: Path) -> dict[str, list[int]]:
    """By name, what tells every file of a folder, and the folders in it, from others.

    Its size, its times and its number: a copy or a restored backup may keep the time of the last
    change, but no program chooses when the file system noted it. Nothing for a link that leads
    nowhere.
    """
    try:
        paths = [*folder.iterdir()]
    except OSError:
        return {}
    # What transformers reads below the folder: templates, and shards where the index says so.
    paths += folder.glob("additional_chat_templates/*")
    paths += folder.glob("*/*.safetensors")

    found: dict[str, list[int]] = {}
    for path in sorted(paths):
        name = path.relative_to(folder).as_posix()
        try:
            facts = path.stat()
        except OSError:
            found[name] = []
            continue
        times = [facts.st_mtime_ns, facts.st_ctime_ns]
        found[name] = [facts.st_size, *times, facts.st_ino]
    return found


def _code() -> str:
    """Of the code that reads and packs models."""
    here = Path(__file__).parent
    known = hashlib.sha256()
    for path in [*sorted(here.glob("*.py")), here.parent / "pretrained.py"]:
        known.update(path.read_bytes())
    return known.hexdigest()[:16]


def _described(tokenizer: Tokenizer) -> dict[str, str]:
    """All that a tokenizer holds, in words."""
    described = {}
    for name, value in vars(tokenizer).items():
        described[name] = value.to_str() if hasattr(value, "to_str") else repr(value)
    return described


def _tidy(cache: Path) -> None:
    """Remove what no one will read, so that a cache does not grow without end.

    That is the entries of folders that are gone, and what processes that were killed had written.
    """
    for path in cache.glob("packed-*.safetensors"):
        with suppress(*_UNUSABLE):
            with safe_open(path, framework="pt") as entry:
                held = json.loads(entry.metadata()["held"])
            if not os.path.isdir(held["folder"]):
                path.unlink(missing_ok=True)

    for scratch in cache.glob(f"{_SCRATCH}*"):
        with suppress(OSError):
            if time.time() - scratch.stat().st_mtime > _LONGEST_WRITE:
                shutil.rmtree(scratch, ignore_errors=True)


# ---- a target and its tensors --------------------------------------------------------------------


def _linears_of(target: LeanTarget) -> Iterator[tuple[str, native.NativeLinear]]:
    for index, linears in enumerate(target.decoder.linears):
        for name in _LINEARS:
            linear = linears[name]
            assert isinstance(linear, native.NativeLinear)
            yield f"{index}.{name}", linear
    assert isinstance(target.head, native.NativeLinear)
    yield "head", target.head


def _shapes_of(target: LeanTarget) -> Json:
    """Format, outputs and inputs of every linear."""
    shapes = {}
    for name, linear in _linears_of(target):
        shapes[name] = [linear.format, linear.out_features, linear.in_features]
    return shapes


def _tensors_of(target: LeanTarget) -> dict[str, Tensor]:
    """Every tensor of a target, by name.

    Large ones first: their sizes are multiples of a cache line, so that each begins with one.
    """
    decoder = target.decoder
    tensors = {"embedding": target.embedding}
    if not target._head_rows.is_set_to(target.embedding):  # the two may be tied
        tensors["head_rows"] = target._head_rows
    for name, linear in _linears_of(target):
        tensors[f"{name}.weight"] = linear.weight

    for name, linear in _linears_of(target):
        tensors[f"{name}.scale"] = linear.scale
        if linear.bias is not None:
            tensors[f"{name}.bias"] = linear.bias
    for index, norms in enumerate(decoder.norms):
        for name, norm in norms.items():
            tensors[f"{index}.{name}"] = norm
    tensors["norm"] = decoder.norm
    tensors["inv_freq"] = decoder.rotaries[0].inv_freq
    return tensors


def _restored(
    name: str, config: Theirs, held: Json, mapped: Mapping[str, Tensor], kernel: str
) -> LeanTarget:
    """The target of these tensors, which lie in a mapped file. Raises ValueError for others."""
    embedding = mapped["embedding"]
    head_rows = mapped.get("head_rows", embedding)
    shape = (int(config.vocab_size), int(config.hidden_size))
    if tuple(embedding.shape) != shape or tuple(head_rows.shape) != shape:
        raise ValueError(f"an embedding of another shape than {shape}")
    linears = {}
    for place, (format, outputs, inputs) in held["linears"].items():
        linears[place] = native.NativeLinear.of_panels(
            (format, outputs, inputs),
            mapped[f"{place}.weight"],
            mapped[f"{place}.scale"],
            mapped.get(f"{place}.bias"),
        )

    if held["linears"]["head"][1:] != list(shape):
        raise ValueError(f"a head of another shape than {shape}")
    blocks = []
    for index in range(int(config.num_hidden_layers)):
        own = {each: linears[f"{index}.{each}"] for each in _LINEARS}
        norms = {}
        for each in ("input_norm", "post_norm", "q_norm", "k_norm"):
            if f"{index}.{each}" in mapped:
                norms[each] = mapped[f"{index}.{each}"]
        blocks.append(PackedBlock(own, norms))

    # What LeanTarget reads of a model of transformers, under the same names.
    rotary = SimpleNamespace(inv_freq=mapped["inv_freq"], attention_scaling=held["scaling"])
    body = SimpleNamespace(
        embed_tokens=SimpleNamespace(weight=embedding),
        norm=SimpleNamespace(weight=mapped["norm"]),
        rotary_emb=rotary,
        layers=blocks,
    )
    head = SimpleNamespace(weight=head_rows, bias=None, packed=linears["head"])
    model = SimpleNamespace(config=config, model=body, lm_head=head)
    return LeanTarget(model, name, kernel=kernel)


def _write(path: Path, tensors: Mapping[str, Tensor], told: Mapping[str, str]) -> None:
    """A safetensors file, one tensor after the other, so that no second copy is made in memory."""
    header: Json = {"__metadata__": dict(told)}
    end = 0
    for name, tensor in tensors.items():
        start = end
        end = start + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNED)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors.values():
            numbers = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
            file.write(numbers.data)


class StoredConfig:
    """A Hugging Face config as it was when its model was read, without importing its class.

    Plain values are at hand; whatever else the config has is read from the folder when asked for.
    """

    def __init__(self, source: Source, held: Json) -> None:
        self._source = source
        self._held = held

    @staticmethod
    def of(config: Theirs) -> Json:
        """What to keep of a config, as JSON holds it."""
        plain = {}
        for name, value in vars(config).items():
            if not name.startswith("_") and _is_json(value):
                plain[name] = value
        return {
            "plain": plain,
            "names": dir(config),
            "diff": json.loads(json.dumps(config.to_diff_dict(), default=str)),
        }

    def to_diff_dict(self) -> Json:
        """What differs from the defaults of its class."""
        diff: Json = self._held["diff"]
        return diff

    def __getattr__(self, name: str) -> object:
        held = vars(self).get("_held", {"plain": {}, "names": ()})
        if name in held["plain"]:
            return held["plain"][name]
        if name not in held["names"]:
            raise AttributeError(name)
        return getattr(self._whole, name)

    @cached_property
    def _whole(self) -> Theirs:
        return read_their_config(self._source)


def _is_json(value: object) -> bool:
    """Whether JSON gives back the same value."""
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False
