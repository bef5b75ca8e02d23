"""How well the simulator foretold `schedule`, `place` and `shape`: their files of this visit, no engine.

Two forecasts of every makespan stand in those files, both written before the run: with the profile's prior (the shipped table) and with
latencies fitted to a step of the same engines under another seed. Errors are |forecast / measured - 1|, in percent, medians over all runs
of an experiment; of ratios, that of first arm over each other arm.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from bench.gpu import results
from bench.gpu.one import Run
from bench.gpu.profiles import Profile
from bench.gpu.results import Prediction, Row

TITLE = "Forecasts of schedule, place and shape against their measurements"
CAVEATS = ("The fitted forecast knows the engines' host work and the sharing of the card on average; the table knows neither.",)
OF = ("schedule", "place", "shape")
FORECASTS = {"table_s": "prior", "fitted_s": "fitted"}
EXPECTED_FITTED = 3.8
"""Percent: the median makespan error on CPU engines (bench/fidelity)."""


def predict(profile: Profile) -> Prediction:
    """The fitted forecast should do as well as on CPU engines."""
    rows = []
    for name in OF:
        rows += [Row(f"{name}: makespan error, prior", "%"), Row(f"{name}: makespan error, fitted", "%", EXPECTED_FITTED)]
        rows += [Row(f"{name}: ratio error, prior", "%"), Row(f"{name}: ratio error, fitted", "%")]
    return Prediction(tuple(rows), "fitted: the error bench/fidelity measured on CPU engines; nobody predicts the others")


def errors(pairs: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Percent errors of makespans and of ratios, over the pairs that were measured whole."""
    makespans, ratios = [], []
    for pair in pairs:
        arms = list(pair["arms"].values())
        if not all("makespan_s" in arm for arm in arms):
            continue
        makespans += [100.0 * abs(arm[key] / arm["makespan_s"] - 1.0) for arm in arms]
        first = arms[0]
        ratios += [100.0 * abs((first[key] / arm[key]) / (first["makespan_s"] / arm["makespan_s"]) - 1.0) for arm in arms[1:]]
    return makespans, ratios


async def measure(run: Run) -> None:
    """Those of the three that are there.

    Raises:
        RuntimeError: none is.
    """
    seen = []
    for name in OF:
        try:
            told = results.read(run.out / f"{name}.json")
        except (OSError, ValueError) as problem:
            print(f"{name}: {problem}")
            continue
        pairs = told["detail"].get("pairs", [])
        if told["profile"] != run.profile.name:
            continue
        for key, word in FORECASTS.items():
            makespans, ratios = errors(pairs, key)
            if makespans:
                seen.append(name)
                run.put(f"{name}: makespan error, {word}", median(makespans), runs=len(makespans), largest=max(makespans))
                run.put(f"{name}: ratio error, {word}", median(ratios), largest=max(ratios))
    if not seen:
        raise RuntimeError(f"none of {', '.join(OF)} has been measured in {run.out}")
