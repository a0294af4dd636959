"""OpenAI's own client through every endpoint and option, plain, async and streamed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from toy_server import NAME, Toy, running

from flashdraft.serve.app import Options

MESSAGES = [{"role": "user", "content": "hello"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
KEY = "a-key"


@pytest.fixture(scope="module")
def toy() -> Iterator[Toy]:
    with running(options=Options(NAME, keys=(KEY.encode(),))) as made:
        yield made


@pytest.fixture
def client(toy: Toy) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{toy.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def chat(client: OpenAI, **options: object) -> openai.types.chat.ChatCompletion:
    given = {"model": NAME, "messages": MESSAGES, "temperature": 0, "max_tokens": 8, **options}
    answer = client.chat.completions.create(**given)  # type: ignore[call-overload]
    assert isinstance(answer, openai.types.chat.ChatCompletion)
    return answer


def text_of(answer: openai.types.chat.ChatCompletion) -> str:
    return answer.choices[0].message.content or ""


def test_models_are_listed_and_retrieved(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "flashdraft"
    with pytest.raises(openai.NotFoundError) as told:
        client.models.retrieve("gpt-4")
    assert told.value.code == "model_not_found"


def test_a_chat_has_its_usage_and_its_id(client: OpenAI) -> None:
    answer = chat(client)
    assert text_of(answer)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8
    assert answer.choices[0].finish_reason == "length"
    assert answer.id.startswith("chatcmpl-")
    assert answer._request_id


def test_content_is_text_or_parts(client: OpenAI) -> None:
    assert text_of(chat(client, messages=PARTS)) == text_of(chat(client))


def test_both_names_of_the_limit(client: OpenAI) -> None:
    newer = chat(client, max_tokens=openai.NOT_GIVEN, max_completion_tokens=5)
    assert newer.usage is not None
    assert newer.usage.completion_tokens == 5
    assert text_of(chat(client)).startswith(text_of(newer))


def test_several_answers_differ_by_seed_and_come_again(client: OpenAI) -> None:
    first = chat(client, n=3, temperature=1, seed=4)
    again = chat(client, n=3, temperature=1, seed=4)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1


def test_a_stop_string_ends_the_text_before_it(client: OpenAI) -> None:
    whole = text_of(chat(client, max_tokens=20))
    stop = whole[4:6]
    for given in (stop, [stop, "never!"]):
        cut = chat(client, max_tokens=20, stop=given)
        assert text_of(cut) == whole[: whole.index(stop)]
        assert cut.choices[0].finish_reason == "stop"


def test_bias_and_penalties_are_obeyed(client: OpenAI) -> None:
    forced = chat(client, logit_bias={"3": 100})
    assert text_of(forced) == "a" * 8
    varied = chat(client, logit_bias={"3": 30, "4": 29.5}, frequency_penalty=2)
    assert {"a", "b"} <= set(text_of(varied))
    repeated = chat(client, logit_bias={"3": 30, "4": 29.5}, presence_penalty=-2)
    assert set(text_of(repeated)) == {"a"}


def test_logprobs_are_those_of_the_text(client: OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(token.token for token in logprobs.content) == text_of(answer)
    assert all(token.logprob <= 0 for token in logprobs.content)


def test_a_stream_says_the_same_as_the_whole(client: OpenAI) -> None:
    whole = text_of(chat(client))
    options = {"include_usage": True}
    stream = client.chat.completions.create(
        model=NAME,
        messages=MESSAGES,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=8,
        stream=True,
        stream_options=options,  # type: ignore[arg-type]
    )
    text = ""
    roles = set()
    for chunk in stream:
        last = chunk
        for choice in chunk.choices:
            text += choice.delta.content or ""
            roles.add(choice.delta.role)
    assert text == whole
    assert "assistant" in roles
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 8


def test_options_of_this_server_go_in_the_extra_body(client: OpenAI) -> None:
    plain = text_of(chat(client))
    for drafting in ("auto", "on", "off"):
        assert text_of(chat(client, extra_body={"drafting": drafting})) == plain
    extra = {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.1, "ignore_eos": True}
    assert text_of(chat(client, temperature=1, seed=1, top_p=0.9, extra_body=extra))


def test_completions_take_text_tokens_and_several_prompts(client: OpenAI) -> None:
    given = {"model": NAME, "max_tokens": 6, "temperature": 0}
    texts = []
    for prompt in ("abc", ["abc"], [3, 4, 5], [[3, 4, 5]]):
        answer = client.completions.create(prompt=prompt, **given)  # type: ignore[call-overload]
        texts.append(answer.choices[0].text)
    assert len(set(texts)) == 1
    several = client.completions.create(prompt=["abc", "xyz"], n=2, **given)  # type: ignore[call-overload]
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text == texts[0]
    echoed = client.completions.create(prompt="abc", echo=True, **given)  # type: ignore[call-overload]
    assert echoed.choices[0].text == "abc" + texts[0]


def test_a_completion_streams(client: OpenAI) -> None:
    given = {"model": NAME, "prompt": "abc", "max_tokens": 6, "temperature": 0}
    whole = client.completions.create(**given).choices[0].text  # type: ignore[call-overload]
    stream = client.completions.create(stream=True, **given)  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].text for chunk in stream) == whole


def test_errors_are_the_clients_own(client: OpenAI, toy: Toy) -> None:
    with pytest.raises(openai.BadRequestError) as told:
        chat(client, extra_body={"guided_json": {}})
    assert told.value.param == "guided_json"
    assert "structured_outputs" in told.value.message
    with pytest.raises(openai.BadRequestError) as told:
        chat(client, max_tokens=10_000)
    assert told.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        chat(client, model="other")
    with (
        OpenAI(base_url=f"{toy.url}/v1", api_key="wrong") as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_an_error_in_a_stream_is_raised_there(client: OpenAI, toy: Toy) -> None:
    stream = client.chat.completions.create(
        model=NAME,
        messages=MESSAGES,  # type: ignore[arg-type]
        max_tokens=200,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    with toy.knobs.slow(0.02):
        next(stream)
        toy.knobs.fault = MemoryError("planted")
        with pytest.raises(openai.APIError, match="engine failed"):
            list(stream)
    toy.settle()


def test_a_stream_that_is_closed_frees_its_row(client: OpenAI, toy: Toy) -> None:
    with toy.knobs.slow(0.02):
        stream = client.chat.completions.create(
            model=NAME,
            messages=MESSAGES,  # type: ignore[arg-type]
            max_tokens=200,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(stream)
        stream.close()
        toy.settle()


def test_many_streams_side_by_side_through_the_async_client(toy: Toy) -> None:
    async def one(client: AsyncOpenAI, text: str) -> str:
        stream = await client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": text}],
            temperature=0,
            max_tokens=8,
            stream=True,
        )
        said = ""
        async for chunk in stream:
            said += chunk.choices[0].delta.content or ""
        return said

    async def all_of(texts: list[str]) -> list[str]:
        async with AsyncOpenAI(base_url=f"{toy.url}/v1", api_key=KEY) as client:
            return await asyncio.gather(*(one(client, text) for text in texts))

    texts = ["hello", "abc", "x", "other", "hello"]
    said = asyncio.run(all_of(texts))
    with OpenAI(base_url=f"{toy.url}/v1", api_key=KEY) as client:
        for text, own in zip(texts, said, strict=True):
            messages = [{"role": "user", "content": text}]
            assert text_of(chat(client, messages=messages)) == own
