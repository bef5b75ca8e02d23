"""Entry point of shaping: decide before a step, learn after it. Pure, no clock, no randomness; the caller serialises.

    shaper = Shaper(settings, n, cap_tokens)
    plan = shaper.plan(step, prompts, fleet)             before a step: samples and rule per prompt; `fleet` from `fleet_of`, or None
    ...                                                  during the step: one or many `groups.Groups` open the groups and decide on samples
    shaper.step_ended(step, visits)                      `Groups.take` of all of them -> the step's metrics for `heddle/shape/*`
    shaper.weights(uid, tokens)                          afterwards, in corrected mode: importance weights of a group's kept samples
    shaper.state() / shaper.restore(state)               JSON values, for the checkpoint

Memory is dominated by the length statistics. Cost: one plan per step (`plan`), one fit per group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import Any, NamedTuple

from verl_heddle.fleet import Replica
from verl_heddle.options import Shape
from verl_heddle.place.outlook import GRID
from verl_heddle.place.pace import Habit, Latency, Tempo
from verl_heddle.shape.budget import Fleet, Spreads
from verl_heddle.shape.censored import Law, Prior, fit
from verl_heddle.shape.groups import Visit
from verl_heddle.shape.honesty import Account, Guard, Row, chance_of_mixed, is_mixed
from verl_heddle.shape.plan import Share, StepPlan, plain, plan
from verl_heddle.shape.select import weights
from verl_heddle.shape.settings import ShapeReason, check

FORMAT = 1
"""Version of `state`; other versions are rejected."""


class _Selected(NamedTuple):
    """A group with spare samples: its step, its share, and its prompt's law including this visit."""

    step: int
    share: Share
    law: Law


def fleet_of(latency: Latency, replicas: Sequence[Replica], habit: Habit, samples: int) -> Fleet:
    """The forecast's view of the engines; `samples` is the most that the step may start in total."""
    kinds: dict[tuple[int, int, int | None], list[Replica]] = {}
    for replica in replicas:
        kinds.setdefault((replica.tp, replica.slots, replica.kv_tokens), []).append(replica)
    each = max(2.0, samples / max(1, len(replicas)))
    return Fleet([Tempo(latency, same[0], GRID, each, habit) for same in kinds.values()], [len(same) for same in kinds.values()])


