"""A target and its drafter by name: what `flashdraft.load` puts together.

Also which methods have a draft network. Their files are imported when one of them is asked for.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch

from flashdraft import hub
from flashdraft.decoding.ending import end_tokens, word_of
from flashdraft.errors import (
    CheckpointError,
    DraftMismatch,
    InvalidParameter,
    ModelNotFound,
    first_line,
)
from flashdraft.files import parse_json
from flashdraft.formats.config import DraftConfig
from flashdraft.formats.foreign import IMAGE_METHOD, is_draft
from flashdraft.formats.read import MOST_NODES
from flashdraft.formats.written import config_of
from flashdraft.formats.zlab import Vocabulary
from flashdraft.generate import Model
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.methods.network import DraftNetwork
from flashdraft.methods.prompt_lookup import PromptLookup
from flashdraft.methods.union import Union
from flashdraft.models.hf import HFTarget
from flashdraft.models.lean import FAMILIES, LeanTarget, fastest, unfit
from flashdraft.models.packed import Shelf
from flashdraft.models.target import Target
from flashdraft.pretrained import (
    Json,
    Source,
    Theirs,
    Tokenizer,
    check_folder,
    check_tokenizer,
    read_model,
    read_tokenizer,
)
from flashdraft.process import undisturbed
from flashdraft.types import COUNTS, Allowed, Drafter, as_number, check_option, require

__all__ = [
    "DTYPES",
    "KERNELS",
    "MOST_NODES",
    "NETWORKS",
    "Loaded",
    "drafters",
    "load",
    "load_target",
    "load_tokenizer",
    "open_network",
    "shipped",
    "union_parts",
    "vocabulary_of",
]

Size = int | None
KERNELS = ("auto", "compact", "float32", "int8", "torch", "compiled", "transformers")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
_HOW = ("device", "dtype", "kernel")  # of `load`, for its target
_NO_DRAFT_NETWORK = ("autoregressive", "prompt_lookup")


# Of each method's draft network: the file, and the class in it.
_PLACES = {
    "dflash": ("flashdraft.methods.dflash", "DFlashDraftModel"),
    "eagle3": ("flashdraft.methods.eagle3", "Eagle3DraftModel"),
    "medusa": ("flashdraft.methods.medusa", "MedusaDraftModel"),
    "draft_model": ("flashdraft.methods.draft_model", "CutDraftModel"),
}


class _Networks(Mapping[str, type[DraftNetwork]]):
    """The class of each method's draft network, whose file is imported when it is asked for."""

    def __getitem__(self, method: str) -> type[DraftNetwork]:
        module, name = _PLACES[method]
        network: type[DraftNetwork] = getattr(import_module(module), name)
        return network

    def __contains__(self, method: object) -> bool:
        return method in _PLACES

    def __iter__(self) -> Iterator[str]:
        return iter(_PLACES)

    def __len__(self) -> int:
        return len(_PLACES)


NETWORKS: Mapping[str, type[DraftNetwork]] = _Networks()


class Loaded(NamedTuple):
    """A target with what belongs to it."""

    target: Target
    tokenizer: Tokenizer
    eos: frozenset[int]  # the ids that end a text


def load(
    target: str | Path = "smollm2-135m",
    *,
    draft: str | Path = "auto",
    block_size: Size = None,
    tree_nodes: Size = None,
    max_rows: int = 8,
    **how: str,
) -> Model:
    """A target by built-in name, hub id, folder or GGUF file, with a drafter, ready to generate.

    - draft: "auto" (the drafter shipped for this target joined with prompt lookup, or none),
      "autoregressive", "prompt_lookup", a drafter's folder or hub id (its config says which method
      it is of), a smaller causal LM with the same tokenizer, "dflash", "eagle3", "medusa" or
      "draft_model" for the one that is shipped, or two of these joined by +, whose proposals become
      one tree.
    - block_size: nodes per proposal, the anchor included; by default as many of what the drafter
      was trained for as pay.
    - tree_nodes: the draft network proposes a tree of so many nodes; None: a chain.
    - max_rows: prompts decoded together, at most.
    - device: "cpu" by default.
    - dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
    - kernel: what runs a float32 target on a CPU: "auto" (the fastest exact one, measured once a
      machine), "compact" (the same numbers in fewer bytes), "float32", "torch", "transformers", or
      "int8", which rounds weights and activations and so makes another target. "torch" and
      "compiled" (static shapes for CUDA graphs, docs/gpu.md) run llama-shaped targets in any dtype
      on any device.

    Raises a FlashDraftError that says what to do.
    """
    max_rows = as_number(max_rows)
    block_size = as_number(block_size)
    tree_nodes = as_number(tree_nodes)
    unknown = sorted(how.keys() - _HOW)
    if unknown:
        hint = f"options are {', '.join(_HOW)}"
        raise InvalidParameter(f"unknown option `{unknown[0]}`", hint=hint)
    check_option("max_rows", max_rows, int, COUNTS)
    _check_sizes(block_size, tree_nodes)

    name = _name_of(target)
    loaded = load_target(name, **how)
    new_drafter = drafters(
        draft, loaded.target, name, block_size, tree_nodes, tokenizer=loaded.tokenizer
    )
    return Model(
        loaded.target,
        loaded.tokenizer,
        new_drafter,
        eos=loaded.eos,
        max_rows=max_rows,
        adaptive=block_size is None and draft != "autoregressive",
    )


