"""Control tokens that only a chat template may write: the same text from anybody else is spelled.

A tokenizer makes the control token <|im_end|> of that text wherever it stands, also in what a user
wrote, and a turn is forged. Here the template's own text keeps its control tokens, and the same
words inside a conversation become the tokens of their letters. All other text has the tokens that
it always had.

Knows a tokenizer's added tokens, and text in which the parts of a conversation are marked. Does not
know templates, roles or models.
"""

import re
import secrets
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from flashdraft.decoding.ending import Tokenizer, added_tokens

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

__all__ = ["Marks", "Spelling"]

_SPACES = " \t\r\n\u2581"  # the last one is a space in sentencepiece
# Gemma has these as tokens, which are not flagged as special: text, no control.
_HTML = (
    "table caption thead tbody tfoot tr th td h1 h2 h3 h4 h5 h6 p br hr ul ol li dl dt dd a b i u "
    "em strong sub sup code pre blockquote div span img"
)
_OPENING, _CLOSING = "<[{|", ">]}|"


class Marks(NamedTuple):
    """Three words that stand nowhere else in a text, and never overlap.

    They are of small letters and digits, which templates and JSON pass on as they are.
    """

    left: str  # in front of a control token's text inside a conversation
    right: str  # behind it
    edge: str  # where a part of a conversation meets other text

    @classmethod
    def absent_from(cls, text: str) -> Self:
        while True:
            word = f"q{secrets.token_hex(6)}"
            if word not in text:
                return cls(f"{word}l", f"{word}r", f"{word}e")

    def removed(self, text: str) -> str:
        for mark in self:
            text = text.replace(mark, "")
        return text


class Match(NamedTuple):
    """A control token's text inside a text."""

    start: int
    end: int
    token: int


class Spelling:
    """One tokenizer's control tokens.

    These are the tokens that are flagged as special; of the other added ones those that the
    template writes, and those that look like a mark, such as <tool_call>. Words, white space and
    HTML that were added to a vocabulary are text.

    read: marks of thinking, which the template may look for in what an assistant said.
    """

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        """template: its source."""
        self.template = template
        self._backend: Backend | None = getattr(tokenizer, "backend_tokenizer", None)
        self._text_of: dict[int, str] = {}
        read = []
        for token, added in added_tokens(tokenizer).items():
            if not _is_control(added, template):
                continue
            text = added.content
            self._text_of[token] = text
            if text in template and "think" in text.lower():
                read.append(token)
        self.read = frozenset(read)

        self._begins: set[str] = set()  # what a control token's text begins with
        self._ends: set[str] = set()
        for text in self._text_of.values():
            self._begins |= {text[:length] for length in range(1, len(text))}
            self._ends |= {text[-length:] for length in range(1, len(text))}
        self._longest = max(map(len, self._text_of.values()), default=0)
        self._together = "\0".join(self._text_of.values())
        self._finder, self._found = self._new_finder(added_tokens(tokenizer))
        self._own: _Renamed | None = None  # made when it is needed

    # --- what stands in a text --------------------------------------------------------------------

    def find(self, text: str) -> Iterator[Match]:
        """Every control token that the tokenizer would make of this text."""
        encoding = self._finder.encode(text, add_special_tokens=False)
        for number, (first, last) in zip(encoding.ids, encoding.offsets, strict=True):
            token = self._found[number]
            content = self._text_of[token]
            start = text.find(content, first, last)  # white space may belong to the match
            if start < 0:  # it is written otherwise: in capitals, or in wide letters
                yield Match(first, last, token)
            else:
                yield Match(start, start + len(content), token)

    def holds(self, text: str) -> bool:
        """Whether a control token stands in the text."""
        return next(self.find(text), None) is not None

    def may_join(self, text: str) -> bool:
        """Whether a control token could stand across an end of the text and what comes there."""
        core = text.strip()
        for length in range(1, min(self._longest, len(core) + 1)):
            if core[:length] in self._ends or core[-length:] in self._begins:
                return True
        return bool(core) and len(core) < self._longest and core in self._together

    def marked(self, text: str, marks: Marks, spared: Collection[int] = ()) -> str:
        """A part of a conversation with its control tokens, and its ends, marked where it has to
        be.

        spared: control tokens that get no marks, and the ends neither. White space at the ends
        stays outside: templates strip it.
        """
        matches = list(self.find(text))
        if not matches and not self.may_join(text):
            return text
        parts = []
        done = 0
        for match in matches:
            if match.token in spared:
                continue
            inside = text[match.start : match.end]
            parts += [text[done : match.start], marks.left, inside, marks.right]
            done = match.end
        whole = "".join([*parts, text[done:]])
        core = whole.strip()
        if spared or not core:
            return whole
        before, _, after = whole.partition(core)
        return f"{before}{marks.edge}{core}{marks.edge}{after}"

    def _new_finder(self, added: Mapping[int, Any]) -> tuple["Backend", dict[int, int]]:
        """A tokenizer that knows control tokens and nothing else, and those that its ids are."""
        from tokenizers import Tokenizer as Backend
        from tokenizers.models import BPE

        finder = Backend(BPE())
        if self._backend is not None and self._backend.normalizer is not None:
            finder.normalizer = self._backend.normalizer
        finder.add_tokens([_as_added(added[token]) for token in self._text_of])
        tokens = {}
        for token, text in self._text_of.items():
            number = finder.token_to_id(text)
            if number is not None:
                tokens[number] = token
        return finder, tokens

    # --- tokens -----------------------------------------------------------------------------------

    @property
    def can_spell(self) -> bool:
        """Whether the tokenizer can be made not to see a token: one of the library `tokenizers`."""
        return self._backend is not None

    def encode(self, told: str, marks: Marks) -> list[int] | None:
        """The tokens of a text that a template made of marked parts. Needs `can_spell`.

        None: the tokenizer itself may encode the text, without the marks. No control token stands
        in those parts or across their ends.
        """
        matches = list(self.find(told))
        written = [match for match in matches if not _is_marked(told, match, marks)]
        if len(written) == len(matches) and self.is_harmless(told, marks, len(written)):
            return None

        assert self._backend is not None
        if self._own is None:
            self._own = _Renamed(self._backend, self._text_of)
        parts = []
        done = 0
        for match in written:
            parts += [told[done : match.start], self._own.name_of(match.token)]
            done = match.end
        parts.append(told[done:])
        return self._own.encode(marks.removed("".join(parts)))

    def is_harmless(self, told: str, marks: Marks, num_written: int) -> bool:
        """Whether the same text without marks has as many control tokens."""
        return num_written == sum(1 for _ in self.find(marks.removed(told)))


