"""Where a text ends: what folders and templates say, stop strings that name special tokens, and
logits that give no law.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import admit, step, tiny_drafter, tiny_model
from toy_folders import letter_tokenizer, save_target
from toy_training import language_model

import flashdraft
from flashdraft.decoding.ending import end_tokens, ends_itself, hidden_tokens, turn_end
from flashdraft.decoding.sampling import draw, likeliest
from flashdraft.decoding.text import TextDecoder
from flashdraft.engine import Engine
from flashdraft.errors import UnusableLogits
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.methods.prompt_lookup import PromptLookup
from flashdraft.models.hf import HFTarget
from flashdraft.train.features import encode
from flashdraft.types import Drafter, SamplingParams

CHATS = {  # as the families write a finished turn of the assistant
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    ),
    "llama3": "{% for m in messages %}{{ m.role }}\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}",
    "gemma": "{% for m in messages %}{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}",
    "phi": (
        "{% for m in messages %}{{ m.content }}<|end|>\n{% endfor %}"
        "{% if not add_generation_prompt %}</s>{% endif %}"
    ),
    "mistral": (
        "{% for m in messages %}{{ m.content }}"
        "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    ),
    "spaced": "{% for m in messages %} {{ m.content }} </s>{% endfor %}",
    "none": "{% for m in messages %}{{ m.role }} {{ m.content }}.{% endfor %}",
    "refusing": "{{ raise_exception('no assistant here') }}",
}
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "phi": "<|end|>"}
ENDS |= dict.fromkeys(("mistral", "spaced"), "</s>")


def tokenizer_with(chat: str | None, *added: str) -> Any:
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = chat
    tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
    return tokenizer


# --- what ends a text
#


@pytest.mark.parametrize("name", CHATS)
def test_template_says_what_ends_a_turn(name: str) -> None:
    tokenizer = tokenizer_with(
        CHATS[name],
        "<|im_start|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<end_of_turn>",
        "<|end|>",
        "<|end|>x",
    )
    wanted = ENDS.get(name)
    assert turn_end(tokenizer) == (
        None if wanted is None else tokenizer.convert_tokens_to_ids(wanted)
    )


def test_tokenizer_without_a_template_says_nothing() -> None:
    assert turn_end(tokenizer_with(None)) is None
    assert turn_end(SimpleNamespace(decode=str)) is None


def test_ends_come_from_configs_tokenizer_and_template_together() -> None:
    tokenizer = tokenizer_with(CHATS["chatml"], "<|im_start|>", "<|im_end|>")
    own = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_tokens([{"eos_token_id": 7}], tokenizer, 1000) == {2, 7, own}
    assert end_tokens(
        [{"eos_token_id": [7, 8]}, {"text_config": {"eos_token_id": [9]}}], tokenizer, 1000
    ) == {2, 7, 8, 9, own}
    assert end_tokens([{}, {"eos_token_id": None, "pad_token_id": 0}], tokenizer, 1000) == {2, own}
    assert end_tokens([{"eos_token_id": [7, 5000, -1, "2", None]}], tokenizer, 50) == {2, 7}


@pytest.mark.parametrize(
    ("generation", "config", "wanted"),
    [
        (None, 2, {2}),
        ([5, 6], 2, {2, 5, 6}),
        ({"eos_token_id": None}, 7, {2, 7}),
        ("damaged", 4, {2, 4}),
    ],
)
def test_folder_ends_where_its_own_files_say(
    tmp_path: Path, generation: Any, config: int, wanted: set[int]
) -> None:
    folder = save_target(tmp_path / "t")
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | {"eos_token_id": config}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if isinstance(generation, list):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    elif isinstance(generation, dict):
        (folder / "generation_config.json").write_text(json.dumps(generation))
    assert flashdraft.load(folder, draft="autoregressive").eos == wanted


def test_what_a_class_adds_by_default_ends_nothing(tmp_path: Path) -> None:
    """A llama's config class has eos_token_id 2 where its file has none; the tokenizer of this
    folder ends with another.
    """
    folder = save_target(tmp_path / "t")
    facts = json.loads((folder / "config.json").read_text())
    facts.pop("eos_token_id")
    (folder / "config.json").write_text(json.dumps(facts))
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokenizer = letter_tokenizer()
    tokenizer.eos_token = "a"
    tokenizer.save_pretrained(folder)
    assert flashdraft.load(folder, draft="autoregressive").eos == {
        tokenizer.convert_tokens_to_ids("a")
    }


# --- answers without token ids
# -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "ended"),
    [
        ({"finish": "stop"}, True),
        ({"finish": "stop", "stop_reason": None}, True),
        ({"finish": "stop", "stop_reason": 2}, True),
        ({"finish": "stop", "stop_reason": "\n\n"}, False),
        ({"finish": "length"}, False),
        ({"finish": "tool_calls"}, False),
        ({"finish": "content_filter"}, False),
        ({"finish": None}, False),
        ({}, False),
    ],
)
def test_answer_that_ended_itself_gets_the_end_of_a_turn(told: dict[str, Any], ended: bool) -> None:
    assert ends_itself(told) is ended
    lm = language_model()
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    wide = replace(lm, eos=frozenset({0, 2}))  # a pad token that ends texts as well, as Qwen's
    tokens, num_prompt = encode(wide, {"prompt": "hi", "response": "Yes", **told})
    assert tokens[num_prompt:] == [
        *lm.tokenizer.encode("Yes", add_special_tokens=False),
        *[2] * ended,
    ]


def test_answer_ends_by_the_tokenizer_where_no_template_says_how() -> None:
    lm = language_model()
    lm.tokenizer.chat_template = None
    row = {"prompt": "hi", "response": "Yes", "finish": "stop"}
    for eos, wanted in (({0, 2}, 2), ({0}, 0), (set(), 2)):
        assert encode(replace(lm, eos=frozenset(eos)), row)[0][-1] == wanted


# --- stop strings that name special tokens
# -------------------------------------------------------------------------------


class Special(str):
    """A token as transformers' tables hold it."""

    special = True


