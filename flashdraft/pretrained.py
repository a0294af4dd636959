"""A folder's files -> transformers' tokenizer and model, whole and as the folder says.

Knows what folders of models look like, and what transformers passes over in silence. Does not know
where a folder comes from, nor what runs a model. Nothing here asks on standard input, and nothing
runs a folder's own code: `trust_remote_code` is always said, and always False.

Transformers is imported where it is called: its files take seconds, and a target whose weights were
packed before (models/packed.py) needs few of them.
"""

import errno
import json
import logging
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open

from flashdraft.decoding import ending
from flashdraft.errors import CheckpointError, FlashDraftError, UnsupportedTarget, first_line
from flashdraft.process import new_lock
from flashdraft.wrappers import LEFT_OUT, WRAPPERS, TextPart, text_config, text_part

__all__ = [
    "Json",
    "Source",
    "Theirs",
    "Tokenizer",
    "check_folder",
    "check_tokenizer",
    "foreign_file",
    "kind_of",
    "read_config",
    "read_model",
    "read_their_config",
    "read_tokenizer",
    "tokenizer_of",
    "without_bars",
]

Theirs = Any  # an object of transformers: its classes differ by family
Json = dict[str, Any]  # a JSON object, such as a config
Names = Collection[str]

_AGAIN = "fetch the model's files again"
_NO_CODE = "a folder's code never runs here; take a model that transformers knows"
_WHO_OWNS = "see who owns it and its mode (ls -l)"
_MERGE = (
    "merge it into its base model (peft's merge_and_unload, then save_pretrained) "
    "and give that folder"
)
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_VOCABULARIES = (
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
# The implementations that take our masks.
_KNOWN = {
    "attn_implementation": ("eager", "sdpa"),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}
_NO_WRITERS = (
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForPreTraining",
    "ForMultipleChoice",
    "ForImageClassification",
    "RewardModel",
    "EncoderModel",
)
# Parts that a text model leaves out by right: eyes, ears, a trainer's value head, and heads for
# several tokens.
_OTHER_PARTS = (
    "vision_tower",
    "vision_model",
    "vision_encoder",
    "visual",
    "multi_modal_projector",
    "audio_tower",
    "mtp",
    "v_head",
)


class Told(NamedTuple):
    """What was found where a model or a file of it should be, and what to do about it."""

    found: str
    hint: str


class Tokenizer(ending.Tokenizer, Protocol):
    """What is called of transformers' tokenizers anywhere here."""

    chat_template: object  # text, or texts by name

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = ...,
        clean_up_tokenization_spaces: bool = ...,
    ) -> str: ...

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, object]], *, tokenize: bool, **options: object
    ) -> Any: ...

    def convert_tokens_to_ids(self, tokens: object) -> Any: ...

    def get_vocab(self) -> dict[str, int]: ...


class Source(NamedTuple):
    """Files to load from: a folder, or one GGUF file in it. `name` is what the user called them."""

    name: str
    folder: Path
    gguf: str | None = None

    @property
    def options(self) -> Json:
        """What every call of from_pretrained takes."""
        options: Json = {"trust_remote_code": False}
        if self.gguf is not None:
            options["gguf_file"] = self.gguf
        return options


def read_config(folder: Path) -> Json:
    """The folder's config.json.

    Raises CheckpointError if it is missing, unreadable or not a JSON object.
    """
    path = folder / "config.json"
    try:
        return _read_object(path)
    except FileNotFoundError:
        hint = "give the folder that holds the model's files"
        raise CheckpointError(f"no config.json in `{folder}`", hint=hint) from None
    except PermissionError:
        raise CheckpointError(f"`{path}` may not be read", hint=_WHO_OWNS) from None
    except (OSError, ValueError, RecursionError) as error:
        other = foreign_file(path)
        if other is not None:
            raise CheckpointError(f"`{path}` is {other.found}", hint=other.hint) from None
        got = f"cannot read `{path}`: {first_line(error)}"
        raise CheckpointError(got, hint="fetch or write it again") from None


def _read_object(path: Path) -> Json:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object was expected, not a {type(value).__name__}")
    return value