def _name_of(given: str | Path) -> str:
    """A Path is the folder itself, also where it is called as something that is known by name."""
    name = str(given)
    is_known = name in hub.BUILTIN or name in NETWORKS
    return f"./{name}" if is_known and isinstance(given, Path) else name


# ---- the target ----------------------------------------------------------------------------------


@undisturbed
def load_target(
    name: str, *, device: str = "cpu", dtype: str = "auto", kernel: str = "auto"
) -> Loaded:
    """The target, its tokenizer and its end-of-text ids; see `load`.

    Raises InvalidParameter for a kernel that cannot run it.
    """
    require(dtype in DTYPES, "dtype", dtype, f"one of {', '.join(DTYPES)}")
    require(kernel in KERNELS, "kernel", kernel, f"one of {', '.join(KERNELS)}")
    device = _device_name(device)

    files = hub.resolve(name)
    if isinstance(files, hub.GgufFile):
        return _read(Source(name, files.folder, files.filename), device, dtype, kernel)
    source = Source(name, files)
    if device != "cpu":
        return _read(source, device, dtype, kernel)

    shelf = Shelf(source, dtype, kernel)
    target = shelf.target()
    if target is not None:
        tokenizer = shelf.tokenizer()
        return _loaded(source, target, tokenizer)
    loaded = _read(source, device, dtype, kernel)
    shelf.keep(loaded.target, loaded.tokenizer)
    return loaded


def load_tokenizer(name: str) -> Tokenizer:
    """A target's tokenizer alone."""
    files = hub.resolve(name)
    if isinstance(files, hub.GgufFile):
        return read_tokenizer(Source(name, files.folder, files.filename))
    return read_tokenizer(Source(name, files))


def vocabulary_of(target_name: str | None) -> Vocabulary | None:
    """A target's tokens, read when they are asked for; None where no target is named."""
    if not target_name:
        return None
    name = target_name
    return lambda: load_tokenizer(name).get_vocab()


def _read(source: Source, device: str, dtype: str, kernel: str) -> Loaded:
    """Read the whole model of these files, and give it to what runs it."""
    if source.gguf is None:
        check_folder(source)
    tokenizer = read_tokenizer(source)
    model = read_model(source, dtype=dtype)
    num_embeddings = int(model.get_input_embeddings().weight.shape[0])
    check_tokenizer(source, tokenizer, num_embeddings)
    _move(model, device)

    # What may run it: the family's plain blocks on our decoder, everything else in transformers.
    odd = unfit(model)
    stored_dtype = model.dtype
    on_cpu = device == "cpu"
    is_ours = kernel in ("torch", "compiled") or (on_cpu and kernel != "transformers")
    if not is_ours or odd is not None:
        made: Target = HFTarget(model, source.name)
    elif kernel != "auto":
        made = LeanTarget(model, source.name, kernel=kernel, consume=True)
    else:
        quick = fastest(model, source.name, consume=True)
        if quick is None:  # the model's weights are gone
            return _read(source, device, dtype, "torch")
        made = quick

    if kernel not in ("auto", made.kernel_name):
        raise _kernel_refused(kernel, made, odd, stored_dtype, device)
    gguf_ends = None if source.gguf is None else model.generation_config.eos_token_id
    return _loaded(source, made, tokenizer, gguf_ends)


def _move(model: Theirs, device: str) -> None:
    """Move the model there. Raises InvalidParameter where torch cannot."""
    try:
        model.to(torch.device(device))
    # Torch was built without it; or a quantised model that stays where it is.
    except (RuntimeError, AssertionError, ValueError) as error:
        raise _device_refused(device, error) from None


