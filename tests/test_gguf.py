"""A GGUF file becomes a folder: converted once, with the logits and the tokens of the model that it
was made from, whole or not at all; a file that cannot be converted is refused by name.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from toy_gguf import TOKENS, built, check_error, empty_cache, logits, tiny_llama, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from flashdraft import hub
from flashdraft.cli import main
from flashdraft.errors import CheckpointError, FlashDraftError, ModelNotFound
from flashdraft.loading import load
from flashdraft.types import SamplingParams


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return empty_cache(tmp_path, monkeypatch)


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=True))


# What a file becomes.


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


# Whole or not at all.


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
