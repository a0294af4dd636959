"""`flashdraft export`: a drafter's folder -> the folder that another engine reads, whole or not at
all.

Knows folders and which exporters there are. Does not know any engine's keys.
"""

import hashlib
import shutil
import tempfile
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Protocol

from flashdraft import __version__, hub
from flashdraft.errors import InvalidParameter
from flashdraft.export.order import (
    Converted,
    Exported,
    Order,
    TargetShape,
    read_target,
    write_folder,
)
from flashdraft.files import appears_whole, locked, output_folder, read_note, write_note
from flashdraft.formats.match import check_target
from flashdraft.formats.parse import given
from flashdraft.formats.read import read_draft
from flashdraft.formats.written import config_of
from flashdraft.loading import open_network, shipped, vocabulary_of

__all__ = ["BUILTIN", "DTYPES", "ENGINES", "export_draft", "in_cache", "told"]

ENGINES = ("zlab", "vllm", "sglang", "llamacpp", "transformers")  # each has a file here
DTYPES = ("auto", "float32", "bfloat16", "float16", "q8_0")
_MADE_BY = "export"
BUILTIN = "smollm2-135m"  # whose drafter a method's name means, where no target is named

_UNCHECKED = (
    "without --target nothing says whether the target's family scales its embedding or caps its "
    "logits (Gemma), nor whether the drafter fits it"
)


class _Exporter(Protocol):
    """Every file of an engine has this function."""

    def export(self, order: Order, folder: Path) -> Exported:
        """Write the engine's files into `folder`, which is empty.

        Raises CheckpointError for a drafter that the engine cannot have.
        """

    def told(self, order: Order) -> Exported:
        """What a user would be told, with nothing written; without a target, of any that fits.

        Raises CheckpointError.
        """


class _Converter(Protocol):
    """A file of an engine that reads config.json and safetensors has this one, too."""

    def convert(self, order: Order) -> Converted: ...


def export_draft(
    draft: str, engine: str, out: Path, target: str | None = None, *, dtype: str = "auto"
) -> Exported:
    """Write what `engine` reads into the folder `out`.

    draft, target: as `flashdraft.load` takes them. dtype: of DTYPES, for llamacpp; "auto": as
    stored. Raises InvalidParameter where `out` holds anything that no export wrote, and
    CheckpointError for a drafter that is damaged, does not fit the target, or that the engine
    cannot have.
    """
    name = shipped(draft, target or BUILTIN)
    if target is None and name != draft:
        target = BUILTIN
    source = hub.resolve(name)
    out = output_folder(out, inputs=[source] if isinstance(source, Path) else [])
    _check_own(out)

    if dtype != "auto" and engine != "llamacpp":
        got = f"{engine} reads weights as they are stored, not in another dtype"
        raise InvalidParameter(got, hint="leave dtype out", option="dtype")
    order = _order(name, out, None if target is None else read_target(target))
    if dtype != "auto":
        order = replace(order, dtype=dtype)
    exporter: _Exporter = import_module(f"flashdraft.export.{engine}")
    with locked(out):
        _check_own(out)
        exported = _written(exporter, order, engine)
    if target is None:
        exported = exported._replace(notes=(*exported.notes, _UNCHECKED))
    return exported


def told(order: Order, engine: str) -> Exported:
    """What would be told of an export that is not made.

    Raises CheckpointError for a drafter that the engine cannot have.
    """
    exporter: _Exporter = import_module(f"flashdraft.export.{engine}")
    return exporter.told(order)


def in_cache(draft: str, engine: str, target: str) -> Exported:
    """A drafter in an engine's form: as it is where that is its form already, else in the cache
    folder, where it is written once.

    draft: a folder or a hub id. Raises CheckpointError.
    """
    made_of = (hub.identity(draft) or draft, hub.identity(target) or target, __version__)
    known = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16]
    out = hub.cache_dir() / "exports" / f"{engine}-{known}"
    order = _order(draft, out, read_target(target))
    converter: _Converter = import_module(f"flashdraft.export.{engine}")
    converted = converter.convert(order)
    if _is_its_form(order, converted):
        return converter.convert(replace(order, out=Path(draft))).exported

    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        with locked(out), appears_whole(out) as made:
            made.mkdir()
            write_folder(made, converted)
    return converted.exported


def _is_its_form(order: Order, converted: Converted) -> bool:
    """Whether a drafter's own folder says the same as its export, tensor by tensor, in published
    keys."""
    folder = hub.resolve(order.draft)
    assert isinstance(folder, Path)
    written = hub.read_config(folder)
    if given(written, "mask_token") is not None:  # engines want its id
        return False
    if "flashdraft_config" in written or order.tensors.keys() != converted.tensors.keys():
        return False
    for name in ("architectures", "speculators_model_type"):
        if written.get(name) != converted.config.get(name):
            return False
    return config_of(converted.config, order.draft) == order.config


def _order(name: str, out: Path, target: TargetShape | None) -> Order:
    target_name = "" if target is None else target.name
    open_network(name, target_name)  # it loads, or says what is wrong
    folder = hub.resolve(name)
    assert isinstance(folder, Path)  # GGUF files are no drafters: open_network says so
    config, tensors = read_draft(folder, vocabulary_of(target_name))
    if target is not None:
        embedding = tensors.get("embed_tokens.weight")
        num_embeddings = None if embedding is None else len(embedding)
        check_target(config, target, num_embeddings=num_embeddings)
    return Order(name, config, tensors, target, out, config.dtype)


def _written(exporter: _Exporter, order: Order, engine: str) -> Exported:
    """Made in a scratch folder beside `out`; what an earlier export left there goes at the end."""
    out = order.out
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=out.parent, prefix=".tmp-") as aside,
        appears_whole(out) as made,
    ):
        made.mkdir()
        exported = exporter.export(order, made)
        sums = {path.name: _sha256(path) for path in made.iterdir()}
        if out.exists():
            shutil.move(out, aside)

    facts = {
        "engine": engine,
        "draft": {"name": order.draft, "id": hub.identity(order.draft)},
        "files": sums,
    }
    write_note(out, _MADE_BY, facts)
    return exported


def _check_own(out: Path) -> None:
    """Raises InvalidParameter for a folder that holds anything but an earlier export, unchanged."""
    if not out.exists():
        return
    found = sorted(out.iterdir())
    if not found:
        return

    note = read_note(out) or {}
    sums = note.get("files", {}) if note.get("made_by") == _MADE_BY else {}
    for path in found:
        is_ours = path.is_file() and path.name in sums
        if not is_ours or _sha256(path) != sums[path.name]:
            got = f"`{path}` was not written by `flashdraft export`, and would be gone"
            raise InvalidParameter(got, hint="name another folder")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
