"""Errors as a client sees them: OpenAI's shape, a status, and nothing of ours."""

from __future__ import annotations

import pytest

from flashdraft import errors
from flashdraft.serve.errors import ApiError, as_api_error
from flashdraft.types import SamplingParams


@pytest.mark.parametrize(
    ("error", "status", "param", "code"),
    [
        (errors.InvalidPrompt("a"), 400, "messages", "invalid_prompt"),
        (errors.ContextLengthError("a"), 400, "messages", "context_length_exceeded"),
        (errors.InvalidParameter("a", option="top_p"), 400, "top_p", "invalid_value"),
        (errors.InvalidParameter("a", option="max_new_tokens"), 400, "max_tokens", "invalid_value"),
        (errors.InvalidParameter("a"), 400, None, "invalid_value"),
        (errors.InvalidParameter("a", option="logits_processor"), 400, None, "invalid_value"),
        (errors.UnusableLogits("a"), 500, None, "internal_error"),
        (errors.FlashDraftError("a"), 500, None, "internal_error"),
        (MemoryError(), 503, None, "out_of_memory"),
        (ValueError("a"), 500, None, "internal_error"),
        (KeyError("a"), 500, None, "internal_error"),
    ],
    ids=repr,
)
def test_every_error_has_a_status_and_a_code(
    error: Exception, status: int, param: str | None, code: str
) -> None:
    made = as_api_error(error, prompt="messages")
    assert (made.status, made.param, made.code) == (status, param, code)
    told = made.body()["error"]
    assert set(told) == {"message", "type", "param", "code"}
    assert told["type"] == ("invalid_request_error" if status == 400 else "server_error")


def test_the_engines_own_words_name_the_field() -> None:
    with pytest.raises(errors.InvalidParameter) as caught:
        SamplingParams(top_p=7)
    made = as_api_error(caught.value)
    assert made.param == "top_p"
    assert "7" in made.message
    assert "\n" not in made.message


def test_a_hint_stands_on_the_same_line() -> None:
    made = as_api_error(errors.InvalidPrompt("it is empty\nreally", hint="write something"))
    assert made.message == "it is empty (write something)"


def test_what_nobody_meant_tells_nothing_of_itself() -> None:
    made = as_api_error(OSError("/home/me/secret"))
    assert "secret" not in made.message
    assert as_api_error(made) is made


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "invalid_request_error"),
        (413, "invalid_request_error"),
        (429, "rate_limit_error"),
        (503, "server_error"),
    ],
)
def test_a_status_has_openais_word(status: int, kind: str) -> None:
    error = ApiError(status, "a", headers={"retry-after": "1"})
    assert error.body()["error"] == {"message": "a", "type": kind, "param": None, "code": None}
    assert error.headers == {"retry-after": "1"}


def test_without_memory_a_client_is_told_to_come_back() -> None:
    made = as_api_error(MemoryError())
    assert made.status == 503
    assert made.headers == {"retry-after": "1"}
