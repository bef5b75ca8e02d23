"""`verl-heddle overrides`: the flag's contract as a terminal table and as the docs page, both from the same data."""

from __future__ import annotations

from typing import Any

import yaml

from verl_heddle import options
from verl_heddle.verl_plugin.overrides import GROUPS, compose, read

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
    """For a terminal: key, value, verl's value and why, one block a key."""
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
    """The page docs/configuration.md."""
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