def _loaded(
    source: Source, target: Target, tokenizer: Tokenizer, gguf_ends: object = None
) -> Loaded:
    """gguf_ends: the `eos_token_id` of a GGUF file's model; a folder states it in its own files."""
    if source.gguf is None:
        configs = _stated_configs(source.folder)
    else:
        configs = [{"eos_token_id": gguf_ends}]
    eos = end_tokens(configs, tokenizer, target.vocab_size)
    return Loaded(target, tokenizer, eos)


def _device_name(given: object) -> str:
    """A device as torch writes it; the CPU has one name, however it was given.

    Raises InvalidParameter for what is none.
    """
    is_name = isinstance(given, (str, int, torch.device))
    require(is_name, "device", given, "cpu, cuda, cuda:1, mps")
    try:
        device = torch.device(given)  # type: ignore[call-overload]
    except RuntimeError as error:  # torch was built without it
        raise _device_refused(given, error) from None
    require(device.type != "meta", "device", given, "one that holds numbers")
    return "cpu" if device.type == "cpu" else str(device)


def _device_refused(device: object, error: Exception) -> InvalidParameter:
    hint = "device must be one that torch can use"
    if isinstance(error, torch.OutOfMemoryError):
        hint = "the model does not fit there: give a smaller --dtype"
    return InvalidParameter(f"device is {device!r}: {first_line(error)}", hint=hint)


def _stated_configs(folder: Path) -> list[Json]:
    """What a folder's own files say, without the defaults that a class of transformers adds."""
    configs = [hub.read_config(folder)]
    path = folder / "generation_config.json"
    if path.is_file():
        with suppress(OSError, ValueError):  # transformers passes over a damaged one, too
            generation = parse_json(path.read_text(encoding="utf-8"))
            if isinstance(generation, dict):
                configs.append(generation)
    return configs


def _kernel_refused(
    kernel: str, made: Target, odd: str | None, dtype: torch.dtype, device: str
) -> InvalidParameter:
    """Why another kernel runs than the one asked for: the first cause, and what helps."""
    cause = "the C++ kernels could not be compiled, or FLASHDRAFT_NATIVE is 0"
    hint = "install a C++ compiler (g++ or clang++), or leave --kernel out"
    size = made.decoder.odd_size() if isinstance(made, LeanTarget) else None
    if odd is not None:
        cause = odd
        hint = f"ours run plain llama-shaped models ({', '.join(FAMILIES)}); leave --kernel out"
    elif device != "cpu":
        cause = f"the C++ kernels run on a CPU, not on {device}"
        hint = "leave --device out, or give --kernel torch or compiled"
    elif dtype != torch.float32:
        stored = str(dtype).removeprefix("torch.")
        cause = f"its weights are {stored}, the C++ kernels take float32"
        hint = "add --dtype float32, or leave --kernel out"
    elif size is not None:
        cause = size
        hint = "the C++ kernels cannot take that size; leave --kernel out"
    got = f"kernel is {kernel!r}, but `{made.name}` runs by {made.kernel_name}: {cause}"
    return InvalidParameter(got, hint=hint)


# ---- its drafter ---------------------------------------------------------------------------------


def drafters(
    draft: str | Path,
    target: Target,
    name: str,
    block_size: Size = None,
    tree_nodes: Size = None,
    *,
    tokenizer: Tokenizer | None = None,
) -> Callable[[], Drafter]:
    """What makes new drafters of the kind called `draft` for this target; see `load`.

    name: what the target was asked for by; tokenizer: the target's, if it is known.
    """
    _check_sizes(block_size, tree_nodes)
    if draft == "auto":
        folder = hub.builtin_draft(name)
        draft = "autoregressive" if folder is None else f"{folder}+prompt_lookup"

    first, *others = union_parts(str(draft))
    if others:
        both_draft = "autoregressive" not in (first, *others)
        require(both_draft, "draft", draft, "two methods that both draft")
        parts = []
        for part in (first, "+".join(others)):
            nodes = None if part == "prompt_lookup" else tree_nodes
            parts.append(drafters(part, target, name, block_size, nodes, tokenizer=tokenizer))
        one, other = parts
        return lambda: Union(one(), other())

    if draft in _NO_DRAFT_NETWORK:
        allowed = "left out: a draft network makes trees"
        require(tree_nodes is None, "tree_nodes", tree_nodes, allowed)
    if draft == "prompt_lookup":
        return lambda: PromptLookup(block_size=block_size or 8)
    if draft == "autoregressive":
        allowed = "left out: plain decoding drafts nothing"
        require(block_size is None, "block_size", block_size, allowed)
        return Autoregressive

    make = _network_drafters(_name_of(draft), target, name, tokenizer)
    return partial(make, block_size=block_size, tree_nodes=tree_nodes)


