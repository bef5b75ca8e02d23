"""Play the tasks with a tiny policy, without verl's trainer or an inference engine, and print how it does per difficulty.

    python recipes/math/evaluate.py --model outputs/math/tiny_model

"right" is the share of episodes with the right answer.
"""

import random
import sys
from pathlib import Path
from typing import Any

from verl.tools.function_tool import load_function_tools_from_path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from recipes.math import reward, tasks
from recipes.tiny.play import evaluate


def rows(per_difficulty: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    drawn = [tasks.draw_expression(k, rng) for k in range(1, tasks.MAX_DIFFICULTY + 1) for _ in range(per_difficulty)]
    return [tasks.to_row(expression, 0, "eval") for expression in drawn]


if __name__ == "__main__":
    tools = Path(__file__).with_name("tools.py")
    evaluate(
        __doc__, "outputs/math/tiny_model", lambda: load_function_tools_from_path(str(tools)), reward.compute_score, reward.CORRECT, rows
    )
