"""Models that also see or hear: which part of such a folder is a language model, and how it reads.

A wrapper (`...ForConditionalGeneration`) keeps its language model's config in `text_config` and its
tensors behind a prefix. On text alone it computes what the language model computes, so that part is
loaded by itself, as the plain causal LM that it is: eyes and ears cost no memory, and a
llama-shaped one runs on our kernels. Where positions have three axes (mRoPE) all three are equal on
text, which makes them plain rotary positions.

Knows configs and tensors' names. Does not know files, tokenizers or targets.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

__all__ = ["LEFT_OUT", "WRAPPERS", "TextPart", "text_config", "text_names", "text_part"]

Theirs = Any  # a config of transformers: their classes differ by family
Json = Mapping[str, Any]

# Wrappers whose text part was checked against the wrapper's own forward (tests/test_wrappers.py).
WRAPPERS = (
    "gemma3",
    "gemma4",
    "idefics3",
    "internvl",
    "lfm2_vl",
    "llava",
    "llava_next",
    "llava_onevision",
    "mistral3",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
)
# Text parts that are another family's, but for positions of three axes, and what they always do.
_SAME: dict[str, tuple[str, Json]] = {
    "qwen2_vl_text": ("qwen2", {}),
    "qwen2_5_vl_text": ("qwen2", {}),
    "qwen3_vl_text": ("qwen3", {}),
    "qwen3_vl_moe_text": ("qwen3_moe", {"norm_topk_prob": True}),
}
_LAYOUTS = {"qwen3_vl_moe": "qwen3_vl_moe"}  # experts lie transposed in published folders
_MROPE = ("mrope_section", "mrope_interleaved")
_PREFIXES = (  # where a text part's tensors lie, the longer names first
    "model.language_model.model.",
    "model.language_model.",
    "language_model.model.",
    "language_model.",
    "model.text_model.",
    "model.",
)
_HEADS = ("lm_head.", "language_model.lm_head.", "model.language_model.lm_head.", "model.lm_head.")
# Parts of the other tensors' names: eyes, ears, what leads from them to the text, and heads for
# several tokens.
LEFT_OUT = (
    "audio_tower",
    "connector",
    "embed_audio",
    "embed_vision",
    "image_newline",
    "mtp",
    "multi_modal_projector",
    "vision_model",
    "vision_tower",
    "visual",
)


class TextPart(NamedTuple):
    """The language model in a wrapper's folder."""

    config: Theirs  # of the causal LM
    names: dict[str, str]  # patterns of tensors' names there -> the beginnings of its own
    layout: str  # the model type whose tensors' layout the files have, as transformers knows it


def text_part(config: Theirs, tensors: Collection[str]) -> TextPart | None:
    """The language model of a wrapper's config, whose files hold tensors of these names.

    None where their names are no known wrapper's.
    """
    names = _renamed(tensors)
    if names is None:
        return None
    own = text_config(config)
    layout = _LAYOUTS.get(config.model_type, own.model_type)
    return TextPart(own, names, layout)


def text_names(tensors: Collection[str]) -> dict[str, str]:
    """Names in a folder, a wrapper's or a plain one's -> those of the causal LM in it."""
    patterns = _renamed(tensors) or {}
    names = {}
    for name in tensors:
        own = name
        for pattern, beginning in patterns.items():
            if re.match(pattern, name):
                own = re.sub(pattern, beginning, name)
                break
        names[name] = own
    return names


def text_config(config: Theirs) -> Theirs:
    """The config of the causal LM that a wrapper's text part is."""
    from transformers import CONFIG_MAPPING

    inner = config.get_text_config()
    own = inner.to_dict()
    kind = inner.model_type
    if kind in _SAME:
        kind, always = _SAME[kind]
        own |= always
        own["rope_parameters"] = _plain_rope(own.get("rope_parameters") or {})
        own["architectures"] = None
    del own["model_type"]
    # The wrapper says whether the lm_head is the embedding, and in which dtype both are.
    own["tie_word_embeddings"] = config.tie_word_embeddings
    if own.get("dtype") is None:
        own["dtype"] = config.dtype
    return CONFIG_MAPPING[kind](**own)


def _plain_rope(rope: Json) -> dict[str, Any]:
    return {name: value for name, value in rope.items() if name not in _MROPE}


def _renamed(tensors: Collection[str]) -> dict[str, str] | None:
    """Patterns for the beginnings of names, as transformers' `key_mapping` takes them."""
    known = set(tensors)
    for prefix in _PREFIXES:
        if f"{prefix}embed_tokens.weight" not in known:
            continue
        renamed = {}
        if prefix != "model.":
            renamed[f"^{re.escape(prefix)}"] = "model."
        for head in _HEADS[1:]:
            if f"{head}weight" in known:
                renamed[f"^{re.escape(head)}"] = _HEADS[0]
        return renamed
    return None
