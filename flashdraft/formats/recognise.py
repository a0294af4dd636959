"""Which published format a drafter's folder is of, and how its blocks lie; never by guess.

The signs, in the order in which they are asked: the speculators wrapper, tensors that one format
alone has, the class that config.json names, keys that one format alone has. Where two of them
contradict, the folder is refused with the cause and what mends it: a block that is read in the
wrong layout drafts every token one place off, and no error shows it. Knows keys, and tensors' names
and shapes. Does not know what a format's keys mean (one file a format).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from flashdraft.errors import CheckpointError
from flashdraft.formats import zlab
from flashdraft.formats.foreign import (
    Json,
    names_of,
    part_of,
    refuse_format,
    refuse_tensors,
    says_any,
    wrapped_kind,
)
from flashdraft.formats.parse import OTHER_READS, given
from flashdraft.formats.weights import Shapes, shapes_of
from flashdraft.hub import read_config

__all__ = ["PUBLISHERS", "TITLES", "Format", "describe", "recognise"]

TITLES = {
    "dflash": "DFlash",
    "dflash2": "DFlash 2",
    "dspark": "DSpark",
    "domino": "Domino",
    "eagle3": "EAGLE-3",
    "medusa": "Medusa",
    "draft_model": "draft_model",
}
PUBLISHERS = {  # whose folders of each kind are read
    "dflash": ("z-lab", "speculators", "FlashDraft"),
    "dflash2": ("z-lab", "speculators", "FlashDraft"),
    # DeepSpec's plain DFlash is its DSpark without heads.
    "dspark": ("DeepSpec", "SpecForge", "speculators", "FlashDraft"),
    "domino": ("SpecForge",),
    "eagle3": ("SafeAILab", "SpecForge", "speculators", "DeepSpec", "FlashDraft"),
    "medusa": ("FlashDraft",),
    "draft_model": ("FlashDraft",),
}
_BLOCKS = ("dflash", "dflash2", "dspark", "domino")
_ANCHOR_FIRST = ("sample_from_anchor", "query_zero_predicts_next")  # two spellings of one flag
_TENSORS = {  # parts of names that one format alone has
    "dflash2": ("candidate_selector.", "attention_conv.", "mlp_conv."),
    "dspark": ("markov_head.", "confidence_head."),
    "domino": ("prefix_gru.", "embed_proj."),
    "eagle3": ("midlayer.",),
}
_CLASSES = ("dflash2", "dspark", "domino", "eagle3", "dflash")  # parts of class names
_KEYS = {  # that one format alone has
    "dflash2": ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k"),
    "dspark": ("markov_rank", "markov_head_type", "num_anchors", "enable_confidence_head"),
    "domino": ("shift_label", "pure_draft_prefix_len", "gru_hidden_dim"),
}
_OWN_KEYS = {  # of flashdraft_config, by its method; of block drafters where it names none
    "dflash": ("sequential_head", "head_rank", *zlab.OWN_FIELDS),
    "eagle3": (*OTHER_READS, "qk_norm", "raw_tables"),
    "medusa": OTHER_READS,
    "draft_model": OTHER_READS,
}
_CLASS_OF = {  # as a format's own folders say it
    "dflash": "DFlashDraftModel in architectures",
    "dflash2": "DFlash2DraftModel in architectures",
    "dspark": "Qwen3DSparkModel in architectures",
    "domino": 'projector_type "domino" in dflash_config',
    "eagle3": "LlamaForCausalLMEagle3 in architectures",
}


class Format(NamedTuple):
    """What a folder is."""

    kind: str  # of TITLES
    publisher: str  # whose keys they are: z-lab, DeepSpec, SpecForge, SafeAILab, speculators, ...
    anchor_first: bool = False  # the anchor's row predicts, too

    @property
    def name(self) -> str:
        """As people say it."""
        return f"{TITLES[self.kind]} ({self.publisher})"

    @property
    def layout(self) -> str:
        """Of its blocks: `fill-in` (row k predicts its own place) or `anchor-first` (the place
        behind it); empty where a method has no blocks."""
        if self.kind not in _BLOCKS:
            return ""
        return "anchor-first" if self.anchor_first else "fill-in"


def describe(folder: Path) -> Format:
    """What the folder of a drafter is, by its config.json and its tensors' names and shapes.

    Raises CheckpointError for what is not read here, and for signs that contradict each other.
    """
    config = read_config(folder)
    try:
        return recognise(config, shapes_of(folder), str(folder))
    except (AttributeError, TypeError, ValueError) as error:
        got = f"`{folder}` is no drafter's folder: its config.json garbles {error!s:.200}"
        hint = "mend its config.json, or fetch it again"
        raise CheckpointError(got, hint=hint) from None


def recognise(config: Json, shapes: Shapes, where: str) -> Format:
    """The format of a config.json beside tensors of these shapes; without any, by itself.

    Raises CheckpointError for what is not read here, and for signs that contradict each other.
    """
    refuse_format(config, where)
    kind, publisher = _said(config, where)
    if publisher != "FlashDraft":
        refuse_tensors(shapes, where)
        _check_tensors(config, kind, shapes, where)

    if kind not in _BLOCKS:
        return Format(kind, publisher)
    return Format(kind, publisher, _is_anchor_first(config, kind, publisher, where))


# --- What config.json says


def _said(config: Json, where: str) -> tuple[str, str]:
    """Kind and publisher, by config.json alone."""
    own = part_of(config, "flashdraft_config")
    _check_own(own, where)
    if "method" in own:
        return str(own["method"]), "FlashDraft"
    if set(own) - {"raw_tables"}:  # the published keys do not say all
        return "dflash", "FlashDraft"
    wrapped = wrapped_kind(config)
    if wrapped is not None:
        return wrapped, "speculators"

    by_class = _by_class(config)
    by_keys = _by_keys(config)
    projector = part_of(config, "dflash_config").get("projector_type")
    if projector in ("dspark", "domino"):
        if by_class not in (None, "dflash", projector):
            raise _contradiction(where, by_class, f"projector_type {projector!r}", str(projector))
        return str(projector), "SpecForge"

    is_deepspec = by_keys == "dspark" and by_class in (None, "dflash", "dspark")
    if is_deepspec or by_class == "dspark":
        is_nested = "dflash_config" in config
        is_another = is_nested or given(config, "markov_rank", 0) != 0
        if by_class == "dflash" and is_another:
            raise _contradiction(where, "dflash", f"the key {_key(config, 'dspark')}", "dspark")
        return "dspark", "SpecForge" if is_nested else "DeepSpec"

    if by_class == "eagle3" or _looks_like_eagle3(config):
        return "eagle3", "DeepSpec" if "qwen3eagle3" in names_of(config) else "SafeAILab"
    if by_class is not None and by_keys not in (None, by_class):
        key = _key(config, str(by_keys))
        raise _contradiction(where, by_class, f"the key {key}", str(by_keys))
    kind = by_class or by_keys or "dflash"
    return kind, "SpecForge" if kind == "domino" else "z-lab"


def _check_own(own: Json, where: str) -> None:
    """Raises CheckpointError for what no version up to this one wrote into flashdraft_config."""
    method = str(own.get("method", "dflash"))
    newer = "was it written by a newer FlashDraft? then that one reads it; known here"
    if method not in _OWN_KEYS:
        got = f"`{where}` is a drafter of {method!r} (method in flashdraft_config)"
        raise CheckpointError(got, hint=f"{newer}: {', '.join(_OWN_KEYS)}")

    known = _OWN_KEYS[method]
    for key in own:
        if key != "method" and key not in known:
            got = f"`{where}` has {key!r:.40} in flashdraft_config, which is not known"
            raise CheckpointError(got, hint=f"{newer}: {', '.join(known)}")


def _by_class(config: Json) -> str | None:
    named = names_of(config)
    for kind in _CLASSES:
        if kind in named:
            return kind
    return None


def _by_keys(config: Json) -> str | None:
    for kind, keys in _KEYS.items():
        if says_any(config, keys):
            return kind
    return None


def _key(config: Json, kind: str) -> str:
    """The key that says it."""
    return next(key for key in _KEYS[kind] if says_any(config, (key,)))


def _looks_like_eagle3(config: Json) -> bool:
    """SafeAILab's oldest folders are of no class."""
    has_one_layer = config.get("num_hidden_layers") == 1
    return config.get("model_type") == "llama" and has_one_layer and "draft_vocab_size" in config


