"""Play the tasks with a tiny policy, without verl's trainer or an inference engine, and print how it does per difficulty.

    python recipes/coding/evaluate.py --model outputs/coding/tiny_model

"right" is the share of episodes whose last program passes all hidden tests.
"""

import random
import sys
from pathlib import Path
from typing import Any

from verl.tools.tool_registry import initialize_tools_from_config

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from recipes.coding import reward, tasks
from recipes.tiny.play import evaluate


def rows(per_difficulty: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    drawn = [tasks.draw_task(k, rng) for k in range(1, tasks.MAX_DIFFICULTY + 1) for _ in range(per_difficulty)]
    return [tasks.to_row(task, i, "eval") for i, task in enumerate(drawn)]


if __name__ == "__main__":
    tools = str(Path(__file__).with_name("tools.yaml"))
    evaluate(__doc__, "outputs/coding/tiny_model", lambda: initialize_tools_from_config(tools), reward.compute_score, reward.SOLVED, rows)
