"""Mathematics from the Hugging Face hub, as rows of the math recipe.

| set | on the hub | what is taken |
|---|---|---|
| `gsm8k` | `openai/gsm8k`, main | question; the number after #### |
| `dapo` | `BytedTsinghua-SIA/DAPO-Math-17k` | problem without its instructions; each once (the set repeats it a hundred times) |

Not tried with a hub by the tests, which have none: they convert rows of the published shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from recipes.tiny.hub import split_of, stream

ASK = "Use the tools `calculate`, `solve` and `python` where they help. Put the final answer into \\boxed{}.\n\n"
DAPO_BEFORE, DAPO_AFTER = "on its own line.\n\n", "\n\nRemember to put your answer"
"""The problem stands between these in DAPO's prompts; our own instruction replaces theirs."""

Row = dict[str, Any]


def row_of(source: str, question: str, truth: str, index: int) -> Row:
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": ASK + question.strip()}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": truth.strip()},
        "extra_info": {"index": index, "split": ""},
        "agent_name": "tool_agent",
    }


def from_gsm8k(row: Row, index: int) -> Row | None:
    """`question`, and `answer` that ends in "#### 72"."""
    _, mark, truth = row["answer"].rpartition("####")
    return row_of("gsm8k", row["question"], truth.replace(",", ""), index) if mark else None


def from_dapo() -> Callable[[Row, int], Row | None]:
    """A converter that remembers which problems it has seen. Rows have verl's format: `prompt`, `reward_model.ground_truth`."""
    seen: set[str] = set()

    def convert(row: Row, index: int) -> Row | None:
        text = row["prompt"][0]["content"]
        question = text.partition(DAPO_BEFORE)[2].rpartition(DAPO_AFTER)[0] or text
        if question in seen:
            return None
        seen.add(question)
        return row_of("dapo", question, str(row["reward_model"]["ground_truth"]), index)

    return convert


SETS: dict[str, tuple[str, str | None, Callable[[], Callable[[Row, int], Row | None]]]] = {
    "gsm8k": ("openai/gsm8k", "main", lambda: from_gsm8k),
    "dapo": ("BytedTsinghua-SIA/DAPO-Math-17k", None, from_dapo),
}


def make_rows(name: str, train_rows: int, val_rows: int, seed: int) -> dict[str, list[Row]]:
    """ "train" and "val" of a set, in the set's own order (`seed` is of no use).

    Raises:
        ConnectionError: no hub.
        ValueError: too few rows.
    """
    path, config, converter = SETS[name]
    return split_of(stream(path, config, "train"), converter(), val_rows, train_rows)
