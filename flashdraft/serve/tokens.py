"""Single tokens as text and as bytes, for log-probabilities and for drafts that were rejected.

Knows tokenizers. A token may be half a character: only its bytes say what it is.
"""

import re
from collections.abc import Callable

from flashdraft.pretrained import Tokenizer

__all__ = ["TokenTexts"]

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # sentencepiece's token of one byte
_SPACE = "\u2581"  # sentencepiece's space


def _bytes_by_letter() -> dict[str, int]:
    """GPT-2's alphabet: a letter for every byte, its own where that can be seen."""
    letters = {}
    num_invisible = 0
    for byte in range(256):
        is_visible = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255
        if is_visible:
            letters[chr(byte)] = byte
        else:
            letters[chr(256 + num_invisible)] = byte
            num_invisible += 1
    return letters


_LETTERS = _bytes_by_letter()


class TokenTexts:
    """What a tokenizer's tokens are by themselves."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        if token not in self._bytes:
            self._bytes[token] = self._read(token)
        return self._bytes[token]

    def text_of(self, token: int) -> str:
        """Its text; of half a character its bytes in OpenAI's way, like bytes:\\xe2\\x80."""
        own = self.bytes_of(token)
        try:
            return own.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)

    def _read(self, token: int) -> bytes:
        text = self._tokenizer.decode(
            [token], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        convert: Callable[[int], object] = self._tokenizer.convert_ids_to_tokens
        name = convert(token)
        if not isinstance(name, str):  # an id that no token has
            return text.encode()

        if all(letter in _LETTERS for letter in name):
            own = bytes(_LETTERS[letter] for letter in name)
            if own.decode(errors="replace") == text:
                return own
        byte = _BYTE.fullmatch(name)
        if byte is not None:
            return bytes([int(byte[1], 16)])
        if _SPACE in name:  # whose space a text may lose at its beginning
            return name.replace(_SPACE, " ").encode()
        return text.encode()
