"""transformers 5.24 with `speculation_type="dflash"`: DFlash v1 whose layers look both ways.

It takes one class, MuseGlimmerAssistantModel, which is v1's network under two other names, without
biases, scales and causal layers.
"""

from pathlib import Path

from flashdraft.export.blocks import (
    head_losses,
    network_of,
    refuse_normed,
    refuse_parts,
    refuse_raw,
    refuse_scales,
)
from flashdraft.export.order import Converted, Exported, Order, refused, write_folder
from flashdraft.export.tables import refuse_tables, without_reduction
from flashdraft.formats.config import DraftConfig
from flashdraft.formats.parse import Fields

__all__ = ["convert", "export", "told"]

_ENGINE = "transformers"
_NAMES = {
    "fc.weight": "encoder.fc.weight",
    "hidden_norm.weight": "encoder.output_norm_enc.weight",
}
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "max_position_embeddings",
    "block_size",
    "mask_token_id",
)
_COMMAND = """\
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
target = AutoModelForCausalLM.from_pretrained({target!r})
draft = AutoModel.from_pretrained({draft!r})
tokenizer = AutoTokenizer.from_pretrained({target!r})
prompt = tokenizer("PROMPT", return_tensors="pt")
answer = target.generate(**prompt, assistant_model=draft, speculation_type="dflash")
print(tokenizer.decode(answer[0]))"""


def convert(order: Order) -> Converted:
    """What its class reads. Raises CheckpointError for a drafter that it cannot have."""
    refuse_parts(order, _ENGINE, ("dflash",))
    refuse_tables(order, _ENGINE)
    refuse_raw(order, _ENGINE)
    refuse_normed(order, _ENGINE)
    refuse_scales(order, _ENGINE, ("input_embedding_scale",))
    _check_layers(order)
    losses = head_losses(order) + without_reduction(order, _ENGINE)
    if order.config.output_multiplier != 1 or order.config.final_logit_softcapping is not None:
        losses += ("the scale and cap of its logits, which change no greedy draft",)

    config, tensors = network_of(order)
    renamed = {_NAMES.get(name, name): tensor for name, tensor in tensors.items()}
    script = _COMMAND.format(target=order.target_name, draft=str(order.out))
    return Converted(_json(config), renamed, Exported(("python", "-c", script), losses))


def told(order: Order) -> Exported:
    """What a user would be told. Raises CheckpointError."""
    return convert(order).exported


def export(order: Order, folder: Path) -> Exported:
    """config.json and model.safetensors."""
    return write_folder(folder, convert(order))


def _check_layers(order: Order) -> None:
    config = order.config
    if config.sliding_window is not None:
        why = "its layers have windows, which that class counts otherwise"
        raise refused(order, _ENGINE, why, hint="`--to zlab` and `--to vllm` have such layers")
    if any(mask.causal for mask in config.masks):
        why = "its layers are causal inside a block"
        raise refused(order, _ENGINE, why, hint="`--to zlab` and `--to vllm` have such layers")
    if config.attention_bias:
        why = "its attention has biases"
        raise refused(order, _ENGINE, why, hint="`--to zlab` and `--to vllm` have them")
    if config.output_multiplier <= 0:
        why = f"its output_multiplier is {config.output_multiplier}"
        raise refused(order, _ENGINE, why, hint="`--to zlab` keeps it")


def _json(config: DraftConfig) -> Fields:
    written: Fields = {
        "architectures": ["MuseGlimmerAssistantModel"],
        "model_type": "muse_glimmer_assistant",
        "hidden_act": "silu",
    }
    for name in _SIZES:
        written[name] = getattr(config, name)
    # Without a window in any, which a sliding one has by that class's default.
    written["layer_types"] = ["full_attention"] * config.num_hidden_layers
    written["rope_parameters"] = {"rope_type": "default", **config.rope_parameters}
    written["target_layer_ids"] = list(config.target_layer_ids)
    written["dtype"] = config.dtype
    return written
