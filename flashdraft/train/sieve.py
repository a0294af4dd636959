"""Which of the prompts that a model wrote itself are kept: by length, repetition, script, and what
was there before.

Knows texts only. Does not know who wrote them.
"""

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from flashdraft.process import INTS

__all__ = ["Sieve"]

_SHORTEST = 15  # characters
_LONGEST = 2000
_SHARED_WORDS = 13  # in a row, with an evaluation set's entry (GPT-3, 2005.14165, appendix C)
_MOST_REPEATED = 0.3  # share of a text's word triples that stand in it before
_MOST_FOREIGN = 0.1  # share of letters that are not of the text's own script
_SHINGLE = 5  # characters
_NEAR = 0.7  # from this share of common shingles on, two texts are nearly the same
_BANDS = 16
_ROWS = 4  # hashes of a band: two texts share one with probability 1 - (1 - near ** 4) ** 16
_PRIME = 2**31 - 1
_SEED = 20240612


class Sieve:
    """Keeps a prompt, or says why not; `counts` has the reasons.

    evaluation: entries of evaluation sets, which nothing may be trained on.
    """

    def __init__(self, evaluation: Iterable[str] = ()) -> None:
        self.counts: Counter[str] = Counter()
        self._seen: set[str] = set()
        self._bands: dict[tuple[int, ...], list[int]] = {}  # a band's number and hashes -> texts
        self._signatures: list[Tensor] = []
        self._forbidden: set[str] = set()  # runs of words, and whole entries that are shorter
        for entry in evaluation:
            words = _words(entry)
            self._forbidden.update(_runs(words))
            self._forbidden.add(" ".join(words))
        self._hash = _hashes()

    def reason(self, text: str) -> str | None:
        """Why a text by itself is not kept; None: it may be."""
        if len(text) < _SHORTEST:
            return "too short"
        if len(text) > _LONGEST:
            return "too long"
        if _has_controls(text):
            return "with control characters"
        if _repeated_share(text) > _MOST_REPEATED:
            return "repeating itself"
        if _foreign_share(text) > _MOST_FOREIGN:
            return "of mixed scripts"
        return None

    def keep(self, text: str) -> bool:
        """Whether a text is kept; one that is will drop its like from now on."""
        reason = self.reason(text) or self._likeness(text)
        if reason is not None:
            self.counts[reason] += 1
            return False
        self.remember(text)
        return True

    def remember(self, text: str) -> None:
        """A text that was kept, now or earlier."""
        self._seen.add(_key(text))
        number = len(self._signatures)
        signature = self._signature(text)
        self._signatures.append(signature)
        for band in _bands(signature):
            self._bands.setdefault(band, []).append(number)

    def _likeness(self, text: str) -> str | None:
        """What it is too much like."""
        words = _words(text)
        is_forbidden = " ".join(words) in self._forbidden
        if is_forbidden or any(run in self._forbidden for run in _runs(words)):
            return "of an evaluation set"
        if _key(text) in self._seen:
            return "there already"

        signature = self._signature(text)
        candidates: set[int] = set()
        for band in _bands(signature):
            candidates.update(self._bands.get(band, ()))
        for number in candidates:
            common = (signature == self._signatures[number]).sum()
            if int(common) >= _NEAR * len(signature):
                return "nearly there already"
        return None

    def _signature(self, text: str) -> Tensor:
        """MinHash of the text's shingles: int64 [bands * rows]."""
        key = _key(text)
        shingles = {key}
        for start in range(len(key) - _SHINGLE + 1):
            shingles.add(key[start : start + _SHINGLE])
        numbers = [zlib.crc32(shingle.encode()) % _PRIME for shingle in sorted(shingles)]
        factors, summands = self._hash
        values = torch.tensor(numbers, **INTS)
        hashed = (factors[:, None] * values + summands[:, None]) % _PRIME
        return hashed.amin(1)


def _hashes() -> tuple[Tensor, Tensor]:
    """Factors and summands of the hash functions, the same in every run."""
    generator = torch.Generator("cpu").manual_seed(_SEED)
    count = (_BANDS * _ROWS,)
    factors = torch.randint(1, _PRIME, count, generator=generator, **INTS)
    summands = torch.randint(0, _PRIME, count, generator=generator, **INTS)
    return factors, summands


def _bands(signature: Tensor) -> Iterator[tuple[int, ...]]:
    rows = signature.view(_BANDS, _ROWS).tolist()
    for number, hashes in enumerate(rows):
        yield (number, *hashes)


def _key(text: str) -> str:
    """The text without what makes no difference: case, punctuation, spaces."""
    return " ".join(_words(text))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _runs(words: list[str]) -> Iterator[str]:
    """Of so many words that nobody writes the same by chance."""
    for start in range(len(words) - _SHARED_WORDS + 1):
        yield " ".join(words[start : start + _SHARED_WORDS])


def _has_controls(text: str) -> bool:
    """Characters of control, private ones, and the mark of bytes that are none."""
    for character in text:
        if character in "\n\t":
            continue
        if character == "\ufffd" or unicodedata.category(character) in ("Cc", "Co", "Cs", "Cn"):
            return True
    return False


def _repeated_share(text: str) -> float:
    words = _words(text)
    triples = list(zip(words, words[1:], words[2:], strict=False))
    if not triples:
        return 0.0
    return 1 - len(set(triples)) / len(triples)


def _foreign_share(text: str) -> float:
    """The share of letters that are of another script than most."""
    scripts: Counter[str] = Counter()
    for character in text:
        if character.isalpha():
            scripts[_script(character)] += 1
    total = scripts.total()
    if not total:
        return 0.0
    (_, most), *_ = scripts.most_common(1)
    return 1 - most / total


_KIN = {  # scripts that one language mixes
    "CJK": "EAST ASIAN",
    "HIRAGANA": "EAST ASIAN",
    "KATAKANA": "EAST ASIAN",
    "HANGUL": "EAST ASIAN",
    "FULLWIDTH": "EAST ASIAN",
    "HALFWIDTH": "EAST ASIAN",
}


def _script(letter: str) -> str:
    """By the first word of the character's name: LATIN, CYRILLIC, ..."""
    first = unicodedata.name(letter, "UNKNOWN").split()[0]
    return _KIN.get(first, first)
