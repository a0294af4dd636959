"""SGLang 0.5.23: DFlash v1, DFlash 2, DSpark, Domino and EAGLE-3.

Its loader passes over tensors that it does not know, without a word, so none is written; keys in
`dflash_config` hold before those at the top; drafters have the target's embedding and, but for
EAGLE-3, its lm_head.
"""

from dataclasses import replace
from pathlib import Path

from flashdraft.export.blocks import (
    head_losses,
    lifted,
    network_of,
    refuse_logits,
    refuse_parts,
    refuse_raw,
    refuse_scales,
    text_config,
)
from flashdraft.export.order import Converted, Exported, Order, kind_of, refused, write_folder
from flashdraft.export.tables import (
    EMBEDDING,
    HEAD,
    own_tables,
    refuse_tables,
    with_head,
    without_reduction,
)
from flashdraft.formats.config import DraftConfig
from flashdraft.formats.shapes import tensor_shapes
from flashdraft.formats.written import json_of

__all__ = ["convert", "export", "told"]

_ENGINE = "SGLang"
_EAGLE3_LACKS = {
    "norm_before_residual": "its residual is the normed state (norm_before_residual)",
    "qk_norm": "its queries and keys are normed",
    "attention_bias": "its attention has biases",
}
_LAST_OUTPUTS = ("gpt_oss", "gemma4")  # families that hand out what their last layer puts out
_KINDS = ("dflash", "dflash2", "dspark", "domino", "eagle3")


def convert(order: Order) -> Converted:
    """What SGLang reads. Raises CheckpointError for a drafter that it cannot have."""
    refuse_parts(order, _ENGINE, _KINDS)
    refuse_raw(order, _ENGINE)
    refuse_logits(order, _ENGINE)
    _check_layers(order)
    kind = kind_of(order.config)
    if kind == "eagle3":
        return _eagle3(order)

    refuse_tables(order, _ENGINE)
    if kind != "dflash2":
        refuse_scales(order, _ENGINE, ("input_embedding_scale",))
    if kind == "dspark":
        _check_dspark(order)
    losses = head_losses(order) + without_reduction(order, _ENGINE)

    config, tensors = network_of(order)
    written = json_of(config)
    if not written.get("num_target_layers"):
        written.pop("num_target_layers", None)  # a 0 is refused
    if kind == "dspark":
        written = lifted(written)
    algorithm = "DSPARK" if kind == "dspark" else "DFLASH"
    exported = Exported(_command(order, config, algorithm), losses)
    return Converted(written, tensors, exported)


def told(order: Order) -> Exported:
    """What a user would be told. Raises CheckpointError."""
    return convert(order).exported


def export(order: Order, folder: Path) -> Exported:
    """config.json and model.safetensors."""
    return write_folder(folder, convert(order))


def _command(order: Order, config: DraftConfig, algorithm: str) -> tuple[str, ...]:
    command = ["sglang", "serve", "--model-path", order.target_name]
    command += ["--speculative-algorithm", algorithm]
    command += ["--speculative-draft-model-path", str(order.out)]
    if algorithm == "EAGLE3":
        command += ["--speculative-num-steps", str(config.block_size - 1)]
        command += ["--speculative-eagle-topk", "1"]
    command += ["--speculative-num-draft-tokens", str(config.block_size)]
    return tuple(command)


def _check_layers(order: Order) -> None:
    """Its models hand out the inputs of layers; what comes out of the last one only few do."""
    if not order.reads_last_layer or order.config.ids_by_target:
        return
    family = "" if order.target is None else str(text_config(order.target).get("model_type"))
    if not family.startswith(_LAST_OUTPUTS):
        why = "it reads the last layer's output, which that engine does not hand out"
        raise refused(order, _ENGINE, why, hint="`--to vllm` does, before the final norm")


def _check_dspark(order: Order) -> None:
    config = order.config
    refuse_scales(order, _ENGINE, ("output_multiplier", "final_logit_softcapping"))
    if not config.anchor_first:
        why = "it is a DSpark drafter whose anchor's row predicts nothing"
        raise refused(order, _ENGINE, why, hint="`--to vllm` has both layouts")
    has_markov_head = config.sequential_head not in (None, "swiglu")  # which is left out
    if config.draft_vocab_size is not None and has_markov_head:
        why = "its Markov head is over a reduced vocabulary"
        raise refused(order, _ENGINE, why, hint="`--to vllm` keeps it")


def _eagle3(order: Order) -> Converted:
    """SpecForge's dialect: `midlayer`, and layers told by their outputs in `eagle_config`."""
    config = order.config
    refuse_scales(order, _ENGINE, ("input_embedding_scale",))
    for name, why in _EAGLE3_LACKS.items():
        if getattr(config, name):
            raise refused(order, _ENGINE, why, hint="`--to vllm` has it")
    if config.num_hidden_layers > 1 or not config.fused:
        why = "it has plain layers behind the first one, or no fc"
        raise refused(order, _ENGINE, why, hint="`--to vllm` has it")
    is_as_wide = config.feature_size == config.hidden_size
    if is_as_wide and EMBEDDING in own_tables(order):
        why = "it has an embedding of its own, and that engine gives drafters the target's"
        hint = "`--to vllm` keeps it; if it is a copy of the target's, say --target"
        raise refused(order, _ENGINE, why, hint=hint)

    tensors = {name: order.tensors[name] for name in tensor_shapes(config)}
    losses: tuple[str, ...] = ()
    has_head = HEAD in order.tensors or order.target is not None
    if config.tied_head:
        config = replace(config, draft_vocab_size=config.vocab_size)
    elif config.draft_vocab_size is not None and has_head:
        tensors |= with_head(order)
    elif HEAD in own_tables(order):
        tensors[HEAD] = order.tensors[HEAD]
        config = replace(config, draft_vocab_size=config.vocab_size)
    else:  # the target's lm_head
        losses = without_reduction(order, _ENGINE)
        config = replace(config, draft_vocab_size=None)

    written = json_of(config)
    for name in ("flashdraft_config", "eagle_aux_hidden_state_layer_ids"):
        written.pop(name, None)
    written["eagle_config"] = {"use_aux_hidden_state": True}
    if config.target_layer_ids:
        layers = list(config.target_layer_ids)
        written["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = layers
    written.setdefault("draft_vocab_size", None)  # its class asks for the key
    return Converted(written, tensors, Exported(_command(order, config, "EAGLE3"), losses))
