"""llama.cpp: DFlash v1, DFlash 2 and DSpark, as a GGUF file of its architecture `dflash`.

Which drafters it cannot run, what it lacks of others, and its server's command line: of 0c1e570
(October 2026). Names and keys stand in `gguf_keys`.
"""

import math
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from torch import Tensor

from flashdraft.export.blocks import target_cap, text_config
from flashdraft.export.gguf_keys import (
    Key,
    Keys,
    keys_of,
    rope_of,
    tensor_name,
)
from flashdraft.export.gguf_tokens import read_tokens
from flashdraft.export.order import Exported, Order, TargetShape, refused
from flashdraft.export.tables import EMBEDDING, HEAD, own_tables, target_ids
from flashdraft.export.target_tables import embedding_of, head_of
from flashdraft.formats.foreign import Json
from flashdraft.formats.shapes import tensor_shapes
from flashdraft.formats.weights import MASK_ROW
from flashdraft.process import FLOATS

__all__ = ["FILE", "export", "told"]

FILE = "draft.gguf"
_DTYPES = {
    "float64": GGMLQuantizationType.F32,  # its widest
    "float32": GGMLQuantizationType.F32,
    "float16": GGMLQuantizationType.F16,
    "bfloat16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
}

_ENGINE = "llama.cpp"
_HEADS = (None, "swiglu", "selector", "markov")
# Families whose layers' states it does not hand out: its server would end at the first draft.
_SILENT_TARGETS = (
    "qwen2",
    "gemma3_text",
    "phi3",
    "glm4",
    "granitemoehybrid",
    "falcon_h1",
    "bamba",
    "olmo_hybrid",
    "kimi_linear",
)
_SCALES = (
    "embedding_multiplier",
    "scale_emb",
    "logits_scaling",
    "logit_scale",
    "lm_head_multiplier",
)
_PLAIN = "`flashdraft train` without --head gives one that it runs"

Tensors = dict[str, Tensor]


def told(order: Order) -> Exported:
    """What a user would be told. Raises CheckpointError."""
    _check_network(order)
    if order.target is not None:
        _check_target(order, order.target, text_config(order.target))
    return Exported(_command(order), _losses(order))


