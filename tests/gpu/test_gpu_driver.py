"""The driver: what begins within a budget, what a failure costs, what becomes of a process that dies."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench.gpu import budget, one, results, run
from bench.gpu.profiles import PROFILES


class Clock:
    def __init__(self):
        self.at = 100.0

    def __call__(self):
        return self.at


spans = st.lists(st.tuples(st.floats(1, 200), st.floats(0, 300), st.floats(0, 500), st.booleans()), min_size=1, max_size=8)


@given(spans, st.floats(0, 2000))
def test_everything_ends_in_time(made, budget_s):
    """Whatever experiments take, as long as each is stopped at its deadline plus grace."""
    clock = Clock()
    slots = [budget.Slot(str(i), least, least + more, kept) for i, (least, more, _, kept) in enumerate(made)]
    wanted = {str(i): took for i, (_, _, took, _) in enumerate(made)}

    def start(name, seconds):
        clock.at += min(wanted[name], seconds + budget.GRACE_S)
        return "done"

    outcomes = budget.drive(slots, budget_s, clock, start)
    assert clock.at - 100.0 <= budget_s + 1e-6
    assert [one.name for one in outcomes] == [slot.name for slot in slots]


@given(spans, st.floats(0, 2000))
def test_what_is_kept_for_the_end_is_there(made, budget_s):
    """A last, kept experiment runs whenever the budget held it at all."""
    clock, last = Clock(), budget.Slot("last", 5, 30, kept=True)
    slots = [budget.Slot(str(i), least, least + more) for i, (least, more, _, _) in enumerate(made)]

    def start(name, seconds):
        clock.at += seconds + budget.GRACE_S  # the worst case
        return "cut"

    ran = {one.name: one.status for one in budget.drive([*slots, last], budget_s, clock, start)}
    spare = budget_s - last.least_s - budget.GRACE_S
    assert abs(spare) < 1e-3 or (ran["last"] == "cut") == (spare > 0)


def test_a_failure_costs_only_itself_and_what_is_there_is_skipped():
    clock, begun = Clock(), []

    def start(name, seconds):
        begun.append((name, seconds))
        clock.at += 10
        if name == "b":
            raise RuntimeError("no engine")
        return "done"

    slots = [budget.Slot(name, 5, 50) for name in "abcd"]
    outcomes = budget.drive(slots, 200, clock, start, lambda name: name == "c")
    assert [(one.name, one.status) for one in outcomes] == [
        ("a", "done"),
        ("b", "failed: RuntimeError: no engine"),
        ("c", "there"),
        ("d", "done"),
    ]
    assert begun[0] == ("a", 50)


def test_the_visit_fits_its_commands():
    """Eight experiments at their least, with grace, fit two commands of nine minutes; each at its most fits one."""
    for profile in (make() for make in PROFILES.values()):
        slots = run.slots(profile, list(one.NAMES))
        assert [slot.name for slot in slots] == list(one.NAMES)
        assert sum(slot.least_s for slot in slots) <= 2 * 540
        assert max(slot.most_s for slot in slots) + 2 * budget.GRACE_S <= 10 * 60 or profile.name == "rehearsal"


def header(name: str, **other) -> dict:
    return {
        "experiment": name,
        "title": "t",
        "kind": results.REHEARSAL,
        "profile": "rehearsal",
        "commit": "c",
        "versions": {},
        "device": {"type": "cpu", "name": "cpu", "clocks": {}},
        "settings": {},
        "caveats": [],
        "started": results.now(),
        "deadline_s": 10.0,
    } | other


def record(path: Path, **other) -> results.Record:
    rows = (results.Row("a", "s", 2.0), results.Row("b", "x"))
    return results.Record(path, header("smoke", **other), results.Prediction(rows, "guess", (0, 1)))


def test_predictions_are_written_before_and_never_changed(tmp_path):
    made = record(tmp_path / "smoke.json")
    assert results.read(made.path)["status"] == "predicted"
    assert results.read(made.path)["rows"][0] == {"name": "a", "unit": "s", "predicted": 2.0, "measured": None, "error": None, "detail": {}}
    made.put("a", 4.0, runs=3)
    told = results.read(made.path)
    assert told["status"] == "running" and told["rows"][0]["predicted"] == 2.0
    assert told["rows"][0]["error"] == pytest.approx(-0.5) and told["rows"][0]["detail"] == {"runs": 3}
    with pytest.raises(ValueError, match="measured before"):
        made.put("a", 5.0)
    with pytest.raises(ValueError, match="no unit"):
        made.put("new", 5.0)
    with pytest.raises(ValueError, match="no measurement"):
        made.put("b", float("nan"))
    made.put("new", 5.0, "ms")
    made.close("done", 3.0)
    assert results.is_over(made.path)


@pytest.mark.parametrize(("code", "word"), [(None, "silent"), (-9, "status -9")])
def test_a_process_that_dies_is_a_failure_with_its_last_words(tmp_path, code, word):
    made = record(tmp_path / "smoke.json")
    made.put("a", 1.0)
    log = tmp_path / "log"
    log.write_text("first\nCUDA error: out of memory\n")
    status = run.settle(made.path, "smoke", code, log)
    told = results.read(made.path)
    assert status.startswith("failed") and told["status"] == "failed"
    assert word in told["error"] and "out of memory" in told["error"]
    assert told["rows"][0]["measured"] == 1.0  # what was measured stays
    assert not results.is_over(made.path)
    assert "before it began" in run.settle(tmp_path / "none.json", "tau", 1, log)


def test_a_process_that_hangs_is_stopped_at_its_deadline(tmp_path, monkeypatch):
    """For real: a process that ignores its deadline, and a child of it."""
    script = tmp_path / "one.py"
    script.write_text(
        "import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\ntime.sleep(60)\n"
    )
    monkeypatch.setattr(run, "__file__", str(tmp_path / "run.py"))
    monkeypatch.setattr(budget, "GRACE_S", 0.5)
    profile = PROFILES["rehearsal"]()
    status = run.perform(profile, tmp_path / "out", "smoke", 0.5)
    assert status.startswith("failed before it began")
    from verl_heddle.compare.campaign import marked

    assert not marked(str((tmp_path / "out/smoke").resolve()))


def test_a_result_of_no_gpu_is_never_called_measured():
    cpu, h200 = {"type": "cpu", "name": "2 cores", "clocks": {}}, {"type": "cuda", "name": "NVIDIA H200", "clocks": {}}
    assert one.kind_of(PROFILES["rehearsal"](), cpu) == one.kind_of(PROFILES["rehearsal"](), h200) == results.REHEARSAL
    assert one.kind_of(PROFILES["h200"](), h200) == results.MEASURED
    with pytest.raises(SystemExit, match="needs an H200"):
        one.kind_of(PROFILES["h200"](), cpu)
    with pytest.raises(SystemExit, match="needs an H200"):
        one.kind_of(PROFILES["h200"](), h200 | {"name": "NVIDIA A100"})


def test_the_smoke_test_decides_whether_engines_run_eagerly(tmp_path):
    profile = PROFILES["rehearsal"]()
    assert run.EAGER not in run.environment(profile, tmp_path, "tau")
    made = record(tmp_path / "smoke.json")
    made.note(eager=True)
    assert run.environment(profile, tmp_path, "tau")[run.EAGER] == "1"


def test_wrong_arguments_end_before_anything_starts(tmp_path, capsys):
    for line in (["--budget-minutes", "0"], ["--profile", "rehearsal", "--out", str(run.RESULTS)], ["--only", "everything"]):
        with pytest.raises(SystemExit) as ended:
            run.main(line)
        assert ended.value.code == 2
    assert "rehearsal does not belong" in capsys.readouterr().err


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError):
        results.store(tmp_path / "x.json", {"a": float("nan")})
    assert json.loads(results.SCHEMA.read_text())["title"]