# --- What the tensors say


def _check_tensors(config: Json, kind: str, shapes: Shapes, where: str) -> None:
    """Raises CheckpointError where the tensors are another format's."""
    for found, name in _found(shapes, config):
        if found == kind:
            continue
        got = (
            f"`{where}` holds {name}, a tensor of {TITLES[found]}, "
            f"but its config.json says {TITLES[kind]}"
        )
        hint = (
            f"fetch the config.json that belongs to these weights; those of {TITLES[found]} "
            f"have {_CLASS_OF[found]}"
        )
        raise CheckpointError(got, hint=hint)


def _found(shapes: Shapes, config: Json) -> Iterator[tuple[str, str]]:
    """Kinds whose tensors are there, with a tensor of each."""
    for kind, parts in _TENSORS.items():
        for name in sorted(shapes):
            if any(part in name for part in parts):
                yield kind, name
                break

    queries = "layers.0.self_attn.q_proj.weight"
    inputs = shapes.get(queries, ())[1:]
    norm = shapes.get("norm.weight", ())
    if inputs and norm and inputs[0] == 2 * norm[0]:
        yield "eagle3", queries


# --- How blocks lie


def _is_anchor_first(config: Json, kind: str, publisher: str, where: str) -> bool:
    """Whether row k of a block predicts the token behind its own place: a flag says it, or the
    format does."""
    flags = dict(_flags(config))
    if publisher == "FlashDraft":
        own = part_of(config, "flashdraft_config")
        flags["flashdraft_config.anchor_first"] = bool(own.get("anchor_first"))
    if len(set(flags.values())) > 1:
        got = f"`{where}` says both of how its blocks lie: {', '.join(flags)} differ"
        raise CheckpointError(got, hint="keep the one that it was trained with")

    flag = next(iter(flags.values()), None)
    if kind == "domino":
        shift = part_of(config, "dflash_config").get("shift_label", config.get("shift_label"))
        if flag is not None and flag != bool(shift):
            got = f"`{where}` has shift_label {shift} and {next(iter(flags))} {flag}"
            raise CheckpointError(got, hint="keep the one that it was trained with")
        return bool(shift)
    if flag is not None:
        return flag
    if publisher == "speculators":  # as vLLM reads it
        return False
    if kind == "dspark":
        return True

    is_bare = "dflash_config" not in config and publisher == "z-lab"
    if kind == "dflash" and is_bare and config.get("target_layer_ids") is not None:
        got = (
            f"`{where}` has its keys where DeepSpec has them, whose blocks are anchor-first, "
            "but names z-lab's class, whose are not"
        )
        hint = "say which by sample_from_anchor, true or false, in its config.json"
        raise CheckpointError(got, hint=hint)
    return False


def _flags(config: Json) -> Iterator[tuple[str, bool]]:
    """The flags of the layout that are there, by name."""
    for part in ("", "dflash_config"):
        place = part_of(config, part) if part else config
        for key in _ANCHOR_FIRST:
            value = place.get(key)
            if value is None:
                continue
            if not isinstance(value, bool):
                raise ValueError(f"{key!r}: {value!r}")
            yield f"{part}.{key}" if part else key, value


def _contradiction(where: str, said: str, sign: str, meant: str) -> CheckpointError:
    got = f"`{where}` calls itself {TITLES[said]}, but has {sign} of {TITLES[meant]}"
    hint = f"its config.json belongs to other weights, or it lacks {_CLASS_OF[meant]}"
    return CheckpointError(got, hint=hint)
