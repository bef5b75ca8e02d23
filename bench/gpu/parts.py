"""Cut a file into parts below a size, and put it together again where the parts arrive. Standard library only: it runs on both sides.

Invariant: `join(split(file))` is the file, byte for byte; a part that is missing, torn or of another bundle is refused by name. The
manifest travels beside the parts: for each archive its size, its digest, and name, size and digest of its parts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

LIMIT_BYTES = 60 * 2**20
"""A part may travel with a few small files beside it where 64 MiB go at a time."""

MANIFEST = "manifest.json"
CHUNK = 2**20


class BundleError(Exception):
    """The parts at hand are not a bundle; says which and what to do."""


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sizes(total: int, limit: int = LIMIT_BYTES) -> list[int]:
    """Sizes of the parts of `total` bytes: as few as possible, as equal as possible, none above `limit`.

    Raises:
        ValueError: `limit` is not positive or `total` is negative.
    """
    if limit < 1 or total < 0:
        raise ValueError(f"total must not be negative and limit must be positive, got {total} and {limit}")
    number = max(1, -(-total // limit))
    base, over = divmod(total, number)
    return [base + (index < over) for index in range(number)]


def split(archive: Path, limit: int = LIMIT_BYTES) -> dict[str, Any]:
    """Cut `archive` into files beside it, named .part0, .part1, ...; returns its entry of the manifest. The archive itself is kept."""
    entry: dict[str, Any] = {"name": archive.name, "bytes": archive.stat().st_size, "sha256": digest(archive), "parts": []}
    with open(archive, "rb") as source:
        for number, size in enumerate(sizes(entry["bytes"], limit)):
            part = archive.with_name(f"{archive.name}.part{number}")
            with open(part, "wb") as target:
                _copy(source, target, size)
            entry["parts"].append({"name": part.name, "bytes": size, "sha256": digest(part)})
    return entry


def join(entry: dict[str, Any], folders: Iterable[Path], target: Path) -> Path:
    """Put an archive together from parts that lie in any of `folders`.

    Raises:
        BundleError: a part is missing or damaged.
    """
    places = list(folders)
    with open(target, "wb") as out:
        for part in entry["parts"]:
            found = next((folder / part["name"] for folder in places if (folder / part["name"]).is_file()), None)
            if found is None:
                raise BundleError(f"part {part['name']} is in none of {', '.join(map(str, places))}: copy it there")
            if digest(found) != part["sha256"]:
                raise BundleError(f"{found} is damaged or of another bundle: copy it again, with its {MANIFEST}")
            with open(found, "rb") as source:
                _copy(source, out, part["bytes"])
    if digest(target) != entry["sha256"]:
        raise BundleError(f"{target} is not what was packed, though its parts are: build the bundle again")
    return target


def missing(entry: dict[str, Any], folders: Sequence[Path]) -> list[str]:
    """Names of the parts of an archive that are not there."""
    return [part["name"] for part in entry["parts"] if not any((folder / part["name"]).is_file() for folder in folders)]


def manifest(folders: Sequence[Path]) -> dict[str, Any]:
    """Read it.

    Raises:
        BundleError: there is none, or it cannot be read.
    """
    for folder in folders:
        try:
            told: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
            return told
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise BundleError(f"{folder / MANIFEST} is not JSON ({error}): copy it again") from None
    raise BundleError(f"no {MANIFEST} in {', '.join(map(str, folders))}: it lies beside the parts, copy it with them")


def _copy(source: BinaryIO, target: BinaryIO, number: int) -> None:
    while number:
        piece = source.read(min(CHUNK, number))
        if not piece:
            raise BundleError("the file ended early")
        target.write(piece)
        number -= len(piece)
