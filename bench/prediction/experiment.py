"""From trajectories to looks: cross-validation by prompt, in three settings.

Setting `burst`: prompts never seen before, all samples start together. `waves`: the same with slots for a quarter of the trajectories and
shuffled submission, so that later samples find finished siblings. `revisit`: half of each prompt's samples came in an earlier epoch
(both halves take turns). In each fold the trees, the fitted lines and the pool come from the other folds' prompts, played first in
steps of some prompts; the tested prompts teach only what the clock has revealed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from random import Random
from zlib import crc32

import numpy as np

from bench.prediction.replay import LOOKS, Look, Notebook, play
from verl_heddle.predict.predictor import Predictor
from verl_heddle.trajectory import Trajectory

SETTINGS = ("burst", "waves", "revisit")

DEV_SHARE = 4
"""One group in four is for choosing features and constants; no reported number contains it."""


def group(item: Trajectory) -> str:
    """What must not be split: the prompt; sub-agents with their parent; a BFCL scenario with its variants."""
    if item.source == "bfcl_vllm":
        return re.sub(r".*_", "scenario_", item.prompt_id)
    return str(item.meta.get("parent") or item.prompt_id)


def is_dev(name: str) -> bool:
    """Whether the group was used for development."""
    return crc32(f"dev {name}".encode()) % DEV_SHARE == 0


def looks(items: Sequence[Trajectory], setting: str, folds: int = 5, seed: int = 0) -> list[Look]:
    """What everybody says about every trajectory while its group is held out, the two fitted lines included."""
    groups = {item.prompt_id: group(item) for item in items}
    names = sorted(set(groups.values()))
    Random(seed).shuffle(names)
    fold_of = {name: number % folds for number, name in enumerate(names)}
    result = []
    for fold in range(folds):
        train = [item for item in items if fold_of[groups[item.prompt_id]] != fold]
        test = [item for item in items if fold_of[groups[item.prompt_id]] == fold]
        for halves in ((0, 1), (1, 0)) if setting == "revisit" else ((0,),):
            result += _fold(train, test, setting, halves, groups, Random(seed + fold))
    return result


def _fold(
    train: list[Trajectory], test: list[Trajectory], setting: str, halves: tuple[int, ...], groups: dict[str, str], rng: Random
) -> list[Look]:
    predictor, notebook = Predictor(), Notebook()
    step, seen = 0, []
    prompts = sorted({item.prompt_id for item in train})
    rng.shuffle(prompts)
    size = max(8, len(prompts) // 10)
    for half in halves:
        for start in range(0, len(prompts), size):
            now = set(prompts[start : start + size])
            seen += _step(
                predictor, notebook, [item for item in _half(train, setting, half) if item.prompt_id in now], setting, step, groups, rng
            )
            step += 1
    predictor.adopt(predictor.fit_job().run())
    for half in halves[:-1]:
        _step(predictor, notebook, _half(test, setting, half), setting, step, None, rng)
        step += 1
    tested = _step(predictor, notebook, _half(test, setting, halves[-1]), setting, step, groups, rng)
    last = seen[len(seen) // 2 :] if setting == "revisit" else seen
    return _with_lines(tested, last)


def _half(items: Iterable[Trajectory], setting: str, half: int) -> list[Trajectory]:
    if setting != "revisit":
        return list(items)
    by_prompt: dict[str, list[Trajectory]] = defaultdict(list)
    for item in items:
        by_prompt[item.prompt_id].append(item)
    return [item for found in by_prompt.values() for number, item in enumerate(found) if (2 * number >= len(found)) == half]


def _step(predictor, notebook, items, setting, step, groups, rng) -> list[Look]:
    if setting == "waves":
        rng.shuffle(items)
    return play(predictor, notebook, items, step, max(1, len(items) // 4) if setting == "waves" else None, groups)


def _with_lines(tested: list[Look], seen: list[Look]) -> list[Look]:
    """Add the two baselines that need fitting: straight lines of log remaining on log prompt length and on log tokens so far."""
    lines = {}
    for turns in LOOKS:
        known = [look for look in seen if look.turns == turns]
        for name, column in (("prompt_length", "prompt_tokens"), ("tokens_so_far", "tokens")):
            x = np.log1p([getattr(look, column) for look in known])
            y = np.log([look.left for look in known])
            lines[name, turns] = np.polyfit(x, y, 1) if len(known) > 2 and np.ptp(x) > 0 else np.array([0.0, y.mean() if len(y) else 0.0])
    for look in tested:
        for name, column in (("prompt_length", "prompt_tokens"), ("tokens_so_far", "tokens")):
            look.says[name] = float(np.exp(np.clip(np.polyval(lines[name, look.turns], np.log1p(getattr(look, column))), -5, 40)))
    return tested
