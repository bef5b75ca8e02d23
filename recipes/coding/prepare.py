"""Make what a run of the coding recipe needs: train.parquet, val.parquet and, with --model, a tiny policy in tiny_model/.

    python recipes/coding/prepare.py --model                          everything into outputs/coding; about 20 s, nearly all for the model
    python recipes/coding/prepare.py --out DIR --train-rows 256       data only, for a model of your own; a second
    python recipes/coding/prepare.py --data apps --train-rows 2000    contest problems from the Hugging Face hub (or code_contests)

Safe to repeat: what is there and is what the arguments ask for is kept, anything else is replaced. Every output appears under its
final name only when it is complete, so an interrupted run leaves nothing half made.
"""

import argparse
import functools
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from recipes.coding import hub, tasks
from recipes.tiny.files import MODEL_FOLDER, make_model, positive, write_rows


def make_rows(train_rows: int, val_rows: int, seed: int, hardest: int = tasks.MAX_DIFFICULTY) -> dict[str, list[dict[str, Any]]]:
    """The rows of "train" and "val", without a task in common. Raises ValueError when there are not enough distinct tasks.

    Validation is drawn first: its tasks then do not depend on `train_rows`.
    """
    val = tasks.draw_tasks(val_rows, random.Random(f"{seed} val"), hardest=hardest)
    train = tasks.draw_tasks(train_rows, random.Random(f"{seed} train"), exclude=val, hardest=hardest)
    return {split: [tasks.to_row(e, i, split) for i, e in enumerate(drawn)] for split, drawn in (("train", train), ("val", val))}


def lesson() -> Any:
    """What the tiny policy learns; imported late, because data alone needs no verl."""
    from recipes.coding import chat

    return chat.lesson()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
A task is a function given by 1 to 8 rules of which the prompt tells one; failing tests tell the others. Difficulties follow a long-tailed
distribution (see recipes/coding/tasks.py): most trajectories of a step are short, a few are very long.

--data apps or code_contests takes contest problems from the Hugging Face hub instead, for models of a billion parameters or more.""",
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/coding"), help="folder to write to (outputs/coding)")
    parser.add_argument("--data", choices=["generated", *hub.SETS], default="generated", help="where tasks come from (generated)")
    parser.add_argument("--train-rows", type=positive, default=64, help="tasks to train on (64)")
    parser.add_argument("--val-rows", type=positive, default=16, help="tasks to validate on, none of them trained on (16)")
    parser.add_argument("--max-difficulty", type=positive, help=f"of generated tasks: 1 to {tasks.MAX_DIFFICULTY} ({tasks.MAX_DIFFICULTY})")
    parser.add_argument("--seed", type=int, default=0, help="seed of the tasks (0); the model has its own, fixed one")
    parser.add_argument("--model", action="store_true", help="also train the tiny policy, for runs without a GPU")
    parser.add_argument(
        "--model-steps", type=positive, help="steps of training it (as many as it needs); with fewer it knows less, and has more to learn"
    )
    args = parser.parse_args(argv)
    hardest = args.max_difficulty or tasks.MAX_DIFFICULTY
    if hardest > tasks.MAX_DIFFICULTY or (args.max_difficulty and args.data != "generated"):
        parser.error(f"--max-difficulty is for generated tasks, and at most {tasks.MAX_DIFFICULTY}")
    try:
        make = functools.partial(make_rows, hardest=hardest) if args.data == "generated" else functools.partial(hub.make_rows, args.data)
        rows = make(args.train_rows, args.val_rows, args.seed)
    except (ValueError, ConnectionError) as error:
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    for split, split_rows in rows.items():
        write_rows(args.out / f"{split}.parquet", split_rows)
    if args.model:
        try:
            make_model(args.out / MODEL_FOLDER, Path(__file__).parent, lesson, args.model_steps)
        except FileExistsError as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
