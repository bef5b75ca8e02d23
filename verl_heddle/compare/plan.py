"""Defines a comparison: a verl command, its arms with their overrides, the number of pairs, seeds, and the order of runs in a pair.

The plan is saved as `comparison.json` in the comparison's folder before the first run. A later call with the same folder resumes it and may
add pairs and arms. Any other difference is an error, because the runs would not be comparable.
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
"""Names taken by the W&B summary."""

FLAG = "+plugin="


@dataclass(frozen=True, slots=True)
class Arm:
    """One arm: `overrides` are added to the verl command. `bare`: no plugin at all, so only verl's own timings are known."""

    name: str
    overrides: tuple[str, ...]
    bare: bool = False


STOCK = Arm("stock", ("+plugin=observe",))
"""The baseline: verl's own decisions, with heddle's instrumentation and its shorter polling interval."""

HEDDLE = Arm("heddle", ("+plugin=heddle",))

BARE = Arm("stock_bare", (), bare=True)
"""verl without any plugin; shows the effect of the instrumentation and the polling interval."""


def parse_arm(text: str) -> Arm:
    """Parse an arm from "name: override override ..."; `+plugin=heddle` is prepended unless a `+plugin=` is among the overrides.

    Raises:
        ValueError: no name, a name that cannot be a folder, no overrides, or unbalanced quotes; one line.
    """
    name, colon, rest = text.partition(":")
    name = name.strip()
    if not colon or not NAME.fullmatch(name) or name in RESERVED:
        raise ValueError(f'--arm needs "name: overrides", with a name of letters, digits, _ . -; got {text!r}')
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise ValueError(f"--arm {name}: {error}: {rest.strip()!r}") from None
    if wrong := [word for word in words if "=" not in word and not word.startswith("~")]:
        raise ValueError(f"--arm {name}: {wrong[0]!r} is not an override (key=value)")
    if not words:
        raise ValueError(f"--arm {name}: no overrides, so it would be identical to heddle")
    flagged = any(is_flag(word) for word in words)
    return Arm(name, tuple(words if flagged else [*HEDDLE.overrides, *words]))


def is_flag(word: str) -> bool:
    """Whether an override selects the plugin group."""
    return word.lstrip("+").startswith("plugin=")


def order(arms: Sequence[Arm], pair: int) -> list[Arm]:
    """The arms in the order in which pair number `pair` (from 1) runs them.

    The order is reversed in every second pair, so that a machine that warms up, fills up or is shared at times favours no arm. It is also
    rotated by one place every two pairs.
    """
    shift = (pair - 1) // 2 % len(arms)
    rotated = [*arms[shift:], *arms[:shift]]
    return rotated if pair % 2 else rotated[::-1]


FILE = "comparison.json"
FORMAT = 1
MOST = 2**31
"""Largest accepted seed, number of pairs and number of steps."""


@dataclass(frozen=True, slots=True)
class Key:
    """Identifies one run; `pair` counts from 1."""

    pair: int
    arm: str

    @property
    def folder(self) -> str:
        """The name of the run and of its folder."""
        return f"p{self.pair}-{self.arm}"


@dataclass(frozen=True, slots=True)
class Plan:
    """A comparison. `command` is the user's verl command without a plugin flag, or the recipe's script with the user's additions."""

    name: str
    command: tuple[str, ...]
    arms: tuple[Arm, ...]
    pairs: int
    seed: int
    steps: int | None = None
    recipe: str | None = None
    wandb: bool = True
    summary_id: str = ""
    """Id of the W&B summary run; constant over all calls of one comparison."""

    def arm(self, name: str) -> Arm:
        """The arm called `name`."""
        return next(arm for arm in self.arms if arm.name == name)

    def seed_of(self, pair: int) -> int:
        """The seed that all arms of a pair share; it differs between pairs."""
        return self.seed + pair - 1

    def runs(self) -> Iterator[Key]:
        """Every run, in execution order."""
        for pair in range(1, self.pairs + 1):
            for arm in order(self.arms, pair):
                yield Key(pair, arm.name)


def wanted(folder: Path, asked: Plan | None, pairs: int | None = None, arms: tuple[Arm, ...] = ()) -> tuple[Plan, bool]:
    """The plan to execute, and whether `folder` already held one. Writes nothing: see `keep`.

    Args:
        asked: the plan on the command line; None resumes the plan in `folder`.
        pairs, arms: if `asked` is None, the smallest number of pairs and the arms that the plan must have.

    Raises:
        ValueError: nothing to resume, a different comparison in `folder`, or a file that is not a plan; one line.
    """
    there = _read(folder / FILE)
    if there is None:
        if asked is None:
            raise ValueError(f"{folder} holds no comparison: give a verl command after --, or a recipe with --recipe")
        return replace(asked, summary_id=secrets.token_hex(4)), False
    if asked is not None:
        _same(folder, there, asked)
        pairs, arms = asked.pairs, asked.arms
    known = {arm.name: arm for arm in there.arms}
    for arm in arms:
        if known.get(arm.name, arm) != arm:
            raise ValueError(
                f"{folder} holds a different comparison: its arm {arm.name} has {' '.join(known[arm.name].overrides) or 'nothing'}"
            )
    new = tuple(arm for arm in arms if arm.name not in known)
    return replace(there, pairs=max(there.pairs, pairs or 0), arms=(*there.arms, *new)), True


def keep(folder: Path, plan: Plan) -> None:
    """Write the plan to its folder, so that a later call can resume it."""
    write_json(folder / FILE, {"format": FORMAT, **asdict(plan)})


def read_plan(folder: Path) -> Plan:
    """Read the plan in a comparison's folder.

    Raises:
        ValueError: the folder holds no plan, or an unreadable one.
    """
    plan = _read(folder / FILE)
    if plan is None:
        raise ValueError(f"{folder} holds no comparison ({FILE} is missing)")
    return plan


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically: a reader, or a call after a crash, sees the old file or the new one."""
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
                f"{folder} holds a different comparison: its {name} is {_shown(old)}, not {_shown(new)}. "
                f"Use a different --out, or resume it with `verl-heddle compare --out {folder}`"
            )
    known = {arm.name: arm for arm in there.arms}
    for arm in asked.arms:
        if arm.name in known and known[arm.name] != arm:
            raise ValueError(
                f"{folder} holds a different comparison: its arm {arm.name} has {' '.join(known[arm.name].overrides) or 'nothing'}"
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
            raise ValueError("made by a different version of verl-heddle")
        arms = tuple(Arm(arm["name"], tuple(arm["overrides"]), arm["bare"]) for arm in value.pop("arms"))
        plan = Plan(command=tuple(value.pop("command")), arms=arms, **value)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}): use a different --out") from None
    if wrong := _wrong(plan):
        raise ValueError(f"{path} cannot be read ({wrong}): use a different --out")
    return plan


def _wrong(plan: Plan) -> str:
    """A message about the first field with a wrong type or value, empty if all are valid; users of a plan do not check again."""
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
    return next((f"invalid {name}" for name, wrong in faults.items() if wrong), "")
