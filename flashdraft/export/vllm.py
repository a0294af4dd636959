"""vLLM 0.33: DFlash v1, DFlash 2, DSpark with a vanilla head, and EAGLE-3.

Block drafters in flat folders, as z-lab and DeepSpec write them; in the speculators format where a
reduced vocabulary is kept, and EAGLE-3. A tensor that its loader does not know stops it.
"""

import json
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from flashdraft.errors import CheckpointError
from flashdraft.export.blocks import (
    head_losses,
    lifted,
    network_of,
    refuse_logits,
    refuse_parts,
    refuse_scales,
    target_scale,
)
from flashdraft.export.order import Converted, Exported, Order, kind_of, refused, write_folder
from flashdraft.export.tables import EMBEDDING, HEAD, own_tables, with_head, without_reduction
from flashdraft.formats import speculators
from flashdraft.formats.config import DraftConfig
from flashdraft.formats.parse import Fields
from flashdraft.formats.shapes import tensor_shapes
from flashdraft.formats.written import json_of

__all__ = ["convert", "export", "told"]

_ENGINE = "vLLM"
_KINDS = ("dflash", "dflash2", "dspark", "eagle3")
_SOFTCAP_LOSS = (
    "its final_logit_softcapping, which changes no draft that is the likeliest token (by default "
    "all are)"
)
_LAST_LAYER_NOTE = (
    "it reads the last layer's output before the final norm, as that engine hands it out; readers "
    "of transformers' hidden_states[-1] would give it the normed one"
)


def convert(order: Order) -> Converted:
    """What vLLM reads. Raises CheckpointError for a drafter that it cannot have."""
    refuse_parts(order, _ENGINE, _KINDS)
    kind = kind_of(order.config)
    refuse_logits(order, _ENGINE)
    scale = 1.0 if order.config.raw_tables else target_scale(order)
    if scale != 1 and kind != "dflash2":
        why = "its target scales its embedding, whose bare rows that engine gives drafters"
        raise refused(order, _ENGINE, why, hint="`--to llamacpp` scales them, if it has the rest")
    if kind == "eagle3":
        return _eagle3(order)

    losses = head_losses(order)
    if kind != "dflash2":
        refuse_scales(order, _ENGINE, ("input_embedding_scale",))
    if kind == "dspark":
        _check_dspark(order)
    elif kind == "dflash" and order.config.final_logit_softcapping is not None:
        losses += (_SOFTCAP_LOSS,)

    config, tensors = network_of(order)
    if scale != 1:
        config = replace(config, input_embedding_scale=scale)
    if kind != "dflash2" and _keeps_reduction(order):
        return _reduced(order, config, tensors, losses)
    if kind == "dspark" and order.config.draft_vocab_size is not None:
        hint = "say the target by --target: its lm_head's rows go with it"
        raise refused(order, _ENGINE, "its Markov head is over a reduced vocabulary", hint=hint)

    losses += without_reduction(order, _ENGINE)
    written = json_of(config)
    if kind == "dspark":
        written = lifted(written)
    elif kind == "dflash" and config.output_multiplier != 1:
        written["logit_scale"] = config.output_multiplier
    tensors |= own_tables(order)
    return Converted(written, tensors, _exported(order, _METHODS[kind], losses))


_METHODS = {"dflash": "dflash", "dflash2": "dflash", "dspark": "dspark", "eagle3": "eagle3"}


def told(order: Order) -> Exported:
    """What a user would be told. Raises CheckpointError."""
    return convert(order).exported


def export(order: Order, folder: Path) -> Exported:
    """config.json and model.safetensors."""
    return write_folder(folder, convert(order))


def _exported(order: Order, method: str, losses: tuple[str, ...]) -> Exported:
    """With the command that serves it. method: as the engine calls it."""
    drafter = {
        "method": method,
        "model": str(order.out),
        "num_speculative_tokens": order.config.block_size - 1,
    }
    told = json.dumps(drafter)
    command = ("vllm", "serve", order.target_name, "--speculative-config", told)
    notes = (_LAST_LAYER_NOTE,) if order.reads_last_layer else ()
    return Exported(command, losses, notes)


def _check_dspark(order: Order) -> None:
    """Its Markov head is the vanilla one; scales of logits would be those of the head, too."""
    if order.config.sequential_head not in (None, "swiglu", "markov"):
        why = f"its Markov head is {order.config.sequential_head.removeprefix('markov_')}"
        raise refused(order, _ENGINE, why, hint="it has vanilla ones; `--to sglang` has all three")
    refuse_scales(order, _ENGINE, ("output_multiplier", "final_logit_softcapping"))


