"""Tables in pages, between marks: `<!-- NAME: begin -->` and `<!-- NAME: end -->`."""

from __future__ import annotations

from pathlib import Path


def filled(page: Path, name: str, table: str) -> str:
    """The page's text with this table between its marks.

    Raises:
        ValueError: the page has no such marks.
    """
    return replaced(page.read_text(), name, table, page)


def replaced(text: str, name: str, table: str, page: Path) -> str:
    """The same for a text that is not on disk yet; `page` only names the place in the error."""
    begin, end = (f"<!-- {name}: {word} -->" for word in ("begin", "end"))
    head, found, rest = text.partition(begin)
    _, ended, tail = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"{page} has no place for the table {name!r}: {begin} ... {end}")
    return f"{head}{begin}\n{table}\n{end}{tail}"


def fill(page: Path, name: str, table: str) -> None:
    """Write it."""
    page.write_text(filled(page, name, table))
