"""Data sets from the Hugging Face hub, streamed: what is asked for is downloaded, not terabytes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

Row = dict[str, Any]
STALE_S = 60
"""A hub that answers nothing for so long counts as out of reach."""


def stream(name: str, config: str | None, split: str) -> Iterator[Row]:
    """The rows of a split, in order, as they come.

    Raises:
        ConnectionError: the hub cannot be reached, or has no such data set; says what to do.
    """
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(STALE_S))
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        raise ConnectionError(f"{name} lies on the Hugging Face hub and HF_HUB_OFFLINE is set: unset it, or use --data generated")
    try:
        from datasets import load_dataset

        yield from load_dataset(name, config, split=split, streaming=True)
    except Exception as error:  # datasets, huggingface_hub, fsspec and httpx each raise their own
        raise ConnectionError(
            f"{name} could not be read from the Hugging Face hub ({type(error).__name__}: {error}); offline, use --data generated"
        ) from error


def take(rows: Iterator[Row], convert: Callable[[Row, int], Row | None], count: int) -> list[Row]:
    """The first `count` rows that `convert(row, index)` turns into verl's format; it returns None for a row of no use.

    Raises:
        ValueError: there are fewer; says how many.
    """
    made: list[Row] = []
    for row in rows:
        if len(made) == count:
            break
        converted = convert(row, len(made))
        if converted is not None:
            made.append(converted)
    if len(made) < count:
        raise ValueError(f"only {len(made)} of {count} rows are there: ask for fewer")
    return made


def split_of(rows: Iterator[Row], convert: Callable[[Row, int], Row | None], val: int, train: int) -> dict[str, list[Row]]:
    """Validation from the front and training after it, for sets without a split of their own."""
    made = take(rows, convert, val + train)
    for index, row in enumerate(made):
        row["extra_info"] |= {"split": "val" if index < val else "train", "index": index if index < val else index - val}
    return {"train": list(itertools.islice(made, val, None)), "val": made[:val]}
