"""Files that recipes make: data in verl's format and tiny policies. Safe to repeat, and never half made.

What is there and is what was asked for is kept, anything else is replaced. Every output appears under its final name only when it is
complete, so an interrupted run leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from recipes.tiny.chat import Lesson

MODEL_FOLDER = "tiny_model"
TINY_SOURCES, RECIPE_SOURCES = ("model.py", "chat.py"), ("chat.py", "tasks.py", "tools.py")
STAMP = "recipe.json"  # in the model folder: what it was made from and how training went


def holds(path: Path, rows: list[dict[str, Any]]) -> bool:
    """Whether `path` is a readable parquet file of exactly `rows`."""
    try:
        return pq.read_table(path).to_pylist() == rows
    except (OSError, pa.ArrowInvalid):  # not there, or torn
        return False


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write `rows` to `path` in one stroke, unless they are there already; says what it did."""
    if holds(path, rows):
        print(f"{path}: {len(rows)} rows, already there")
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        pq.write_table(pa.Table.from_pylist(rows), part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    counts = sorted(Counter(row["extra_info"].get("difficulty") for row in rows if "difficulty" in row["extra_info"]).items())
    per_difficulty = f"; rows per difficulty: {', '.join(f'{k}: {n}' for k, n in counts)}" if counts else ""
    print(f"{path}: {len(rows)} rows written{per_difficulty}")


def fingerprint(recipe: Path) -> str:
    """Of the source files that the tiny model of the recipe in folder `recipe` depends on: settings, chat format, tools, tasks."""
    digest = hashlib.sha256()
    for path in [Path(__file__).with_name(name) for name in TINY_SOURCES] + [recipe / name for name in RECIPE_SOURCES]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def made_from(folder: Path) -> str | None:
    """The fingerprint a tiny model was made from; None when `folder` does not hold one."""
    try:
        return json.loads((folder / STAMP).read_text())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def make_model(folder: Path, recipe: Path, lesson: Callable[[], Lesson], steps: int | None = None) -> None:
    """Train the tiny policy into `folder`, unless a current one is there already; says what it did.

    `steps`: of its training; None: as many as it takes to know its task. Raises FileExistsError when `folder` exists and was not made
    here: it is not ours to replace.
    """
    current = fingerprint(recipe) + (f" after {steps} steps" if steps else "")
    if made_from(folder) == current:
        print(f"{folder}: already there")
        return
    if folder.exists() and made_from(folder) is None:
        raise FileExistsError(f"{folder} exists and was not made by prepare.py: move it away or choose another --out")
    print(f"{folder}: training, about 20 s on an idle core", flush=True)
    from recipes.tiny import model  # here, because data alone needs neither torch nor verl

    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    part.mkdir()
    try:
        taught = lesson()
        facts = model.build(part, replace(taught, training={**taught.training, "steps": steps}) if steps else taught)
        (part / STAMP).write_text(json.dumps({"fingerprint": current, **facts}, indent=2) + "\n")
        if folder.exists():
            shutil.rmtree(folder)  # made from other settings
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{folder}: {facts['parameters']} parameters, vocabulary {facts['vocabulary']}, trained in {facts['seconds']} s")


def positive(text: str) -> int:
    """argparse type: an integer >= 1."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number
