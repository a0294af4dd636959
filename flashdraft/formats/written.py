"""config.json -> what it describes, and back: the published formats' readers and writers, each in a
file of its own (`zlab`, `dflash2`, `dspark`, `domino`, `speculators`, `eagle3`).

EAGLE-3: SafeAILab's and SpecForge's names; their configs say nothing of the target's depth, which
ours add. Medusa: heads alone. Does not know files (`read`, `write`).
"""

from flashdraft.errors import CheckpointError
from flashdraft.formats import dflash2, domino, dspark, parse, speculators, zlab
from flashdraft.formats.config import DraftConfig
from flashdraft.formats.eagle3 import eagle3_fields, eagle3_json
from flashdraft.formats.foreign import Json, article_of, refuse_switches
from flashdraft.formats.parse import Fields
from flashdraft.formats.recognise import TITLES, Format, recognise
from flashdraft.formats.weights import Shapes, told_by_shapes

__all__ = ["config_of", "json_of"]

_READERS = {  # of block drafters: kind -> the fields of its flat config.json
    "dflash": zlab.read,
    "dflash2": dflash2.read,
    "dspark": dspark.read,
    "domino": domino.read,
}
_SILENT = ("num_key_value_heads", "head_dim")  # what z-lab's folders may leave out
_FIXED = {  # by method: what its config.json always says
    "dflash": {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "tie_word_embeddings": True,
    },
    "eagle3": {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "tie_word_embeddings": False,
    },
    "medusa": {
        "architectures": ["MedusaDraftModel"],
        "model_type": "medusa",
        "tie_word_embeddings": True,
    },
    "draft_model": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "tie_word_embeddings": True,
    },
}
_SIZES = (  # in the order in which config.json has them
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


def config_of(
    config: Json,
    where: str,
    shapes: Shapes | None = None,
    vocabulary: zlab.Vocabulary | None = None,
) -> DraftConfig:
    """What a config.json describes.

    shapes: of the tensors beside it, which tell what it leaves out. vocabulary: the target's, which
    tells the id of a mask token that is named. Raises CheckpointError naming
    the missing or foreign key.
    """
    kind = "dflash"
    shapes = shapes or {}
    try:
        form = recognise(config, shapes, where)
        kind = form.kind
        if kind in _READERS:
            if vocabulary is not None:
                config = zlab.with_mask_id(config, vocabulary, where)
            return DraftConfig(**_block_fields(config, form, shapes, where))
        flat = config
        if form.publisher == "speculators":
            flat = speculators.one_rope(speculators.unwrapped(config, shapes, where))
        refuse_switches(flat, where, kind=kind)
        fields = parse.other_fields(flat, kind, where)
        if kind == "eagle3":
            fields |= eagle3_fields(flat, where, wrapper=speculators.wrapper_of(config))
        return DraftConfig(**fields)
    except KeyError as error:
        hint = (
            "a drafter's config.json has block_size and dflash_config with mask_token_id "
            "and target_layer_ids"
        )
        raise _garbled(kind, error, where, hint=hint) from None
    except (AttributeError, TypeError, ValueError) as error:
        hint = "mend its config.json, or fetch it again"
        raise _garbled(kind, error, where, hint=hint) from None


def _block_fields(config: Json, form: Format, shapes: Shapes, where: str) -> Fields:
    """Of the config.json of a block drafter."""
    flat = dict(config)
    if form.publisher == "speculators":
        flat = speculators.flat(config, form.anchor_first, shapes, where)
    told = told_by_shapes(shapes)
    for name in _SILENT:
        if flat.get(name) is None and name in told:
            flat[name] = told[name]

    refuse_switches(flat, where)
    if form.publisher == "FlashDraft":  # flashdraft_config has the layout
        return zlab.read(flat, where)
    return _READERS[form.kind](flat, where, anchor_first=form.anchor_first)


def json_of(draft: DraftConfig) -> Fields:
    """config.json as the method's authors write it; what theirs leaves out stands in
    `flashdraft_config`. The order of the keys is part of the file."""
    is_dflash = draft.method == "dflash"
    config: Fields = {**_FIXED[draft.method], "hidden_act": "silu"}
    if draft.tied_head:
        config["tie_word_embeddings"] = True

    for name in _SIZES:
        config[name] = getattr(draft, name)
    if is_dflash:
        config["block_size"] = draft.block_size
        config["num_target_layers"] = draft.num_target_layers
    config["rms_norm_eps"] = draft.rms_norm_eps
    config["max_position_embeddings"] = draft.max_position_embeddings
    if is_dflash:
        full = ["full_attention"] * draft.num_hidden_layers
        config["layer_types"] = list(draft.layer_types) or full
        config["sliding_window"] = draft.sliding_window
    if draft.method == "eagle3":
        config |= eagle3_json(draft)
    config["attention_bias"] = draft.attention_bias
    if draft.draft_vocab_size is not None:
        config["draft_vocab_size"] = draft.draft_vocab_size
    config["dtype"] = draft.dtype
    config |= _rope_json(draft)
    if draft.causal is not None:
        config["is_causal"] = draft.causal

    reads: Fields = {
        "mask_token_id": draft.mask_token_id,
        "target_layer_ids": list(draft.target_layer_ids),
    }
    if is_dflash:
        config["use_sliding_window"] = draft.sliding_window is not None
        config["dflash_config"] = reads | _scales_json(draft)
        _dress(draft, config)
        return config

    config |= _scales_json(draft)
    if draft.ids_by_target:  # eagle_config has them
        del reads["target_layer_ids"]
    own: Fields = {
        "block_size": draft.block_size,
        "num_target_layers": draft.num_target_layers,
        **reads,
        "method": draft.method,
    }
    for name in ("qk_norm", "raw_tables"):
        if getattr(draft, name):
            own[name] = True
    config["flashdraft_config"] = own
    return config


def _rope_json(draft: DraftConfig) -> Fields:
    ropes = draft.ropes
    if len(ropes) > 1:
        return {"rope_parameters": {kind: dict(rope) for kind, rope in ropes.items()}}

    scaling = dict(draft.rope_parameters)
    theta = scaling.pop("rope_theta")
    is_scaled = scaling.get("rope_type", "default") != "default"
    return {"rope_theta": theta, "rope_scaling": scaling if is_scaled else None}


def _scales_json(draft: DraftConfig) -> Fields:
    """What few folders have: written only where it says something."""
    scales: Fields = {}
    if draft.input_embedding_scale != 1.0:
        scales["input_embedding_scale"] = draft.input_embedding_scale
    if draft.output_multiplier != 1.0:
        scales["output_multiplier"] = draft.output_multiplier
    if draft.final_logit_softcapping is not None:
        scales["final_logit_softcapping"] = draft.final_logit_softcapping
    return scales


def _dress(draft: DraftConfig, config: Fields) -> None:
    """Make z-lab's config.json, which is of version 1, the one of the drafter's own format; what
    none of them says stands in `flashdraft_config`."""
    is_told = True
    if dflash2.fits(draft):
        dflash2.dress(draft, config)
    elif dspark.fits(draft):
        dspark.dress(draft, config)
    elif domino.fits(draft):
        domino.dress(draft, config)
    else:
        is_told = False
    own = zlab.own_json(draft, heads=not is_told)
    if own:
        config["flashdraft_config"] = own


def _garbled(method: str, error: Exception, where: str, *, hint: str) -> CheckpointError:
    title = TITLES.get(method, method)
    drafter = f"{article_of(title)} {title} drafter"
    got = f"`{where}` is not {drafter}: its config lacks or garbles {error!s:.200}"
    return CheckpointError(got, hint=hint)
