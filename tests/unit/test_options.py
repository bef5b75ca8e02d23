"""The typed schema of `heddle.*`."""

from dataclasses import fields, is_dataclass

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl_heddle.options import Deadlines, Options, Priority, Trace, Twin, check, walk
from verl_heddle.verl_plugin.settings import options_of


def test_every_option_has_a_default_and_a_help_text():
    keys = [key for key, default, help in walk() if help.endswith(".")]
    assert len(keys) == len(set(keys)) == sum(1 for _ in walk())

    def count(node):
        return sum(count(getattr(node, f.name)) if is_dataclass(getattr(node, f.name)) else 1 for f in fields(node))

    assert len(keys) == count(Options())


def test_defaults_are_sound():
    assert check(Options()) == []


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (Options(poll_interval_s=0), "poll_interval_s"),
        (Options(poll_interval_s=float("nan")), "poll_interval_s"),
        (Options(priority=Priority(quantum_tokens=0)), "quantum_tokens"),
        (Options(priority=Priority(order="shortest")), "priority.order"),
        (Options(deadlines=Deadlines(router_s=-1)), "router_s"),
        (Options(trace=Trace(dir="")), "trace.dir"),
        (Options(twin=Twin(budget_s=0)), "twin.budget_s"),
    ],
)
def test_bad_values_are_named(options, word):
    problems = check(options)
    assert len(problems) == 1 and word in problems[0]


def test_options_of_resolves_inside_the_whole_config():
    config = OmegaConf.create({"trainer": {"x": "/tmp/t"}, "heddle": {"trace": {"dir": "${trainer.x}/heddle", "workload": "w"}}})
    assert options_of(config).trace.dir == "/tmp/t/heddle"


@pytest.mark.parametrize("node", [{"nonsense": 1}, {"seed": "many"}, {"priority": {"enable": "perhaps"}}])
def test_unknown_keys_and_wrong_types_are_refused(node):
    with pytest.raises(OmegaConfBaseException):
        options_of(OmegaConf.create({"heddle": node}))
