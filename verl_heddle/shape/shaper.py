"""The door to shaping: what is decided before a step, and learnt after it. Pure, no clock, no randomness; the caller serialises.

    shaper = Shaper(settings, n, cap_tokens)
    plan = shaper.plan(step, prompts, fleet)             before a step: samples and rule per prompt; `fleet` from `fleet_of`, or None
    ...                                                  the step: `groups.Groups`, one or many, open the groups and decide on samples
    shaper.step_ended(step, visits)                      `Groups.take` of all of them -> metrics of the step for `heddle/shape/*`
    shaper.weights(uid, tokens)                          corrected mode, after that: what each kept sample of a group stands for
    shaper.state() / shaper.restore(state)               JSON values, for the checkpoint

Memory is the statistics. Cost: one plan per step (`plan`), one fit per group.
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
"""Version of `state`; others are refused."""


class _Selected(NamedTuple):
    """A group that was selected from, its prompt's law with this visit in it, and the step."""

    step: int
    share: Share
    law: Law


def fleet_of(latency: Latency, replicas: Sequence[Replica], habit: Habit, samples: int) -> Fleet:
    """What the forecast knows of the engines: `samples` is the most the step may start in all."""
    kinds: dict[tuple[int, int, int | None], list[Replica]] = {}
    for one in replicas:
        kinds.setdefault((one.tp, one.slots, one.kv_tokens), []).append(one)
    each = max(2.0, samples / max(1, len(replicas)))
    return Fleet([Tempo(latency, same[0], GRID, each, habit) for same in kinds.values()], [len(same) for same in kinds.values()])


class Shaper:
    """See the module.

    Args:
        size: n, rows per prompt that the trainer gets.
        cap_tokens: most tokens a trajectory may generate; None: no cap known.

    Raises:
        ValueError: the settings are wrong, one line per problem.
    """

    def __init__(self, settings: Shape, size: int, cap_tokens: int | None = None) -> None:
        if problems := check(settings, size):
            raise ValueError("\n".join(problems))
        self._settings, self.size, self._cap = settings, size, cap_tokens
        self.spreads = Spreads()
        """What is known of prompts' lengths."""
        self._guard = Guard(settings)
        self._last: StepPlan | None = None
        self._selected: dict[str, _Selected] = {}
        """By uid, in the corrected mode: groups of this step and, as a buffer may hand them out late, of the one before."""

    def plan(self, step: int, prompts: Sequence[str], fleet: Fleet | None, laws: Sequence[Law] | None = None) -> StepPlan:
        """Samples and rule of each prompt. `laws`: better ones than the prompts' own statistics, where somebody has them."""
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
        """Close the books: judge the bounds, teach the statistics; returns metrics without prefix."""
        account = Account()
        self._selected = {uid: one for uid, one in self._selected.items() if one.step >= step - 1}
        for visit in visits:
            account.stopped(visit.stopped_tokens)
            mean = self._mean(visit)
            self.spreads.observe(visit.prompt, visit.seen)
            if visit.closed:
                if self._settings.corrected and visit.selected:
                    self._selected[visit.uid] = _Selected(step, visit.share, self.spreads.law(visit.prompt))
                account.add(self._with_weights(visit), self.size, mean)
                self._mourn(visit)
        crossed = self._guard.step_ended(step, account)
        told = account.metrics()
        if self._last is not None:
            told |= {f"prompts/{reason}": float(count) for reason, count in self._last.counts.items()}
            told["spare"] = sum(share.samples - self.size for share in self._last.shares) / max(1, len(self._last.shares))
            if self._last.patience_tokens < inf:
                told["patience_tokens"] = self._last.patience_tokens
            if self._last.budget is not None:
                told |= {"forecast/saved_s": self._last.budget.saved_s, "forecast/cost_s": self._last.budget.cost_s}
        told["resting"] = float(self._guard.allows(step + 1) is not None)
        if crossed is not None:
            told[f"crossed/{crossed}"] = 1.0
        self._last = None
        return told

    def weights(self, uid: str, tokens: Sequence[int]) -> list[float]:
        """Weights, mean 1, of samples of these many generated tokens that were kept of a group of this step; ones where nothing was
        selected, or without the corrected mode.

        The law is the prompt's with this visit in it. At a first visit there is nothing else but the pool's, which is as far from the
        prompt as prompts are from each other; at later ones it makes no difference.
        """
        of = self._selected.get(uid)
        return [1.0] * len(tokens) if of is None else weights(of.share.rule, of.share.samples, of.law, tokens)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: statistics and guard, as JSON values."""
        return {"format": FORMAT, "spreads": self.spreads.state(), "guard": self._guard.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Counterpart of `state`. Raises ValueError, with nothing changed: not such a state, or of another version."""
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError("not a state of shaping of this version")
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
        """Mean log tokens of all samples of a group that was selected from, the stopped ones counted as longer than they got."""
        if not visit.selected or not visit.rows:
            return None
        law = self.spreads.law(visit.prompt)
        return fit(visit.seen, Prior(law.mean, law.spread**2, 0.0, 1.0))[0]

    def _with_weights(self, visit: Visit) -> list[Row]:
        kept = [row for row in visit.rows if row.kept]
        values = iter(self.weights(visit.uid, [row.tokens for row in kept]))
        return [row._replace(weight=next(values)) if row.kept else row for row in visit.rows]

    def _mourn(self, visit: Visit) -> None:
        """Remember a prompt whose mix of outcomes was lost by selection."""
        rewards = [row.reward for row in visit.rows]
        if (
            visit.selected
            and len(rewards) > self.size
            and None not in rewards
            and not is_mixed([row.reward for row in visit.rows if row.kept])
        ):
            self._guard.lost(visit.prompt, chance_of_mixed(rewards, self.size))
