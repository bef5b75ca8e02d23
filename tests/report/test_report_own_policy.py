"""Policies of one's own as arms: loaded from a file, played like any other, refused in a line."""

from __future__ import annotations

import pytest
from report_cases import small

from verl_heddle.report.rules import RULES, rule_of

STOCK = """
from verl_heddle.simulate.baselines.stock import Stock

class Mine(Stock):
    '''what verl does'''
"""
LATEST = """
from verl_heddle.simulate.baselines.stock import Stock
from dataclasses import replace

class Latest(Stock):
    count = 0

    def turn_started(self, turn, now):
        self.count += 1
        return replace(super().turn_started(turn, now), priority=-self.count)
"""


def test_a_policy_is_played_as_the_rule_that_it_is(tmp_path):
    mine, latest = tmp_path / "mine.py", tmp_path / "latest.py"
    mine.write_text(STOCK)
    latest.write_text(LATEST)
    answer = small(arms=("trajectory_fcfs", str(mine), str(latest)), slots=2, jobs=2)
    assert list(answer.rows) == ["stock", "trajectory_fcfs", str(mine), str(latest)]
    own, other = answer.rows[str(mine)], answer.rows[str(latest)]
    assert [run.makespan_s for run in own.runs] == [run.makespan_s for run in answer.stock.runs] and own.title == "what verl does"
    assert [run.makespan_s for run in other.runs] != [run.makespan_s for run in answer.stock.runs], "its priorities count"
    assert other.title == "Latest"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no such file"),
        ("class A(", "does not load: SyntaxError"),
        ("import nothing_of_that_name", "does not load: ModuleNotFoundError"),
        ("x = 1", "must hold one policy, for example a subclass of verl_heddle.simulate.baselines.Peer; found: none"),
        ("from verl_heddle.simulate.baselines import Peer\nclass A(Peer): pass\nclass B(Peer): pass", "found: A, B"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_before_anything_is_simulated(tmp_path, text, words):
    file = tmp_path / "own.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError) as caught:
        small(arms=("stock", str(file)))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return 1 / 0", "own.py, line 6, place: ZeroDivisionError"),
        ("raise ValueError('mine')", "own.py, line 6, place: ValueError: mine"),
        ("return 'nowhere', 'reason'", "the policy chose replica 'nowhere', which is not in the fleet"),
        (
            "return self.least_loaded(), 'r'\n\n    def priority(self, turn):\n        return 0.5",
            "priority 0.5: vLLM priorities are integers",
        ),
    ],
)
def test_a_policy_that_raises_is_told_with_its_place(tmp_path, capsys, body, words):
    from verl_heddle.cli import main

    file = tmp_path / "own.py"
    file.write_text(f"from verl_heddle.simulate.baselines import Peer\n\n\nclass Own(Peer):\n    def place(self, turn):\n        {body}\n")
    small = ("--prompts", "2", "--samples", "2", "--seeds", "1", "--gpus", "2")
    for jobs in ("1", "2"):
        words_typed = ["simulate", "--workload", "math", "--model", "qwen3-8b", *small, "--arms", "stock", "--jobs", jobs]
        assert main([*words_typed, "--policy", str(file)]) == 2
        said = capsys.readouterr().err.strip()
        assert words in said and len(said.splitlines()) == 1, said


HOLDS = """
from verl_heddle.simulate.baselines import Stock
from verl_heddle.trajectory import Decision

class Own(Stock):
    held = ()

    def turn_started(self, turn, now):
        self.held = (*self.held, turn.request)
        return Decision({replica}, 0, "mine", held=True)

    def admitted(self, now):
        names, self.held = self.held, ()
        return {names}
"""
AT_ONCE = """
from verl_heddle.simulate.baselines import Stock

class Own(Stock):
    def due_s(self, now):
        return now

    def tick(self, now):
        pass
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (HOLDS.format(replica="super().turn_started(turn, now).replica", names="[]"), "admits none, and no other event is pending"),
        (HOLDS.format(replica="super().turn_started(turn, now).replica", names="['x']"), "admits 'x', which it does not hold"),
        (HOLDS.format(replica="''", names="names"), "without a replica, and held it without one"),
        (AT_ONCE, "must be later than now, or inf"),
    ],
)
def test_answers_that_no_simulation_can_go_on_with_are_said(tmp_path, text, words):
    file = tmp_path / "own.py"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        small(arms=("stock", str(file)), jobs=1)
    assert words in str(caught.value)


def test_a_base_class_beside_the_policy_is_no_second_one(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(STOCK + "\nclass Other(Mine):\n    '''the one'''\n")
    assert rule_of(str(file)).title == "the one"


def test_names_are_names():
    assert rule_of("stock") is RULES["stock"]
    with pytest.raises(ValueError, match="unknown rule 'magic'"):
        rule_of("magic")
