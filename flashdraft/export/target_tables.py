"""A target's embedding and lm_head, read from its folder without the rest of it.

Knows names of tensors and files. Does not know what the tables are for.
"""

import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from flashdraft.errors import CheckpointError
from flashdraft.export.order import TargetShape

__all__ = ["embedding_of", "head_of"]

_EMBEDDING = re.compile(r"(.*\.)?embed_tokens\.weight")
_HEAD = re.compile(r"(.*\.)?lm_head\.weight")


def embedding_of(target: TargetShape) -> Tensor:
    """[vocabulary, hidden], as stored. Raises CheckpointError."""
    found = _find(target.folder, _EMBEDDING)
    if found is None:
        got = f"`{target.name}` has no tensor embed_tokens.weight"
        raise CheckpointError(got, hint="give the target's own folder of safetensors")
    return _checked(found, "embed_tokens", target)


def head_of(target: TargetShape) -> Tensor:
    """[vocabulary, hidden]: the lm_head, which is the embedding where it is tied. Raises
    CheckpointError."""
    found = _find(target.folder, _HEAD)
    return embedding_of(target) if found is None else _checked(found, "lm_head", target)


def _find(folder: Path, pattern: re.Pattern[str]) -> Tensor | None:
    """The first tensor of such a name; the language model's own stands before any other's."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if pattern.fullmatch(name):
                        tensor: Tensor = file.get_tensor(name)
                        return tensor
        except (SafetensorError, OSError) as error:
            got = f"`{path}` is damaged: {error}"
            raise CheckpointError(got, hint="fetch it again") from None
    return None


def _checked(table: Tensor, name: str, target: TargetShape) -> Tensor:
    shape = (target.vocab_size, target.hidden_size)
    if not table.is_floating_point() or tuple(table.shape) != shape:
        dtype = str(table.dtype).removeprefix("torch.")
        got = f"the {name} of `{target.name}` is {dtype} of shape {list(table.shape)}"
        hint = f"give the target as it was before it was quantised or cut: {list(shape)} is needed"
        raise CheckpointError(got, hint=hint)
    return table
