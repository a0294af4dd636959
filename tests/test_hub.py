"""Names become folders: on this disk, on the hub, beside a target; a name of nothing, or of
something else, is one line and a hint.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from toy_gguf import check_error, empty_cache

from flashdraft import hub
from flashdraft.errors import CheckpointError, ModelNotFound


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return empty_cache(tmp_path, monkeypatch)


# Names.


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            " ",
            "nope",
            "./nope",
            "../../nope",
            "/no/where",
            "~/no/where",
            "..",
            "a/b/c",
            "a/../b",
            "org/..",
            "-x/y",
            "org/a--b",
        ),
        *(
            "nope.gguf",
            "org/nope.gguf",
            "https://example.org/org/name",
            "file:///etc",
            "a\0b",
            "a\nb",
            "smollm2-135m/../x",
        ),
        pytest.param("x" * 5000, id="long"),
    ],
)
def test_a_name_of_nothing_is_one_line_and_a_hint(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()  # `..` holds nothing that could be meant
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(hub, "_from_hub", lambda name: pytest.fail("asked the hub"))
    with pytest.raises(ModelNotFound) as caught:
        hub.resolve(name)
    check_error(caught.value, "smollm2-135m", "org/name")


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    with pytest.raises(ModelNotFound) as caught:
        hub.resolve(str(folder))
    check_error(caught.value, "no config.json")
    (folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("org/name") == Path("org/name")  # before any hub id
    with pytest.raises(ModelNotFound) as caught:
        hub.resolve(str(folder / "config.json"))
    check_error(caught.value, "is a file")


@pytest.mark.parametrize(
    "name",
    ["モデル\u3000一", "a\u00a0b", "👩\u200d💻", "plain name", "a\nb", "trailing/", "q?*[x]", "-x"],
)
def test_a_folder_may_have_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text("{}")
    assert hub.resolve(name) == Path(name)
    assert hub.resolve(str(tmp_path / name)) == tmp_path / name


@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors", "a.gguf", "adapter_config.json"]
)
def test_a_model_called_like_the_builtin_one_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "builtin", lambda name: Path("built in"))
    folder = tmp_path / "smollm2-135m"
    folder.mkdir()
    assert hub.resolve("smollm2-135m") == Path("built in")  # no model: logs, say
    (folder / file).write_text("{}")
    with pytest.raises(ModelNotFound) as caught:
        hub.resolve("smollm2-135m")
    check_error(caught.value, "built-in", "./smollm2-135m")
    if file == "config.json":
        assert hub.resolve("./smollm2-135m") == Path("smollm2-135m")
        assert hub.builtin_draft("./smollm2-135m") is None


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("https://huggingface.co/org/name", "give its hub id: org/name"),
        ("https://huggingface.co/org/name/tree/main", "give its hub id: org/name"),
        ("huggingface.co/org/name", "give its hub id: org/name"),
        ("https://hf.co/org/name/", "give its hub id: org/name"),
        ("hf://org/name", "give its hub id: org/name"),
        ("file:///models/x", "give its path: /models/x"),
        ("org/name/", "did you mean org/name?"),
        (" org/name", "did you mean org/name?"),
        ("smollm2-135m\r", "did you mean smollm2-135m?"),
        ("smollm2-135m/", "did you mean smollm2-135m?"),
        ("models\\mine", "did you mean models/mine?"),
    ],
)
def test_a_name_of_nothing_leads_to_what_was_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, meant: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.setattr(hub, "_from_hub", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(ModelNotFound) as caught:
        hub.resolve(name)
    check_error(caught.value, meant)


LIES: dict[str, tuple[str, ...]] = {
    "adapter_config.json": ("an adapter", "merge"),
    "model_index.json": ("diffusers",),
    "m.gguf": ("m.gguf",),
    "params.json": ("maker's own format",),
    "pytorch_model.bin": ("pickle",),
    "tf_model.h5": ("another framework",),
    "checkpoint-500/config.json": ("did you mean", "checkpoint-500"),
    "snapshots/0123/config.json": ("snapshots/0123", "hub id org/name"),
    "x.txt": ("org/name",),
}


@pytest.mark.parametrize("file", LIES)
def test_a_folder_that_is_no_model_says_what_it_is(tmp_path: Path, file: str) -> None:
    folder = tmp_path / "models--org--name"
    (folder / file).parent.mkdir(parents=True)
    (folder / file).write_text("{}")
    with pytest.raises(ModelNotFound) as caught:
        hub.resolve(str(folder))
    check_error(caught.value, "no config.json", *LIES[file])


def test_a_file_of_a_model_leads_to_its_folder(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(ModelNotFound) as caught:
            hub.resolve(str(tmp_path / name))
        check_error(caught.value, "is a file", f"give the folder that holds it: {tmp_path}")


@pytest.mark.parametrize(
    ("files", "word"),
    [
        (["config.json", "pytorch_model.bin"], "pickle"),
        (["a.Q4.gguf", "README.md"], "a.Q4.gguf"),
        (["adapter_config.json", "adapter_model.safetensors"], "an adapter"),
        (["model_index.json"], "diffusers"),
    ],
)
def test_a_hub_repository_that_is_no_model_says_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], word: str
) -> None:
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(ModelNotFound) as caught:
        hub.resolve("org/name")
    check_error(caught.value, word)


def test_what_keeps_a_download_away_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import GatedRepoError

    cases = [
        (hub_answer(GatedRepoError, 403), "accept them"),  # model_info is open, the files are not
        (OSError(28, "No space left on device"), "free some space"),
        (PermissionError(13, "Permission denied"), "HF_HOME"),
    ]
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    for error, word in cases:

        def download(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        with pytest.raises(ModelNotFound) as caught:
            hub.resolve("org/name")
        check_error(caught.value, word)


def hub_answer(error: type[Exception], status: int) -> Exception:
    """An error of the hub client, made as it makes them itself."""
    from huggingface_hub.utils import get_session

    request = get_session().build_request("GET", "https://example.org")
    answer = sys.modules[type(request).__module__.split(".")[0]].Response(status, request=request)
    return error("several\nlines", response=answer)  # type: ignore[call-arg]


def test_hub_answers_become_one_line_and_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    cases = [
        (hub_answer(RepositoryNotFoundError, 404), "no such model"),
        (hub_answer(GatedRepoError, 403), "terms"),
        (hub_answer(HfHubHTTPError, 503), "cannot be fetched: several"),
        (TimeoutError("timed out"), "cannot be fetched: timed out"),
    ]
    for error, word in cases:

        def model_info(
            self: object, name: str, *, timeout: float, error: Exception = error
        ) -> None:
            assert timeout <= 10
            raise error

        monkeypatch.setattr(HfApi, "model_info", model_info)
        with pytest.raises(ModelNotFound) as caught:
            hub.resolve("org/name")
        check_error(caught.value, "`org/name`", word)


def test_an_offline_hub_gives_what_was_fetched_before_and_else_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound) as caught:
        hub.resolve("org/name")
    check_error(caught.value, "org/name", "offline")
    repository = tmp_path / "hub" / "models--org--name"
    folder = repository / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelNotFound) as caught:
        hub.resolve("org/name")
    check_error(caught.value, "pickled")
    (folder / "model.safetensors").write_bytes(b"")
    assert hub.resolve("org/name") == folder


def test_the_hub_is_asked_for_no_pickles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    wanted = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "chat_template.jinja",
    ]
    wanted += ["tokenizer.model", "merges.txt"]
    wanted += ["mask_embedding.pt"]  # of a drafter, which is opened as tensors alone
    others = [
        "pytorch_model.bin",
        "embedding.pt",
        "model.pt",
        "x.pkl",
        "modeling.py",
        "original/params.json",
        "consolidated.safetensors",
        "a.gguf",
    ]
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")

    def download(
        name: str, *, allow_patterns: list[str], ignore_patterns: list[str], local_files_only: bool
    ) -> str:
        assert not local_files_only
        kept = filter_repo_objects(
            [*wanted, *others], allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        assert list(kept) == wanted
        return str(tmp_path)

    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert hub.resolve("org/name") == tmp_path


@pytest.mark.parametrize("inner", ["dflash", "model/consolidated"])
def test_drafter_in_a_subfolder_is_fetched_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inner: str
) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    wanted = [f"{inner}/config.json", f"{inner}/model.safetensors", f"{inner}/mask_embedding.pt"]
    files = [*wanted, "README.md", "optimiser/state.safetensors", "assets/a.json"]
    for name in wanted:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")

    def download(*_: str, allow_patterns: list[str], ignore_patterns: list[str], **__: bool) -> str:
        kept = filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        assert list(kept) == wanted
        return str(tmp_path)

    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert hub.resolve("org/name") == tmp_path / inner
    assert hub.resolve(str(tmp_path)) == tmp_path / inner


# Configs, the cache folder, shipped drafters.


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_bad_config_is_one_line_and_a_hint(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        hub.read_config(tmp_path)
    check_error(caught.value, "config.json")


def test_config_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert hub.read_config(tmp_path) == {"model_type": "llama"}


def test_cache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHDRAFT_CACHE", "~/models")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.cache_dir() == tmp_path / "models"
    monkeypatch.delenv("FLASHDRAFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert hub.cache_dir() == tmp_path / "xdg" / "flashdraft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hub.cache_dir() == tmp_path / ".cache" / "flashdraft"


def test_a_shipped_drafter_is_found_by_its_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "__file__", str(tmp_path / "hub.py"))
    folder = tmp_path / "assets" / "smollm2-135m-dflash"
    folder.mkdir(parents=True)
    assert hub.builtin_draft("smollm2-135m") is None
    (folder / "config.json").write_text("{}")
    assert hub.builtin_draft("smollm2-135m") == folder
    assert hub.builtin_draft("../assets/smollm2-135m") is None
    assert hub.builtin_draft("org/name") is None
