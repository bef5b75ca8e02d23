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


def test_names_are_names():
    assert rule_of("stock") is RULES["stock"]
    with pytest.raises(ValueError, match="there is no rule 'magic'"):
        rule_of("magic")
