"""The flag's contract as data: every key a config group sets, its value, verl's own value, and why. Read from the YAML files themselves.

The comment above a key in `configs/**.yaml` is the why; so file, table and docs page cannot drift apart. Composition uses Hydra
on verl's config folder, found without importing verl.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from verl_heddle.verl_plugin.settings import CONFIGS

GROUPS = ("plugin/heddle", "plugin/observe", "machine/cpu")


@dataclass(frozen=True, slots=True)
class Override:
    """One key a group sets. `stock` is verl's value, None where verl has no such key."""

    key: str
    value: Any
    stock: Any
    why: str


def read(group: str, stock: DictConfig | None = None) -> list[Override]:
    """The overrides of `configs/<group>.yaml`, in its order.

    Args:
        group: one of `GROUPS`.
        stock: verl's composed config; composed here if not given.
    """
    text = (CONFIGS / f"{group}.yaml").read_text()
    plain = OmegaConf.to_container(stock if stock is not None else compose([]), resolve=False)
    lines = text.splitlines()
    return [
        Override(key, value, _look_up(plain, key), _comment_above(lines, line))
        for key, value, line in _leaves(yaml.compose(text))
        if not key.startswith("defaults")
    ]


def compose(overrides: Sequence[str]) -> DictConfig:
    """verl's trainer config with command-line overrides, as `python -m verl.trainer.main_ppo` would compose it.

    Raises:
        ModuleNotFoundError: verl is not installed.
        hydra.errors.HydraException: the overrides do not compose.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    spec = find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("verl is not installed here")
    folder = Path(next(iter(spec.submodule_search_locations))) / "trainer" / "config"
    with initialize_config_dir(config_dir=str(folder), version_base=None):
        return hydra_compose("ppo_trainer", overrides=list(overrides))


def arguments_of(command: Sequence[str]) -> list[str]:
    """The Hydra overrides in a verl command line: what follows the module, or everything if it names none."""
    words = list(command)
    for i, word in enumerate(words):
        if word.startswith("verl.trainer.main") or word.endswith("main_ppo.py"):
            words = words[i + 1 :]
            break
    return [word for word in words if "=" in word or word.startswith(("+", "~"))]


def _leaves(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, Any, int]]:
    """(dotted key, value, line of the key counted from 0) of every leaf of a mapping."""
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if isinstance(value, yaml.MappingNode):
            yield from _leaves(value, name + ".")
        else:
            yield name, yaml.safe_load(yaml.serialize(value)), key.start_mark.line


def _comment_above(lines: list[str], line: int) -> str:
    above = []
    while line > 0 and lines[line - 1].lstrip().startswith("#"):
        line -= 1
        above.append(lines[line].lstrip().lstrip("#").strip())
    return " ".join(reversed(above))


def _look_up(plain: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(plain, dict) or part not in plain:
            return None
        plain = plain[part]
    return plain
