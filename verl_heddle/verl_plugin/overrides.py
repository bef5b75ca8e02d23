"""Lists every key that heddle's config groups set, its value, verl's own value, and why: for `verl-heddle overrides` and the docs page.

The list is read from the YAML files, and the reason is the comment above each key in `configs/**.yaml`, so file, terminal table and docs
page cannot drift apart. Hydra composes the program's own config folder, which is found without importing it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf, open_dict

from verl_heddle import options
from verl_heddle.verl_plugin.command_line import Command, configured, verl_main
from verl_heddle.verl_plugin.command_line import read as read_command
from verl_heddle.verl_plugin.settings import CONFIGS

GROUPS = ("plugin/heddle", "plugin/observe", "machine/cpu")


@dataclass(frozen=True, slots=True)
class Override:
    """One key that a group sets. `stock` is verl's value, None if verl has no such key."""

    key: str
    value: Any
    stock: Any
    why: str


def read(group: str, stock: DictConfig | None = None) -> list[Override]:
    """The overrides of `configs/<group>.yaml`, in file order.

    Args:
        group: one of `GROUPS`.
        stock: verl's composed config; composed here if None.
    """
    text = (CONFIGS / f"{group}.yaml").read_text()
    plain = OmegaConf.to_container(stock if stock is not None else compose([]), resolve=False)
    lines = text.splitlines()
    return [
        Override(key, _default(value), _look_up(plain, key), _comment_above(lines, line))
        for key, value, line in _leaves(yaml.compose(text))
        if not key.startswith("defaults")
    ]


def compose(overrides: Sequence[str], command: Command | None = None) -> DictConfig:
    """The trainer config that a program composes with command-line overrides.

    Args:
        command: gives the program and Hydra's options; None means `python -m verl.trainer.main_ppo`. A program whose configuration is
            unknown is treated as verl's own.

    Raises:
        ModuleNotFoundError: verl is not installed.
        hydra.errors.HydraException: the overrides do not compose.
    """
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_automatic_config_search_path, validate_config_path
    from hydra.core.config_search_path import SearchPathQuery
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    command = command or Command()
    file = verl_main()
    main = command.main or (configured(file, {}) if file is not None else None)
    if main is None:
        raise ModuleNotFoundError("verl is not installed here")
    folder = command.config_path if command.config_path is not None else main.config_path
    validate_config_path(folder)
    path = create_automatic_config_search_path(str(main.file), None, folder)
    if command.config_dir is not None:
        path.prepend("command-line", f"file://{os.path.abspath(command.config_dir)}", SearchPathQuery(provider="schema"))
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        hydra = Hydra.create_main_hydra2(task_name="verl", config_search_path=path)
        config = hydra.compose_config(command.config_name or main.config_name, list(overrides), RunMode.RUN)
    finally:
        GlobalHydra.instance().clear()
        if before is not None:
            GlobalHydra.instance().initialize(before)
    with open_dict(config):
        del config["hydra"]
    return config


def arguments_of(command: Sequence[str]) -> list[str]:
    """The Hydra overrides in a verl command line."""
    return list(read_command(command).overrides)


def _leaves(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, Any, int]]:
    """Yields (dotted key, value, zero-based line of the key) for every leaf of a mapping."""
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if isinstance(value, yaml.MappingNode):
            yield from _leaves(value, name + ".")
        else:
            yield name, yaml.safe_load(yaml.serialize(value)), key.start_mark.line


def _default(value: Any) -> Any:
    """`x` for a value `${heddle_default:x}`, else the value."""
    return value.removeprefix("${heddle_default:").removesuffix("}") if str(value).startswith("${heddle_default:") else value


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


TITLES = {
    "plugin/heddle": "`+plugin=heddle`: the flag",
    "plugin/observe": "`+plugin=observe`: stock decisions, heddle's instruments (all of the above, and)",
    "machine/cpu": "`+machine=cpu`: verl and vLLM without a GPU (works with and without the flag)",
}


def _shown(value: Any) -> str:
    if value is None:
        return "(none)"
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def text() -> str:
    """Terminal output: key, value, verl's value and why, one block per key."""
    stock = compose([])
    out = []
    for group in GROUPS:
        out.append(TITLES[group].replace("`", ""))
        for item in read(group, stock):
            out.append(f"  {item.key} = {_shown(item.value)}   [verl: {_shown(item.stock)}]\n      {item.why}")
    out.append("Options of heddle (override any on the command line)")
    out += [f"  {key} = {_shown(default)}\n      {help}" for key, default, help in options.walk()]
    return "\n".join(out) + "\n"


def markdown() -> str:
    """Text of the page docs/configuration.md."""
    stock = compose([])
    out = [
        "# Configuration",
        "",
        "Written by `make docs` from `configs/` and `verl_heddle/options.py`. Any key can be overridden after the flag.",
    ]
    out += ["", "## Options", "", "| option | default | what it does |", "|---|---|---|"]
    out += [f"| `{key}` | `{_shown(default)}` | {help} |" for key, default, help in options.walk()]
    for group in GROUPS:
        out += ["", f"## {TITLES[group]}", "", "| key | value | verl's own | why |", "|---|---|---|---|"]
        out += [f"| `{i.key}` | `{_shown(i.value)}` | `{_shown(i.stock)}` | {i.why} |" for i in read(group, stock)]
    return "\n".join(out) + "\n"
