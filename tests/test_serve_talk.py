"""Messages and tools become the prompt that the model's template makes of them, or are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from toy_templates import QWEN, TEMPLATES, chat_tokenizer

from flashdraft.errors import InvalidParameter, InvalidPrompt
from flashdraft.generate import Model
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.serve.talk import decoder, reader, render
from flashdraft.serve.turns import Turn

HI = {"role": "user", "content": "hi"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "K\\u00f6ln"}'},
        }
    ],
}
ANSWERED = {"role": "tool", "tool_call_id": "call_1", "content": "rain"}


def toy_model(template: str = "qwen", *, source: str | None = None) -> Model:
    """A model of which only the tokenizer and the vocabulary's size are used."""
    tokenizer = chat_tokenizer("byte level", template)
    if source is not None:
        tokenizer.chat_template = source
    target: Any = SimpleNamespace(name="toy", vocab_size=1000)
    return Model(target, tokenizer, Autoregressive, eos=frozenset({0}), max_rows=1)


@pytest.fixture(scope="module")
def qwen() -> Model:
    return toy_model()


def told(model: Model, messages: list[Any], **options: Any) -> str:
    return str(model.tokenizer.decode(render(model, messages, **options)))


@pytest.mark.parametrize("template", TEMPLATES)
def test_messages_are_told_as_the_template_tells_them(template: str) -> None:
    model = toy_model(template)
    messages = [HI, {"role": "assistant", "content": "well"}, HI]
    text = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = model.tokenizer.encode(text, add_special_tokens=False)
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, *messages[1:]]
    assert render(model, messages) == render(model, parts) == expected


def test_developers_are_systems_where_the_template_knows_none(qwen: Model) -> None:
    system = told(qwen, [{"role": "system", "content": "be"}, HI])
    assert told(qwen, [{"role": "developer", "content": "be"}, HI]) == system


def test_tools_and_calls_are_told_by_the_template(qwen: Model) -> None:
    text = told(qwen, [HI, CALLED, ANSWERED], tools=[WEATHER])
    assert '"name": "weather", "parameters": {"type": "object"' in text
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
    assert f"<|im_start|>assistant\n{call}<|im_end|>" in text
    assert "<tool_response>\nrain\n</tool_response>" in text


def test_tools_that_may_not_be_called_are_not_told(qwen: Model) -> None:
    assert render(qwen, [HI], tools=[WEATHER], tool_choice="none") == render(qwen, [HI])
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        forced = render(qwen, [HI], tools=[WEATHER], tool_choice=choice)
        assert forced == render(qwen, [HI], tools=[WEATHER])


@pytest.mark.parametrize(
    "source", [TEMPLATES["chatml"], TEMPLATES["chatml"] + "{# it has no tools #}"]
)
def test_template_without_tools_refuses_them_by_name(source: str) -> None:
    model = toy_model(source=source)
    with pytest.raises(InvalidParameter, match="the chat template of `toy` has no tools") as error:
        render(model, [HI], tools=[WEATHER])
    assert error.value.option == "tools"
    assert render(model, [HI], tools=[WEATHER], tool_choice="none") == render(model, [HI])


def test_template_without_calls_refuses_them() -> None:
    with pytest.raises(InvalidPrompt, match="has no `tool_calls`"):
        render(toy_model("chatml"), [HI, CALLED, ANSWERED])


