"""Where a user's text begins in a chat template, and what ends it.

An instruction-tuned model that reads its template up to there writes what a user might ask
(Magpie, 2406.08464, section 2.1). Knows templates and tokens; does not know who writes on.
"""

from collections.abc import Sequence
from typing import NamedTuple

from flashdraft.decoding.ending import token_before
from flashdraft.decoding.prompt import Tokenizer, Turn, told
from flashdraft.errors import InvalidPrompt

__all__ = ["Opening", "opening"]

_MARK = "FlashDraftAsks"  # what the user says where the template is looked at


class Opening(NamedTuple):
    """The beginning of a user's turn."""

    tokens: list[int]  # of the conversation, up to where the user's text begins
    end_token: int | None  # a special token that the template puts behind that text
    end_text: str  # or the text that stands there instead; empty: neither does


def opening(tokenizer: Tokenizer, name: str, turns: Sequence[Turn] = ()) -> Opening:
    """The opening of the user's turn behind `turns`, by the chat template of the target `name`.

    Raises InvalidPrompt where there is no template, or the user's text cannot be cut out of it.
    """
    if not getattr(tokenizer, "chat_template", None):
        got = f"`{name}` has no chat template: nothing says where a user's text begins"
        hint = "its own prompts are those of an instruction-tuned model; name prompts instead"
        raise InvalidPrompt(got, hint=hint)

    text = told(tokenizer, name, [*turns, {"role": "user", "content": _MARK}])
    before, found, behind = text.partition(_MARK)
    if not found or _MARK in behind:
        how_often = "more than once" if found else "changed, or not at all"
        got = f"the chat template of `{name}` writes the user's text {how_often}"
        hint = "so it cannot be cut where that text begins: name prompts instead"
        raise InvalidPrompt(got, hint=hint)

    # A word's own token holds the blank before it.
    cut = before.removesuffix(" ")
    end_token = token_before(behind.lstrip(), tokenizer)
    end_text = ""
    if end_token is None and behind.strip():
        end_text = behind.strip().splitlines()[0].rstrip()
    tokens = tokenizer.encode(cut, add_special_tokens=False)
    if not tokens:
        got = f"the chat template of `{name}` has nothing before the user's text"
        raise InvalidPrompt(got, hint="a model needs something to go on from: name prompts instead")
    return Opening(tokens, end_token, end_text)