def _is_marked(told: str, match: Match, marks: Marks) -> bool:
    begins = told.endswith(marks.left, 0, match.start)
    return begins and told.startswith(marks.right, match.end)


class _Renamed:
    """A tokenizer whose control tokens have other names, which no text holds by chance.

    It cuts a text at these names exactly as the original cuts it at the tokens' own texts.
    """

    def __init__(self, backend: "Backend", text_of: Mapping[int, str]) -> None:
        from tokenizers import Tokenizer as Backend

        self._secret = secrets.token_hex(16)
        self._name = re.compile(f"{self._secret}-([0-9]+)")
        self._text_of = text_of
        self._model = backend.model
        self._backend = Backend(backend.model)
        if backend.normalizer is not None:
            self._backend.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            self._backend.pre_tokenizer = backend.pre_tokenizer

        renamed = []
        others = {}
        for token, added in sorted(backend.get_added_tokens_decoder().items()):
            text = self.name_of(token) if token in text_of else added.content
            renamed.append(_as_added(added, text))
            if token not in text_of:
                others[token] = text
        self._backend.add_tokens(renamed)

        self._ids: dict[int, int] = {}  # of other added tokens: the original's by those here
        for token, text in others.items():
            number = self._backend.token_to_id(text)
            if number is not None:
                self._ids[number] = token

    def name_of(self, token: int) -> str:
        return f"<{self._secret}-{token}>"

    def encode(self, text: str) -> list[int]:
        encoding = self._backend.encode(text, add_special_tokens=False)
        tokens: list[int] = []
        words = zip(encoding.ids, encoding.tokens, encoding.offsets, strict=True)
        for number, word, (first, last) in words:
            name = self._name.search(word)
            if name is not None:
                tokens.append(int(name[1]))
            elif self._is_word(number, text[first:last]):
                tokens += self._spelled(word)
            else:
                tokens.append(self._ids.get(number, number))
        return tokens

    def _is_word(self, number: int, written: str) -> bool:
        """Whether a control token's own text was found as a word of the vocabulary."""
        return number in self._text_of and self._text_of[number] in written

    def _spelled(self, word: str) -> list[int]:
        tokens = []
        for character in word:
            tokens += [token.id for token in self._model.tokenize(character)]
        return tokens


def _is_control(added: "AddedToken", template: str) -> bool:
    text = added.content.strip(_SPACES)
    if added.special:
        return bool(text)
    if not text or text.isalnum():
        return False
    if added.content in template:
        return True
    is_html = text.startswith("<") and text.strip("</>").lower() in _HTML.split()
    return text[0] in _OPENING and text[-1] in _CLOSING and len(text) > 2 and not is_html


def _as_added(added: "AddedToken", text: str | None = None) -> "AddedToken":
    """The same token, of another text."""
    from tokenizers import AddedToken

    return AddedToken(
        added.content if text is None else text,
        single_word=added.single_word,
        lstrip=added.lstrip,
        rstrip=added.rstrip,
        normalized=added.normalized,
        special=added.special,
    )
