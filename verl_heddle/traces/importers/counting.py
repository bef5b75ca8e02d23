"""Count the tokens of texts, with a tokenizer or by estimate, and tally exact, estimated and missing values."""

from __future__ import annotations

from collections import Counter
from functools import cache

CHARACTERS_PER_TOKEN = 4.0
"""English text and code in the public traces have 4.0 to 4.1, measured where both counts were available."""


class Tally:
    """Token counter, and tally of exact, estimated and missing values.

    Args:
        tokenizer: a folder or name for transformers; None: estimate.

    Raises:
        ValueError: there is no such tokenizer, or transformers is not installed.
    """

    def __init__(self, tokenizer: str | None = None) -> None:
        self._encode = None if tokenizer is None else _tokenizer(tokenizer)
        self.known: Counter[str] = Counter()
        """By field (`output tokens`, `tool seconds`, ...): values the file recorded or a tokenizer counted."""
        self.estimated: Counter[str] = Counter()
        self.missing: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        """Trajectories or records left out, by reason."""

    @property
    def exact(self) -> bool:
        """Whether a tokenizer counts the texts."""
        return self._encode is not None

    def tokens(self, text: str) -> int:
        """Tokens of a text; at least 1 unless it is empty."""
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
