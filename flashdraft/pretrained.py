"""A folder's files -> transformers' tokenizer and model: whole, as the folder says, and by none of the folder's own code.

Knows what folders of models look like, and what transformers passes over in silence. Does not know where a folder comes
from, nor what runs a model. Nothing here asks on standard input: `trust_remote_code` is always said, and always False.
"""

import errno
import json
import logging
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import torch
import transformers
from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    modeling_gguf_pytorch_utils,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils import logging as their_logging

from flashdraft.errors import CheckpointError, FlashDraftError, UnsupportedTarget, first_line
from flashdraft.process import new_lock

__all__ = [
    "Source",
    "check_folder",
    "check_tokenizer",
    "foreign_file",
    "kind_of",
    "read_config",
    "read_model",
    "read_tokenizer",
]
__all__ += ["without_bars"]

Names = Collection[str]
Told = tuple[str, str]  # what was found, and what to do

_AGAIN = "fetch the model's files again"
_MERGE = "merge it into its base model (peft's merge_and_unload, then save_pretrained) and give that folder"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_VOCABULARIES: tuple[str, ...] = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
_DRAFTS = (
    "dflash_config",
    "flashdraft_config",
    "eagle_config",
    "medusa_num_heads",
    "speculators_model_type",
)
_ATTENTION = ("eager", "sdpa")  # the implementations that take our masks
_EXPERTS = ("eager", "batched_mm", "grouped_mm")
_NO_WRITERS: tuple[str, ...] = (
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)
_NO_WRITERS += (
    "ForPreTraining",
    "ForMultipleChoice",
    "ForImageClassification",
    "RewardModel",
    "EncoderModel",
)
# parts that a text model leaves out by right: eyes, ears, a trainer's value head, and heads for several tokens
_OTHER_PARTS: tuple[str, ...] = (
    "vision_tower",
    "vision_model",
    "vision_encoder",
    "visual",
    "multi_modal_projector",
    "audio_tower",
    "mtp",
    "v_head",
)


