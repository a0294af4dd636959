"""EAGLE-3 folders: one network, three dialects of keys and of tensors' names.

SafeAILab, SpecForge, NeMo: keys at the top, tensors `midlayer.*`. speculators: the shape inside
`transformer_layer_config`, tensors `layers.0.*`, plain layers `layers.1.*` behind it. DeepSpec: a
copy of the target's config, `layers.0.*` with norms of q and k, five features.

What no tensor betrays is asked of the keys: which layers their ids mean, whether the residual is
normed, what is fed back. Knows keys, names and shapes; does not know files nor how it runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from flashdraft.errors import CheckpointError
from flashdraft.formats.config import DraftConfig
from flashdraft.formats.foreign import Json, part_of
from flashdraft.formats.parse import Fields, count_of, flag_of, layer_ids_of

__all__ = ["eagle3_completed", "eagle3_fields", "eagle3_json", "eagle3_names", "eagle3_shapes"]

Shape = tuple[int, ...]

_IDS = "eagle_aux_hidden_state_layer_ids"
_USUAL_BLOCK = 6  # nodes, where a folder does not say how many tokens it was trained to draft
_LLAMA = (  # classes whose layer is Llama's
    "LlamaForCausalLMEagle3",
    "Eagle3LlamaForCausalLM",
    "LlamaEagle3DraftModel",
    "Eagle3Speculator",
    "Eagle3DraftModel",
    "LlamaForCausalLM",  # SafeAILab's early folders
)
_QWEN3 = ("Qwen3Eagle3Model", "Eagle3Qwen3ForCausalLM")  # with norms of q and k
_SWITCHES = ("norm_before_residual", "norm_output", "norm_before_fc")
_OLD_NAMES = {
    "layers.0": "midlayer",
    "aux_norm_low": "fc_norm.0",
    "aux_norm_mid": "fc_norm.1",
    "aux_norm_high": "fc_norm.2",
}


# --- Keys


def eagle3_fields(config: Json, where: str, *, wrapper: Json | None = None) -> Fields:
    """What a DraftConfig has of EAGLE-3's own, by a flat config.json.

    wrapper: speculators', where the folder is of that library: its defaults are vLLM's.
    Raises CheckpointError for what is another network, or contradicts itself.
    """
    own = part_of(config, "flashdraft_config")
    speculators = wrapper is not None
    has_norms = _has_norms(config, where, speculators=speculators)
    fields: Fields = {"layer_types": ()}
    fields |= _switches(config, where, speculators=speculators)
    fields |= _reads(config, where, fused=fields["fused"])
    fields["qk_norm"] = has_norms or bool(flag_of(own, "qk_norm"))
    # SafeAILab's layer and its kin have biases where the file holds some, whatever the key says.
    is_theirs = speculators or has_norms
    fields["attention_bias"] = is_theirs and bool(flag_of(config, "attention_bias"))
    fields["tied_head"] = bool(flag_of(config, "tie_word_embeddings"))
    fields["mask_token_id"] = 0
    fields["block_size"] = _block_size(config, wrapper or {})
    fields["raw_tables"] = speculators or bool(flag_of(own, "raw_tables"))
    if config.get("target_hidden_size") not in (None, config.get("hidden_size")):
        fields["target_hidden_size"] = count_of("target_hidden_size", config["target_hidden_size"])
        if not fields["fused"]:
            got = f"`{where}` is of another width than its target, and has no fc between the two"
            hint = "say whether use_aux_hidden_state or target_hidden_size is wrong"
            raise CheckpointError(got, hint=hint)
    _refuse_windows(config, where)
    return fields


def _has_norms(config: Json, where: str, *, speculators: bool) -> bool:
    """Whether its layers are Qwen3's, with norms of q and k. Raises CheckpointError for others."""
    classes = config.get("architectures") or ()
    unknown = [name for name in classes if name not in (*_LLAMA, *_QWEN3)]
    if unknown:
        got = f"`{where}` is an EAGLE-3 drafter of class {unknown[0]}, which is not supported"
        hint = f"known are {', '.join((*_LLAMA[:-1], _QWEN3[0]))}: a Llama's layer or a Qwen3's"
        raise CheckpointError(got, hint=hint)

    if speculators:
        return config.get("model_type") != "llama"
    return any(name in _QWEN3 for name in classes)


