"""Whether a drafter and a target belong together, as far as their shapes tell."""

from typing import Protocol

from flashdraft.errors import DraftMismatch
from flashdraft.formats.config import DraftConfig

__all__ = ["Shape", "check_target"]


class Shape(Protocol):
    """What of a target has to fit: a loaded one, or its config.json alone."""

    @property
    def name(self) -> str: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...


def check_target(config: DraftConfig, target: Shape, *, num_embeddings: int | None = None) -> None:
    """Raises DraftMismatch where this drafter cannot have been made for this target.

    Vocabularies of two lengths fit where their common ids do: one is cut or padded.
    num_embeddings: of a drafter's own.
    """
    num_layers = config.num_target_layers
    width = config.feature_size
    but = f"but `{target.name}` has"
    hint = f"it was trained for a target with {num_layers or 'other'} layers of size {width}"
    if width != target.hidden_size:
        got = f"the draft has hidden size {width}, {but} {target.hidden_size}"
        raise DraftMismatch(got, hint=hint)

    last = target.num_layers  # its output is the final normed state, which DFlash does not read
    if config.method == "dflash":
        last -= 1
    first = -1 if config.method == "dflash" else 0  # -1: the embeddings
    for layer in config.target_layer_ids:
        if not first <= layer <= last:
            got = f"the draft wants hidden states of layer {layer}"
            raise DraftMismatch(f"{got}, {but} {target.num_layers} layers", hint=hint)

    if num_layers and num_layers != target.num_layers:
        got = f"the draft was made for a target with {num_layers} layers"
        raise DraftMismatch(f"{got}, {but} {target.num_layers}", hint=hint)

    rows = num_embeddings or target.vocab_size
    mask = config.mask_token_id
    if config.method == "dflash" and not 0 <= mask < rows:
        got = f"the draft fills its blocks with the mask token {mask}, {but} {rows} tokens"
        hint = (
            "its row of the embedding is missing: take the target whose vocabulary was not cut, "
            "or a drafter with embed_tokens"
        )
        raise DraftMismatch(got, hint=hint)