class Source(NamedTuple):
    """Files to load from: a folder, or one GGUF file in it. `name` is what the user called them."""

    name: str
    folder: Path
    gguf: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What every call of from_pretrained takes."""
        options: dict[str, Any] = {"trust_remote_code": False}
        if self.gguf is not None:
            options["gguf_file"] = self.gguf
        return options


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Raises CheckpointError if it is missing, unreadable or not a JSON object."""
    path = folder / "config.json"
    try:
        return _read_object(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"no config.json in `{folder}`", hint="give the folder that holds the model's files"
        ) from None
    except PermissionError:
        raise CheckpointError(
            f"`{path}` may not be read", hint="see who owns it and its mode (ls -l)"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        found = foreign_file(path)
        if found is not None:
            raise CheckpointError(f"`{path}` is {found[0]}", hint=found[1]) from None
        raise CheckpointError(
            f"cannot read `{path}`: {first_line(error)}", hint="fetch or write it again"
        ) from None


def _read_object(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object was expected, not a {type(value).__name__}")
    return value


def read_tokenizer(source: Source) -> Any:
    """The tokenizer of these files. Raises CheckpointError."""
    if source.gguf is None:
        _check_vocabulary(source)
    try:
        with without_bars():
            tokenizer = AutoTokenizer.from_pretrained(source.folder, **source.options)
            _take_template(source, tokenizer)
            tokenizer.encode(
                "", add_special_tokens=False
            )  # takes a file's truncation away now: threads may not do it at once
            return tokenizer
    except Exception as error:  # transformers and its readers raise what they like
        raise _explained(error, source, "the tokenizer of ") from None


def _take_template(source: Source, tokenizer: Any) -> None:
    """The template of chat_template.json, where models that also see have theirs, and which tokenizers pass over."""
    path = source.folder / "chat_template.json"
    if source.gguf is not None or getattr(tokenizer, "chat_template", None) or not path.exists():
        return
    template = _read_object(path).get("chat_template")
    if isinstance(template, str):
        tokenizer.chat_template = template


def read_model(source: Source, *, dtype: str = "auto") -> Any:
    """The model of these files, every tensor of it from them. Raises CheckpointError or UnsupportedTarget.

    Look at a folder with `check_folder` first.
    """
    safetensors = None if source.gguf is not None else True
    options: dict[str, Any] = {**source.options, "dtype": dtype, "use_safetensors": safetensors}
    options |= {
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }  # `_check_whole` says which and why
    try:
        with without_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(source.folder, **options)
    except Exception as error:  # a quantiser's, a reader's, an allocator's
        raise _explained(error, source) from None
    model, info = loaded
    _check_whole(source, type(model).__name__, info)
    if source.gguf is not None:
        _check_all_used(source, model)
    return model


def check_tokenizer(source: Source, tokenizer: Any, vocab_size: int) -> None:
    """Raises CheckpointError where the tokenizer is made for more tokens than the model has embeddings.

    Added tokens may lie beyond (a pad token that nobody embedded): a prompt that uses one is refused when it comes.
    """
    size = getattr(tokenizer, "vocab_size", None)
    if isinstance(size, int) and size > vocab_size:
        got = f"the tokenizer of `{source.name}` has {size} tokens, its model only {vocab_size}"
        raise CheckpointError(
            got,
            hint="they do not belong together: take the tokenizer's files from the model's own folder",
        )


# ------------------------------------------------------------------------------ before: what a folder is, by its names


def kind_of(names: Names) -> Told | None:
    """What a folder or repository with these files is, where it is no model that can be loaded; None: nothing known."""
    found = set(names)
    ends = {Path(name).suffix.lower() for name in found}
    ggufs = sorted(name for name in found if name.lower().endswith(".gguf"))
    if "adapter_config.json" in found:
        return "an adapter (LoRA) without its base model", _MERGE
    if "model_index.json" in found:
        return "a diffusers pipeline", "a language model is needed, not a picture's"
    if "snapshots" in found:
        return (
            "a repository of the hub's cache, not a model's folder",
            "give its hub id, or the folder below snapshots/",
        )
    if ggufs:
        return "a folder of GGUF files", f"give the path of one of them, such as {ggufs[0]}"
    if found & {"params.json", "consolidated.safetensors", "consolidated.00.pth"}:
        return (
            "in its maker's own format (consolidated weights)",
            "take the model's folder in Hugging Face's format",
        )
    if ends & {".bin", ".pt", ".pth", ".ckpt", ".pkl"}:
        hint = "pickled weights are never read, for they can run code: convert them to safetensors with save_pretrained"
        return "a folder of pickled weights only", hint
    if ends & {".h5", ".msgpack", ".onnx", ".npz", ".tflite", ".mlmodel", ".ot"}:
        return "a folder of weights for another framework", "take the model's safetensors"
    return None


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def foreign_file(path: Path) -> Told | None:
    """What lies in the place of a model's file, where it is something else, and what to do; None: it may be one."""
    try:
        with path.open("rb") as file:
            start = file.read(256)
    except FileNotFoundError:
        return "not there", _AGAIN
    except OSError as error:
        return f"not readable: {error.strerror}", "see who owns it and its mode (ls -l)"
    if start.startswith(b"version https://git-lfs"):
        return (
            "a git-lfs pointer, not the file itself",
            "fetch what it points to: git lfs install; git lfs pull",
        )
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return (
            "a web page, not the file itself",
            "fetch the file: hf download, or the page's download button",
        )
    if not start:
        return "empty", _AGAIN
    return None


def check_folder(source: Source) -> dict[str, Any]:
    """Refuse, by name, what transformers would pass over, run or misread in this folder; returns its config.json.

    Raises CheckpointError, or UnsupportedTarget for a model that does not write text from left to right.
    """
    config = read_config(source.folder)
    _check_kind(source, config)
    _check_code(source, config)
    _check_quantisation(source, config)
    _check_json_files(source)
    names = _weight_files(source, config)
    _check_weight_files(source, config, names)
    return config


def _check_kind(source: Source, config: Mapping[str, Any]) -> None:
    name, kind = source.name, config.get("model_type")
    own = [str(one) for one in config.get("architectures") or ()]
    draft = next((key for key in _DRAFTS if key in config), None)
    if (source.folder / "adapter_config.json").exists():
        got = f"`{name}` holds an adapter beside its base model, which would be left out"
        raise CheckpointError(got, hint=f"{_MERGE}; or take adapter_config.json out of the folder")
    if draft is not None:
        got = f"`{name}` is a drafter, by `{draft}` in its config.json, not a target"
        raise CheckpointError(
            got, hint="give it as the draft, beside the target that it was made for"
        )
    if not isinstance(kind, str) or not kind:
        raise CheckpointError(
            f"config.json of `{name}` names no model_type",
            hint="is it a language model's? fetch it again",
        )
    if config.get("is_encoder_decoder"):
        got = f"`{name}` is a {kind} model: it writes from an encoder's states"
        raise UnsupportedTarget(
            got, hint="a decoder-only language model is needed, such as a llama or a qwen3"
        )
    odd = next((one for one in own if one.endswith(_NO_WRITERS)), None)
    if (
        odd is None
        and (source.folder / "modules.json").exists()
        and not any("CausalLM" in one for one in own)
    ):
        odd = "sentence-transformers model"
    if odd is not None:
        got = f"`{name}` is a {odd}: it does not write text from left to right"
        raise UnsupportedTarget(got, hint="a causal language model is needed (...ForCausalLM)")
    if config.get("is_causal") is False:
        got = f"`{name}` reads to both sides (is_causal is false in its config.json)"
        raise UnsupportedTarget(got, hint="a causal language model is needed")
    if kind in CONFIG_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedTarget(
            f"`{name}` is a {kind} model, no language model",
            hint="a causal language model is needed",
        )


def _check_code(source: Source, config: Mapping[str, Any]) -> None:
    """What would run Python that came with the folder, or code that the folder names, or other operations than ours."""
    name, kind = source.name, config.get("model_type")
    own = config.get("auto_map") or {}
    version = transformers.__version__
    if kind not in CONFIG_MAPPING:
        if own:
            got = f"`{name}` is a {kind!r} model, which exists only in the folder's own Python"
            raise CheckpointError(
                got, hint="a folder's code never runs here; take a model that transformers knows"
            )
        written = config.get("transformers_version")
        since = f", the folder is of {written}" if written else ""
        got = f"`{name}` is a {kind!r} model, unknown to transformers {version}{since}"
        raise CheckpointError(got, hint="a newer one may know it: pip install -U transformers")
    architectures = [str(one) for one in config.get("architectures") or ()]
    foreign = [one for one in architectures if not hasattr(transformers, one)]
    if own and foreign:
        got = f"`{name}` is a {foreign[0]}, which exists only in the folder's own Python"
        raise CheckpointError(
            got, hint="a folder's code never runs here; take a model that transformers knows"
        )
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key, known in (
            ("attn_implementation", _ATTENTION),
            ("experts_implementation", _EXPERTS),
        ):
            asked = part.get(key, part.get(f"_{key}"))
            if asked is not None and asked not in known:
                got = f"config.json of `{name}` asks for {key} {asked!r}"
                raise CheckpointError(got, hint=f"take it out: known here are {', '.join(known)}")
    if config.get("fusion_config"):
        raise CheckpointError(
            f"config.json of `{name}` asks for fusion_config",
            hint="take it out: nothing is fused here",
        )


def _check_quantisation(source: Source, config: Mapping[str, Any]) -> None:
    how = _quantisation(config)
    if how is None:
        return
    hint = "take the model's unquantised weights"
    if not isinstance(how, dict):
        raise CheckpointError(
            f"config.json of `{source.name}` has quantization_config {how!r}",
            hint=f"it is damaged; {hint}",
        )
    method = how.get("quant_method")
    if method is None and not how.get("load_in_4bit") and not how.get("load_in_8bit"):
        maker = "MLX" if "group_size" in how and "bits" in how else "a method that it does not name"
        raise CheckpointError(
            f"`{source.name}` is quantised by {maker}, which transformers cannot read", hint=hint
        )
    known = {key.partition("_4bit")[0].partition("_8bit")[0] for key in AUTO_QUANTIZER_MAPPING}
    if method is not None and str(method) not in known:
        got = f"`{source.name}` is quantised by {method}, which transformers {transformers.__version__} cannot read"
        raise CheckpointError(got, hint=hint)


def _quantisation(config: Mapping[str, Any]) -> Any:
    """The part of config.json that says how the weights are quantised, or None."""
    inner = config.get("text_config")
    inner = inner if isinstance(inner, dict) else {}
    found = config.get("quantization_config") or inner.get("quantization_config")
    if found is None and isinstance(config.get("quantization_config"), dict):
        return config["quantization_config"]
    return found if found is not None else config.get("quantization")


def _check_json_files(source: Source) -> None:
    """Small files that transformers leaves out in silence where they are damaged: end tokens and templates stand in them."""
    for name in (
        "generation_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    ):
        path = source.folder / name
        if not path.exists():
            continue
        try:
            _read_object(path)
        except (OSError, ValueError, RecursionError) as error:
            found = foreign_file(path) or (f"damaged: {first_line(error)}", _AGAIN)
            raise CheckpointError(f"`{path}` is {found[0]}", hint=found[1]) from None


def _check_vocabulary(source: Source) -> None:
    """Without a vocabulary transformers may make an empty tokenizer."""
    names = _names(source.folder)
    if not any(name in _VOCABULARIES or name.endswith(".tiktoken") for name in names):
        hint = "copy tokenizer.json and tokenizer_config.json from the model that it was made from"
        raise CheckpointError(f"`{source.name}` holds no tokenizer", hint=hint)
    for name in names:
        path = source.folder / name
        found = foreign_file(path) if name in _VOCABULARIES else None
        if found is not None:
            raise CheckpointError(f"`{path}` is {found[0]}", hint=found[1])


# ----------------------------------------------------------------------------------------- before: the files of weights


def _weight_files(source: Source, config: Mapping[str, Any]) -> dict[str, set[str]]:
    """The files that transformers will read, each with the tensors that the index promises in it (none: no index)."""
    folder, chosen = source.folder, config.get("transformers_weights")
    names = _names(folder)
    if any(name.startswith("shard-") and name.endswith(".safetensors") for name in names):
        got = f"`{source.name}` is a distributed checkpoint (shard-...)"
        raise CheckpointError(got, hint="save it whole with save_pretrained")
    if chosen is not None:
        hint = "take transformers_weights out of config.json, or let it name a safetensors file"
        if not str(chosen).endswith((".safetensors", ".safetensors.index.json")):
            raise CheckpointError(
                f"config.json of `{source.name}` asks for the weights {chosen!r}", hint=hint
            )
        if str(chosen).endswith(".safetensors"):
            return {str(chosen): set()}
        return _promised(source, str(chosen))
    if _SINGLE in names:
        if _INDEX in names:
            _check_same(source)
        return {_SINGLE: set()}
    if _INDEX in names:
        return _promised(source, _INDEX)
    others = [
        name
        for name in names
        if name.endswith(".safetensors") and not name.startswith("consolidated")
    ]
    kind = kind_of(names) if not others else None
    if kind is not None:
        raise CheckpointError(f"`{source.name}` is {kind[0]}", hint=kind[1])
    if not others:
        raise CheckpointError(
            f"`{source.name}` holds no weights: no {_SINGLE}",
            hint=f"the folder is incomplete; {_AGAIN}",
        )
    if "-of-" in others[0]:
        raise CheckpointError(
            f"`{source.name}` holds shards, but no {_INDEX}",
            hint=f"the folder is incomplete; {_AGAIN}",
        )
    got = f"`{source.name}` holds {others[0]}, but no {_SINGLE}"
    raise CheckpointError(got, hint=f"if it is the whole model, call it {_SINGLE}")


def _promised(source: Source, index: str) -> dict[str, set[str]]:
    """What an index says: each file, and its tensors."""
    path = source.folder / index
    try:
        places = _read_object(path)["weight_map"]
        promised: dict[str, set[str]] = {}
        for tensor, file in places.items():
            promised.setdefault(str(file), set()).add(tensor)
    except (OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
        found = foreign_file(path) or (f"damaged: {first_line(error)}", _AGAIN)
        raise CheckpointError(f"`{path}` is {found[0]}", hint=found[1]) from None
    if not promised:
        raise CheckpointError(f"`{path}` names no tensor", hint=_AGAIN)
    return promised


def _check_same(source: Source) -> None:
    """A folder with both a whole file and shards: they must be the same tensors, for only one of the two would be read."""
    sharded = set().union(*_promised(source, _INDEX).values())
    whole = set(_header(source, _SINGLE))
    if sharded != whole:
        got = f"`{source.name}` holds two sets of weights: {_SINGLE}, and the shards of {_INDEX}"
        raise CheckpointError(got, hint="move the one that is old out of the folder")


def _header(source: Source, file: str) -> dict[str, str]:
    """Every tensor of a safetensors file with its dtype; the file's length is what its header says."""
    path = source.folder / file
    found = foreign_file(path)
    if found is not None:
        raise CheckpointError(f"`{path}` is {found[0]}", hint=found[1])
    try:
        with safe_open(path, framework="pt") as opened:
            return {name: str(opened.get_slice(name).get_dtype()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"`{path}` is damaged: {first_line(error)}", hint=f"it may be cut short; {_AGAIN}"
        ) from None


def _check_weight_files(
    source: Source, config: Mapping[str, Any], files: Mapping[str, set[str]]
) -> None:
    """Every file is there, undamaged, with every tensor that the index promises in it, and none that needs unpacking."""
    absent = [file for file in sorted(files) if not (source.folder / file).exists()]
    if absent:
        why = "which its index names" if files[absent[0]] else "which its config.json names"
        if (source.folder / absent[0]).is_symlink():
            why = "for its link leads nowhere"
        got = f"`{source.name}` lacks {absent[0]}{_and_more(absent)}, {why}"
        raise CheckpointError(got, hint=f"the folder is incomplete; {_AGAIN}")
    for file, promised in sorted(files.items()):
        held = _header(source, file)
        lacking = sorted(promised - set(held))
        if lacking:
            got = f"`{source.folder / file}` lacks the tensor {lacking[0]}, which the index promises in it"
            raise CheckpointError(got, hint=f"the shards are not of one model; {_AGAIN}")
        packed = [
            name
            for name, dtype in held.items()
            if name.endswith(".weight") and dtype.startswith(("I", "U"))
        ]
        if packed and _quantisation(config) is None:
            got = f"`{source.name}` holds {packed[0]} as {held[packed[0]]}, but its config.json names no quantisation"
            raise CheckpointError(
                got,
                hint="take its config.json from where the weights are from, or unquantised weights",
            )


# ------------------------------------------------------------------------------------------- after: what was really read


def _check_whole(source: Source, architecture: str, info: Mapping[str, Any]) -> None:
    """Raises CheckpointError for the first tensor that is missing, of another shape, or in the files but not in the model."""
    missing = sorted(info["missing_keys"])
    mismatched = sorted(info["mismatched_keys"])
    unexpected = sorted(name for name in info["unexpected_keys"] if not _is_other_part(name))
    if missing:
        got = (
            f"`{source.name}` lacks the tensor {missing[0]}{_and_more(missing)} of a {architecture}"
        )
        raise CheckpointError(got, hint=_why_missing(source, missing, unexpected))
    if mismatched:
        name, stored, wanted = mismatched[0]
        got = f"{name} of `{source.name}` has shape {list(stored)}, its config.json asks for {list(wanted)}"
        raise CheckpointError(got, hint="the two do not belong together: take both from one place")
    if unexpected:
        got = f"`{source.name}` holds the tensor {unexpected[0]}{_and_more(unexpected)}, which a {architecture} leaves out"
        raise CheckpointError(
            got,
            hint="what ran would be another model: is the config.json of these weights the right one?",
        )
    if info.get("error_msgs"):
        raise CheckpointError(
            f"cannot load `{source.name}`: {first_line(info['error_msgs'][0])}", hint=_AGAIN
        )


def _check_all_used(source: Source, model: Any) -> None:
    """A GGUF file's tensors that its reader has no place for are dropped without a word: the numbers must add up."""
    reader = GGUFReader(source.folder / str(source.gguf))
    architecture = str(reader.fields["general.architecture"].contents())
    kept = {
        tensor.name: int(tensor.n_elements)
        for tensor in reader.tensors
        if ".nextn" not in tensor.name
    }
    if architecture in ("falcon", "bloom"):  # always tied
        kept.pop("output.weight", None)
    taken = sum(parameter.numel() for parameter in model.parameters())
    if sum(kept.values()) <= taken:
        return

    enum = next((key for key, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    left = sorted(kept)
    if enum is not None:
        names = get_tensor_name_map(enum, int(model.config.get_text_config().num_hidden_layers))
        known = {
            names.get_name(name, try_suffixes=(".weight", ".bias"))
            for name, _ in model.named_parameters()
        }
        left = sorted(set(kept) - known) or left
    got = f"`{source.name}` holds the tensor {left[0]}, which a {type(model).__name__} leaves out"
    raise CheckpointError(
        got, hint="what ran would be another model: use the model's original Hugging Face folder"
    )


def _is_other_part(name: str) -> bool:
    return any(part in _OTHER_PARTS for part in name.split("."))


def _and_more(names: Collection[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _why_missing(source: Source, missing: list[str], unexpected: list[str]) -> str:
    wrapped = next((name for name in unexpected if name.endswith(f".{missing[0]}")), None)
    if wrapped is not None:
        prefix = wrapped.removesuffix(missing[0])
        return f"its tensors are called {prefix}...: save the model itself, without what wraps it, and load that"
    if any("weight_scale" in name or "qweight" in name or "absmax" in name for name in unexpected):
        return "its weights are quantised and its config.json does not say so; take the unquantised ones"
    if any("lora_" in name for name in unexpected):
        return _MERGE
    if source.gguf is not None:
        return "the file is incomplete, or of another architecture than it says; " + _AGAIN
    return f"the weights are incomplete, or config.json is another model's; {_AGAIN}"


_bars = new_lock()
_transformers_logging: Any = their_logging
_gguf_reader: Any = modeling_gguf_pytorch_utils
_their_bar = _gguf_reader.tqdm
_quiet = threading.local()  # its `asked` is true in a thread that is inside `without_bars`
_hidden = [
    0,
    True,
]  # threads inside `without_bars`, and whether transformers' bars were on before the first one


@contextmanager
def without_bars() -> Iterator[None]:
    """Transformers draws no progress bars, and has its own setting back behind the last of several loads at once.

    Standard error stays what it is: other threads write there. A user who asked for bars (HF_HUB_DISABLE_PROGRESS_BARS=0) has
    them, but for those of GGUF files, which know no setting. Nor does it write its table of odd tensors for this thread:
    `_check_whole` says the same in a line.
    """
    with _bars:
        if _hidden[0] == 0:
            _hidden[1] = their_logging.is_progress_bar_enabled()
            if huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS is not False:
                _transformers_logging._tqdm_active = False
            _gguf_reader.tqdm = _gguf_bar
            _loader_log.addFilter(_is_for_others)
        _hidden[0] += 1
    _quiet.asked = True
    try:
        yield
    finally:
        _quiet.asked = False
        with _bars:
            _hidden[0] -= 1
            if _hidden[0] == 0:
                _transformers_logging._tqdm_active = _hidden[1]
                _gguf_reader.tqdm = _their_bar
                _loader_log.removeFilter(_is_for_others)


_loader_log = logging.getLogger("transformers.modeling_utils")


def _is_for_others(_record: logging.LogRecord) -> bool:
    return not getattr(_quiet, "asked", False)


def _gguf_bar(items: Any, *args: Any, **options: Any) -> Any:
    return items if getattr(_quiet, "asked", False) else _their_bar(items, *args, **options)


def _explained(error: Exception, source: Source, part: str = "") -> FlashDraftError:
    """What transformers raised, in a line, with the cause that can be found and what helps against it."""
    told = f"cannot load {part}`{source.name}`: {first_line(error)}"
    how = _quantised_by(source)
    if isinstance(error, FlashDraftError):
        return error
    if _is_memory(error):
        hint = "close other programs, give a smaller --dtype (bfloat16), or take a smaller model"
        return CheckpointError(f"{told} (not enough memory)", hint=hint)
    damaged = None if isinstance(error, ImportError) else _damaged(source)
    if damaged is not None:
        return damaged
    odd = None if isinstance(error, ImportError) else _odd_config(source)
    if odd is not None:
        return CheckpointError(
            f"config.json of `{source.name}` {odd}", hint="mend it, or fetch it again"
        )
    if isinstance(error, ImportError):
        asks = (
            f"it is quantised by {how}, which asks for that package"
            if how
            else "install that package"
        )
        return CheckpointError(
            told, hint=f"{asks}; or take a model that needs none" if how else asks
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return CheckpointError(told, hint="free some space there")
    if isinstance(error, PermissionError):
        return CheckpointError(told, hint="see who owns the files and their mode (ls -l)")
    if "trust_remote_code" in str(error):
        got = f"cannot load {part}`{source.name}`: it exists only in the folder's own Python"
        return CheckpointError(
            got, hint="a folder's code never runs here; take a model that transformers knows"
        )
    if how:
        return CheckpointError(
            told,
            hint=f"it is quantised by {how}, which does not run here; take the unquantised weights",
        )
    version = transformers.__version__
    hint = f"transformers {version} cannot read it; is it a causal language model in Hugging Face's format?"
    return CheckpointError(told, hint=hint)


def _is_memory(error: Exception) -> bool:
    words = (
        "not enough memory",
        "cannot allocate memory",
        "can't allocate memory",
        "out of memory",
    )
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        word in str(error).lower() for word in words
    )


def _quantised_by(source: Source) -> str | None:
    if source.gguf is not None:
        return None
    try:
        how = _quantisation(read_config(source.folder))
    except CheckpointError:
        return None
    if not isinstance(how, dict):
        return None
    bits = "bitsandbytes" if how.get("load_in_4bit") or how.get("load_in_8bit") else None
    return str(how.get("quant_method") or bits or "") or None


def _damaged(source: Source) -> CheckpointError | None:
    """The first of the folder's files that cannot be read, if that is why a load failed."""
    if source.gguf is not None:
        return None
    for path in sorted(source.folder.glob("*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            found = foreign_file(path) or (f"damaged: {first_line(error)}", _AGAIN)
            return CheckpointError(f"`{path}` is {found[0]}", hint=found[1])
    return None


def _odd_config(source: Source) -> str | None:
    """What in config.json cannot be meant, if that is why a load failed."""
    if source.gguf is not None:
        return None
    config = read_config(source.folder)
    told = config.get("dtype") or config.get("torch_dtype") or "auto"
    dtype = str(told).removeprefix("torch.")
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        return f"has dtype {told!r}, which torch does not know"

    ropes = [
        rope
        for rope in (config.get("rope_parameters"), config.get("rope_scaling"))
        if isinstance(rope, dict)
    ]
    for rope in ropes:
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", *ROPE_INIT_FUNCTIONS):
            return f"has rotary positions of type {kind!r}, which transformers {transformers.__version__} does not know"
    for part in (config, *ropes):
        for name in ("rope_theta", "factor"):
            if isinstance(part.get(name), str):
                return f"has {name} {part[name]!r}: text, not a number"
    try:
        AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except Exception as error:  # a config's own checks raise what they like
        return f"cannot be used: {first_line(error)}"
    return None
