"""What is compared: arms, their overrides, and the order in which a pair runs them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

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