def union_parts(draft: str, is_there: Callable[[str], bool] = os.path.exists) -> list[str]:
    """The drafters that + joins; a path that is there may have a + in its name."""
    pieces = draft.split("+")
    if len(pieces) == 1 or not all(pieces):
        return [draft]

    parts = []
    while pieces:
        lengths = range(len(pieces), 0, -1)
        whole = next((count for count in lengths if is_there("+".join(pieces[:count]))), 1)
        parts.append("+".join(pieces[:whole]))
        pieces = pieces[whole:]
    return parts


def _check_sizes(block_size: Size, tree_nodes: Size) -> None:
    if block_size is not None:
        check_option("block_size", block_size, int, Allowed(1, MOST_NODES))
    if tree_nodes is not None:
        check_option("tree_nodes", tree_nodes, int, Allowed(2, MOST_NODES))


def _network_drafters(
    draft: str, target: Target, target_name: str, tokenizer: Tokenizer | None
) -> Callable[..., Drafter]:
    """The drafters of a folder or hub id, of whichever method it is.

    A method's name is the drafter shipped for the target.
    """
    draft = shipped(draft, target_name)
    if is_draft(_config_of(draft)):
        network = open_network(draft, target_name, tokenizer)
        _check_mask(network.config, tokenizer, target.name)
        return network.drafters(target)

    from flashdraft.methods.draft_model import (
        DraftModelDrafter,
        check_cut_back,
        check_tokenizers,
    )

    dtype = "auto" if target.kernel_name == "transformers" else "float32"
    small = load_target(draft, dtype=dtype)  # a causal LM
    check_tokenizers(tokenizer or small.tokenizer, small.tokenizer, target, small.target)
    check_cut_back(small.target)
    return partial(DraftModelDrafter, small.target, vocab_size=target.vocab_size)


def _check_mask(config: DraftConfig, tokenizer: Tokenizer | None, target_name: str) -> None:
    """Raises DraftMismatch where blocks are filled with a word: no drafter was trained so, and a
    config.json that says it belongs to another tokenizer."""
    if tokenizer is None or config.method != "dflash":
        return
    word = word_of(config.mask_token_id, tokenizer)
    if word is not None:
        got = (
            f"the draft fills its blocks with token {config.mask_token_id}, "
            f"which is {word!r} to the tokenizer of `{target_name}`"
        )
        hint = "its mask token means nothing: it is for another tokenizer, or its config is damaged"
        raise DraftMismatch(got, hint=hint)


def _config_of(name: str) -> Json:
    """The config.json of a folder or hub id; nothing of a GGUF file, which is no drafter.

    Raises CheckpointError for a draft of images.
    """
    files = hub.resolve(name)
    if not isinstance(files, Path):
        return {}
    config = hub.read_config(files)
    if config.get("method") == IMAGE_METHOD:
        got = f"`{name}` drafts images, not text"
        raise CheckpointError(got, hint="`flashdraft image --draft` takes it")
    return config


def shipped(draft: str, target_name: str) -> str:
    """The folder of the drafter shipped for a target where `draft` is a method; else `draft`."""
    if draft not in NETWORKS:
        return draft
    hub.check_unambiguous(draft, "a method's name")
    folder = hub.builtin_draft(target_name, draft)
    if folder is None:
        got = f"no {draft} drafter is shipped for `{target_name}`"
        raise ModelNotFound(got, hint="give a drafter's folder or hub id")
    return str(folder)


def open_network(
    draft: str | Path, target_name: str = "", tokenizer: Tokenizer | None = None
) -> DraftNetwork:
    """The draft network of a folder, a hub id or a method's name, of whichever method it is.

    tokenizer: the target's; else it is read, where a drafter asks for it. Raises CheckpointError.
    """
    name = shipped(str(draft), target_name)
    config = _config_of(name)
    methods = ", ".join(NETWORKS)
    if not is_draft(config):
        got = f"`{name}` is not a DFlash drafter, nor one of {methods}: it is a language model"
        raise CheckpointError(got, hint="give a folder that `flashdraft train` wrote")
    vocabulary = vocabulary_of(target_name) if tokenizer is None else tokenizer.get_vocab
    method = config_of(config, name, vocabulary=vocabulary).method
    if method not in NETWORKS:
        got = f"`{name}` is a drafter of {method!r}"
        raise CheckpointError(got, hint=f"methods are {methods}")
    return NETWORKS[method].from_pretrained(name, vocabulary)