def _switches(config: Json, where: str, *, speculators: bool) -> Fields:
    """What the network does, besides its shape: keys that stand at the top or in eagle_config."""
    switches: Fields = {}
    for name in _SWITCHES:
        switches[name] = _switch(config, name)
    if speculators and config.get("norm_before_residual") is None:
        switches["norm_before_residual"] = True  # as vLLM reads it
    switches["fc_norm"] = _switch(config, "fc_norm") or _switch(config, "use_aux_norm")
    switches["fused"] = _switch(config, "use_aux_hidden_state", default=True)

    norms = [name for name in ("norm_before_fc", "fc_norm") if switches[name]]
    if len(norms) > 1:
        got = f"`{where}` has both norm_before_fc and fc_norm, which exclude each other"
        raise CheckpointError(got, hint="keep the one that it was trained with")
    if norms and not switches["fused"]:
        got = f"`{where}` has {norms[0]}, but no fc: use_aux_hidden_state is false"
        raise CheckpointError(got, hint="keep the one that it was trained with")
    return switches


def _switch(config: Json, name: str, *, default: bool = False) -> bool:
    nested = part_of(config, "eagle_config")
    told = flag_of(config, name)
    if told is None:
        told = flag_of(nested, name)
    return default if told is None else told


def _reads(config: Json, where: str, *, fused: bool) -> Fields:
    """The layers whose outputs are features, 0-based; none: the usual ones.

    Ids at the top are those of transformers' hidden_states (vLLM, speculators): i is the output of
    layer i - 1. `target_layer_ids` (DeepSpec) and ids in eagle_config (SpecForge, SGLang) are
    outputs; which of the latter are not shows beside the target (methods/eagle3.py).
    """
    own = part_of(config, "flashdraft_config")
    depth = own.get("num_target_layers", config.get("num_target_layers"))
    reads: Fields = {"num_target_layers": count_of("num_target_layers", depth or 0, least=0)}
    if not fused:
        reads["target_layer_ids"] = ()
        return reads

    told = own.get("target_layer_ids")
    if told is not None:
        reads["target_layer_ids"] = layer_ids_of(told)
        return reads

    exact = _exact_layers(config, where)
    nested = part_of(config, "eagle_config").get(_IDS)
    layers = exact
    if nested is not None and not exact:
        layers = layer_ids_of(nested)
        reads["ids_by_target"] = True
    elif nested and layer_ids_of(nested) != exact:
        raise _told_twice(where, exact, nested)

    if -1 in layers:
        got = f"`{where}` reads the target's embeddings, which is not supported"
        raise CheckpointError(got, hint="layers' outputs are read")
    _check_count(config, len(layers) or 3, where)
    reads["target_layer_ids"] = layers
    return reads


def _exact_layers(config: Json, where: str) -> tuple[int, ...]:
    """The outputs that keys at the top name, whose meaning is sure."""
    states = config.get(_IDS)
    outputs = config.get("target_layer_ids")
    by_states: tuple[int, ...] = ()
    if states:
        by_states = tuple(layer - 1 for layer in layer_ids_of(states))
    if outputs is None:
        return by_states

    by_outputs = layer_ids_of(outputs)
    if by_states and by_states != by_outputs:
        raise _told_twice(where, by_states, outputs)
    return by_outputs


def _told_twice(where: str, outputs: Sequence[int], other: object) -> CheckpointError:
    got = f"`{where}` names its layers twice and differently: outputs {list(outputs)} and {other}"
    hint = (
        f"{_IDS} at the top count the embeddings as 0, in eagle_config they do not; "
        "keep the list that it was trained with"
    )
    return CheckpointError(got, hint=hint)


def _check_count(config: Json, count: int, where: str) -> None:
    told = config.get("num_aux_hidden_states")
    if told is not None and count_of("num_aux_hidden_states", told) != count:
        got = f"`{where}` has num_aux_hidden_states {told}, but names {count} layers"
        raise CheckpointError(got, hint=f"say which layers they are: {_IDS}")


def _block_size(config: Json, wrapper: Json) -> int:
    """Nodes of a proposal: the anchor, and as many drafts as the folder says."""
    own = part_of(config, "flashdraft_config")
    if own.get("block_size") is not None:
        return count_of("block_size", own["block_size"], least=0)
    counts = [config.get("ttt_length")]  # DeepSpec's
    for proposal in wrapper.get("proposal_methods") or ():
        counts.append(proposal.get("speculative_tokens"))
    told = [count_of("speculative_tokens", count) for count in counts if count is not None]
    return 1 + max(told) if told else _USUAL_BLOCK


def _refuse_windows(config: Json, where: str) -> None:
    """Raises CheckpointError where a layer would have a window."""
    num_layers = count_of("num_hidden_layers", config["num_hidden_layers"])
    types = list(config.get("layer_types") or ())[:num_layers]  # DeepSpec's may be the target's
    has_window = "sliding_attention" in types
    if not types and flag_of(config, "use_sliding_window") and config.get("sliding_window"):
        first = config.get("max_window_layers")
        num_full = 28 if first is None else count_of("max_window_layers", first, least=0)
        has_window = num_full < num_layers
    if has_window:
        hint = "in drafters of eagle3 they are not supported"
        raise CheckpointError(f"`{where}` has sliding layers", hint=hint)