class Marks:
    """Letters, and two special tokens."""

    added_tokens_decoder = {100: Special("<end>"), 101: Special("<s>")}  # noqa: RUF012

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join("abcdefgh"[token] for token in ids if token < 100)


STOPS = [  # tokens, stop, text, how many tokens were read
    ([0, 1, 100, 2], "<end>", "ab", 3),
    ([0, 1, 100, 2], "b<end>", "a", 3),
    ([0, 1, 100, 2, 3], "<end>c", "ab", 4),
    ([0, 1, 100, 101, 2], "<end><s>", "ab", 4),
    ([0, 1, 100, 2], "nd>", "ab", 3),
    ([0, 1, 100, 2, 3], "d>c", "ab", 4),
    ([0, 1, 100, 2, 3], "bc", "a", 4),  # what is shown counts as before
    ([100, 0, 1], "<end>", "", 1),
    ([0, 1, 101, 2], "<end>", "abc", None),
    ([0, 1, 100, 3], "<end>c", "abd", None),
]


@pytest.mark.parametrize(("tokens", "stop", "text", "read"), STOPS)
def test_stop_string_sees_special_tokens(
    tokens: list[int], stop: str, text: str, read: int | None
) -> None:
    decoder = TextDecoder(Marks(), [stop])
    pieces = []
    count = None
    for number, token in enumerate(tokens, 1):
        pieces.append(decoder.push(token))
        if decoder.stopped:
            count = number
            break
    pieces.append(decoder.flush())
    assert "".join(pieces) == decoder.text == text
    assert count == read


def test_planted_decoder_that_sees_no_special_token_never_stops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flashdraft.decoding.text.hidden_tokens", lambda tokenizer: {})
    decoder = TextDecoder(Marks(), ["<end>"])
    assert [decoder.push(token) for token in (0, 100, 1)] == ["a", "", "b"]
    assert not decoder.stopped


def test_stop_string_may_end_with_the_token_that_ends_the_text() -> None:
    decoder = TextDecoder(Marks(), ["b<end>"])
    assert decoder.push(0) + decoder.push(1) == "a"
    assert decoder.end(100) == ""
    assert decoder.stopped
    other = TextDecoder(Marks(), ["c<end>"])
    assert other.push(0) + other.push(1) + other.end(100) == "ab"


def test_pending_text_stays_short_however_many_special_tokens_come() -> None:
    decoder = TextDecoder(Marks(), ["<end>zzz"])
    for _ in range(200):
        decoder.push(100)
        decoder.push(101)
    assert len(decoder._held) < 10


