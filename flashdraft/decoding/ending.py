"""Where a text ends: the tokens that end it, and the one that ends a turn of the chat template.

Knows configs as they are written, and a tokenizer's special tokens and template. Does not know
models, requests or files.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

__all__ = [
    "Tokenizer",
    "added_tokens",
    "end_tokens",
    "ends_itself",
    "hidden_tokens",
    "stated_ends",
    "token_before",
    "turn_end",
    "word_of",
]

_SAID = "FlashDraftEnds"  # what the assistant says where the chat template is looked at
_TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _SAID}]


class Tokenizer(Protocol):
    """What is called of a tokenizer of transformers; what else is read of one may be missing."""

    def decode(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool,
        clean_up_tokenization_spaces: bool,
    ) -> object: ...

    def convert_ids_to_tokens(self, ids: int) -> object: ...

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, object]], *, tokenize: bool, **options: object
    ) -> object: ...


def end_tokens(
    configs: Iterable[Mapping[str, object]], tokenizer: Tokenizer, vocab_size: int
) -> frozenset[int]:
    """All ids that end a text.

    Those that the configs state, the tokenizer's, and the one that ends a turn of its template.
    configs: generation_config.json and config.json as they lie in the folder: what a class of
    transformers adds by default was stated by nobody. Ids beyond the vocabulary are left out.
    """
    ids: set[int] = set()
    for config in configs:
        ids |= stated_ends(config)
        ids |= stated_ends(config.get("text_config"))
    ids |= _ids(getattr(tokenizer, "eos_token_id", None))
    ids |= _ids(turn_end(tokenizer))
    return frozenset(token for token in ids if 0 <= token < vocab_size)


def stated_ends(config: object) -> set[int]:
    """A config's `eos_token_id`: one id, several or none."""
    if not isinstance(config, Mapping):
        return set()
    return _ids(config.get("eos_token_id"))


def turn_end(tokenizer: Tokenizer) -> int | None:
    """The special token that the chat template puts behind a finished turn of the assistant.

    Like <|im_end|> or <|eot_id|>. None without a template, and where it puts none there.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        text = str(tokenizer.apply_chat_template(_TURNS, tokenize=False))
    except Exception:  # a template raises what it likes
        return None

    _, found, behind = text.rpartition(_SAID)
    if not found:
        return None
    return token_before(behind.lstrip(), tokenizer)


def token_before(text: str, tokenizer: Tokenizer) -> int | None:
    """The special token that a text begins with; None: with none of them."""
    return _longest_beginning(text, _special_tokens(tokenizer))


def _longest_beginning(text: str, tokens: Mapping[int, str]) -> int | None:
    """The token with the longest of the texts that `text` begins with; None: with none of them."""
    longest = None
    length = 0
    for token, content in tokens.items():
        if len(content) > length and text.startswith(content):
            longest = token
            length = len(content)
    return longest


def word_of(token: int, tokenizer: Tokenizer) -> str | None:
    """The text of a token that is a part of texts.

    None for special, added and reserved ones, for pieces of characters, and for ids that the
    tokenizer does not have.
    """
    if token in _special_tokens(tokenizer):
        return None
    try:
        name = tokenizer.convert_ids_to_tokens(token)
    except (IndexError, KeyError, OverflowError, ValueError):
        return None
    if name is None or str(name).startswith(("<", "[")):
        return None
    text = str(
        tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )
    has_letters = any(character.isalnum() for character in text)
    return text if has_letters else None


def hidden_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """The text of every token that is left out of a decoded text because it is special."""
    added = added_tokens(tokenizer)
    hidden = {}
    for token, content in _special_tokens(tokenizer).items():
        is_special = getattr(added.get(token), "special", True)
        if is_special:
            hidden[token] = content
    return hidden


def ends_itself(answer: Mapping[str, object]) -> bool:
    """Whether an answer's text ended with an end token.

    It did not run into its limit, a filter, a tool or a stop string.
    """
    return answer.get("finish") == "stop" and not isinstance(answer.get("stop_reason"), str)


def _special_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """The texts of all tokens that were added or are special."""
    found = {int(token): str(content) for token, content in added_tokens(tokenizer).items()}
    ids = getattr(tokenizer, "all_special_ids", None)
    if not ids:
        return found
    for token in ids:
        if token not in found:
            found[token] = str(tokenizer.convert_ids_to_tokens(token))
    return found


def added_tokens(tokenizer: Tokenizer) -> Mapping[int, Any]:
    """Tokens that were added to the vocabulary, with their flags: AddedToken of transformers."""
    added: Mapping[int, object] | None = getattr(tokenizer, "added_tokens_decoder", None)
    return added if added else {}


def _ids(value: object) -> set[int]:
    """The integers of one value or several."""
    several = value if isinstance(value, (list, tuple)) else [value]
    return {one for one in several if type(one) is int}
