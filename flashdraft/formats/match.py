"""Whether a drafter and a target belong together."""

from flashdraft.errors import DraftMismatch
from flashdraft.formats.config import DraftConfig
from flashdraft.models.target import Target

__all__ = ["check_target"]


def check_target(config: DraftConfig, target: Target, *, num_embeddings: int | None = None) -> None:
    """Raises DraftMismatch where this drafter cannot have been made for this target.

    Vocabularies of two lengths fit where their common ids do: one is cut or padded. num_embeddings: of a drafter's own.
    """
    layers, but = config.num_target_layers, f"but `{target.name}` has"
    hint = (
        f"it was trained for a target with {layers or 'other'} layers of size {config.hidden_size}"
    )
    if config.hidden_size != target.hidden_size:
        raise DraftMismatch(
            f"the draft has hidden size {config.hidden_size}, {but} {target.hidden_size}", hint=hint
        )
    if beyond := [
        i
        for i in config.target_layer_ids
        if not 0 <= i <= target.num_layers - (config.method == "dflash")
    ]:
        raise DraftMismatch(
            f"the draft wants hidden states of layer {beyond[0]}, {but} {target.num_layers} layers",
            hint=hint,
        )
    if layers and layers != target.num_layers:
        raise DraftMismatch(
            f"the draft was made for a target with {layers} layers, {but} {target.num_layers}",
            hint=hint,
        )
    rows, mask = num_embeddings or target.vocab_size, config.mask_token_id
    if config.method == "dflash" and not 0 <= mask < rows:
        hint = "its row of the embedding is missing: take the target whose vocabulary was not cut, or a drafter with embed_tokens"
        raise DraftMismatch(
            f"the draft fills its blocks with the mask token {mask}, {but} {rows} tokens", hint=hint
        )
