"""Define the arms of `simulate` by name: stock verl, its peers and heddle; user policies are loaded by file path."""

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
"""Methods every `Policy` must have."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How to simulate a named arm. `knows`: the policy receives the true lengths."""

    title: str
    make: Callable[[int], Policy] | None = None
    order: Literal["fcfs", "priority"] = "fcfs"
    options: Options | None = None
    """heddle with these options: it learns from the previous epoch, and its engines preempt on arrival if the options say so."""
    knows: bool = False
    tier: bool = False
    """Engines keep evicted KV cache in host memory (`Setting.tier`)."""
    mixed: bool = False
    """Runs on the layout `Setting.mixed`, if set, instead of one degree for all replicas."""


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
    "uniboost": Rule("UniBoost: short prefills first", UniBoost, "priority"),
    "heddle": Rule("heddle: resident sets, least served first", options=Options()),
    "heddle_tier": Rule("heddle with KV offload to the host", options=Options(), tier=True),
    "heddle_longest": Rule("heddle with heddle.priority.order=longest", options=Options.longest()),
    "heddle_place": PLACING,
    "heddle_mixed": replace(PLACING, title="heddle on mixed degrees, placing", mixed=True),
    "lpt_oracle": Rule("oracle: longest first, true lengths", order="priority", knows=True),
}


def is_file(name: str) -> bool:
    """Whether an arm is the path of a user policy."""
    return name.endswith(".py")


def rule_of(name: str) -> Rule:
    """The rule of that name; for the path of a Python file, the only policy class in it, constructed with a seed.

    The engines of a user policy run turns by the priorities it assigns; equal priorities run in arrival order.

    Raises:
        ValueError: the rule or file does not exist, it does not load, or it does not hold exactly one policy; the message is one line.
    """
    if is_file(name):
        return _own(str(Path(name).resolve()))
    if name not in RULES:
        raise ValueError(f"unknown rule {name!r}; allowed: {', '.join(RULES)}")
    return RULES[name]


@cache
def _own(path: str) -> Rule:
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; allowed: a Python file that defines a policy")
    spec = spec_from_file_location(f"heddle_policy_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} does not load: {type(error).__name__}: {' '.join(str(error).split())}") from error
    own = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == spec.name]
    policies = [kind for kind in own if all(callable(getattr(kind, name, None)) for name in METHODS)]
    leaves = [kind for kind in policies if not any(kind in other.__bases__ for other in policies)]
    if len(leaves) != 1:
        named = ", ".join(kind.__name__ for kind in leaves) or "none"
        raise ValueError(f"{path} must hold one policy, for example a subclass of verl_heddle.simulate.baselines.Peer; found: {named}")
    return Rule((leaves[0].__doc__ or leaves[0].__name__).strip().splitlines()[0], leaves[0], "priority")
