"""The math recipe's tool for tool files that put something around it, and what these reach from inside the agent-loop worker.

verl loads a tool file by its path: it puts its own folder on `sys.path` to import this.
"""

import gc
import importlib.util
import os
from pathlib import Path
from typing import Any

import ray
from verl.tools.function_tool import FUNCTION_TOOL_REGISTRY

from verl_heddle.verl_plugin.client import HeddleClient

_spec = importlib.util.spec_from_file_location("recipe_tools", Path(__file__).parents[2] / "recipes/math/tools.py")
RECIPE = importlib.util.module_from_spec(_spec)
"""The recipe's module of tools."""
_spec.loader.exec_module(RECIPE)  # registers `simplify`

TOOL = FUNCTION_TOOL_REGISTRY["simplify"]
"""verl's registered tool; its `fn` is what is called."""


def client() -> HeddleClient:
    """The worker's own."""
    return next(o for o in gc.get_objects() if isinstance(o, HeddleClient))


def pid_of(actor: Any) -> int:
    """Of the actor's process."""
    return ray.get(actor.__ray_call__.remote(lambda self: os.getpid()), timeout=60)
