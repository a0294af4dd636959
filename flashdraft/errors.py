"""Every error that FlashDraft raises on purpose.

FlashDraftError                 what is wrong, what was got; `hint` says what to do
├── InvalidParameter            an option or argument outside its range (also a ValueError)
├── InvalidPrompt               an empty prompt, or an unreadable one (also a ValueError)
│   └── ContextLengthError      prompt, or prompt + new tokens, beyond the context
├── ModelNotFound               no such folder, file, hub id or built-in name
├── UnsupportedTarget           a model whose state cannot be cut back to a prefix
├── CheckpointError             a folder or file that is damaged or not a drafter
│   └── DraftMismatch           a drafter made for another target
├── UnusableLogits              NaN, infinity, or no token allowed, where a token must be drawn
│                               (also an ArithmeticError)
└── DataError                   a line of a data file that cannot be used

A user's slip becomes one of these, never a traceback; the command line prints `error:` and `hint:`
lines.
"""

__all__ = [
    "CheckpointError",
    "ContextLengthError",
    "DataError",
    "DraftMismatch",
    "FlashDraftError",
    "InvalidParameter",
    "InvalidPrompt",
    "ModelNotFound",
    "UnsupportedTarget",
    "UnusableLogits",
    "first_line",
]


class FlashDraftError(Exception):
    """What is wrong and what was got; `hint` is what to do about it, or None."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = str(self.args[0])
        return f"{message}\nhint: {self.hint}" if self.hint else message


def first_line(error: object) -> str:
    """The first line of an error's text that is not empty, or the error's name."""
    for line in str(error).splitlines():
        if line.strip():
            return line.strip()
    return type(error).__name__


class InvalidParameter(FlashDraftError, ValueError):
    """`option` is the name of the one option that is wrong, as Python writes it, or None."""

    def __init__(self, message: str, *, hint: str | None = None, option: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.option = option


class InvalidPrompt(FlashDraftError, ValueError): ...


class ContextLengthError(InvalidPrompt): ...


class ModelNotFound(FlashDraftError): ...


class UnsupportedTarget(FlashDraftError): ...


class CheckpointError(FlashDraftError): ...


class DraftMismatch(CheckpointError): ...


class UnusableLogits(FlashDraftError, ArithmeticError): ...


class DataError(FlashDraftError): ...
