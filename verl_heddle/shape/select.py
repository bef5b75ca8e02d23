"""Which n of a prompt's samples are trained on, by length, and which of those under way cannot be among them any more.

Law. Order samples by (tokens, number). *Valid* is what ended by itself and can be trained on; *cut* what a limit on tokens or turns ended;
the rest (failed, no reward) is of no use. With V valid samples and n = K + L,

    V >= n:  E = the valid of at most `patience_tokens` tokens, and always the n shortest; kept = the K shortest and the L longest of E
    V <  n:  kept = all valid, and as many of the shortest cut ones as are missing to n

so cut samples count only where the group would be short without them, and a group is short only if fewer than n can be trained on. With
patience infinite this is DARTS's dual-end rule; with patience 0, or L = 0, its shortest-only rule; between, the long slots are for
the longest that end in time, and what runs longer is stopped. The authors' code takes the order of arrival for the order of lengths,
which is another set wherever siblings run at different speeds.

Online, with a lower bound g on the tokens of those that run and every outcome of theirs possible:

    runner   out  iff V >= n valid have ended and g >= `stop_tokens`: the least g from which no length it may still reach is kept
    ended    in   iff no completion by the runners leaves it out;  out  iff no completion keeps it

Both conditions are exact, and closed forms: lengths enter by rank only, and further valid siblings only add to the shorter and the longer.

Invariants: the decision depends on final lengths, numbers and outcomes only, never on the order of events; `Group.kept` at the end is
`choose` of the final samples, whatever those that were stopped would have become; at most n are ever in.
Source: DARTS, algorithm 1; patience and the online form are own. Cost: O(m log m) per event with m samples.

Importance weights for the selection: what each kept sample stands for.

Law. A sample of x tokens among m independent ones of the prompt's length law F is kept with the chance (K shortest, L longest, patience w)

    x <= w:  pi(x) = 1 - P(a >= K, b >= L)      a of the m - 1 others shorter than x, b of them between x and w: multinomial
    x >  w:  pi(x) = P(a < n)                   a ~ Bin(m - 1, F(x))

which follows from `select` word for word. Weights 1 / pi would make weighted sums over the kept unbiased for sums over all m, whatever
reward does with length (Horvitz and Thompson 1952). They are divided by their mean over the group (Hajek), and none is above `MOST` times
the least.

What remains biased, and is held by a test (12 samples: dual-end keeps a fifth to a third, shortest-only three quarters and more): (1)
lengths whose pi is below 1 / `MOST` of the group's largest count for less than they are, and of shortest-only groups nothing beyond the
n-th length is ever seen; (2) the ratio is biased by O(1/n); (3) F is estimated, and independent samples of one law are an assumption; (4)
stopped samples are dropped, so a group's baseline has n terms. The variance grows: the effective sample size (sum w)^2 / sum w^2 says how
many plain samples the kept are worth. Source: own; DARTS has no correction; DUET (arXiv 2605.08441) reweights for its aborts. Cost: O(m)
per sample, plain floats.
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
    """How a sample's life ended, as far as training goes."""

    VALID = "valid"
    CUT = "cut"
    """Ended by a limit on tokens or turns."""
    USELESS = "useless"
    """Failed, cancelled by somebody else, or its reward cannot be told."""


class Standing(StrEnum):
    """What is known of a sample's place in the group."""

    IN = "in"
    OUT = "out"
    OPEN = "open"


class Sample(NamedTuple):
    """A sample that has ended: its number in the group, which breaks ties, and the tokens it generated."""

    number: int
    tokens: int
    fate: Fate = Fate.VALID


@dataclass(frozen=True, slots=True)
class Rule:
    """Keep `size` of a group, of which `longest` from the long end. Tokens are those the model generated over all turns.

    Raises:
        ValueError: a number is out of range.
    """

    size: int
    longest: int = 1
    patience_tokens: float = inf
    """Longest sample that a long slot waits for; 0 makes the rule shortest-only."""
    cap_tokens: int | None = None
    """Most tokens a sample may generate (verl's `response_length`); None: no cap known."""

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.longest <= self.size:
            raise ValueError(f"a group keeps at least 1 sample and 0 to all of them from the long end, got {self.size} and {self.longest}")
        if not self.patience_tokens >= 0 or (self.cap_tokens is not None and self.cap_tokens < 1):
            raise ValueError(
                f"patience must not be negative and the cap at least 1 token, got {self.patience_tokens} and {self.cap_tokens}"
            )

    @property
    def shortest(self) -> int:
        """K."""
        return self.size - self.longest


def choose(rule: Rule, samples: Iterable[Sample]) -> list[int]:
    """Numbers of the kept, ascending: the rule on final lengths."""
    ended = list(samples)
    valid = sorted((one.tokens, one.number) for one in ended if one.fate is Fate.VALID)
    if len(valid) >= rule.size:
        eligible = valid[: max(rule.size, sum(tokens <= rule.patience_tokens for tokens, _ in valid))]
        kept = eligible[: rule.shortest] + eligible[len(eligible) - rule.longest :]
    else:
        cut = sorted((one.tokens, one.number) for one in ended if one.fate is Fate.CUT)
        kept = valid + cut[: rule.size - len(valid)]
    return sorted(number for _, number in kept)


