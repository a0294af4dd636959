"""Errors as a client of the server sees them: OpenAI's shape, with a status.

Knows FlashDraft's errors and what they mean to a client. Does not know HTTP libraries or requests.
"""

from collections.abc import Mapping

from flashdraft.errors import (
    ContextLengthError,
    FlashDraftError,
    InvalidParameter,
    InvalidPrompt,
    first_line,
)
from flashdraft.files import Json

__all__ = ["ApiError", "as_api_error"]

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
# fields of SamplingParams that are called otherwise in a body, or come from one of several
_PARAMS = {
    "max_new_tokens": "max_tokens",
    "prompt_logprobs": "echo",
    "logits_processor": None,
    "params": None,
}


class ApiError(Exception):
    """What a client is told instead of an answer.

    type: OpenAI's word for the kind of error, by the status where it is None. param: the field of
    the body that is at fault. headers: those that go with the status, like Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type or _type_of(status)
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> Json:
        """The error in OpenAI's shape: a response's body, or the data of a stream's last event."""
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


def _type_of(status: int) -> str:
    if status in _TYPES:
        return _TYPES[status]
    return "server_error" if status >= 500 else "invalid_request_error"


def as_api_error(error: Exception, *, prompt: str = "prompt") -> ApiError:
    """What a client is told of an error that came up behind its request.

    prompt: the field that the prompt came in, `messages` or `prompt`. What is nobody's purpose
    tells nothing of itself: its text could hold paths or prompts.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, MemoryError):
        message = "out of memory; try again later"
        return ApiError(503, message, code="out_of_memory", headers={"retry-after": "1"})
    if not isinstance(error, FlashDraftError):
        return ApiError(500, "the server failed at this request", code="internal_error")

    message = _on_one_line(error)
    if isinstance(error, ContextLengthError):
        return ApiError(400, message, param=prompt, code="context_length_exceeded")
    if isinstance(error, InvalidPrompt):
        return ApiError(400, message, param=prompt, code="invalid_prompt")
    if isinstance(error, InvalidParameter):
        option = error.option or "params"
        return ApiError(400, message, param=_PARAMS.get(option, option), code="invalid_value")
    return ApiError(500, message, code="internal_error")


def _on_one_line(error: FlashDraftError) -> str:
    message = first_line(error.args[0])
    return f"{message} ({error.hint})" if error.hint else message