def export(order: Order, folder: Path) -> Exported:
    """The drafter's GGUF file. Raises CheckpointError before anything is written."""
    target = order.target
    if target is None:
        hint = "--target MODEL: the drafter's file holds its tokens"
        raise refused(order, _ENGINE, "no target is given", hint=hint)

    of_target = text_config(target)
    _check_network(order)
    _check_target(order, target, of_target)
    keys, tensors = _written(order, target, of_target)
    tokens = read_tokens(target)

    writer = GGUFWriter(folder / FILE, "dflash")
    writer.add_type("model")
    writer.add_name(Path(order.draft).name)
    for name, value in keys.items():
        _add_key(writer, f"dflash.{name}", value)
    tokens.write(writer, order.config.mask_token_id)
    for name, tensor in tensors.items():
        _add_tensor(writer, tensor_name(name), tensor, order.dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Exported(_command(order), _losses(order))


def _command(order: Order) -> tuple[str, ...]:
    config = order.config
    by_dspark = config.sequential_head == "markov" or config.anchor_first
    return (
        "llama-server",
        "-m",
        "TARGET.gguf",
        "-md",
        str(order.out / FILE),
        "--spec-type",
        "draft-dspark" if by_dspark else "draft-dflash",
        "--spec-draft-n-max",
        str(config.block_size - 1),
    )


def _losses(order: Order) -> tuple[str, ...]:
    config = order.config
    losses = []
    if config.sequential_head == "swiglu":
        losses.append("its sequential head (swiglu): rows are guessed without the token before")
    has_markov = config.sequential_head == "markov"
    if config.confidence_head and not (has_markov and config.confidence_with_markov):
        losses.append("its confidence head, which llama.cpp reads beside a Markov head's embedding")
    if len({mask.causal for mask in config.masks}) > 1:
        losses.append(
            "that its sliding layers are causal inside a block: all layers read it in both "
            "directions, so fewer drafts may be accepted"
        )
    return tuple(losses)


# --- What llama.cpp cannot run


def _check_network(order: Order) -> None:
    """Raises CheckpointError, by name."""
    config = order.config
    if config.method != "dflash":
        hint = "for EAGLE-3 use llama.cpp's own convert_hf_to_gguf.py with --target-model-dir"
        raise refused(order, _ENGINE, f"it is a drafter of {config.method}", hint=hint)
    if order.reads_last_layer:
        why = "it reads the output of the target's last layer"
        raise refused(order, _ENGINE, why, hint="there only the inputs of layers are handed out")

    head = config.sequential_head
    if head not in _HEADS:
        why = f"its sequential head is {head}, and of Markov heads the plain one runs there"
        raise refused(order, _ENGINE, why, hint="vLLM and SGLang have the others")
    if config.attention_bias:
        why = "its q, k, v and o projections have biases"
        raise refused(order, _ENGINE, why, hint="vLLM and SGLang have them")
    if len(config.ropes) > 1:
        why = "its sliding and its full layers turn by different rotary positions"
        raise refused(order, _ENGINE, why, hint="there all layers have the same")
    windows = {mask.window for mask in config.masks} - {None}
    if len(windows) > 1:
        raise refused(order, _ENGINE, "its windows differ", hint="there all layers have the same")

    if head == "selector":
        _check_selector(order)
    elif config.conv_kernel_size:
        why = "it has DFlash 2's convolutions without a candidate selector"
        raise refused(order, _ENGINE, why, hint="there the two go together")
    if head == "markov" and (config.final_logit_softcapping or config.output_multiplier != 1):
        why = "its logits are scaled or capped before its Markov head adds to them"
        raise refused(order, _ENGINE, why, hint="vLLM and SGLang do that")


def _check_selector(order: Order) -> None:
    config = order.config
    room = config.head_choices * (config.head_choices + 1)
    if config.hidden_size < room:
        why = (
            f"its selector scores pairs of {config.head_choices} choices, {room} numbers a row, "
            f"more than its hidden size {config.hidden_size}"
        )
        raise refused(order, _ENGINE, why, hint="fewer choices (selector_top_k) fit")
    if config.anchor_first:
        why = "the anchor's row predicts, which its DFlash 2 passes over"
        raise refused(order, _ENGINE, why, hint=_PLAIN)


def _check_target(order: Order, target: TargetShape, of_target: Json) -> None:
    """Raises CheckpointError where llama.cpp cannot draft beside this target."""
    config = order.config
    family = str(of_target.get("model_type"))
    if family in _SILENT_TARGETS:
        why = f"of a target of family {family} it does not hand out what layers put out"
        raise refused(order, _ENGINE, why, hint="a later llama.cpp may: ask for it there")
    if config.mask_token_id >= target.vocab_size:
        why = f"its mask token {config.mask_token_id} is none of the target's"
        raise refused(order, _ENGINE, why, hint="take the target whose vocabulary was not cut")

    scales = [name for name in _SCALES if of_target.get(name) not in (None, 1)]
    if scales:
        why = f"its target scales embeddings or logits ({scales[0]})"
        raise refused(order, _ENGINE, why, hint="drafters have the tables as they are there")
    head = config.sequential_head
    if head in ("selector", "markov") and config.vocab_size != target.vocab_size:
        why = f"its head knows {config.vocab_size} tokens, its target {target.vocab_size}"
        raise refused(order, _ENGINE, why, hint="take the target that it was trained for")
    if head == "markov" and target_cap(order) is not None:
        why = "its target caps logits, which there happens behind the Markov head"
        raise refused(order, _ENGINE, why, hint="vLLM and SGLang cap before it")
    scales_itself = config.input_embedding_scale != 1 or MASK_ROW in order.tensors
    if _target_scale(order, of_target) != 1 and scales_itself:
        why = "it scales the embedding of a target that scales it already"
        raise refused(order, _ENGINE, why, hint="readers of input_embedding_scale differ here")


# --- What is written


def _written(order: Order, target: TargetShape, of_target: Json) -> tuple[Keys, Tensors]:
    """Keys without their prefix; tensors under published names."""
    config = order.config
    rope = of_target.get("rope_parameters") or of_target.get("rope_scaling") or {}
    by_sections = "mrope_section" in rope
    rope_keys, divisors = rope_of(config, by_sections=by_sections)
    if by_sections and divisors is not None:
        why = f"it scales rotary positions by {config.rope_parameters['rope_type']}, unlike any key"
        raise refused(order, _ENGINE, why, hint="beside a target with M-RoPE none are read")

    tensors = _network(order)
    tables = _tables(order, target)
    keys = keys_of(config) | rope_keys
    scale = config.input_embedding_scale
    if "embed_tokens.weight" not in tables:  # the target's own, as it lies in its file
        scale *= _target_scale(order, of_target)
    if scale != 1:
        keys["embedding_scale"] = scale
    if config.sequential_head == "selector":
        keys |= _logit_keys(order, of_target)
        if not config.conv_kernel_size:
            keys |= {"conv_kernel_size": 1, "conv_group_size": config.hidden_size}
            tensors |= _identities(order)
    tensors |= tables
    if divisors is not None:
        tensors["rope_freqs.weight"] = divisors
    return keys, tensors


def _target_scale(order: Order, of_target: Json) -> float:
    """What the target's family multiplies its embedding by, where the drafter has it so, too."""
    is_gemma = str(of_target.get("model_type")).startswith("gemma")
    if not is_gemma or order.config.raw_tables:
        return 1.0
    return math.sqrt(float(of_target["hidden_size"]))


def _logit_keys(order: Order, of_target: Json) -> Keys:
    """DFlash 2 adds to logits: they are scaled and capped before."""
    keys: Keys = {}
    config = order.config
    if config.output_multiplier != 1:
        keys["logit_scale"] = config.output_multiplier
    cap = config.final_logit_softcapping or target_cap(order)
    if cap is not None:
        keys["final_logit_softcapping"] = cap
    return keys


def _network(order: Order) -> Tensors:
    """The drafter's own tensors, without those that llama.cpp does not read."""
    config = order.config
    has_markov = config.sequential_head == "markov"
    keeps_confidence = has_markov and config.confidence_with_markov
    tensors = {}
    for name in tensor_shapes(config):
        is_lost = name.startswith("sequential_head.")
        if name.startswith("confidence_head."):
            is_lost = not keeps_confidence
        if not is_lost:
            tensors[name] = order.tensors[name]
    return tensors


def _identities(order: Order) -> Tensors:
    """Convolutions that change nothing: there no selector is without them."""
    hidden = order.config.hidden_size
    tensors = {}
    for index in range(order.config.num_hidden_layers):
        for name in ("attention_conv", "mlp_conv"):
            place = f"layers.{index}.{name}"
            tensors[f"{place}.base_kernel"] = torch.ones(2, 1, hidden, **FLOATS)
            projection = torch.zeros(2, hidden, **FLOATS)
            tensors[f"{place}.kernel_projection.weight"] = projection
    return tensors


def _tables(order: Order, target: TargetShape) -> Tensors:
    """The drafter's own embedding and lm_head and its vocabulary, as far as the target's do not
    serve.

    llama.cpp takes an embedding of the drafter's own for its lm_head, too, unless that is there.
    """
    tables: Tensors = {}
    own = own_tables(order)
    embedding = _own_embedding(order, target, own.get(EMBEDDING))
    head = own.get(HEAD)
    if embedding is not None:
        tables[EMBEDDING] = embedding

    if "d2t" in order.tensors:
        ids = target_ids(order)
        if int(ids.max()) >= target.vocab_size:
            why = f"its vocabulary has token {int(ids.max())}, which is none of its target's"
            raise refused(order, _ENGINE, why, hint="take the target whose vocabulary was not cut")
        tables["d2t"] = ids
        tables[HEAD] = head_of(target)[ids] if head is None else head
    elif head is not None:
        tables[HEAD] = _of_size(head, target.vocab_size)
    elif embedding is not None:
        tables[HEAD] = head_of(target)
    return tables


def _own_embedding(order: Order, target: TargetShape, embedding: Tensor | None) -> Tensor | None:
    """None: the target's serves. A row of the mask token's own makes it another table."""
    row = order.tensors.get(MASK_ROW)
    if row is None and embedding is None:
        return None
    table = embedding_of(target) if embedding is None else embedding
    table = _of_size(table, target.vocab_size)
    if row is not None:
        table = table.clone()
        table[order.config.mask_token_id] = row.to(table.dtype)
    return table


def _of_size(table: Tensor, count: int) -> Tensor:
    """A row for every token of the target; those that the drafter does not know are zeros."""
    missing = max(count - len(table), 0)
    return torch.nn.functional.pad(table, (0, 0, 0, missing))[:count]


# --- The file


def _add_key(writer: GGUFWriter, name: str, value: Key) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def _add_tensor(writer: GGUFWriter, name: str, tensor: Tensor, dtype: str) -> None:
    """Matrices in this dtype; norms, kernels and biases in float32, ids as they are."""
    if not tensor.is_floating_point():
        writer.add_tensor(name, tensor.numpy())
        return

    kind = _DTYPES[dtype]
    is_vector = tensor.ndim == 1 or "conv_base" in name
    if is_vector:
        kind = GGMLQuantizationType.F32
    elif kind is GGMLQuantizationType.Q8_0 and tensor.shape[-1] % 32:
        kind = GGMLQuantizationType.F16  # its blocks are of 32
    values = gguf.quantize(tensor.float().numpy(), kind)
    writer.add_tensor(name, values, raw_dtype=kind)
