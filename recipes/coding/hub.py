"""Contest problems with tests from the Hugging Face hub, as rows of the coding recipe.

| set | on the hub | what is taken |
|---|---|---|
| `apps` | `codeparrot/apps` | problems with standard input and output; the first test is shown, the others are hidden |
| `code_contests` | `deepmind/code_contests` | public tests are shown, private and generated ones are hidden |

The prompt asks for a Python program that reads standard input and prints. Not tried with a hub by the tests, which have none: they convert
rows of the published shapes.
"""

from __future__ import annotations

import json
from typing import Any

from recipes.coding.judge import OUTPUT_CHARS, TESTS
from recipes.coding.tasks import Test, make_row
from recipes.tiny.hub import split_of, stream

SHOWN = 2
"""Tests that the tool runs, at most: examples, not an exhaustive suite to fit."""
MAX_QUESTION = 6000
"""Characters, some 1500 tokens: what `data.max_prompt_length` of the sizes in recipes/config allows."""
ASK = (
    "Write a Python program that reads standard input and prints the answer. Test it with the tool `test`, read what fails, and fix it. "
    "Give the final program in a ```python block.\n\n"
)


def tests_of(inputs: list[Any], outputs: list[Any]) -> list[Test]:
    """Tests that can be judged: text in and out, not too long."""
    pairs = [(given, wanted) for given, wanted in zip(inputs, outputs, strict=False) if isinstance(given, str) and isinstance(wanted, str)]
    return [{"input": given, "output": wanted} for given, wanted in pairs if max(len(given), len(wanted)) < OUTPUT_CHARS]


def row_of(source: str, question: str, shown: list[Test], hidden: list[Test], index: int) -> dict[str, Any] | None:
    """A row, or None when the problem has no tests to hide or is too long."""
    if not shown or not hidden or len(question) > MAX_QUESTION:
        return None
    return make_row(source, ASK + question, shown[:SHOWN], hidden[:TESTS], index, "")


def from_apps(row: dict[str, Any], index: int) -> dict[str, Any] | None:
    """`question`, and `input_output` as JSON text with `inputs`, `outputs` and, for tasks that we leave out, `fn_name`."""
    try:
        given = json.loads(row["input_output"] or "{}")
    except ValueError:  # a few rows hold integers too long for json
        return None
    if "fn_name" in given:
        return None
    tests = tests_of(given.get("inputs", []), given.get("outputs", []))
    return row_of("apps", row["question"], tests[:1], tests[1:], index)


def from_code_contests(row: dict[str, Any], index: int) -> dict[str, Any] | None:
    """`description`, and `public_tests`, `private_tests`, `generated_tests` as {"input": [...], "output": [...]}."""
    public, private, generated = (
        tests_of(row[name]["input"], row[name]["output"]) for name in ("public_tests", "private_tests", "generated_tests")
    )
    return row_of("code_contests", row["description"], public, private + generated, index)


SETS = {"apps": ("codeparrot/apps", None, from_apps), "code_contests": ("deepmind/code_contests", None, from_code_contests)}


def make_rows(name: str, train_rows: int, val_rows: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """ "train" and "val" of a set, in the set's own order (`seed` is of no use).

    Raises:
        ConnectionError: no hub.
        ValueError: too few rows.
    """
    path, config, convert = SETS[name]
    return split_of(stream(path, config, "train"), convert, val_rows, train_rows)
