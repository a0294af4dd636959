"""A target and its drafter by name: what `flashdraft.load` puts together, and which methods have a draft network."""

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flashdraft import hub
from flashdraft.decoding.ending import end_tokens
from flashdraft.errors import CheckpointError, InvalidParameter, ModelNotFound, first_line
from flashdraft.files import parse_json
from flashdraft.formats.config import DraftConfig
from flashdraft.formats.foreign import is_draft
from flashdraft.generate import Model
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.methods.dflash import DFlashDraftModel
from flashdraft.methods.draft_model import CutDraftModel, DraftModelDrafter, check_tokenizers
from flashdraft.methods.eagle3 import Eagle3DraftModel
from flashdraft.methods.medusa import MedusaDraftModel
from flashdraft.methods.network import DraftNetwork
from flashdraft.methods.prompt_lookup import PromptLookup
from flashdraft.methods.union import Union
from flashdraft.models.hf import HFTarget
from flashdraft.models.lean import FAMILIES, LeanTarget, fastest, unfit
from flashdraft.models.target import Target
from flashdraft.pretrained import Source, check_folder, check_tokenizer, read_model, read_tokenizer
from flashdraft.process import undisturbed
from flashdraft.types import COUNTS, Allowed, Drafter, as_number, check_option, require

__all__ = [
    "DTYPES",
    "KERNELS",
    "MOST_NODES",
    "NETWORKS",
    "drafters",
    "load",
    "load_target",
    "open_network",
    "shipped",
    "union_parts",
]
Size = int | None
Loaded = tuple[Target, Any, frozenset[int]]
KERNELS = ("auto", "compact", "float32", "int8", "torch", "compiled", "transformers")
_HOW = ("device", "dtype", "kernel")  # of `load`, for its target
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
MOST_NODES = 1024  # of a proposal: its masks and states are square in them
_ALL = DFlashDraftModel, Eagle3DraftModel, MedusaDraftModel, CutDraftModel
NETWORKS: dict[str, type[DraftNetwork]] = {network.method: network for network in _ALL}


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

    draft: "auto" (the drafter shipped for this target, or none), "autoregressive", "prompt_lookup", a drafter's folder or hub id
    (its config says which method it is of), a smaller causal LM with the same tokenizer, "dflash", "eagle3", "medusa" or
    "draft_model" for the one that is shipped, or two of these joined by +, whose proposals become one tree.
    block_size: nodes per proposal, the anchor included; by default as many of what the drafter was trained for as pay.
    tree_nodes: the draft network proposes a tree of so many nodes; None: a chain. how: `device`, "cpu" by default;
    `dtype`, "auto" (as stored), "float32", "bfloat16" or "float16"; `kernel`, what runs a float32 target on a CPU: "auto" (the
    fastest exact one, measured once a machine), "compact" (the same numbers in fewer bytes), "float32", "torch",
    "transformers", or "int8", which rounds weights and activations and so makes another target. "torch" and "compiled" (static
    shapes for CUDA graphs, docs/gpu.md) run llama-shaped targets in any dtype on any device.
    Raises a FlashDraftError that says what to do.
    """
    max_rows, block_size, tree_nodes = map(as_number, (max_rows, block_size, tree_nodes))
    if unknown := sorted(how.keys() - _HOW):
        raise InvalidParameter(
            f"unknown option `{unknown[0]}`", hint=f"options are {', '.join(_HOW)}"
        )
    check_option("max_rows", max_rows, int, COUNTS)
    _check_sizes(block_size, tree_nodes)
    name = _name_of(target)
    loaded, tokenizer, eos = load_target(name, **how)
    new_drafter = drafters(draft, loaded, name, block_size, tree_nodes, tokenizer=tokenizer)
    adaptive = block_size is None and draft != "autoregressive"
    return Model(loaded, tokenizer, new_drafter, eos=eos, max_rows=max_rows, adaptive=adaptive)


def _name_of(given: str | Path) -> str:
    """A Path is the folder itself, also where it is called as something that is known by name."""
    name = str(given)
    known = (*hub.BUILTIN, *NETWORKS)
    return f"./{name}" if isinstance(given, Path) and name in known else name


@undisturbed
def load_target(
    name: str, *, device: str = "cpu", dtype: str = "auto", kernel: str = "auto"
) -> Loaded:
    """The target, its tokenizer and its end-of-text ids; see `load`. Raises InvalidParameter for a kernel that cannot run it."""
    require(dtype in DTYPES, "dtype", dtype, f"one of {', '.join(DTYPES)}")
    require(kernel in KERNELS, "kernel", kernel, f"one of {', '.join(KERNELS)}")
    device = _device_name(device)
    files = hub.resolve(name)
    gguf = files.filename if isinstance(files, hub.GgufFile) else None
    source = Source(name, files.folder if isinstance(files, hub.GgufFile) else files, gguf)
    if gguf is None:
        check_folder(source)
    tokenizer = read_tokenizer(source)
    model = read_model(source, dtype=dtype)
    check_tokenizer(source, tokenizer, int(model.get_input_embeddings().weight.shape[0]))
    try:
        model.to(torch.device(device))
    except (
        RuntimeError,
        AssertionError,
        ValueError,
    ) as error:  # torch was built without it; a quantised model that stays
        raise _device_refused(device, error) from None
    stated = (
        _stated_configs(files)
        if isinstance(files, Path)
        else [{"eos_token_id": model.generation_config.eos_token_id}]
    )
    odd = unfit(model)
    stored = model.dtype
    ours = kernel != "transformers" and (device == "cpu" or kernel in ("torch", "compiled"))
    lean = ours and odd is None
    if lean and kernel == "auto":
        quick = fastest(model, name, consume=True)
        if quick is None:  # the model's weights are gone
            return load_target(name, device=device, dtype=dtype, kernel="torch")
        return quick, tokenizer, end_tokens(stated, tokenizer, quick.vocab_size)
    made = LeanTarget(model, name, kernel=kernel, consume=True) if lean else HFTarget(model, name)
    if kernel not in ("auto", made.kernel_name):
        raise _kernel_refused(kernel, made, odd, stored, device)
    return made, tokenizer, end_tokens(stated, tokenizer, made.vocab_size)


def _device_name(given: Any) -> str:
    """A device as torch writes it; the CPU has one name, however it was given. Raises InvalidParameter for what is none."""
    require(isinstance(given, (str, int, torch.device)), "device", given, "cpu, cuda, cuda:1, mps")
    try:
        device = torch.device(given)
    except RuntimeError as error:  # torch was built without it
        raise _device_refused(given, error) from None
    require(device.type != "meta", "device", given, "one that holds numbers")
    return "cpu" if device.type == "cpu" else str(device)


def _device_refused(device: Any, error: Exception) -> InvalidParameter:
    full = isinstance(error, torch.OutOfMemoryError)
    hint = (
        "the model does not fit there: give a smaller --dtype"
        if full
        else "device must be one that torch can use"
    )
    return InvalidParameter(f"device is {device!r}: {first_line(error)}", hint=hint)


def _stated_configs(folder: Path) -> list[dict[str, Any]]:
    """What a folder's own files say, without the defaults that a class of transformers adds."""
    configs = [hub.read_config(folder)]
    path = folder / "generation_config.json"
    if path.is_file():
        with suppress(OSError, ValueError):  # transformers passes over a damaged one, too
            configs.append(parse_json(path.read_text(encoding="utf-8")))
    return [config for config in configs if isinstance(config, dict)]


