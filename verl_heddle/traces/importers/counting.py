"""Tokens of texts, by a tokenizer where there is one, else estimated; and a tally of what was estimated or is missing."""

from __future__ import annotations

from collections import Counter
from functools import cache

CHARACTERS_PER_TOKEN = 4.0
"""English text and code of the public traces have 4.0 to 4.1 where both could be counted."""


class Tally:
    """Counts tokens, and remembers what was told, estimated and missing.

    Args:
        tokenizer: a folder or name that transformers knows; None: estimate.

    Raises:
        ValueError: there is no such tokenizer, or transformers is not installed.
    """

    def __init__(self, tokenizer: str | None = None) -> None:
        self._encode = None if tokenizer is None else _tokenizer(tokenizer)
        self.told: Counter[str] = Counter()
        """By field (`output tokens`, `tool seconds`, ...): how often the file said it."""
        self.estimated: Counter[str] = Counter()
        self.missing: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        """Trajectories or records that do not count, by reason."""

    @property
    def exact(self) -> bool:
        """Whether texts are counted by a tokenizer."""
        return self._encode is not None

    def tokens(self, text: str) -> int:
        """Of a text; at least 1 where there is one."""
        if not text:
            return 0
        if self._encode is not None:
            return max(1, len(self._encode(text, add_special_tokens=False)))
        return max(1, round(len(text) / CHARACTERS_PER_TOKEN))


@cache
def _tokenizer(name: str):  # type: ignore[no-untyped-def]
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ValueError("--tokenizer needs transformers: pip install transformers, or leave it out for an estimate") from None
    try:
        return AutoTokenizer.from_pretrained(name).encode
    except Exception as error:  # transformers raises OSError, ValueError and more
        raise ValueError(f"no tokenizer {name!r}: {' '.join(str(error).split())[:200]}") from None
