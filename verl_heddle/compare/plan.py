"""What a comparison is: a verl command, its arms, how many pairs, which seeds. Kept as `comparison.json` in the comparison's folder.

The file is written before the first run. Calling again with the same folder goes on with it: more pairs and more arms may be asked for,
anything else that differs is an error, because runs of different questions cannot be compared.

What is compared: arms, their overrides, and the order in which a pair runs them.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")

RESERVED = ("summary",)
"""Names that the summary on W&B uses."""

FLAG = "+plugin="


@dataclass(frozen=True, slots=True)
class Arm:
    """`overrides` are added to the verl command. `bare`: no plugin at all, so only verl's own clocks are known."""

    name: str
    overrides: tuple[str, ...]
    bare: bool = False


STOCK = Arm("stock", ("+plugin=observe",))
"""verl's own decisions, with heddle's instruments and its shorter poll: what policies are compared with."""

HEDDLE = Arm("heddle", ("+plugin=heddle",))

BARE = Arm("stock_bare", (), bare=True)
"""verl without any plugin: shows what the instruments and the poll change."""


def parse_arm(text: str) -> Arm:
    """An arm from "name: override override ..."; without a `+plugin=` among them, `+plugin=heddle` comes first.

    Raises:
        ValueError: no name, a name that cannot be a folder, no overrides, or quotes that do not match; one line.
    """
    name, colon, rest = text.partition(":")
    name = name.strip()
    if not colon or not NAME.fullmatch(name) or name in RESERVED:
        raise ValueError(f'--arm needs "name: overrides", the name of letters, digits, _ . -; got {text!r}')
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise ValueError(f"--arm {name}: {error}: {rest.strip()!r}") from None
    if wrong := [word for word in words if "=" not in word and not word.startswith("~")]:
        raise ValueError(f"--arm {name}: {wrong[0]!r} is not an override (key=value)")
    if not words:
        raise ValueError(f"--arm {name}: no overrides; it would be heddle again")
    flagged = any(is_flag(word) for word in words)
    return Arm(name, tuple(words if flagged else [*HEDDLE.overrides, *words]))


def is_flag(word: str) -> bool:
    """Whether an override chooses the plugin group."""
    return word.lstrip("+").startswith("plugin=")


def order(arms: Sequence[Arm], pair: int) -> list[Arm]:
    """The arms in the order in which pair number `pair` (from 1) runs them.

    Two arms swap places from pair to pair, so that a machine that warms up, fills up or is shared at times favours none. With more arms the
    order is also turned by one place every second pair.
    """
    turn = (pair - 1) // 2 % len(arms)
    turned = [*arms[turn:], *arms[:turn]]
    return turned if pair % 2 else turned[::-1]


FILE = "comparison.json"
FORMAT = 1
MOST = 2**31
"""Of seeds, pairs and steps."""


@dataclass(frozen=True, slots=True)
class Key:
    """One run. `pair` counts from 1."""

    pair: int
    arm: str

    @property
    def folder(self) -> str:
        """Its folder's name; also the run's name."""
        return f"p{self.pair}-{self.arm}"


@dataclass(frozen=True, slots=True)
class Plan:
    """`command` is the user's verl command without a plugin flag, or the recipe's script and what was added to it."""

    name: str
    command: tuple[str, ...]
    arms: tuple[Arm, ...]
    pairs: int
    seed: int
    steps: int | None = None
    recipe: str | None = None
    wandb: bool = True
    summary_id: str = ""
    """Id of the summary run on W&B: the same whenever the comparison is called again."""

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def seed_of(self, pair: int) -> int:
        """All arms of a pair have the same seed, pairs have different ones."""
        return self.seed + pair - 1

    def runs(self) -> Iterator[Key]:
        """Every run, in the order in which they are made."""
        for pair in range(1, self.pairs + 1):
            for arm in order(self.arms, pair):
                yield Key(pair, arm.name)