@dataclass(slots=True)
class Group:
    """A prompt's samples under way, numbered 0 to `samples` - 1; those not heard of run with 0 tokens.

    Raises:
        ValueError: fewer samples than the rule keeps.
    """

    rule: Rule
    samples: int
    running: dict[int, int] = field(init=False)
    """Tokens so far by number."""
    stopped: dict[int, int] = field(default_factory=dict, init=False)
    """Tokens at which those that were out have been stopped."""
    ended: dict[int, Sample] = field(default_factory=dict, init=False)
    _valid: list[tuple[int, int]] = field(default_factory=list, init=False)
    _cut: list[tuple[int, int]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.samples < self.rule.size:
            raise ValueError(f"a group of {self.samples} samples cannot keep {self.rule.size}")
        self.running = dict.fromkeys(range(self.samples), 0)

    def progress(self, number: int, tokens: int) -> None:
        """A sample has generated so many tokens; news that is old, or of one that is over, changes nothing."""
        if number in self.running:
            self.running[number] = max(tokens, self.running[number])

    def end(self, sample: Sample) -> None:
        """A sample is over by itself; of one that was stopped or has ended this changes nothing."""
        if self.running.pop(sample.number, None) is None:
            return
        self.ended[sample.number] = sample
        if sample.fate is Fate.VALID:
            insort(self._valid, (sample.tokens, sample.number))
        elif sample.fate is Fate.CUT:
            insort(self._cut, (sample.tokens, sample.number))

    def stop(self) -> list[int]:
        """Numbers of the runners that are out; they count as stopped from here on and are not named again."""
        gone = [number for number, tokens in self.running.items() if tokens >= self.stop_tokens(number)]
        for number in gone:
            self.stopped[number] = self.running.pop(number)
        return gone

    def stop_tokens(self, number: int) -> float:
        """Tokens at which this runner is out, if nothing else happens; inf: it may be kept whatever its length. It only ever falls."""
        rule, valid = self.rule, self._valid
        if len(valid) < rule.size:
            return inf
        top = self._top()
        beyond = 0.0
        if rule.cap_tokens is None or rule.cap_tokens > rule.patience_tokens:  # it may end out of patience, and then needs rank n
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
        """Nobody runs any more."""
        return not self.running

    def kept(self) -> list[int]:
        """Numbers of the kept of those that have ended: final once `settled`."""
        return choose(self.rule, self.ended.values())

    def _top(self) -> float:
        """Most tokens with which a sample may be valid within patience."""
        top = min(self.rule.patience_tokens, inf if self.rule.cap_tokens is None else self.rule.cap_tokens)
        return floor(top) if top < inf else inf

    def _longer(self, place: tuple[float, int]) -> int:
        """Valid ones that have ended after this place and within patience."""
        return sum(one > place and one[0] <= self.rule.patience_tokens for one in self._valid)

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
    """Least tokens with which a sample of this number stands behind the mark."""
    return float(mark[0] + (number < mark[1]))


MOST = 5.0
"""Largest ratio of two weights in a group: with n = 8 one sample of weight 5 among ones leaves an effective size of 4.5."""

EPSILON = 1e-6
"""verl's, beside a deviation."""


def chance(rule: Rule, samples: int, shorter: float, within: float) -> float:
    """pi: `shorter` = F(x), `within` = F(w) (below F(x): x is out of patience), in 0 to 1."""
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
    """Weights of the kept samples of a group of which `samples` were started, mean 1."""
    within = _share(law, rule.patience_tokens)
    if rule.cap_tokens is not None and rule.patience_tokens >= rule.cap_tokens:
        within = _share(law, rule.cap_tokens)
    chances = [chance(rule, samples, _share(law, tokens), within if tokens <= rule.patience_tokens else -1.0) for tokens in kept_tokens]
    top = max(chances, default=1.0) or 1.0
    inverse = [top / max(one, top / MOST) for one in chances]
    mean = sum(inverse) / max(1, len(inverse))
    return [one / mean for one in inverse]


def advantages(rewards: Sequence[float], given: Sequence[float], by_deviation: bool) -> list[float]:
    """GRPO's, of a group whose samples stand for `given` (mean 1): w_i (r_i - m), m the weighted mean, so that they still sum to 0.

    `by_deviation`: over the weighted standard deviation (Bessel's n - 1 becomes sum w - sum w^2 / sum w). Equal weights give verl's
    `compute_grpo_outcome_advantage` exactly, also for a group of one, whose baseline is 0.
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
    """(sum w)^2 / sum w^2; 0 for none."""
    squares = sum(one * one for one in given)
    return sum(given) ** 2 / squares if squares else 0.0


def _share(law: Law, tokens: float) -> float:
    """F: log-logistic, as `shape.outlook` has it."""
    if tokens <= 0 or tokens == inf:
        return float(tokens > 0)
    score = (log(tokens) - law.mean) / (law.spread * LOGISTIC)
    return 1.0 / (1.0 + exp(min(40.0, max(-40.0, -score))))


def _binomial(number: int, hits: int, share: float) -> float:
    return comb(number, hits) * share**hits * (1.0 - share) ** (number - hits) if 0 <= hits <= number else 0.0
