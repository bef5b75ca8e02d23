"""Make what a run of the math recipe needs: train.parquet, val.parquet and, with --model, a tiny policy in tiny_model/.

    python recipes/math/prepare.py --model                       everything into outputs/math; about 20 s, nearly all for the model
    python recipes/math/prepare.py --out DIR --train-rows 512    data only, for a model of your own; a second

Safe to repeat: what is there and is what the arguments ask for is kept, anything else is replaced. Every output appears under its
final name only when it is complete, so an interrupted run leaves nothing half made.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from recipes.math import tasks

MODEL_FOLDER = "tiny_model"
MODEL_SOURCES = ("tiny_model.py", "chat.py", "tasks.py", "tools.py")
STAMP = "recipe.json"  # in the model folder: what it was made from and how training went


def make_rows(train_rows: int, val_rows: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """The rows of "train" and "val", without a task in common. Raises ValueError when there are not enough distinct tasks.

    Validation is drawn first: its tasks then depend on `val_rows` and `seed` alone.
    """
    val = tasks.draw_tasks(val_rows, random.Random(f"{seed} val"))
    train = tasks.draw_tasks(train_rows, random.Random(f"{seed} train"), exclude=val)
    return {split: [tasks.to_row(e, i, split) for i, e in enumerate(drawn)] for split, drawn in (("train", train), ("val", val))}


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
    counts = sorted(Counter(row["extra_info"]["difficulty"] for row in rows).items())
    print(f"{path}: {len(rows)} rows written; rows per difficulty: {', '.join(f'{k}: {n}' for k, n in counts)}")


def fingerprint() -> str:
    """Of the source files that the tiny model depends on: settings, chat format, tool schema, tasks."""
    digest = hashlib.sha256()
    for name in MODEL_SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()[:16]


def made_from(folder: Path) -> str | None:
    """The fingerprint a tiny model was made from; None when `folder` does not hold one."""
    try:
        return json.loads((folder / STAMP).read_text())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def make_model(folder: Path) -> None:
    """Train the tiny policy into `folder`, unless a current one is there already; says what it did.

    Raises FileExistsError when `folder` exists and was not made here: it is not ours to replace.
    """
    current = fingerprint()
    if made_from(folder) == current:
        print(f"{folder}: already there")
        return
    if folder.exists() and made_from(folder) is None:
        raise FileExistsError(f"{folder} exists and was not made by prepare.py: move it away or choose another --out")
    print(f"{folder}: training, about 20 s on an idle core", flush=True)
    from recipes.math import tiny_model  # here, because data alone needs neither torch nor verl

    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    part.mkdir()
    try:
        facts = tiny_model.build(part, tiny_model.Settings())
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
A task is "Simplify 3+4-2+5."; its difficulty, 1 to 8, is its number of operations. One call of the tool `simplify` does one operation, so
a task of difficulty k takes k + 1 assistant turns. Difficulties follow a long-tailed distribution (see recipes/math/tasks.py): most
trajectories of a step are short, a few are very long.

With a model of your own, raise data.max_response_length if needed: the tiny model's longest regular episode takes about 500 tokens.""",
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/math"), help="folder to write to (outputs/math)")
    parser.add_argument("--train-rows", type=positive, default=64, help="tasks to train on (64)")
    parser.add_argument("--val-rows", type=positive, default=16, help="tasks to validate on, none of them trained on (16)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the tasks (0); the model has its own, fixed one")
    parser.add_argument("--model", action="store_true", help="also train the tiny policy, for runs without a GPU")
    args = parser.parse_args(argv)
    try:
        rows = make_rows(args.train_rows, args.val_rows, args.seed)
    except ValueError as error:
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    for split, split_rows in rows.items():
        write_rows(args.out / f"{split}.parquet", split_rows)
    if args.model:
        try:
            make_model(args.out / MODEL_FOLDER)
        except FileExistsError as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