class Shaper:
    """Plans each step and learns from its outcome (see the module).

    Args:
        size: n, the rows per prompt that the trainer gets.
        cap_tokens: maximum tokens that a trajectory may generate; None: no known cap.

    Raises:
        ValueError: invalid settings, one line per problem.
    """

    def __init__(self, settings: Shape, size: int, cap_tokens: int | None = None) -> None:
        if problems := check(settings, size):
            raise ValueError("\n".join(problems))
        self._settings, self.size, self._cap = settings, size, cap_tokens
        self.spreads = Spreads()
        """Length statistics of the prompts."""
        self._guard = Guard(settings)
        self._last: StepPlan | None = None
        self._selected: dict[str, _Selected] = {}
        """By uid, in corrected mode: groups of this step and, because a buffer may release them late, of the previous one."""

    def plan(self, step: int, prompts: Sequence[str], fleet: Fleet | None, laws: Sequence[Law] | None = None) -> StepPlan:
        """Samples and rule of each prompt. `laws`, if given, replace the prompts' own statistics."""
        forced = self._guard.allows(step)
        if forced is not None:
            shares = tuple(plain(self.size, self._cap, forced) for _ in prompts)
            self._last = StepPlan(shares, counts={str(forced): len(prompts)})
            return self._last
        known = [self.spreads.law(prompt) for prompt in prompts] if laws is None else laws
        learnt = laws is not None or self.spreads.visits > 0
        unseen = [prompt not in self.spreads for prompt in prompts] if laws is None else ()
        made = plan(known, self.size, self._settings, fleet if learnt else None, self._cap, unseen)
        shares = tuple(self._overruled(number, *pair) for number, pair in enumerate(zip(prompts, made.shares, strict=True)))
        counts: dict[str, int] = {}
        for share in shares:
            counts[share.reason] = counts.get(share.reason, 0) + 1
        self._last = replace(made, shares=shares, counts=counts)
        return self._last

    def step_ended(self, step: int, visits: Sequence[Visit]) -> dict[str, float]:
        """Check the bounds and update the statistics; returns metrics without prefix."""
        account = Account()
        self._selected = {uid: group for uid, group in self._selected.items() if group.step >= step - 1}
        for visit in visits:
            account.stopped(visit.stopped_tokens)
            mean = self._mean(visit)
            self.spreads.observe(visit.prompt, visit.seen)
            if visit.closed:
                if self._settings.corrected and visit.selected:
                    self._selected[visit.uid] = _Selected(step, visit.share, self.spreads.law(visit.prompt))
                account.add(self._with_weights(visit), self.size, mean)
                self._note_lost_mix(visit)
        crossed = self._guard.step_ended(step, account)
        metrics = account.metrics()
        if self._last is not None:
            metrics |= {f"prompts/{reason}": float(count) for reason, count in self._last.counts.items()}
            metrics["spare"] = sum(share.samples - self.size for share in self._last.shares) / max(1, len(self._last.shares))
            if self._last.patience_tokens < inf:
                metrics["patience_tokens"] = self._last.patience_tokens
            if self._last.budget is not None:
                metrics |= {"forecast/saved_s": self._last.budget.saved_s, "forecast/cost_s": self._last.budget.cost_s}
        metrics["resting"] = float(self._guard.allows(step + 1) is not None)
        if crossed is not None:
            metrics[f"crossed/{crossed}"] = 1.0
        self._last = None
        return metrics

    def weights(self, uid: str, tokens: Sequence[int]) -> list[float]:
        """Weights, mean 1, of a group's kept samples with these generated tokens; all 1 without selection or corrected mode.

        The law is the prompt's, including this visit. At a first visit the only alternative is the pool's law, which is as far from the
        prompt as prompts are from each other; at later visits it makes no difference.
        """
        group = self._selected.get(uid)
        return [1.0] * len(tokens) if group is None else weights(group.share.rule, group.share.samples, group.law, tokens)

    def state(self) -> dict[str, Any]:
        """Statistics and guard as JSON values, for a checkpoint."""
        return {"format": FORMAT, "spreads": self.spreads.state(), "guard": self._guard.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Load a `state`. Raises ValueError, with nothing changed, if it is malformed or has a different version."""
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError("not a shaping state of this version")
        guard = Guard(self._settings)
        spreads = Spreads.restore(state["spreads"])
        guard.restore(state["guard"])
        self.spreads, self._guard = spreads, guard

    def _overruled(self, number: int, prompt: str, share: Share) -> Share:
        every = self._settings.control_every
        if share.samples == self.size:
            return share
        if self._guard.plain(prompt):
            return plain(self.size, self._cap, ShapeReason.MIXED_LOSS)
        return plain(self.size, self._cap, ShapeReason.CONTROL) if every and not number % every else share

    def _mean(self, visit: Visit) -> float | None:
        """Mean log tokens of all samples of a group with spares, stopped ones being censored; None if nothing was selected."""
        if not visit.selected or not visit.rows:
            return None
        law = self.spreads.law(visit.prompt)
        return fit(visit.seen, Prior(law.mean, law.spread**2, 0.0, 1.0))[0]

    def _with_weights(self, visit: Visit) -> list[Row]:
        kept = [row for row in visit.rows if row.kept]
        values = iter(self.weights(visit.uid, [row.tokens for row in kept]))
        return [row._replace(weight=next(values)) if row.kept else row for row in visit.rows]

    def _note_lost_mix(self, visit: Visit) -> None:
        """Report to the guard a prompt whose mix of outcomes was lost by selection."""
        rewards = [row.reward for row in visit.rows]
        if (
            visit.selected
            and len(rewards) > self.size
            and None not in rewards
            and not is_mixed([row.reward for row in visit.rows if row.kept])
        ):
            self._guard.lost(visit.prompt, chance_of_mixed(rewards, self.size))