def eagle3_json(config: DraftConfig) -> Fields:
    """The keys of EAGLE-3's own, as `eagle3_fields` reads them and the engines do.

    vLLM looks for ids of hidden_states at the top, SGLang for outputs in eagle_config.
    """
    written: Fields = {}
    for name in (*_SWITCHES, "fc_norm"):
        if getattr(config, name):
            written[name] = True
    if config.target_hidden_size is not None:
        written["target_hidden_size"] = config.target_hidden_size

    nested: dict[str, object] = {}
    if not config.fused:
        nested["use_aux_hidden_state"] = False
    elif config.ids_by_target:
        nested[_IDS] = list(config.target_layer_ids)
    elif config.target_layer_ids:
        written[_IDS] = [layer + 1 for layer in config.target_layer_ids]
        nested[_IDS] = list(config.target_layer_ids)
    written["eagle_config"] = nested
    return written


# --- Tensors


def eagle3_names(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors under the names of `eagle3_shapes`; tables of rotary angles are left out.

    Raises CheckpointError for one that is there under two names.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("rotary_emb.inv_freq"):
            continue
        new = name
        for old, ours in _OLD_NAMES.items():
            if name.startswith(f"{old}."):
                new = ours + name.removeprefix(old)
        if new in named:
            got = f"`{where}` holds {new} twice, once by the name {name}"
            raise CheckpointError(got, hint="move the weights that are old out of the folder")
        named[new] = tensor
    return named


def eagle3_completed(config: DraftConfig, tensors: Mapping[str, Tensor]) -> DraftConfig:
    """What a folder's keys do not say and its tensors show: norms of q and k, and biases."""
    attention = "midlayer.self_attn"
    has_norms = f"{attention}.q_norm.weight" in tensors
    has_biases = f"{attention}.q_proj.bias" in tensors
    return replace(
        config,
        qk_norm=config.qk_norm or has_norms,
        attention_bias=config.attention_bias or has_biases,
    )


def eagle3_shapes(config: DraftConfig) -> dict[str, Shape]:
    """Every tensor that the file must hold, with its shape.

    A network of another width than its target's cannot borrow the embedding and the lm_head.
    """
    hidden = config.hidden_size
    width = config.feature_size
    shapes = _layer_shapes(config, "midlayer", 2 * hidden)  # embedding and state side by side
    shapes["midlayer.hidden_norm.weight"] = (hidden,)
    for index in range(1, config.num_hidden_layers):
        shapes |= _layer_shapes(config, f"layers.{index}", hidden)
    shapes["norm.weight"] = (hidden,)

    if config.fused:
        shapes["fc.weight"] = (hidden, config.num_features * width)
    if config.norm_before_fc:
        shapes["input_norm.weight"] = (config.num_features * width,)
    if config.fc_norm:
        for feature in range(config.num_features):
            shapes[f"fc_norm.{feature}.weight"] = (width,)
    if width != hidden:
        shapes["embed_tokens.weight"] = (config.vocab_size, hidden)
        if not config.tied_head:
            shapes["lm_head.weight"] = (config.draft_vocab_size or config.vocab_size, hidden)
    return shapes


def _layer_shapes(config: DraftConfig, place: str, inputs: int) -> dict[str, Shape]:
    """The tensors of one decoder layer, whose attention reads so many numbers."""
    hidden = config.hidden_size
    inner = config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    attention = f"{place}.self_attn"
    shapes: dict[str, Shape] = {
        f"{attention}.q_proj.weight": (queries, inputs),
        f"{attention}.k_proj.weight": (keys, inputs),
        f"{attention}.v_proj.weight": (keys, inputs),
        f"{attention}.o_proj.weight": (hidden, queries),
        f"{place}.mlp.gate_proj.weight": (inner, hidden),
        f"{place}.mlp.up_proj.weight": (inner, hidden),
        f"{place}.mlp.down_proj.weight": (hidden, inner),
        f"{place}.input_layernorm.weight": (hidden,),
        f"{place}.post_attention_layernorm.weight": (hidden,),
    }
    if config.attention_bias:
        shapes[f"{attention}.q_proj.bias"] = (queries,)
        shapes[f"{attention}.k_proj.bias"] = (keys,)
        shapes[f"{attention}.v_proj.bias"] = (keys,)
        shapes[f"{attention}.o_proj.bias"] = (hidden,)
    if config.qk_norm:
        shapes[f"{attention}.q_norm.weight"] = (config.head_dim,)
        shapes[f"{attention}.k_norm.weight"] = (config.head_dim,)
    return shapes
