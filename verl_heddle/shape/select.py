"""Selection by length: which n of a prompt's samples are trained on, which running ones are already out, and the weights of the kept.

Selection. Order samples by (tokens, number). A sample is *valid* if it ended by itself and can be trained on, *cut* if a limit on tokens or
turns ended it; the others (failed, no reward) are unusable. With V valid samples and n = K + L,

    V >= n:  E = the valid of at most `patience_tokens` tokens, and always the n shortest; kept = the K shortest and the L longest of E
    V <  n:  kept = all valid, and the shortest cut samples up to n

so cut samples count only if the group would be short without them, and a group is short only if fewer than n can be trained on. Infinite
patience gives DARTS's dual-end rule; patience 0, or L = 0, its shortest-only rule. In between, the long slots are for the longest samples
that end in time, and longer ones are stopped. The authors' code uses order of arrival as order of length, which is a different set if
siblings run at different speeds.

Online form, with a lower bound g on the tokens of each running sample and every outcome possible:

    running  out  iff V >= n valid have ended and g >= `stop_tokens`: the least g from which no length it may still reach is kept
    ended    in   iff no completion of the running samples excludes it;  out  iff no completion keeps it

Both conditions are exact and in closed form: lengths enter only by rank, and further valid siblings only add to the shorter and the longer.

Importance weights. A sample of x tokens, one of m independent ones with the prompt's length law F, is kept with the chance (K shortest, L
longest, patience w)

    x <= w:  pi(x) = 1 - P(a >= K, b >= L)      a of the m - 1 others shorter than x, b of them between x and w: multinomial
    x >  w:  pi(x) = P(a < n)                   a ~ Bin(m - 1, F(x))

which follows directly from the selection law. Weights 1 / pi would make weighted sums over the kept unbiased for sums over all m, however
reward depends on length (Horvitz and Thompson 1952). They are divided by their mean over the group (Hajek) and capped at `MOST` times the
smallest.
Remaining bias, pinned by a test (with 12 samples, a fifth to a third of it for dual-end, three quarters or more for shortest-only): (1)
lengths whose pi is below 1 / `MOST` of the group's largest are underweighted, and a shortest-only group never shows anything beyond the
n-th length; (2) the ratio is biased by O(1/n); (3) F is estimated, and samples are assumed independent with one law; (4) stopped samples
are dropped, so a group's baseline has n terms. The variance grows: the effective sample size (sum w)^2 / sum w^2 is the number of plain
samples that the kept are worth.

Invariants: the selection depends only on final lengths, numbers and outcomes, never on the order of events; the final `Group.kept` equals
`choose` of the final samples, whatever the stopped ones would have become; at most n are ever in.
Source: DARTS, algorithm 1; patience, online form and weights are ours. DARTS has no correction; DUET (arXiv 2605.08441) reweights for its
aborts. Cost: O(m log m) per event with m samples; weights O(m) per sample, plain floats.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import comb, exp, floor, inf, log, sqrt
from typing import NamedTuple

from verl_heddle.predict.quantities import LOGISTIC
from verl_heddle.shape.censored import Law


class Fate(StrEnum):
    """How a sample ended, as far as training is concerned."""

    VALID = "valid"
    CUT = "cut"
    """Ended by a limit on tokens or turns."""
    USELESS = "useless"
    """Failed, cancelled externally, or without a known reward."""


class Standing(StrEnum):
    """Whether a sample is certainly kept, certainly not kept, or undecided."""

    IN = "in"
    OUT = "out"
    OPEN = "open"


class Sample(NamedTuple):
    """An ended sample: its number in the group, which breaks ties, and its generated tokens."""

    number: int
    tokens: int
    fate: Fate = Fate.VALID


@dataclass(frozen=True, slots=True)
class Rule:
    """Keep `size` samples of a group, `longest` of them from the long end. Tokens are those generated over all turns.

    Raises:
        ValueError: a number is out of range.
    """

    size: int
    longest: int = 1
    patience_tokens: float = inf
    """Tokens up to which a group waits for its long slots; 0 makes the rule shortest-only."""
    cap_tokens: int | None = None
    """Maximum tokens of a sample (verl's `response_length`); None: no known cap."""

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.longest <= self.size:
            raise ValueError(f"a group keeps at least 1 sample, and 0 to all of them from the long end, got {self.size} and {self.longest}")
        if not self.patience_tokens >= 0 or (self.cap_tokens is not None and self.cap_tokens < 1):
            raise ValueError(
                f"patience must not be negative, and the cap must be at least 1 token, got {self.patience_tokens} and {self.cap_tokens}"
            )

    @property
    def shortest(self) -> int:
        """K, the samples kept from the short end."""
        return self.size - self.longest


def choose(rule: Rule, samples: Iterable[Sample]) -> list[int]:
    """Apply the rule to final lengths; returns the numbers of the kept samples, ascending."""
    ended = list(samples)
    valid = sorted((sample.tokens, sample.number) for sample in ended if sample.fate is Fate.VALID)
    if len(valid) >= rule.size:
        eligible = valid[: max(rule.size, sum(tokens <= rule.patience_tokens for tokens, _ in valid))]
        kept = eligible[: rule.shortest] + eligible[len(eligible) - rule.longest :]
    else:
        cut = sorted((sample.tokens, sample.number) for sample in ended if sample.fate is Fate.CUT)
        kept = valid + cut[: rule.size - len(valid)]
    return sorted(number for _, number in kept)


@dataclass(slots=True)
class Group:
    """A prompt's samples in flight, numbered 0 to `samples` - 1; each runs with 0 tokens until its first event.

    Raises:
        ValueError: fewer samples than the rule keeps.
    """

    rule: Rule
    samples: int
    running: dict[int, int] = field(init=False)
    """Tokens so far of running samples, by number."""
    stopped: dict[int, int] = field(default_factory=dict, init=False)
    """Tokens at which samples were stopped, by number."""
    ended: dict[int, Sample] = field(default_factory=dict, init=False)
    _valid: list[tuple[int, int]] = field(default_factory=list, init=False)
    _cut: list[tuple[int, int]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.samples < self.rule.size:
            raise ValueError(f"a group of {self.samples} samples cannot keep {self.rule.size}")
        self.running = dict.fromkeys(range(self.samples), 0)

    def progress(self, number: int, tokens: int) -> None:
        """A sample has generated `tokens` tokens; stale progress, or progress of a sample that is over, is ignored."""
        if number in self.running:
            self.running[number] = max(tokens, self.running[number])

    def end(self, sample: Sample) -> None:
        """A sample has ended by itself; ignored if it was stopped or has already ended."""
        if self.running.pop(sample.number, None) is None:
            return
        self.ended[sample.number] = sample
        if sample.fate is Fate.VALID:
            insort(self._valid, (sample.tokens, sample.number))
        elif sample.fate is Fate.CUT:
            insort(self._cut, (sample.tokens, sample.number))

    def stop(self) -> list[int]:
        """Mark running samples that are out as stopped and return their numbers; each is returned once."""
        out = [number for number, tokens in self.running.items() if tokens >= self.stop_tokens(number)]
        for number in out:
            self.stopped[number] = self.running.pop(number)
        return out

    def stop_tokens(self, number: int) -> float:
        """Tokens at which this running sample is out, given the events so far; inf: any length may be kept. It never rises."""
        rule, valid = self.rule, self._valid
        if len(valid) < rule.size:
            return inf
        top = self._top()
        beyond = 0.0
        if rule.cap_tokens is None or rule.cap_tokens > rule.patience_tokens:  # it may end beyond patience, and then needs rank n
            beyond = _passes(valid[rule.size - 1], number)
            if beyond <= floor(min(rule.patience_tokens, beyond)) + 1:
                beyond = 0.0
        if rule.longest and self._longer((top, number)) < rule.longest:
            within = top + 1.0
        else:
            within = _passes(valid[rule.shortest - 1], number) if rule.shortest else 0.0
            within = min(within, top + 1.0)
        stop = max(beyond, within)
        return inf if rule.cap_tokens is not None and stop > rule.cap_tokens else stop

    def standing(self, number: int) -> Standing:
        """Whether a sample is certainly kept, certainly not, or neither."""
        if number in self.stopped:
            return Standing.OUT
        if number in self.running:
            return Standing.OUT if self.running[number] >= self.stop_tokens(number) else Standing.OPEN
        sample = self.ended[number]
        if sample.fate is Fate.USELESS:
            return Standing.OUT
        place = (sample.tokens, number)
        return self._standing_cut(place) if sample.fate is Fate.CUT else self._standing_valid(place)

    @property
    def settled(self) -> bool:
        """Whether no sample is running any more."""
        return not self.running

    def kept(self) -> list[int]:
        """Numbers of the ended samples that are kept; final once `settled`."""
        return choose(self.rule, self.ended.values())

    def _top(self) -> float:
        """Most tokens that a valid sample within patience can have."""
        top = min(self.rule.patience_tokens, inf if self.rule.cap_tokens is None else self.rule.cap_tokens)
        return floor(top) if top < inf else inf

    def _longer(self, place: tuple[float, int]) -> int:
        """Ended valid samples behind this place and within patience."""
        return sum(valid > place and valid[0] <= self.rule.patience_tokens for valid in self._valid)

    def _standing_cut(self, place: tuple[int, int]) -> Standing:
        first = len(self._valid) + bisect_left(self._cut, place)
        if first >= self.rule.size:
            return Standing.OUT
        return Standing.IN if first + len(self.running) < self.rule.size else Standing.OPEN

    def _standing_valid(self, place: tuple[int, int]) -> Standing:
        rule, top = self.rule, self._top()
        shorter = bisect_left(self._valid, place)
        below = {number for number, tokens in self.running.items() if (tokens, number) < place}
        if place[0] > rule.patience_tokens:
            if shorter >= rule.size:
                return Standing.OUT
            return Standing.OPEN if shorter + len(below) >= rule.size else Standing.IN
        longer = self._longer(place)
        if shorter >= rule.shortest and longer >= rule.longest:
            return Standing.OUT
        above = {number for number, tokens in self.running.items() if tokens <= top and (top, number) > place}
        need_below, need_above = max(0, rule.shortest - shorter), max(0, rule.longest - longer)
        could = len(below) >= need_below and len(above) >= need_above and len(below | above) >= need_below + need_above
        return Standing.OPEN if could else Standing.IN


def _passes(mark: tuple[int, int], number: int) -> float:
    """Least tokens with which a sample of this number ranks behind the mark."""
    return float(mark[0] + (number < mark[1]))


MOST = 5.0
"""Largest ratio of two weights in a group. With n = 8, one weight of 5 among ones leaves an effective size of 4.5."""

EPSILON = 1e-6
"""Added to the deviation, as in verl."""


def chance(rule: Rule, samples: int, shorter: float, within: float) -> float:
    """pi(x), in 0 to 1. `shorter` is F(x); `within` is F(w), or less than F(x) if x exceeds the patience."""
    others = samples - 1
    if within < shorter:
        return sum(_binomial(others, a, shorter) for a in range(min(rule.size, samples)))
    lost = 0.0
    between = 0.0 if shorter >= 1 else (within - shorter) / (1 - shorter)
    for a in range(rule.shortest, others + 1):
        few = sum(_binomial(others - a, b, between) for b in range(min(rule.longest, others - a + 1)))
        lost += _binomial(others, a, shorter) * (1.0 - few)
    return min(1.0, max(0.0, 1.0 - lost))


def weights(rule: Rule, samples: int, law: Law, kept_tokens: Sequence[int]) -> list[float]:
    """Weights of a group's kept samples, mean 1; `samples` were started."""
    within = _share(law, rule.patience_tokens)
    if rule.cap_tokens is not None and rule.patience_tokens >= rule.cap_tokens:
        within = _share(law, rule.cap_tokens)
    chances = [chance(rule, samples, _share(law, tokens), within if tokens <= rule.patience_tokens else -1.0) for tokens in kept_tokens]
    top = max(chances, default=1.0) or 1.0
    inverse = [top / max(pi, top / MOST) for pi in chances]
    mean = sum(inverse) / max(1, len(inverse))
    return [weight / mean for weight in inverse]


def advantages(rewards: Sequence[float], given: Sequence[float], by_deviation: bool) -> list[float]:
    """GRPO advantages of a group with sample weights `given` (mean 1): w_i (r_i - m), m the weighted mean, so that they still sum to 0.

    `by_deviation` divides by the weighted standard deviation (Bessel's n - 1 becomes sum w - sum w^2 / sum w). Equal weights give verl's
    `compute_grpo_outcome_advantage` exactly, including a group of one, whose baseline is 0.
    """
    if len(rewards) == 1:
        return [rewards[0] * given[0]]
    whole = sum(given)
    mean = sum(w * r for w, r in zip(given, rewards, strict=True)) / whole
    scale = 1.0
    if by_deviation:
        freedom = whole - sum(w * w for w in given) / whole
        scale = sqrt(sum(w * (r - mean) ** 2 for w, r in zip(given, rewards, strict=True)) / freedom) + EPSILON
    return [w * (r - mean) / scale for w, r in zip(given, rewards, strict=True)]


def effective_size(given: Sequence[float]) -> float:
    """(sum w)^2 / sum w^2; 0 if there are no weights."""
    squares = sum(weight * weight for weight in given)
    return sum(given) ** 2 / squares if squares else 0.0


def _share(law: Law, tokens: float) -> float:
    """F(tokens), log-logistic as in `shape.outlook`."""
    if tokens <= 0 or tokens == inf:
        return float(tokens > 0)
    score = (log(tokens) - law.mean) / (law.spread * LOGISTIC)
    return 1.0 / (1.0 + exp(min(40.0, max(-40.0, -score))))


def _binomial(number: int, hits: int, share: float) -> float:
    return comb(number, hits) * share**hits * (1.0 - share) ** (number - hits) if 0 <= hits <= number else 0.0
