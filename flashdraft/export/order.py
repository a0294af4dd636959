"""What is asked of an exporter, and what it answers.

Knows the facts of a drafter and of a target's config.json. Does not know any engine.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from flashdraft import hub
from flashdraft.errors import CheckpointError, ModelNotFound
from flashdraft.files import write_file, write_tensors
from flashdraft.formats.config import DraftConfig
from flashdraft.formats.foreign import is_draft
from flashdraft.formats.parse import Fields

__all__ = [
    "Converted",
    "Exported",
    "Order",
    "TargetShape",
    "kind_of",
    "read_target",
    "refused",
    "write_folder",
]

_LANGUAGE_MODELS = ("ForCausalLM", "ForConditionalGeneration")  # how their classes end
_MARKOV = ("markov", "markov_gated", "markov_rnn")


@dataclass(frozen=True)
class TargetShape:
    """A target as far as its config.json tells."""

    name: str  # what an engine is told: a hub id, or a folder
    folder: Path
    hidden_size: int
    num_layers: int
    vocab_size: int
    classes: tuple[str, ...]  # `architectures`


@dataclass(frozen=True)
class Order:
    """A drafter that was read and checked, and what it shall become."""

    draft: str  # as the user calls it
    config: DraftConfig
    tensors: Mapping[str, Tensor]  # every one of the folder, under published names, as stored
    target: TargetShape | None  # that it was found to fit
    out: Path  # where the folder will lie; an exporter writes into another one
    dtype: str  # of the matrices that are written: config.dtype, or "q8_0"

    @property
    def reads_last_layer(self) -> bool:
        """Whether a feature is the last layer's output, which some engines hand out normed, and
        some not at all; False where the target's depth is not known."""
        depth = self.config.num_target_layers if self.target is None else self.target.num_layers
        return depth > 0 and depth - 1 in self.config.target_layer_ids

    @property
    def target_name(self) -> str:
        """For a command."""
        return "TARGET" if self.target is None else self.target.name


class Exported(NamedTuple):
    """What a user is told of an export."""

    command: tuple[str, ...]  # that serves it, word by word
    losses: tuple[str, ...] = ()  # what of the drafter that engine does not have, a line each
    notes: tuple[str, ...] = ()  # what else is to be known of it, a line each


class Converted(NamedTuple):
    """A drafter in an engine's form, not written yet."""

    config: Fields  # config.json
    tensors: dict[str, Tensor]
    exported: Exported


def kind_of(config: DraftConfig) -> str:
    """Which published kind of drafter it is: a method's name, or for block drafters dflash,
    dflash2, dspark or domino; `mixed` for parts that no published kind has together.

    The swiglu head counts as none: it can be left out.
    """
    if config.method != "dflash":
        return config.method

    head = config.sequential_head
    has_convolutions = bool(config.conv_kernel_size)
    if head == "selector" and has_convolutions and not config.anchor_first:
        return "dflash2"
    if head == "selector" or has_convolutions:
        return "mixed"
    if head == "domino":
        return "domino"
    if head in _MARKOV or config.anchor_first or config.confidence_head:
        return "dspark"
    return "dflash"


def read_target(name: str) -> TargetShape:
    """A target by built-in name, hub id or folder, whose weights are not read."""
    files = hub.resolve(name)
    if not isinstance(files, Path):
        got = f"`{name}` is a GGUF file of an architecture that is not converted here"
        raise ModelNotFound(got, hint="give the target's Hugging Face folder or hub id")

    config: Mapping[str, Any] = hub.read_config(files)
    classes = tuple(map(str, config.get("architectures") or ()))
    is_model = any(name.endswith(_LANGUAGE_MODELS) for name in classes)
    if is_draft(config) and not is_model:
        hint = "give the language model that the drafter is for"
        raise CheckpointError(f"`{name}` is a drafter, not a target", hint=hint)
    text = config.get("text_config")
    if isinstance(text, Mapping):  # a multimodal wrapper
        config = text
    try:
        hidden_size = int(config["hidden_size"])
        num_layers = int(config["num_hidden_layers"])
        vocab_size = int(config["vocab_size"])
    except (KeyError, TypeError, ValueError) as error:
        got = f"the config of `{name}` lacks or garbles {error}"
        raise CheckpointError(got, hint="give the language model that the drafter is for") from None

    is_hub_id = not Path(name).expanduser().exists() and name not in hub.BUILTIN
    told = name if is_hub_id else str(files)
    return TargetShape(told, files, hidden_size, num_layers, vocab_size, classes)


def write_folder(folder: Path, converted: Converted) -> Exported:
    """A folder of two files. The tensors stay in the dtype that they were stored in."""
    stored = {}
    for name, tensor in converted.tensors.items():
        stored[name] = tensor.contiguous().clone()  # a file holds no memory twice
    write_tensors(folder / "model.safetensors", stored)
    text = json.dumps(converted.config, indent=2) + "\n"
    write_file(folder / "config.json", text.encode())
    return converted.exported


def refused(order: Order, engine: str, why: str, *, hint: str) -> CheckpointError:
    """For a drafter that an engine cannot have."""
    return CheckpointError(f"{engine} cannot have `{order.draft}`: {why}", hint=hint)