def _keeps_reduction(order: Order) -> bool:
    """Whether the rows of a reduced lm_head are at hand: in its file, or in the target's."""
    is_reduced = order.config.draft_vocab_size is not None
    return is_reduced and (HEAD in order.tensors or order.target is not None)


def _reduced(
    order: Order, config: DraftConfig, tensors: dict[str, Tensor], losses: tuple[str, ...]
) -> Converted:
    """The speculators format, which has a reduced vocabulary with its own lm_head.

    A flat folder where layers have windows or are causal, which vLLM takes from that format for
    all layers or for none.
    """
    config = replace(config, draft_vocab_size=order.config.draft_vocab_size)
    classes = [] if order.target is None else list(order.target.classes)
    is_plain = all(mask.window is None and not mask.causal for mask in config.masks)
    if is_plain:
        written = _wrapped(order, config, classes)
    elif kind_of(config) == "dspark":
        written = lifted(json_of(config))
    else:
        written = json_of(config)
    for name, shape in tensor_shapes(config).items():
        tensors[name] = tensors[name][: shape[0]]  # of a head that was made for the layout alone
    tensors |= with_head(order)
    if EMBEDDING in own_tables(order):
        tensors[EMBEDDING] = order.tensors[EMBEDDING]
    method = _METHODS[kind_of(config)]
    return Converted(written, tensors, _exported(order, method, losses))


def _wrapped(order: Order, config: DraftConfig, classes: list[str]) -> Fields:
    try:
        return speculators.wrapped(config, target=order.target_name, target_classes=classes)
    except CheckpointError as error:
        raise refused(order, _ENGINE, f"{error.args[0]}", hint=error.hint or "") from None


def _eagle3(order: Order) -> Converted:
    """The speculators format: `layers.0`, and layers told by hidden_states."""
    config = order.config
    refuse_scales(order, _ENGINE, ("input_embedding_scale",))
    losses: tuple[str, ...] = ()
    if config.final_logit_softcapping is not None:
        losses += (_SOFTCAP_LOSS,)

    if config.attention_bias:
        why = "its attention has biases"
        raise refused(order, _ENGINE, why, hint="FlashDraft runs it")

    tensors: dict[str, Tensor] = {}
    for name in tensor_shapes(config):
        tensors[name.replace("midlayer.", "layers.0.")] = order.tensors[name]
    tensors |= own_tables(order)
    if config.tied_head:
        tensors[HEAD] = order.tensors[EMBEDDING]
    if _keeps_reduction(order):
        tensors |= with_head(order)
    elif config.draft_vocab_size is not None:
        losses += without_reduction(order, _ENGINE)
        config = replace(config, draft_vocab_size=None)
    exported = _exported(order, "eagle3", losses)
    return Converted(_eagle3_json(order, config), tensors, exported)


def _eagle3_json(order: Order, config: DraftConfig) -> Fields:
    classes = [] if order.target is None else list(order.target.classes)
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": config.block_size - 1,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    layers: Fields = {
        "model_type": "qwen3" if config.qk_norm else "llama",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": dict(config.rope_parameters),
        "attention_bias": False,
        "tie_word_embeddings": False,
        "num_aux_hidden_states": config.num_features,
    }
    if not config.fused:
        layers["eagle_config"] = {"use_aux_hidden_state": False}
    if config.output_multiplier != 1:
        layers["logit_scale"] = config.output_multiplier
    written: Fields = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [proposal],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": order.target_name, "architectures": classes},
        },
        "transformer_layer_config": layers,
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "norm_before_residual": config.norm_before_residual,
        "norm_output": config.norm_output,
        "norm_before_fc": config.norm_before_fc,
        "fc_norm": config.fc_norm,
        "tie_word_embeddings": False,
        "dtype": config.dtype,
    }
    if config.target_hidden_size is not None:
        written["target_hidden_size"] = config.target_hidden_size
    if config.target_layer_ids:
        written["eagle_aux_hidden_state_layer_ids"] = _states(order)
    return written


def _states(order: Order) -> list[int]:
    """Its layers as ids of hidden_states, one higher than the layers whose outputs these are.

    Raises CheckpointError where what its ids count shows beside the target alone.
    """
    layers = list(order.config.target_layer_ids)
    if order.config.ids_by_target:
        if order.target is None:
            why = "what its layer ids count shows beside the target alone"
            raise refused(order, _ENGINE, why, hint="say it by --target")
        classes = " ".join(order.target.classes).lower()
        is_deepseek = "deepseek" in classes and layers[0] != 1
        if is_deepseek or max(layers) == order.target.num_layers:
            return layers
    return [layer + 1 for layer in layers]