def read_tokenizer(source: Source) -> Tokenizer:
    """The tokenizer of these files. Raises CheckpointError."""
    if source.gguf is None:
        _check_vocabulary(source)
    try:
        from transformers import AutoTokenizer

        with without_bars():
            tokenizer: Theirs = AutoTokenizer.from_pretrained(source.folder, **source.options)
            return _prepared(tokenizer, source)
    except Exception as error:  # transformers and its readers raise what they like
        raise _explained(error, source, "the tokenizer of ") from None


def tokenizer_of(kind: str, source: Source) -> Tokenizer:
    """The tokenizer of a folder that is known to be of the class of transformers `module:name`.

    What `read_tokenizer` finds out about the folder takes longer than all the rest of it.
    """
    module, _, name = kind.partition(":")
    if module.partition(".")[0] != "transformers":
        raise ValueError(f"{kind} is no class of transformers")
    theirs = getattr(import_module(module), name)
    return _prepared(theirs.from_pretrained(source.folder, trust_remote_code=False), source)


def _prepared(tokenizer: Tokenizer, source: Source) -> Tokenizer:
    _take_template(source, tokenizer)
    # Takes a file's truncation away now: threads may not do it at once.
    tokenizer.encode("", add_special_tokens=False)
    return tokenizer


def _take_template(source: Source, tokenizer: Tokenizer) -> None:
    """The template of chat_template.json, where models that also see have theirs.

    Tokenizers pass over it.
    """
    path = source.folder / "chat_template.json"
    if source.gguf is not None or getattr(tokenizer, "chat_template", None) or not path.exists():
        return
    template = _read_object(path).get("chat_template")
    if isinstance(template, str):
        tokenizer.chat_template = template