@pytest.mark.parametrize("ignore_eos", [True, False])
@pytest.mark.parametrize("block_size", [None, 4])
def test_text_stops_at_a_special_token_inside_a_block(
    ignore_eos: bool, block_size: int | None
) -> None:
    lm = language_model()
    made = Autoregressive if block_size is None else lambda: PromptLookup(block_size=4)
    options: dict[str, Any] = {"temperature": 2.0, "ignore_eos": True, "max_new_tokens": 40}
    seed = next(s for s in range(300) if 1 in lm.generate("hi", seed=s, **options).tokens[1:-1])
    plain = lm.generate("hi", seed=seed, **options)
    at = plain.tokens.index(1)
    options["ignore_eos"] = ignore_eos
    stopped = replace(lm, new_drafter=made).generate("hi", seed=seed, stop=["<s>"], **options)
    ended = 2 in plain.tokens[:at] and not ignore_eos
    assert stopped.finish_reason == "stop"
    if not ended:
        assert stopped.tokens == plain.tokens[: at + 1]


def test_hidden_tokens_are_those_that_decoding_leaves_out() -> None:
    tokenizer = letter_tokenizer()
    hidden = hidden_tokens(tokenizer)
    assert {2: "</s>", 1: "<s>"}.items() <= hidden.items()
    assert all(tokenizer.decode([token], skip_special_tokens=True) == "" for token in hidden)


# --- logits that give no law
# ---------------------------------------------------------------------------------------------

POISON = 0  # whoever reads this token knows nothing any more


def poisoned() -> HFTarget:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[POISON] = torch.nan
    return HFTarget(model, "poisoned")


@pytest.mark.parametrize(
    "params",
    [SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.5)],
)
@pytest.mark.parametrize("new_drafter", [Autoregressive, PromptLookup])
def test_logits_without_a_law_are_named_and_leave_the_row_clean(
    params: SamplingParams, new_drafter: type[Drafter]
) -> None:
    lm = replace(language_model(torch.float64), target=poisoned())
    engine = Engine(lm.target, new_drafter(), max_rows=1)
    own = replace(params, max_new_tokens=6)
    expected = lm.generate([5, 6, 7], own).tokens
    with pytest.raises(UnusableLogits, match=r"`poisoned` \(transformers float64\) are NaN"):
        admit(engine, lm.request([5, 6, 7, POISON] + [8] * 80, own))
    assert not engine.running
    assert all(
        bool(tensor.isfinite().all())
        for tensor in (*engine._cache.keys, *engine._cache.values)
        if tensor is not None
    )
    chunks = [admit(engine, lm.request([5, 6, 7], own))]
    while chunks[-1].result is None:
        chunks += engine.step()
    assert chunks[-1].result.tokens == expected


def test_row_that_goes_wrong_later_is_forgotten_and_the_others_go_on() -> None:
    lm = replace(language_model(torch.float64), target=poisoned(), max_rows=2)
    engine = Engine(lm.target, Autoregressive(), max_rows=2)
    params = SamplingParams(max_new_tokens=6, ignore_eos=True)
    expected = lm.generate([5, 6, 7], params).tokens
    admit(engine, lm.request([5, 6, 7], params, index=0))
    admit(engine, lm.request([8, 6], params, index=1))
    bad = next(request for request in engine.running.values() if request.index == 1)
    bad.history[-1] = POISON
    with pytest.raises(UnusableLogits):
        step(engine)
    assert [request.index for request in engine.running.values()] == [0]
    chunks: list[Any] = []
    while engine.running:
        chunks += engine.step()
    assert chunks[-1].result.tokens == expected


def test_planted_release_without_wiping_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashdraft.models.cache.SlotCache.wipe", lambda self, row: None)
    with pytest.raises(AssertionError):
        test_logits_without_a_law_are_named_and_leave_the_row_clean(
            SamplingParams(), Autoregressive
        )


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_no_law_is_an_error_also_where_assertions_are_off(value: float) -> None:
    with pytest.raises(UnusableLogits):
        likeliest(torch.tensor([[0.0, value]]))
    with pytest.raises(UnusableLogits):
        draw(torch.full((1, 3), torch.nan), torch.zeros(1, dtype=torch.float64))


def test_drafted_texts_of_a_network_name_it_too() -> None:
    target = poisoned()
    lm = replace(
        language_model(torch.float64), target=target, new_drafter=lambda: tiny_drafter(target)
    )
    with pytest.raises(UnusableLogits, match="poisoned"):
        lm.generate([5, POISON], max_new_tokens=6)