def wanted(folder: Path, asked: Plan | None, pairs: int | None = None, arms: tuple[Arm, ...] = ()) -> tuple[Plan, bool]:
    """The plan to go on with, and whether one was there already. Writes nothing: see `keep`.

    Args:
        asked: what the command line asks for; None: go on with what is there.
        pairs, arms: with `asked` None, how many pairs and which arms it is to have at least.

    Raises:
        ValueError: nothing there to go on with, another comparison there, or a file that is not a plan; one line.
    """
    there = _read(folder / FILE)
    if there is None:
        if asked is None:
            raise ValueError(f"{folder} holds no comparison: name a verl command after --, or a recipe with --recipe")
        return replace(asked, summary_id=secrets.token_hex(4)), False
    if asked is not None:
        _same(folder, there, asked)
        pairs, arms = asked.pairs, asked.arms
    known = {arm.name: arm for arm in there.arms}
    for arm in arms:
        if known.get(arm.name, arm) != arm:
            raise ValueError(
                f"{folder} holds another comparison: its arm {arm.name} has {' '.join(known[arm.name].overrides) or 'nothing'}"
            )
    new = tuple(arm for arm in arms if arm.name not in known)
    return replace(there, pairs=max(there.pairs, pairs or 0), arms=(*there.arms, *new)), True


def keep(folder: Path, plan: Plan) -> None:
    """Write the plan to its folder, so that a later call can go on with it."""
    write_json(folder / FILE, {"format": FORMAT, **asdict(plan)})


def read_plan(folder: Path) -> Plan:
    """The plan in a comparison's folder.

    Raises:
        ValueError: there is none.
    """
    plan = _read(folder / FILE)
    if plan is None:
        raise ValueError(f"{folder} holds no comparison ({FILE} is missing)")
    return plan


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one stroke: a reader, or a call after a crash, sees the old one or the new one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(draft, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _same(folder: Path, there: Plan, asked: Plan) -> None:
    for name in ("command", "recipe", "steps", "seed", "name", "wandb"):
        old, new = getattr(there, name), getattr(asked, name)
        if old != new:
            raise ValueError(
                f"{folder} holds another comparison: its {name} is {_shown(old)}, not {_shown(new)}. "
                f"Use another --out, or go on with `verl-heddle compare --out {folder}`"
            )
    known = {arm.name: arm for arm in there.arms}
    for arm in asked.arms:
        if arm.name in known and known[arm.name] != arm:
            raise ValueError(
                f"{folder} holds another comparison: its arm {arm.name} has {' '.join(known[arm.name].overrides) or 'nothing'}"
            )


def _shown(value: Any) -> str:
    text = " ".join(value) if isinstance(value, tuple) and all(isinstance(item, str) for item in value) else str(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _read(path: Path) -> Plan | None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        value = json.loads(text)
        if value.pop("format") != FORMAT:
            raise ValueError("made by another version of verl-heddle")
        arms = tuple(Arm(arm["name"], tuple(arm["overrides"]), arm["bare"]) for arm in value.pop("arms"))
        plan = Plan(command=tuple(value.pop("command")), arms=arms, **value)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}): use another --out") from None
    if wrong := _wrong(plan):
        raise ValueError(f"{path} cannot be read ({wrong}): use another --out")
    return plan


def _wrong(plan: Plan) -> str:
    """The first field that is not of its type, as nobody who has a plan looks again; empty if all are."""
    words = (plan.name, *plan.command, *(word for arm in plan.arms for word in (arm.name, *arm.overrides)))
    whole = {"pairs": plan.pairs, "seed": plan.seed, "steps": 1 if plan.steps is None else plan.steps}
    faults = {
        "arms": not plan.arms or any(type(arm.bare) is not bool for arm in plan.arms),
        "name, command or arms": not all(isinstance(word, str) for word in words),
        "recipe": not isinstance(plan.recipe or "", str),
        "wandb": type(plan.wandb) is not bool,
        "summary_id": not isinstance(plan.summary_id, str),
    }
    faults |= {name: type(value) is not int or abs(value) > MOST or (name != "seed" and value < 1) for name, value in whole.items()}
    return next((f"{name} is not what it was written as" for name, wrong in faults.items() if wrong), "")