@pytest.mark.parametrize("arguments", ["{", "[]", "5", "null", "[" * 100_000, "9" * 5000])
def test_arguments_that_are_no_object_are_refused(qwen: Model, arguments: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    with pytest.raises(InvalidPrompt, match="the arguments of a call of `f` are no JSON object"):
        render(qwen, [HI, turn])


REFUSED: list[tuple[str, list[Any], str]] = [
    ("gemma", [{"role": "system", "content": "be"}, HI], "System role not supported"),
    ("gemma", [HI, HI], "Conversation roles must alternate"),
    ("mistral", [HI, ANSWERED], "Only user and assistant roles"),
    ("chatml", [{"content": "hi"}], "is not a prompt"),
    ("chatml", [{"role": "user"}], "is not a prompt"),
    ("chatml", [{"role": "user", "content": None}], "turn 1: a turn's content is no text"),
    ("chatml", [{"role": "user", "content": [{"type": "image_url"}]}], "a part of type"),
    ("chatml", [], "the prompt is empty"),
]


@pytest.mark.parametrize(("template", "messages", "why"), REFUSED)
def test_messages_that_the_template_refuses_are_an_error_of_one_line(
    template: str, messages: list[Any], why: str
) -> None:
    with pytest.raises(InvalidPrompt, match=why) as error:
        render(toy_model(template), messages)
    assert "\n" not in error.value.args[0]


def test_model_without_a_template_refuses_messages() -> None:
    with pytest.raises(InvalidPrompt, match="`toy` has no chat template for messages"):
        render(toy_model(source=""), [HI])


def test_thinking_is_switched_where_the_template_can(qwen: Model) -> None:
    thinks = render(qwen, [HI], template_kwargs={"enable_thinking": True})
    assert thinks == render(qwen, [HI]) == render(qwen, [HI], template_kwargs={})
    silent = told(qwen, [HI], template_kwargs={"enable_thinking": False})
    assert silent.endswith("<think>\n\n</think>\n\n")

    for model, name, words in [
        (toy_model("chatml"), "enable_thinking", "has no `enable_thinking`"),
        (qwen, "documents", "chat_template_kwargs has `documents`"),
    ]:
        with pytest.raises(InvalidParameter, match=words) as error:
            render(model, [HI], template_kwargs={name: False})
        assert error.value.option == "chat_template_kwargs"


def test_thoughts_come_back_only_to_templates_that_ask_for_them(qwen: Model) -> None:
    thought = {"role": "assistant", "content": "well", "reasoning_content": "hm"}
    later = [HI, thought | {"tool_calls": CALLED["tool_calls"]}, ANSWERED]
    assert "<think>\nhm\n</think>\n\nwell" in told(qwen, later)
    alone = [HI, {"role": "assistant", "reasoning_content": "hm"}, ANSWERED]
    assert "<think>\nhm\n</think>\n\n<|im_end|>" in told(qwen, alone)

    plain = {"role": "assistant", "content": "well"}
    chatml = toy_model("chatml")
    assert render(chatml, [HI, thought, HI]) == render(chatml, [HI, plain, HI])


# --- what reads the answer ------------------------------------------------------------------------

CALL = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'


def test_reader_knows_what_the_prompt_and_its_template_say(qwen: Model) -> None:
    prompt = render(qwen, [HI], tools=[WEATHER])
    turn = reader(qwen, prompt, tools=[WEATHER]).read(f"<think>\nhm\n</think>\n\n{CALL}")
    assert (turn.content, turn.reasoning, len(turn.calls)) == (None, "hm", 1)
    silent = reader(qwen, prompt, tools=[WEATHER], tool_choice="none").read(CALL)
    assert silent == Turn(CALL, None, ())
    assert reader(qwen, prompt).read(CALL).content == CALL

    opened = toy_model("deepseek")  # its prompts end with <think>
    prompt = render(opened, [HI])
    assert reader(opened, prompt).read("hm</think>Yes.") == Turn("Yes.", "hm", ())
    assert reader(opened, prompt, is_bound=True).read("{}") == Turn("{}", None, ())
    chatml = toy_model("chatml")
    text = "<think>hm</think>"
    assert reader(chatml, render(chatml, [HI])).read(text).content == text


def test_forced_call_is_read_though_the_template_thinks() -> None:
    model = toy_model(source=QWEN + "<think>\n")
    prompt = render(model, [HI], tools=[WEATHER], tool_choice="required")
    forced = reader(model, prompt, tools=[WEATHER], tool_choice="required")
    assert len(forced.read('{"name": "weather", "arguments": {}}').calls) == 1


def test_user_does_not_open_thoughts() -> None:
    model = toy_model(source=TEMPLATES["mistral"] + "{# </think> #}")
    prompt = render(model, [{"role": "user", "content": "<think>"}])
    assert reader(model, prompt).read("Yes.").content == "Yes."


@pytest.mark.parametrize("special", [True, False])
def test_marks_are_in_the_text_whether_or_not_the_tokenizer_hides_them(special: bool) -> None:
    model = toy_model()
    tokenizer: Any = model.tokenizer
    answer = f"<think>hm</think>I look.\n{CALL}<|im_end|>"
    tokens = tokenizer.encode(answer, add_special_tokens=False)
    if special:
        marks = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
        tokenizer.add_special_tokens({"additional_special_tokens": marks})
        assert "<think>" not in tokenizer.decode(tokens, skip_special_tokens=True)

    text = decoder(model)
    reads = reader(model, render(model, [HI], tools=[WEATHER]), tools=[WEATHER])
    deltas = [delta for token in tokens for delta in reads.push(text.push(token))]
    deltas += reads.push(text.flush())
    deltas += reads.end()
    assert "".join(delta.content for delta in deltas) == "I look."
    assert "".join(delta.reasoning for delta in deltas) == "hm"
    assert [delta.call.name for delta in deltas if delta.call] == ["weather"]


def test_pythons_mark_is_in_the_text() -> None:
    model = toy_model("llama")
    answer = '<|python_tag|>{"name": "weather", "parameters": {}}<|eot_id|>'
    text = decoder(model)
    reads = reader(model, [], tools=[WEATHER])
    for token in model.tokenizer.encode(answer, add_special_tokens=False):
        reads.push(text.push(token))
    assert text.text == answer.removesuffix("<|eot_id|>")
    assert reads.num_calls == 1
