"""What is asked of an exporter, and what it answers.

Knows the facts of a drafter and of a target's config.json. Does not know any engine.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from flashdraft import hub
from flashdraft.errors import CheckpointError, ModelNotFound
from flashdraft.formats.config import DraftConfig

__all__ = ["Exported", "Order", "TargetShape", "read_target", "refused"]


@dataclass(frozen=True)
class TargetShape:
    """A target as far as its config.json tells."""

    name: str  # what an engine is told: a hub id, or a folder
    folder: Path
    hidden_size: int
    num_layers: int
    vocab_size: int


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
    def target_name(self) -> str:
        """For a command."""
        return "TARGET" if self.target is None else self.target.name


class Exported(NamedTuple):
    """What a user is told of an export."""

    command: tuple[str, ...]  # that serves it, word by word
    losses: tuple[str, ...] = ()  # what of the drafter that engine does not have, a line each


def read_target(name: str) -> TargetShape:
    """A target by built-in name, hub id or folder, whose weights are not read."""
    files = hub.resolve(name)
    if not isinstance(files, Path):
        got = f"`{name}` is a GGUF file of an architecture that is not converted here"
        raise ModelNotFound(got, hint="give the target's Hugging Face folder or hub id")

    config: Mapping[str, Any] = hub.read_config(files)
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
    return TargetShape(told, files, hidden_size, num_layers, vocab_size)


def refused(order: Order, engine: str, why: str, *, hint: str) -> CheckpointError:
    """For a drafter that an engine cannot have."""
    return CheckpointError(f"{engine} cannot have `{order.draft}`: {why}", hint=hint)
