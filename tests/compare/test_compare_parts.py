"""Arms, plans, launches: what is decided before anything runs."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_heddle.commands.compare import _quoted
from verl_heddle.compare.launch import launch, override, wandb_offline
from verl_heddle.compare.plan import BARE, HEDDLE, STOCK, Arm, Key, Plan, keep, order, parse_arm, read_plan, wanted

PLAN = Plan("n", ("python", "train.py"), (STOCK, HEDDLE), 3, 7, steps=4)


@settings(deadline=None)
@given(st.integers(2, 6), st.integers(1, 40))
def test_every_pair_runs_every_arm_once_and_none_is_always_first(number, pairs):
    arms = [Arm(f"a{index}", ()) for index in range(number)]
    orders = [order(arms, pair) for pair in range(1, pairs + 1)]
    assert all(sorted(one, key=lambda arm: arm.name) == arms for one in orders)
    ahead = Counter((one.name, two.name) for turn in orders for i, one in enumerate(turn) for two in turn[i + 1 :])
    for one in arms:
        for two in arms:
            if one.name < two.name:
                assert abs(ahead[one.name, two.name] - ahead[two.name, one.name]) <= pairs % 2, "two arms swap from pair to pair"


def test_an_arm_is_heddle_with_overrides_unless_it_says_otherwise():
    assert parse_arm("slots: a.b=4 c='x y'") == Arm("slots", ("+plugin=heddle", "a.b=4", "c=x y"))
    assert parse_arm("watch: +plugin=observe a=1").overrides == ("+plugin=observe", "a=1")


@pytest.mark.parametrize("text", ["", "noname", ": a=1", "a/b: c=1", "x:", "x: nothing", "x: a='1", "summary: a=1", "-x: a=1"])
def test_a_bad_arm_is_one_line(text):
    with pytest.raises(ValueError) as error:
        parse_arm(text)
    assert "\n" not in str(error.value) and "--arm" in str(error.value)


def test_seeds_are_the_same_within_a_pair_and_differ_between_pairs():
    found = {}
    for key in PLAN.runs():
        words = launch(PLAN, key, Path("/out"), {}).command
        found[key] = {word.split("=")[1] for word in words if word.split("=")[0].endswith("seed") and not word.startswith("heddle")}
    assert all(len(seeds) == 1 for seeds in found.values())
    assert {key.pair: found[key] for key in found} == {1: {"7"}, 2: {"8"}, 3: {"9"}}


def test_runs_are_kept_apart_and_a_bare_arm_has_no_word_of_heddle():
    plan = Plan("n", ("python", "train.py", "trainer.rollout_data_dir=shared"), (STOCK, BARE), 1, 1)
    one, bare = (launch(plan, key, Path("/out"), {}) for key in plan.runs())
    assert "heddle.trace.dir=/out/runs/p1-stock/heddle" in one.command
    assert "trainer.rollout_data_dir=/out/runs/p1-stock/rollouts" in one.command
    assert not any("heddle" in word or "plugin" in word for word in bare.command)
    assert one.environment["WANDB_DIR"] != bare.environment["WANDB_DIR"]
    assert not any(word.startswith("trainer.total_training_steps") for word in one.command), "the command's own number of steps"


def as_a_run_reads_it(word: str) -> object:
    """Through a shell, Hydra's parser, the merge into a configuration, and verl's `OmegaConf.resolve` in another process."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    (word,) = shlex.split(_quoted(word))
    parsed = OverridesParser.create().parse_override(word)
    config = OmegaConf.create({"a": {"b": None}, "other": "${a.b}"})
    OmegaConf.update(config, "a.b", parsed.value(), merge=True)
    OmegaConf.resolve(config)
    assert config.other == config.a.b
    return config.a.b


