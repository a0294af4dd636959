"""`load`, `generate` and `stream`: every form of prompt, one result each, and no request that
disturbs another.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EOS, VOCAB
from toy_folders import letter_tokenizer, save_target, save_zlab

import flashdraft
from flashdraft import generate as module
from flashdraft.engine import Engine
from flashdraft.errors import (
    CheckpointError,
    ContextLengthError,
    FlashDraftError,
    InvalidParameter,
    InvalidPrompt,
    ModelNotFound,
)
from flashdraft.generate import Model
from flashdraft.types import Chunk, Result, SamplingParams

PROMPTS = ["hello there", "a", "what is it?", "zebra", "Quick brown fox"]
PARAMS = SamplingParams(max_new_tokens=20, ignore_eos=True)
SAMPLED = replace(PARAMS, temperature=1.0, seed=5)


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def draft_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_zlab(tmp_path_factory.mktemp("draft"))


@pytest.fixture(scope="module")
def model(target_folder: Path, draft_folder: Path) -> Model:
    return flashdraft.load(target_folder, draft=draft_folder, dtype="float64", max_rows=3)


@pytest.fixture(scope="module")
def plain(target_folder: Path) -> Model:
    return flashdraft.load(target_folder, draft="autoregressive", dtype="float64")


def one_line(error: pytest.ExceptionInfo[FlashDraftError], *, hint: bool = True) -> str:
    message, *rest = str(error.value).split("\n")
    assert [line[:6] for line in rest] == ["hint: "] * hint
    return message


# Forms of a prompt.


def test_one_prompt_gives_one_result(model: Model) -> None:
    result = model.generate("hello there", PARAMS)
    assert isinstance(result, Result)
    assert result.finish_reason == "length"
    assert len(result.tokens) == result.stats.num_tokens == 20
    assert result.text == model.tokenizer.decode(list(result.tokens), skip_special_tokens=True)


def test_list_of_prompts_gives_a_list_in_its_order(model: Model) -> None:
    """Five prompts through three rows."""
    results = model.generate(PROMPTS, PARAMS)
    assert [result.tokens for result in results] == [
        model.generate(prompt, PARAMS).tokens for prompt in PROMPTS
    ]
    assert len({result.text for result in results}) == len(PROMPTS)


def test_prompts_that_end_at_different_times_keep_their_order(model: Model) -> None:
    each = [replace(PARAMS, max_new_tokens=n) for n in (9, 1, 20, 2, 5)]
    results = model.generate(PROMPTS, each)
    assert [len(result.tokens) for result in results] == [9, 1, 20, 2, 5]
    whole = model.generate(PROMPTS, PARAMS)
    cut = [r.tokens[:n] for r, n in zip(whole, (9, 1, 20, 2, 5), strict=False)]
    assert [r.tokens for r in results] == cut


def test_text_conversation_and_token_ids_are_the_same_prompt(model: Model) -> None:
    conversation = [{"role": "user", "content": "zebra"}]
    ids = model.encode("zebra")
    assert model.tokenizer.decode(ids) == "u zebra.a "
    texts = [
        model.generate(prompt, PARAMS).text for prompt in ("zebra", conversation, ids, tuple(ids))
    ]
    assert len(set(texts)) == 1
    both = model.generate([conversation, "zebra", ids], PARAMS)
    assert [result.text for result in both] == texts[:3]


def test_conversation_has_all_its_turns(model: Model) -> None:
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert model.tokenizer.decode(model.encode(turns)) == "u a.a b.u c.a "


def test_list_of_one_prompt_gives_a_list(model: Model) -> None:
    (result,) = model.generate(["zebra"], PARAMS)
    assert result.text == model.generate("zebra", PARAMS).text
    assert model.generate([], PARAMS) == []


def test_target_without_chat_template_takes_text_as_it_is(tmp_path: Path) -> None:
    raw = flashdraft.load(save_target(tmp_path, chat=False), dtype="float64")
    assert raw.tokenizer.decode(raw.encode("zebra")) == "zebra"
    with pytest.raises(InvalidPrompt) as error:
        raw.generate([{"role": "user", "content": "zebra"}], PARAMS)
    assert "has no chat template for a conversation" in one_line(error)


@pytest.mark.parametrize("prompt", ["", [[]], [""], ["a", ""], [()]])
def test_empty_prompt_is_refused(model: Model, prompt: Any) -> None:
    with pytest.raises(InvalidPrompt) as error:
        model.generate(prompt, PARAMS)
    assert "the prompt is empty" in one_line(error)


@pytest.mark.parametrize("token", [VOCAB, -1, 10**9])
def test_token_outside_the_vocabulary_is_refused(model: Model, token: int) -> None:
    with pytest.raises(InvalidPrompt) as error:
        model.generate([[5, 6], [5, token]], PARAMS)
    assert f"token id {token} is outside the vocabulary of {VOCAB}" in one_line(error, hint=False)
    assert len(model.generate([5, VOCAB - 1, 0], PARAMS).tokens) == 20


@pytest.mark.parametrize(
    "prompt",
    [
        {"role": "user", "content": "a"},
        [{"role": "user"}],
        [{"role": "user", "content": "a"}, "b"],
        [5, "a"],
        5,
        None,
        [None],
        [5.5],
    ],
    ids=repr,
)
def test_prompt_of_no_known_form_is_refused(model: Model, prompt: Any) -> None:
    with pytest.raises(InvalidPrompt) as error:
        model.generate(prompt, PARAMS)
    one_line(error)


def test_conversation_that_the_template_refuses_is_a_wrong_prompt(tmp_path: Path) -> None:
    strict = flashdraft.load(save_target(tmp_path), dtype="float64")
    strict.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidPrompt) as error:
        strict.generate("a", PARAMS)
    assert "roles must alternate" in one_line(error)


def test_prompt_beyond_the_context_is_refused_before_anything_runs(model: Model) -> None:
    assert len(model.generate([5] * 236, PARAMS).tokens) == 20
    with pytest.raises(ContextLengthError) as error:
        model.stream(["a", [5] * 237], PARAMS)
    assert "the prompt has 237 tokens and 20 new ones were asked for" in one_line(error)


# Options.


def test_options_are_sampling_parameters(model: Model) -> None:
    by_options = model.generate(
        "zebra", max_new_tokens=20, ignore_eos=True, temperature=1.0, seed=5
    )
    assert by_options.tokens == model.generate("zebra", SAMPLED).tokens
    assert by_options.tokens != model.generate("zebra", PARAMS).tokens


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"max_tokens": 5}, "unknown option `max_tokens`"),
        ({"params": PARAMS, "seed": 1}, "got both `params` and separate options"),
        ({"params": [PARAMS] * 2}, "got 2 SamplingParams for 1 prompts"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": "warm"}, "temperature is 'warm'"),
        ({"top_p": None}, "top_p is None"),
        ({"min_p": "a"}, "min_p is 'a'"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": ""}, "stop is ('',)"),
        ({"stop": 5}, "stop is 5"),
    ],
    ids=str,
)
def test_wrong_option_is_refused_before_anything_runs(
    model: Model, arguments: dict[str, Any], expected: str
) -> None:
    with pytest.raises(InvalidParameter) as error:
        model.stream("zebra", **arguments)
    assert expected in one_line(error)


NUMBERS: list[dict[str, Any]] = [
    {"temperature": np.float32(0.5), "seed": np.int64(3), "max_new_tokens": np.uint8(4)},
    {
        "temperature": torch.tensor(0.5),
        "seed": torch.tensor(3),
        "max_new_tokens": torch.tensor(4, dtype=torch.int16),
    },
    {"temperature": np.array(0.5), "seed": np.array(3), "max_new_tokens": np.array(4)},
]


@pytest.mark.parametrize("numbers", NUMBERS, ids=["numpy", "torch", "arrays"])
def test_numbers_of_numpy_and_torch_are_numbers(numbers: dict[str, Any]) -> None:
    params = SamplingParams(
        **numbers, ignore_eos=np.True_, logit_bias={np.int64(5): np.float32(1.5)}
    )  # type: ignore[arg-type]
    assert params == SamplingParams(
        temperature=0.5, seed=3, max_new_tokens=4, ignore_eos=True, logit_bias={5: 1.5}
    )
    assert {type(getattr(params, name)) for name in numbers} == {int, float}
    assert json.loads(json.dumps({name: getattr(params, name) for name in numbers}))["seed"] == 3


@pytest.mark.parametrize(
    "value", [np.array([3]), torch.tensor([3]), np.float64(3.5), "3"], ids=repr
)
def test_arrays_and_fractions_are_no_whole_numbers(value: Any) -> None:
    with pytest.raises(InvalidParameter, match="max_new_tokens is"):
        SamplingParams(max_new_tokens=value)


def test_every_prompt_may_have_its_own_parameters(model: Model) -> None:
    each = [
        PARAMS,
        SAMPLED,
        replace(SAMPLED, seed=6),
        replace(SAMPLED, top_k=3),
        replace(PARAMS, max_new_tokens=7),
    ]
    together = model.generate(["zebra"] * 5, each)
    assert [r.tokens for r in together] == [
        model.generate("zebra", params).tokens for params in each
    ]
    assert len({r.tokens for r in together}) == 5


@pytest.mark.parametrize("params", [PARAMS, SAMPLED], ids=["greedy", "sampled"])
def test_text_is_the_plain_text_with_every_drafter(
    target_folder: Path, model: Model, plain: Model, params: SamplingParams
) -> None:
    expected = [result.tokens for result in plain.generate(PROMPTS, params)]
    assert [result.tokens for result in model.generate(PROMPTS, params)] == expected
    repeating = flashdraft.load(target_folder, draft="prompt_lookup", dtype="float64")
    results = repeating.generate(PROMPTS, params)
    assert [result.tokens for result in results] == expected
    assert sum(result.stats.num_drafted for result in results) > 0


# Streams.


def test_joined_chunks_are_the_result(model: Model) -> None:
    model = replace(model, adaptive=False)  # how much is drafted must not depend on what steps take
    chunks = list(model.stream(PROMPTS, PARAMS))
    for index, expected in enumerate(model.generate(PROMPTS, PARAMS)):
        own = [chunk for chunk in chunks if chunk.index == index]
        assert "".join(chunk.text for chunk in own) == expected.text
        assert tuple(token for chunk in own for token in chunk.tokens) == expected.tokens
        assert [chunk.result is not None for chunk in own] == [False] * (len(own) - 1) + [True]
        assert own[-1].result is not None
        assert own[-1].result.text == expected.text
        assert (
            sum(piece.drafted for chunk in own for piece in chunk.pieces)
            == expected.stats.num_accepted
        )
        assert len(own) == 1 + expected.stats.target_passes


def joined(chunks: Sequence[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def test_interleaved_streams_do_not_disturb_each_other(model: Model) -> None:
    first, second = model.stream("hello there", PARAMS), model.stream("what is it?", SAMPLED)
    streams: list[tuple[Iterator[Chunk], list[Chunk]]] = [(first, []), (second, [])]
    for _ in range(25):
        for stream, chunks in streams:
            chunks += [chunk for chunk in [next(stream, None)] if chunk is not None]
    assert joined(streams[0][1]) == model.generate("hello there", PARAMS).text
    assert joined(streams[1][1]) == model.generate("what is it?", SAMPLED).text


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """Every engine that a stream makes."""
    made: list[Engine] = []

    def record(*args: Any, **kwargs: Any) -> Engine:
        made.append(Engine(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(module, "Engine", record)
    return made


def tokens_in_draft_caches(model: Model, engines: list[Engine]) -> list[list[int]]:
    """After the first chunk of two streams that run side by side."""
    streams = [model.stream(prompt, PARAMS) for prompt in PROMPTS[:2]]
    for stream in streams:
        next(stream)
    held = [list(engine.drafter.caches[0].lengths) for engine in engines]
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]
    return held


def test_every_stream_has_a_drafter_of_its_own(model: Model, engines: list[Engine]) -> None:
    first, second = (len(model.encode(prompt)) for prompt in PROMPTS[:2])
    assert tokens_in_draft_caches(model, engines) == [[first], [second]]
    engines.clear()
    shared = model.new_drafter()  # the planted fault
    faulty = Model(model.target, model.tokenizer, lambda: shared, eos=model.eos, max_rows=1)
    assert tokens_in_draft_caches(faulty, engines) == [[first + second]] * 2


def test_stream_that_is_left_frees_its_rows(model: Model, engines: list[Engine]) -> None:
    stream = model.stream(PROMPTS, PARAMS)
    for _ in range(8):
        next(stream)
    (engine,) = engines
    assert len(engine.running) == 3
    assert max(engine.drafter.caches[0].lengths) > 0
    stream.close()  # type: ignore[attr-defined]
    assert engine.running == {}
    assert engine.drafter.caches[0].lengths == [0, 0, 0]
    assert model.generate("zebra", PARAMS).text == model.generate("zebra", PARAMS).text
    assert list(stream) == []


def test_stream_that_is_never_read_runs_nothing(model: Model, engines: list[Engine]) -> None:
    model.stream(PROMPTS, PARAMS)
    assert engines == []


# Ends of a text.


@pytest.mark.parametrize("prompt", PROMPTS)
def test_stop_string_ends_the_text_before_it(model: Model, plain: Model, prompt: str) -> None:
    whole = plain.generate(prompt, PARAMS)
    for stop in (whole.text[4:6], whole.text[9:13], whole.text[-1:]):
        params = replace(PARAMS, stop=("never", stop))
        for one in (model, plain):
            result = one.generate(prompt, params)
            assert result.text == whole.text[: whole.text.index(stop)]
            assert result.finish_reason == "stop"
            assert result.tokens == whole.tokens[: result.stats.num_tokens]
            last = one.tokenizer.decode(list(result.tokens), skip_special_tokens=True)
            assert last.endswith(stop)  # no token beyond the one that completes the stop string


def test_stop_string_that_never_comes_holds_nothing_back(model: Model) -> None:
    whole = model.generate("zebra", PARAMS).text
    never = replace(PARAMS, stop=(whole[-3:] + "never",))
    assert model.generate("zebra", never).text == whole
    assert joined(list(model.stream("zebra", never))) == whole


def test_end_of_text_token_ends_the_text_and_is_not_in_it(model: Model) -> None:
    whole = model.generate("zebra", PARAMS)
    at = next(i for i, token in enumerate(whole.tokens) if i > 5 and token not in whole.tokens[:i])
    ending = Model(
        model.target,
        model.tokenizer,
        model.new_drafter,
        eos=frozenset({whole.tokens[at], EOS}),
        max_rows=1,
    )
    result = ending.generate("zebra", max_new_tokens=20)
    assert result.tokens == whole.tokens[: at + 1]
    assert result.finish_reason == "stop"
    assert result.text == model.tokenizer.decode(list(whole.tokens[:at]), skip_special_tokens=True)
    assert ending.generate("zebra", PARAMS).tokens == whole.tokens


# Loading.


def with_eos(source: Path, folder: Path, eos: Any) -> Path:
    shutil.copytree(source, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": eos}))
    return folder


@pytest.mark.parametrize(("eos", "expected"), [(2, {2}), ([2, 7], {2, 7}), (0, {0, 2})])
def test_end_of_text_ids_come_from_the_generation_config_and_the_tokenizer(
    target_folder: Path, tmp_path: Path, eos: Any, expected: set[int]
) -> None:
    assert flashdraft.load(with_eos(target_folder, tmp_path / "t", eos)).eos == expected


def test_folder_without_a_drafter_decodes_plainly(target_folder: Path) -> None:
    loaded = flashdraft.load(target_folder)
    result = loaded.generate("zebra", PARAMS)
    assert result.stats.num_drafted == 0
    assert result.stats.tau == 1.0


@pytest.mark.parametrize("block_size", [1, 2, 6])
def test_block_size_is_the_number_of_nodes(
    target_folder: Path, draft_folder: Path, block_size: int
) -> None:
    loaded = flashdraft.load(
        target_folder, draft=draft_folder, block_size=block_size, dtype="float64"
    )
    stats = loaded.generate("zebra", PARAMS).stats
    assert stats.num_drafted <= stats.target_passes * (block_size - 1)
    assert stats.num_drafted > stats.target_passes * (block_size - 2) - 10  # less at the end
    assert (stats.num_drafted > 0) == (block_size > 1)


@pytest.mark.parametrize(
    ("dtype", "kernel"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("auto", "float32")]
)
def test_dtype_is_that_of_the_weights(
    target_folder: Path, draft_folder: Path, dtype: str, kernel: str
) -> None:
    loaded = flashdraft.load(target_folder, draft=draft_folder, dtype=dtype)
    assert kernel in loaded.target.kernel
    assert loaded.generate("zebra", PARAMS).stats.num_tokens == 20


BAD_LOADS: dict[str, tuple[dict[str, Any], type[FlashDraftError], str]] = {
    "dtype": ({"dtype": "int4"}, InvalidParameter, "dtype is 'int4'"),
    "max_rows": ({"max_rows": 0}, InvalidParameter, "max_rows is 0"),
    "tree_nodes": ({"tree_nodes": 1}, InvalidParameter, "tree_nodes is 1"),
    "tree_nodes without a block": (
        {"draft": "prompt_lookup", "tree_nodes": 8},
        InvalidParameter,
        "tree_nodes is 8",
    ),
    "a union with nothing": (
        {"draft": "prompt_lookup+autoregressive"},
        InvalidParameter,
        "draft is 'prompt_lookup+autoregressive'",
    ),
    "block_size": ({"block_size": 0}, InvalidParameter, "block_size is 0"),
    "device": ({"device": "warp"}, InvalidParameter, "device is 'warp'"),
    "no device": ({"device": None}, InvalidParameter, "device is None"),
    "a device without numbers": ({"device": "meta"}, InvalidParameter, "device is 'meta'"),
    "an option of another library": (
        {"torch_dtype": "float32"},
        InvalidParameter,
        "unknown option `torch_dtype`",
    ),
    "draft": ({"draft": "/nowhere/at/all"}, ModelNotFound, "/nowhere/at/all"),
}


@pytest.mark.parametrize("case", BAD_LOADS)
def test_wrong_argument_of_load_is_refused(target_folder: Path, case: str) -> None:
    arguments, kind, expected = BAD_LOADS[case]
    with pytest.raises(kind) as error:
        flashdraft.load(target_folder, **arguments)
    assert expected in one_line(error)


@pytest.mark.parametrize("device", ["cpu:0", torch.device("cpu"), torch.device("cpu", 0)])
def test_the_cpu_is_the_cpu_however_it_is_called(target_folder: Path, device: Any) -> None:
    named, plain = (
        flashdraft.load(target_folder, device=one, kernel="torch") for one in (device, "cpu")
    )
    assert named.target.kernel == plain.target.kernel
    assert flashdraft.load(target_folder, device=device).target.kernel_name != "transformers"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.safetensors", CheckpointError),
        ("tokenizer.json", CheckpointError),
        ("config.json", FlashDraftError),
    ],
)
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_target_folder_is_refused(
    target_folder: Path, tmp_path: Path, name: str, kind: type, damage: str
) -> None:
    folder = shutil.copytree(target_folder, tmp_path / "target")
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage == "cut":
        (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises((kind, ModelNotFound)) as error:
        flashdraft.load(folder)
    one_line(error)


def test_a_folder_called_like_a_method_is_not_passed_over(
    target_folder: Path, draft_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(draft_folder, "dflash")
    with pytest.raises(ModelNotFound) as error:
        flashdraft.load(target_folder, draft="dflash", dtype="float64")
    assert "give ./dflash" in str(error.value)
    for draft in ("./dflash", Path("dflash")):
        assert (
            flashdraft.load(target_folder, draft=draft, dtype="float64").new_drafter().name
            == "dflash"
        )


def test_unknown_target_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound) as error:
        flashdraft.load(tmp_path / "nothing")
    assert "nothing" in one_line(error)


def test_tokenizer_of_these_tests_is_one_letter_a_token() -> None:
    assert [len(letter_tokenizer().encode(text)) for text in ("a", "ab c", "Zz?!")] == [1, 4, 4]
