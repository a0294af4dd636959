"""Where a text ends: the tokens that end it, and the one that ends a turn of the chat template.

Knows configs as they are written, and a tokenizer's special tokens and template. Does not know models, requests or files.
"""

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["end_tokens", "ends_itself", "hidden_tokens", "stated_ends", "turn_end"]

_SAID = "FlashDraftEnds"  # what the assistant says where the chat template is looked at
_TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _SAID}]


def end_tokens(
    configs: Iterable[Mapping[str, Any]], tokenizer: Any, vocab_size: int
) -> frozenset[int]:
    """All ids that end a text: those that the configs state, the tokenizer's, and the one that ends a turn of its template.

    configs: generation_config.json and config.json as they lie in the folder: what a class of transformers adds by default
    was stated by nobody. Ids beyond the vocabulary are left out.
    """
    ids = set[int]()
    for config in configs:
        ids |= stated_ends(config)
        ids |= stated_ends(config.get("text_config"))
    ids |= _ids(getattr(tokenizer, "eos_token_id", None))
    ids |= _ids(turn_end(tokenizer))
    return frozenset(token for token in ids if 0 <= token < vocab_size)


def stated_ends(config: Any) -> set[int]:
    """A config's `eos_token_id`: one id, several or none."""
    return _ids(config.get("eos_token_id")) if isinstance(config, Mapping) else set()


def turn_end(tokenizer: Any) -> int | None:
    """The special token that the chat template puts behind a finished turn of the assistant, like <|im_end|> or <|eot_id|>.

    None without a template, and where it puts none there.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        text = str(tokenizer.apply_chat_template(_TURNS, tokenize=False))
    except Exception:  # a template raises what it likes
        return None

    _, found, behind = text.rpartition(_SAID)
    behind = behind.lstrip()
    special = _special_tokens(tokenizer)
    ending = [token for token, content in special.items() if content and behind.startswith(content)]
    longest = max(ending, key=lambda token: len(special[token]), default=None)
    return longest if found else None


def hidden_tokens(tokenizer: Any) -> dict[int, str]:
    """The text of every token that is left out of a decoded text because it is special."""
    special = _special_tokens(tokenizer)
    flags = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return {
        token: content
        for token, content in special.items()
        if getattr(flags.get(token), "special", True)
    }


def ends_itself(answer: Mapping[str, Any]) -> bool:
    """Whether an answer's text ended with an end token: it did not run into its limit, a filter, a tool or a stop string."""
    return answer.get("finish") == "stop" and not isinstance(answer.get("stop_reason"), str)


def _special_tokens(tokenizer: Any) -> dict[int, str]:
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    found = {int(token): str(content) for token, content in added.items()}
    for token in getattr(tokenizer, "all_special_ids", None) or ():
        if token not in found:
            found[token] = str(tokenizer.convert_ids_to_tokens(token))
    return found


def _ids(value: Any) -> set[int]:
    several = value if isinstance(value, (list, tuple)) else [value]
    return {one for one in several if type(one) is int}