ANY_NAME = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30),
    st.text(st.sampled_from("ab/._-019 ={}[]()$\\'\"`!?:,#~@*\té\u65e5\n"), min_size=1, max_size=12),
    st.sampled_from(["null", "true", "1", "1e3", "-1", "nan", "${a.c}", "$${a.c}", "\\\\${a}", "???", "~", " ", "a b", "it's", "\\", "é"]),
)


@settings(deadline=None)
@given(ANY_NAME, st.booleans())
def test_a_run_reads_any_name_as_it_is_or_it_is_refused(text, quoted):
    if "${" in text or text == "???":
        with pytest.raises(ValueError, match="use a different --out or --name"):
            override("++a.b", text, quoted)
    else:
        assert as_a_run_reads_it(override("++a.b", text, quoted)) == text


@pytest.mark.parametrize("name", ["a\\b", "it's", 'say "x"', "é\u65e5", "a b", "x$(id)", "`id`", "a;b#c", "{x}", "[1]", "\\'"])
def test_a_dry_run_can_be_read_back(name, tmp_path, capsys):
    """What is printed, pasted into a shell: the same words that a run gets."""
    from verl_heddle.cli import main

    assert main(["compare", "--dry-run", "--pairs", "1", "--out", str(tmp_path / name), "--", "python", "train.py"]) == 0
    line = capsys.readouterr().out.replace("\\\n", " ").splitlines()[1]
    words = shlex.split(line)
    experiment = next(word for word in words if word.startswith("trainer.experiment_name="))
    assert as_a_run_reads_it("++a.b=" + experiment.partition("=")[2]) == f"{name}-p1-stock"
    assert f"WANDB_RUN_GROUP={name}" in words


@pytest.mark.parametrize("name", ["a${b}", "???", "\udcff"])
def test_a_name_that_no_configuration_can_hold_is_one_line(name, tmp_path, capsys):
    from verl_heddle.cli import main

    assert main(["compare", "--dry-run", "--pairs", "1", "--out", str(tmp_path / name), "--", "python", "train.py"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "use a different --out or --name" in said[0]


def test_wandb_is_offline_unless_somebody_can_log_in(tmp_path):
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert wandb_offline({"NETRC": "/nowhere"})
    assert not wandb_offline({"NETRC": str(tmp_path / "netrc")})
    assert not wandb_offline({"WANDB_API_KEY": "x"}) and not wandb_offline({"WANDB_MODE": "online"})


def test_a_plan_survives_its_file_and_can_only_grow(tmp_path):
    plan, again = wanted(tmp_path, PLAN)
    assert not again and plan.summary_id and not list(tmp_path.iterdir()), "nothing is kept before it is checked"
    keep(tmp_path, plan)
    assert read_plan(tmp_path) == plan and wanted(tmp_path, None) == (plan, True)
    more, _ = wanted(tmp_path, None, 5, (parse_arm("x: a=1"),))
    assert more.pairs == 5 and [arm.name for arm in more.arms] == ["stock", "heddle", "x"] and more.summary_id == plan.summary_id
    keep(tmp_path, more)
    assert wanted(tmp_path, PLAN)[0] == more, "asking for less does not forget runs"
    for changed in ({"command": ("other",)}, {"seed": 8}, {"steps": None}, {"recipe": "math"}, {"wandb": False}):
        with pytest.raises(ValueError, match="holds a different comparison"):
            wanted(tmp_path, replace(PLAN, **changed))
    with pytest.raises(ValueError, match="its arm heddle has"):
        wanted(tmp_path, replace(PLAN, arms=(STOCK, Arm("heddle", ("+plugin=heddle", "b=2")))))
    with pytest.raises(ValueError, match="its arm x has"):
        wanted(tmp_path, None, None, (parse_arm("x: a=2"),))
    (tmp_path / "comparison.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        wanted(tmp_path, PLAN)


def test_without_a_plan_there_is_nothing_to_go_on_with(tmp_path):
    with pytest.raises(ValueError, match="holds no comparison"):
        wanted(tmp_path, None)
    assert Key(2, "heddle").folder == "p2-heddle"
