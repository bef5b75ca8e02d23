"""Importance weights for the selection: what each kept sample stands for.

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

from collections.abc import Sequence
from math import comb, exp, inf, log, sqrt

from verl_heddle.predict.quantities import LOGISTIC
from verl_heddle.shape.censored import Law
from verl_heddle.shape.select import Rule

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