def read_model(source: Source, *, dtype: str = "auto") -> Theirs:
    """The model of these files, every tensor of it from them.

    Of a model that also sees or hears, its language model. Look at a folder with `check_folder`
    first. Raises CheckpointError or UnsupportedTarget.
    """
    options: Json = {
        **source.options,
        "dtype": dtype,
        "use_safetensors": True if source.gguf is None else None,
        # `_check_whole` says which and why.
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    part: TextPart | None = None
    try:
        from transformers import AutoModelForCausalLM

        part = _text_part(source)
        if part is not None:
            options |= {"config": part.config, "key_mapping": part.names}
        with without_bars():
            loaded: Theirs = AutoModelForCausalLM.from_pretrained(source.folder, **options)
    except Exception as error:  # a quantiser's, a reader's, an allocator's
        raise _explained(error, source) from None

    model, info = loaded
    if part is not None:
        _leave_wrapper(model, part, info)
    _check_whole(source, type(model).__name__, info)
    if source.gguf is not None:
        _check_all_used(source, model)
    return model


def _text_part(source: Source) -> TextPart | None:
    """The language model of a folder whose model also sees or hears; None of other folders."""
    if source.gguf is not None:
        return None
    config = read_config(source.folder)
    if not _is_wrapper(config):
        return None

    from transformers import AutoConfig

    names: set[str] = set()
    for file, promised in _weight_files(source, config).items():
        names |= promised or set(_header(source, file))
    part = text_part(AutoConfig.from_pretrained(source.folder, trust_remote_code=False), names)
    if part is None:
        got = f"`{source.name}` is a {config['model_type']} model whose language model is not found"
        raise CheckpointError(got, hint=f"its tensors have names that are not known; {_AGAIN}")
    part.config.model_type = part.layout
    return part


def _is_wrapper(config: Json) -> bool:
    """Whether a language model is read out of this folder. A quantised one names its layers as the
    wrapper does, and is read whole."""
    return config.get("model_type") in WRAPPERS and _quantisation(config) is None


def _leave_wrapper(model: Theirs, part: TextPart, info: Json) -> None:
    """Let the language model forget that it was part of another one, eyes and ears included."""
    model.config.model_type = type(part.config).model_type
    of_text = []
    for name in info["unexpected_keys"]:
        if not any(piece in LEFT_OUT for piece in name.split(".")):
            of_text.append(name)
    info["unexpected_keys"] = of_text


def read_their_config(source: Source) -> Theirs:
    """The config of these files as transformers reads it; the language model's, where it is part of
    another one."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    is_part = source.gguf is None and _is_wrapper(read_config(source.folder))
    return text_config(config) if is_part else config


def check_tokenizer(source: Source, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises CheckpointError where the tokenizer has more tokens than the model has embeddings.

    Added tokens may lie beyond (a pad token that nobody embedded): a prompt that uses one is
    refused when it comes.
    """
    size = getattr(tokenizer, "vocab_size", None)
    if isinstance(size, int) and size > vocab_size:
        got = f"the tokenizer of `{source.name}` has {size} tokens, its model only {vocab_size}"
        hint = "they do not belong together: take the tokenizer's files from the model's own folder"
        raise CheckpointError(got, hint=hint)


# ---- before: what a folder is, by its names ------------------------------------------------------


def kind_of(names: Names) -> Told | None:
    """What files of these names are, where they are no model that can be loaded.

    Of a folder or of a repository. None: nothing is known.
    """
    found = set(names)
    ends = {Path(name).suffix.lower() for name in found}
    if "adapter_config.json" in found:
        return Told("an adapter (LoRA) without its base model", _MERGE)
    if "model_index.json" in found:
        return Told("a diffusers pipeline", "a language model is needed, not a picture's")
    if "snapshots" in found:
        hint = "give its hub id, or the folder below snapshots/"
        return Told("a repository of the hub's cache, not a model's folder", hint)

    ggufs = sorted(name for name in found if name.lower().endswith(".gguf"))
    if ggufs:
        hint = f"give the path of one of them, such as {ggufs[0]}"
        return Told("a folder of GGUF files", hint)
    if found & {"params.json", "consolidated.safetensors", "consolidated.00.pth"}:
        hint = "take the model's folder in Hugging Face's format"
        return Told("in its maker's own format (consolidated weights)", hint)
    if ends & {".bin", ".pt", ".pth", ".ckpt", ".pkl"}:
        hint = (
            "pickled weights are never read, for they can run code: "
            "convert them to safetensors with save_pretrained"
        )
        return Told("a folder of pickled weights only", hint)
    if ends & {".h5", ".msgpack", ".onnx", ".npz", ".tflite", ".mlmodel", ".ot"}:
        hint = "take the model's safetensors"
        return Told("a folder of weights for another framework", hint)
    return None


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def foreign_file(path: Path) -> Told | None:
    """What lies in the place of a model's file, where it is none; None: it may be one."""
    try:
        with path.open("rb") as file:
            start = file.read(256)
    except FileNotFoundError:
        return Told("not there", _AGAIN)
    except OSError as error:
        return Told(f"not readable: {error.strerror}", _WHO_OWNS)
    if start.startswith(b"version https://git-lfs"):
        hint = "fetch what it points to: git lfs install; git lfs pull"
        return Told("a git-lfs pointer, not the file itself", hint)
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        hint = "fetch the file: hf download, or the page's download button"
        return Told("a web page, not the file itself", hint)
    if not start:
        return Told("empty", _AGAIN)
    return None


def _damaged_file(path: Path, error: Exception) -> CheckpointError:
    """What is wrong with a file that could not be read as what it should be."""
    told = foreign_file(path) or Told(f"damaged: {first_line(error)}", _AGAIN)
    return CheckpointError(f"`{path}` is {told.found}", hint=told.hint)


def check_folder(source: Source) -> Json:
    """Refuse, by name, what transformers would pass over, run or misread in this folder.

    Returns its config.json. Raises CheckpointError, or UnsupportedTarget for a model that does not
    write text from left to right.
    """
    config = read_config(source.folder)
    _check_kind(source, config)
    _check_code(source, config)
    _check_quantisation(source, config)
    _check_json_files(source)
    names = _weight_files(source, config)
    _check_weight_files(source, config, names)
    return config


def _check_kind(source: Source, config: Json) -> None:
    name = source.name
    kind = config.get("model_type")
    if (source.folder / "adapter_config.json").exists():
        got = f"`{name}` holds an adapter beside its base model, which would be left out"
        raise CheckpointError(got, hint=f"{_MERGE}; or take adapter_config.json out of the folder")

    draft = next((key for key in _DRAFTS if key in config), None)
    if draft is not None:
        got = f"`{name}` is a drafter, by `{draft}` in its config.json, not a target"
        hint = "give it as the draft, beside the target that it was made for"
        raise CheckpointError(got, hint=hint)
    if not isinstance(kind, str) or not kind:
        got = f"config.json of `{name}` names no model_type"
        raise CheckpointError(got, hint="is it a language model's? fetch it again")
    if config.get("is_encoder_decoder"):
        got = f"`{name}` is a {kind} model: it writes from an encoder's states"
        hint = "a decoder-only language model is needed, such as a llama or a qwen3"
        raise UnsupportedTarget(got, hint=hint)

    odd = _no_writer(source, config)
    if odd is not None:
        got = f"`{name}` is a {odd}: it does not write text from left to right"
        raise UnsupportedTarget(got, hint="a causal language model is needed (...ForCausalLM)")
    if config.get("is_causal") is False:
        got = f"`{name}` reads to both sides (is_causal is false in its config.json)"
        raise UnsupportedTarget(got, hint="a causal language model is needed")

    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if _is_wrapper(config):
        return
    if kind in CONFIG_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        got = f"`{name}` is a {kind} model, no language model"
        hint = "a causal language model is needed"
        if isinstance(config.get("text_config"), dict):
            hint = f"{hint}, or one inside a wrapper of {', '.join(WRAPPERS)}, not quantised"
        raise UnsupportedTarget(got, hint=hint)


def _architectures(config: Json) -> list[str]:
    return [str(one) for one in config.get("architectures") or ()]


def _no_writer(source: Source, config: Json) -> str | None:
    """The architecture that the config names, where it is none that writes; None: it may write."""
    architectures = _architectures(config)
    for one in architectures:
        if one.endswith(_NO_WRITERS):
            return one
    is_causal = any("CausalLM" in one for one in architectures)
    if (source.folder / "modules.json").exists() and not is_causal:
        return "sentence-transformers model"
    return None


def _check_code(source: Source, config: Json) -> None:
    """What would run Python that came with the folder, or other operations than ours."""
    import transformers
    from transformers import CONFIG_MAPPING

    name = source.name
    kind = config.get("model_type")
    own = config.get("auto_map") or {}
    if kind not in CONFIG_MAPPING:
        if own:
            got = f"`{name}` is a {kind!r} model, which exists only in the folder's own Python"
            raise CheckpointError(got, hint=_NO_CODE)
        written = config.get("transformers_version")
        since = f", the folder is of {written}" if written else ""
        version = transformers.__version__
        got = f"`{name}` is a {kind!r} model, unknown to transformers {version}{since}"
        raise CheckpointError(got, hint="a newer one may know it: pip install -U transformers")

    foreign = [one for one in _architectures(config) if not hasattr(transformers, one)]
    if own and foreign:
        got = f"`{name}` is a {foreign[0]}, which exists only in the folder's own Python"
        raise CheckpointError(got, hint=_NO_CODE)
    _check_implementations(source, config)
    for value in config.values():
        if isinstance(value, dict):
            _check_implementations(source, value)
    if config.get("fusion_config"):
        got = f"config.json of `{name}` asks for fusion_config"
        raise CheckpointError(got, hint="take it out: nothing is fused here")


def _check_implementations(source: Source, config: Json) -> None:
    for key, known in _KNOWN.items():
        asked = config.get(key, config.get(f"_{key}"))
        if asked is not None and asked not in known:
            got = f"config.json of `{source.name}` asks for {key} {asked!r}"
            raise CheckpointError(got, hint=f"take it out: known here are {', '.join(known)}")


def _check_quantisation(source: Source, config: Json) -> None:
    how = _quantisation(config)
    if how is None:
        return
    hint = "take the model's unquantised weights"
    if not isinstance(how, dict):
        got = f"config.json of `{source.name}` has quantization_config {how!r}"
        raise CheckpointError(got, hint=f"it is damaged; {hint}")

    method = how.get("quant_method")
    if method is None and not how.get("load_in_4bit") and not how.get("load_in_8bit"):
        is_mlx = "group_size" in how and "bits" in how
        maker = "MLX" if is_mlx else "a method that it does not name"
        got = f"`{source.name}` is quantised by {maker}, which transformers cannot read"
        raise CheckpointError(got, hint=hint)
    if method is None:
        return

    import transformers
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    known = {key.partition("_4bit")[0].partition("_8bit")[0] for key in AUTO_QUANTIZER_MAPPING}
    if str(method) not in known:
        version = transformers.__version__
        got = f"`{source.name}` is quantised by {method}, which transformers {version} cannot read"
        raise CheckpointError(got, hint=hint)


def _quantisation(config: Json) -> object:
    """The part of config.json that says how the weights are quantised, or None."""
    outer = config.get("quantization_config")
    text_config = config.get("text_config")
    inner = None
    if isinstance(text_config, dict):
        inner = text_config.get("quantization_config")

    found = outer or inner
    if found is not None:
        return found
    if isinstance(outer, dict):
        return outer
    return config.get("quantization")


def _check_json_files(source: Source) -> None:
    """Small files that transformers leaves out in silence where they are damaged.

    End tokens and templates stand in them.
    """
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
            raise _damaged_file(path, error) from None


def _check_vocabulary(source: Source) -> None:
    """Without a vocabulary transformers may make an empty tokenizer."""
    names = _names(source.folder)
    if not any(name in _VOCABULARIES or name.endswith(".tiktoken") for name in names):
        hint = "copy tokenizer.json and tokenizer_config.json from the model that it was made from"
        raise CheckpointError(f"`{source.name}` holds no tokenizer", hint=hint)

    for name in names:
        path = source.folder / name
        other = foreign_file(path) if name in _VOCABULARIES else None
        if other is not None:
            raise CheckpointError(f"`{path}` is {other.found}", hint=other.hint)


# ---- before: the files of weights ----------------------------------------------------------------

Promised = dict[str, set[str]]  # by file, the tensors that an index promises in it


def _weight_files(source: Source, config: Json) -> Promised:
    """The files that transformers will read; without an index no tensor is promised in them."""
    names = _names(source.folder)
    if any(name.startswith("shard-") and name.endswith(".safetensors") for name in names):
        got = f"`{source.name}` is a distributed checkpoint (shard-...)"
        raise CheckpointError(got, hint="save it whole with save_pretrained")

    chosen = config.get("transformers_weights")
    if chosen is not None:
        return _chosen_files(source, str(chosen), chosen)
    if _SINGLE in names:
        if _INDEX in names:
            _check_same(source)
        return {_SINGLE: set()}
    if _INDEX in names:
        return _promised(source, _INDEX)
    raise _no_weights(source, names)


def _chosen_files(source: Source, name: str, chosen: object) -> Promised:
    """The files that a config.json names itself."""
    if name.endswith(".safetensors"):
        return {name: set()}
    if name.endswith(".safetensors.index.json"):
        return _promised(source, name)
    got = f"config.json of `{source.name}` asks for the weights {chosen!r}"
    hint = "take transformers_weights out of config.json, or let it name a safetensors file"
    raise CheckpointError(got, hint=hint)


def _no_weights(source: Source, names: Names) -> CheckpointError:
    """What a folder holds instead of weights that can be found."""
    others = []
    for name in names:
        if name.endswith(".safetensors") and not name.startswith("consolidated"):
            others.append(name)
    if not others:
        kind = kind_of(names)
        if kind is not None:
            return CheckpointError(f"`{source.name}` is {kind.found}", hint=kind.hint)
        got = f"`{source.name}` holds no weights: no {_SINGLE}"
        return CheckpointError(got, hint=f"the folder is incomplete; {_AGAIN}")
    if "-of-" in others[0]:
        got = f"`{source.name}` holds shards, but no {_INDEX}"
        return CheckpointError(got, hint=f"the folder is incomplete; {_AGAIN}")
    got = f"`{source.name}` holds {others[0]}, but no {_SINGLE}"
    return CheckpointError(got, hint=f"if it is the whole model, call it {_SINGLE}")


def _promised(source: Source, index: str) -> Promised:
    """What an index says."""
    path = source.folder / index
    promised: Promised = {}
    try:
        places = _read_object(path)["weight_map"]
        for tensor, file in places.items():
            promised.setdefault(str(file), set()).add(tensor)
    except (OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged_file(path, error) from None
    if not promised:
        raise CheckpointError(f"`{path}` names no tensor", hint=_AGAIN)
    return promised


def _check_same(source: Source) -> None:
    """A folder with both a whole file and shards: only one of the two would be read."""
    sharded: set[str] = set()
    for tensors in _promised(source, _INDEX).values():
        sharded |= tensors
    whole = set(_header(source, _SINGLE))
    if sharded != whole:
        got = f"`{source.name}` holds two sets of weights: {_SINGLE}, and the shards of {_INDEX}"
        raise CheckpointError(got, hint="move the one that is old out of the folder")


def _header(source: Source, file: str) -> dict[str, str]:
    """Every tensor of a safetensors file with its dtype.

    The file's length is what its header says.
    """
    path = source.folder / file
    other = foreign_file(path)
    if other is not None:
        raise CheckpointError(f"`{path}` is {other.found}", hint=other.hint)
    try:
        with safe_open(path, framework="pt") as opened:
            names = opened.keys()
            return {name: str(opened.get_slice(name).get_dtype()) for name in names}
    except (SafetensorError, OSError) as error:
        got = f"`{path}` is damaged: {first_line(error)}"
        raise CheckpointError(got, hint=f"it may be cut short; {_AGAIN}") from None


def _check_weight_files(source: Source, config: Json, files: Promised) -> None:
    """Every file is there, whole, with what the index promises, and nothing needs unpacking."""
    absent = [file for file in sorted(files) if not (source.folder / file).exists()]
    if absent:
        first = absent[0]
        why = "which its index names" if files[first] else "which its config.json names"
        if (source.folder / first).is_symlink():
            why = "for its link leads nowhere"
        got = f"`{source.name}` lacks {first}{_and_more(absent)}, {why}"
        raise CheckpointError(got, hint=f"the folder is incomplete; {_AGAIN}")

    is_quantised = _quantisation(config) is not None
    for file, promised in sorted(files.items()):
        held = _header(source, file)
        lacking = sorted(promised - held.keys())
        if lacking:
            path = source.folder / file
            got = f"`{path}` lacks the tensor {lacking[0]}, which the index promises in it"
            raise CheckpointError(got, hint=f"the shards are not of one model; {_AGAIN}")
        if not is_quantised:
            _check_unpacked(source, held)


def _check_unpacked(source: Source, dtypes: Mapping[str, str]) -> None:
    for name, dtype in dtypes.items():
        if name.endswith(".weight") and dtype.startswith(("I", "U")):
            held = f"`{source.name}` holds {name} as {dtype}"
            got = f"{held}, but its config.json names no quantisation"
            hint = "take its config.json from where the weights are from, or unquantised weights"
            raise CheckpointError(got, hint=hint)


# ---- after: what was really read -----------------------------------------------------------------


def _check_whole(source: Source, architecture: str, info: Json) -> None:
    """Raises CheckpointError for the first tensor that was not read as it is.

    One that is missing, of another shape, or in the files but not in the model.
    """
    unexpected = sorted(name for name in info["unexpected_keys"] if not _is_other_part(name))
    missing = sorted(info["missing_keys"])
    if missing:
        first = f"{missing[0]}{_and_more(missing)}"
        got = f"`{source.name}` lacks the tensor {first} of a {architecture}"
        raise CheckpointError(got, hint=_why_missing(source, missing, unexpected))

    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        name, stored, wanted = mismatched[0]
        shapes = f"{list(stored)}, its config.json asks for {list(wanted)}"
        got = f"{name} of `{source.name}` has shape {shapes}"
        raise CheckpointError(got, hint="the two do not belong together: take both from one place")
    if unexpected:
        first = f"{unexpected[0]}{_and_more(unexpected)}"
        got = f"`{source.name}` holds the tensor {first}, which a {architecture} leaves out"
        hint = "what ran would be another model: is the config.json of these weights the right one?"
        raise CheckpointError(got, hint=hint)
    if info.get("error_msgs"):
        got = f"cannot load `{source.name}`: {first_line(info['error_msgs'][0])}"
        raise CheckpointError(got, hint=_AGAIN)


def _check_all_used(source: Source, model: Theirs) -> None:
    """A GGUF file's tensors that its reader has no place for are dropped without a word.

    So the numbers must add up.
    """
    from gguf import GGUFReader

    reader = GGUFReader(source.folder / str(source.gguf))
    architecture = str(reader.fields["general.architecture"].contents())
    sizes: dict[str, int] = {}
    for tensor in reader.tensors:
        if ".nextn" not in tensor.name:
            sizes[tensor.name] = int(tensor.n_elements)
    if architecture in ("falcon", "bloom"):  # always tied
        sizes.pop("output.weight", None)

    taken = sum(parameter.numel() for parameter in model.parameters())
    if sum(sizes.values()) <= taken:
        return
    left = _left_out(sizes, architecture, model)
    got = f"`{source.name}` holds the tensor {left}, which a {type(model).__name__} leaves out"
    hint = "what ran would be another model: use the model's original Hugging Face folder"
    raise CheckpointError(got, hint=hint)


def _left_out(names: Iterable[str], architecture: str, model: Theirs) -> str:
    """The first of a GGUF file's tensors that no parameter is made of, as far as gguf can tell."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    enum = next((key for key, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    if enum is None:
        return min(names)

    num_layers = int(model.config.get_text_config().num_hidden_layers)
    ggml_names = get_tensor_name_map(enum, num_layers)
    known = set()
    for name, _ in model.named_parameters():
        known.add(ggml_names.get_name(name, try_suffixes=(".weight", ".bias")))
    left = set(names) - known
    return min(left) if left else min(names)


def _is_other_part(name: str) -> bool:
    return any(part in _OTHER_PARTS for part in name.split("."))


def _and_more(names: Names) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _why_missing(source: Source, missing: list[str], unexpected: list[str]) -> str:
    wrapped = next((name for name in unexpected if name.endswith(f".{missing[0]}")), None)
    if wrapped is not None:
        prefix = wrapped.removesuffix(missing[0])
        mend = "save the model itself, without what wraps it, and load that"
        return f"its tensors are called {prefix}...: {mend}"
    for name in unexpected:
        if "weight_scale" in name or "qweight" in name or "absmax" in name:
            cause = "its weights are quantised and its config.json does not say so"
            return f"{cause}; take the unquantised ones"
    if any("lora_" in name for name in unexpected):
        return _MERGE
    if source.gguf is not None:
        return f"the file is incomplete, or of another architecture than it says; {_AGAIN}"
    return f"the weights are incomplete, or config.json is another model's; {_AGAIN}"


# ---- what transformers prints --------------------------------------------------------------------

_loader_log = logging.getLogger("transformers.modeling_utils")
_quiet = threading.local()  # its `asked` is true in a thread that is inside `without_bars`


class _Bars:
    """Transformers' progress bars, of which the process has one setting."""

    lock = new_lock()
    hiders = 0  # threads inside `without_bars`
    were_on = True  # before the first of them
    of_gguf: Callable[..., object]  # what draws those of GGUF files


@contextmanager
def without_bars() -> Iterator[None]:
    """Transformers draws no progress bars.

    It has its own setting back behind the last of several loads at once. Standard error stays what
    it is: other threads write there. A user who asked for bars (HF_HUB_DISABLE_PROGRESS_BARS=0)
    has them, but for those of GGUF files, which know no setting. Nor does transformers write its
    table of odd tensors for this thread: `_check_whole` says the same in a line.
    """
    with _Bars.lock:
        if _Bars.hiders == 0:
            _hide_bars()
        _Bars.hiders += 1
    _quiet.asked = True
    try:
        yield
    finally:
        _quiet.asked = False
        with _Bars.lock:
            _Bars.hiders -= 1
            if _Bars.hiders == 0:
                _show_bars()


def _hide_bars() -> None:
    import huggingface_hub

    settings, gguf_reader = _their_files()
    _Bars.were_on = settings.is_progress_bar_enabled()
    if huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS is not False:
        settings._tqdm_active = False
    _Bars.of_gguf = gguf_reader.tqdm
    gguf_reader.tqdm = _gguf_bar
    _loader_log.addFilter(_is_for_others)


def _show_bars() -> None:
    settings, gguf_reader = _their_files()
    settings._tqdm_active = _Bars.were_on
    gguf_reader.tqdm = _Bars.of_gguf
    _loader_log.removeFilter(_is_for_others)


def _their_files() -> tuple[Theirs, Theirs]:
    """Where transformers keeps its setting, and where it reads GGUF files."""
    return (
        import_module("transformers.utils.logging"),
        import_module("transformers.modeling_gguf_pytorch_utils"),
    )


def _is_for_others(_record: logging.LogRecord) -> bool:
    return not getattr(_quiet, "asked", False)


def _gguf_bar(items: object, *args: object, **options: object) -> object:
    if getattr(_quiet, "asked", False):
        return items
    return _Bars.of_gguf(items, *args, **options)


# ---- what transformers raised --------------------------------------------------------------------


def _explained(error: Exception, source: Source, part: str = "") -> FlashDraftError:
    """The error in a line, with the cause that can be found and what helps against it."""
    if isinstance(error, FlashDraftError):
        return error
    told = f"cannot load {part}`{source.name}`: {first_line(error)}"
    how = _quantised_by(source)
    if _is_memory(error):
        hint = "close other programs, give a smaller --dtype (bfloat16), or take a smaller model"
        return CheckpointError(f"{told} (not enough memory)", hint=hint)
    if isinstance(error, ImportError):
        hint = "install that package"
        if how:
            cause = f"it is quantised by {how}, which asks for that package"
            hint = f"{cause}; or take a model that needs none"
        return CheckpointError(told, hint=hint)

    damaged = _damaged(source)
    if damaged is not None:
        return damaged
    odd = _odd_config(source)
    if odd is not None:
        hint = "mend it, or fetch it again"
        return CheckpointError(f"config.json of `{source.name}` {odd}", hint=hint)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return CheckpointError(told, hint="free some space there")
    if isinstance(error, PermissionError):
        return CheckpointError(told, hint="see who owns the files and their mode (ls -l)")
    if "trust_remote_code" in str(error):
        got = f"cannot load {part}`{source.name}`: it exists only in the folder's own Python"
        return CheckpointError(got, hint=_NO_CODE)
    if how:
        hint = f"it is quantised by {how}, which does not run here; take the unquantised weights"
        return CheckpointError(told, hint=hint)
    question = "is it a causal language model in Hugging Face's format?"
    return CheckpointError(told, hint=f"transformers {_version()} cannot read it; {question}")


def _version() -> str:
    import transformers

    return transformers.__version__


def _is_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = (
        "not enough memory",
        "cannot allocate memory",
        "can't allocate memory",
        "out of memory",
    )
    text = str(error).lower()
    return any(word in text for word in words)


def _quantised_by(source: Source) -> str | None:
    if source.gguf is not None:
        return None
    try:
        how = _quantisation(read_config(source.folder))
    except CheckpointError:
        return None
    if not isinstance(how, dict):
        return None

    if how.get("quant_method"):
        return str(how["quant_method"])
    if how.get("load_in_4bit") or how.get("load_in_8bit"):
        return "bitsandbytes"
    return None


def _damaged(source: Source) -> CheckpointError | None:
    """The first of the folder's files that cannot be read, if that is why a load failed."""
    if source.gguf is not None:
        return None
    for path in sorted(source.folder.glob("*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            return _damaged_file(path, error)
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

    parts = [config]
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name)
        if isinstance(rope, dict):
            parts.append(rope)
            kind = rope.get("rope_type", rope.get("type", "default"))
            if not _is_known_rope(kind):
                unknown = f"which transformers {_version()} does not know"
                return f"has rotary positions of type {kind!r}, {unknown}"
    for part in parts:
        for name in ("rope_theta", "factor"):
            if isinstance(part.get(name), str):
                return f"has {name} {part[name]!r}: text, not a number"

    try:
        read_their_config(source)
    except Exception as error:  # a config's own checks raise what they like
        return f"cannot be used: {first_line(error)}"
    return None


def _is_known_rope(kind: object) -> bool:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return kind in ("default", *ROPE_INIT_FUNCTIONS)