def _kernel_refused(
    kernel: str, made: Target, odd: str | None, dtype: torch.dtype, device: str
) -> InvalidParameter:
    """Why another kernel runs than the one that was asked for: the first cause, and what helps against it."""
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
        cause = f"its weights are {str(dtype).removeprefix('torch.')}, the C++ kernels take float32"
        hint = "add --dtype float32, or leave --kernel out"
    elif size is not None:
        cause = size
        hint = "the C++ kernels cannot take that size; leave --kernel out"
    got = f"kernel is {kernel!r}, but `{made.name}` runs by {made.kernel_name}: {cause}"
    return InvalidParameter(got, hint=hint)


def drafters(
    draft: str | Path,
    target: Target,
    name: str,
    block_size: Size = None,
    tree_nodes: Size = None,
    *,
    tokenizer: Any = None,
) -> Callable[[], Drafter]:
    """What makes new drafters of the kind called `draft` for this target; see `load`. tokenizer: the target's, if it is known."""
    _check_sizes(block_size, tree_nodes)
    if draft == "auto":
        draft = hub.builtin_draft(name) or "autoregressive"
    first, *others = union_parts(str(draft))
    if others:
        rest = "+".join(others)
        require(
            "autoregressive" not in (first, *others), "draft", draft, "two methods that both draft"
        )
        options = [
            (block_size, None if part == "prompt_lookup" else tree_nodes) for part in (first, rest)
        ]
        parts = zip((first, rest), options, strict=True)
        one, other = (
            drafters(part, target, name, *own, tokenizer=tokenizer) for part, own in parts
        )
        return lambda: Union(one(), other())
    if draft in ("autoregressive", "prompt_lookup"):
        require(
            tree_nodes is None, "tree_nodes", tree_nodes, "left out: a draft network makes trees"
        )
    if draft == "prompt_lookup":
        return lambda: PromptLookup(block_size=block_size or 8)
    if draft == "autoregressive":
        require(
            block_size is None, "block_size", block_size, "left out: plain decoding drafts nothing"
        )
        return Autoregressive
    return partial(
        _network(_name_of(draft), target, name, tokenizer),
        block_size=block_size,
        tree_nodes=tree_nodes,
    )


