"""The arms of `simulate` by name: stock verl, the peers, heddle; and policies of one's own, by the path of their file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Literal

from verl_heddle.options import Options, Place
from verl_heddle.simulate import Policy
from verl_heddle.simulate.baselines import (
    AffinityMargin,
    Continuum,
    DualThreshold,
    Lfs,
    Plas,
    RoundRobin,
    Slime,
    Stock,
    ThunderAgent,
    TrajectoryFcfs,
    UniBoost,
    VerlStar,
    WaveAdmission,
)

METHODS = ("replicas_added", "replicas_removed", "turn_started", "turn_finished", "trajectory_ended")
"""Of every `Policy`."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A policy by name. `knows`: it is told the true lengths."""

    title: str
    make: Callable[[int], Policy] | None = None
    order: Literal["fcfs", "priority"] = "fcfs"
    options: Options | None = None
    """heddle with these: it is shown the epoch before, and its engines preempt on arrival."""
    knows: bool = False
    tier: bool = False
    """Engines keep evicted KV cache in the host's memory, `Setting.tier`."""
    mixed: bool = False
    """On `Setting.mixed`, where there is one, instead of one degree for all."""


PLACING = Rule("heddle with heddle.place.enable", options=Options(place=Place(enable=True)))

RULES: Mapping[str, Rule] = {
    "stock": Rule("stock verl", Stock),
    "stock_tier": Rule("stock verl with KV offload to the host", Stock, tier=True),
    "trajectory_fcfs": Rule("trajectory-FCFS: first turn first", TrajectoryFcfs, "priority"),
    "round_robin": Rule("round-robin", RoundRobin),
    "slime": Rule("Slime: least load, every turn", Slime),
    "verl_star": Rule("Verl*: sticky until 32 apart", VerlStar),
    "dual_threshold": Rule("SGLang dual threshold (verl #6533)", DualThreshold),
    "affinity_margin": Rule("affinity margin 2 (verl #7435)", AffinityMargin),
    "plas": Rule("PLAS: least served first (Autellix)", Plas, "priority"),
    "thunder_agent": Rule("ThunderAgent: pauses and resumes programs", ThunderAgent),
    "continuum": Rule("Continuum: KV kept for a time to live", Continuum, "priority"),
    "wave_admission": Rule("llm-d wave admission: free KV against growth", WaveAdmission),
    "lfs": Rule("NeMo-RL #4007: probes, then longest groups", Lfs),
    "uniboost": Rule("UniBoost: short reads put forward", UniBoost, "priority"),
    "heddle": Rule("heddle: resident sets, least served first", options=Options()),
    "heddle_tier": Rule("heddle with KV offload to the host", options=Options(), tier=True),
    "heddle_longest": Rule("heddle with heddle.priority.order=longest", options=Options.longest()),
    "heddle_place": PLACING,
    "heddle_mixed": replace(PLACING, title="heddle on mixed degrees, placing", mixed=True),
    "lpt_oracle": Rule("oracle: longest first, true lengths", order="priority", knows=True),
}


def is_file(name: str) -> bool:
    """Whether an arm is a policy of the user's own."""
    return name.endswith(".py")


def rule_of(name: str) -> Rule:
    """The rule of that name; for the path of a Python file the one policy class in it, made with a seed.

    Its engines run turns by the priorities that it gives, equal ones as they come.

    Raises:
        ValueError: there is no such rule or file, it does not load, or it does not hold exactly one policy; one line.
    """
    if is_file(name):
        return _own(str(Path(name).resolve()))
    if name not in RULES:
        raise ValueError(f"there is no rule {name!r}; there are {', '.join(RULES)}")
    return RULES[name]


@cache
def _own(path: str) -> Rule:
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; allowed: a Python file with a policy in it")
    spec = spec_from_file_location(f"heddle_policy_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} does not load: {type(error).__name__}: {' '.join(str(error).split())}") from error
    own = [one for one in vars(module).values() if isinstance(one, type) and one.__module__ == spec.name]
    able = [one for one in own if all(callable(getattr(one, name, None)) for name in METHODS)]
    made = [one for one in able if not any(one in other.__bases__ for other in able)]
    if len(made) != 1:
        named = ", ".join(one.__name__ for one in made) or "none"
        raise ValueError(f"{path} must hold one policy, for example a subclass of verl_heddle.simulate.baselines.Peer; found: {named}")
    return Rule((made[0].__doc__ or made[0].__name__).strip().splitlines()[0], made[0], "priority")