def union_parts(draft: str, is_there: Callable[[str], bool] = os.path.exists) -> list[str]:
    """The drafters that + joins; a path that is there may have a + in its name."""
    before, *behind = draft.split("+")
    if not behind or not all(draft.split("+")):
        return [draft]

    parts = []
    pieces = [before, *behind]
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


def _network(
    draft: str, target: Target, target_name: str, tokenizer: Any
) -> Callable[..., Drafter]:
    """The drafters of a folder or hub id, of whichever method it is; a method's name is the one shipped for the target."""
    draft = shipped(draft, target_name)
    files = hub.resolve(draft)
    config = hub.read_config(files) if isinstance(files, Path) else {}
    if is_draft(config):
        return open_network(draft).drafters(target)
    small, own, _ = load_target(
        draft, dtype="float32" if target.kernel_name != "transformers" else "auto"
    )  # a causal LM
    check_tokenizers(tokenizer or own, own, target, small)
    return partial(DraftModelDrafter, small, vocab_size=target.vocab_size)


def shipped(draft: str, target_name: str) -> str:
    """The folder of the drafter shipped for a target where `draft` is a method's name; else `draft` itself."""
    if draft not in NETWORKS:
        return draft
    hub.check_unambiguous(draft, "a method's name")
    folder = hub.builtin_draft(target_name, draft)
    if folder is None:
        raise ModelNotFound(
            f"no {draft} drafter is shipped for `{target_name}`",
            hint="give a drafter's folder or hub id",
        )
    return str(folder)


def open_network(draft: str | Path, target_name: str = "") -> DraftNetwork:
    """The draft network of a folder, a hub id or a method's name, of whichever method it is. Raises CheckpointError."""
    name = shipped(str(draft), target_name)
    files = hub.resolve(name)
    config = hub.read_config(files) if isinstance(files, Path) else {}
    if not is_draft(config):
        got = f"`{name}` is not a DFlash drafter, nor one of {', '.join(NETWORKS)}: it is a language model"
        raise CheckpointError(got, hint="give a folder that `flashdraft train` wrote")
    method = DraftConfig.from_json(config, name).method
    if method not in NETWORKS:
        raise CheckpointError(
            f"`{name}` is a drafter of {method!r}", hint=f"methods are {', '.join(NETWORKS)}"
        )
    return NETWORKS[method].from_pretrained(name)
