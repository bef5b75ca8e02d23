"""`verl-heddle simulate` and `verl-heddle plan` as a user types them."""

import io
import json
import subprocess
import sys

import pytest
from report_cases import command, lived, trace

from verl_heddle.commands.asking import Meter

QUICK = ("--model", "qwen3-8b", "--gpus", "2", "--prompts", "3", "--samples", "2", "--seeds", "2", "--jobs", "1")


@pytest.fixture
def run_trace(tmp_path):
    return trace(tmp_path, [lived(f"p{k}", s, (20 + k, 30), step) for step in (1, 2) for k in range(3) for s in range(2)])


def test_table_and_sentences(capsys):
    assert command("simulate", "--workload", "math", *QUICK) == 0
    out, err = capsys.readouterr()
    for name in ("stock", "stock_best_tp", "slime", "verl_star", "heddle", "heddle_best_tp", "lpt_oracle"):
        assert f"\n{name} " in out
    assert "\n- Stock verl at tp=1 takes " in out and "2 draws" in out and err == ""


def test_json_alone_on_stdout(capsys):
    assert command("simulate", "--workload", "math", "--arms", "heddle", "--json", "-", *QUICK) == 0
    value = json.loads(capsys.readouterr().out)
    assert [arm["name"] for arm in value["arms"]] == ["stock", "heddle"]


def test_out_writes_everything(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "new"
    assert command("simulate", "--workload", "search", "--out", str(folder), *QUICK) == 0
    assert sorted(file.name for file in folder.iterdir()) == ["perfetto.json.gz", "report.html", "simulate.json", "timeline.png"]
    assert capsys.readouterr().out.count("wrote ") == 4


def test_trace_whole_and_one_step(run_trace, capsys):
    plain = ("--trace", run_trace, "--model", "qwen3-8b", "--gpus", "1", "--seeds", "1", "--jobs", "1", "--json", "-")
    assert command("simulate", *plain) == 0
    both = json.loads(capsys.readouterr().out)
    assert both["config"]["steps"] == 2 and both["config"]["trace"] == "trace.jsonl" and both["config"]["trajectories"] == 6
    assert command("simulate", *plain, "--step", "2", "--cold") == 0
    one = json.loads(capsys.readouterr().out)
    assert one["config"]["steps"] == 1 and one["config"]["history"].startswith("none")


def test_plan_prints_overrides(capsys, tmp_path):
    page = tmp_path / "plan.html"
    assert command("plan", "--workload", "coding", *QUICK, "--html", str(page)) == 0
    out = capsys.readouterr().out
    assert "actor_rollout_ref.rollout.tensor_model_parallel_size=2" in out and "+plugin=" in out and "(now)" in out
    assert page.read_text().startswith("<!doctype html>")
    assert command("plan", "--workload", "coding", *QUICK, "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["recommendation"]["tp"] == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "one of the arguments --trace --workload is required"),
        (("--workload", "chess"), "invalid choice"),
        (("--workload", "math", "--gpus", "0"), "must be a whole number of at least 1"),
        (("--workload", "math", "--model", "gpt-5"), "unknown model 'gpt-5'"),
        (("--workload", "math", "--tp", "3"), "--tp 3 does not divide the model's 32 heads"),
        (("--workload", "math", "--step", "1"), "--step chooses a step of a trace"),
        (("--workload", "math", "--set", "tool_mean_s"), "--set needs KEY=NUMBER"),
        (("--workload", "math", "--set", "colour=3"), "unknown parameter"),
        (("--workload", "math", "--arms", "stock,magic"), "unknown arm 'magic'"),
        (("--workload", "math", "--json", "/nowhere/x.json"), "there is no folder"),
        (("--workload", "math", "--html", "/tmp"), "it is a folder"),
        (("--trace", "/nowhere.jsonl"), "no such file"),
        (("--trace", __file__), "not JSON"),
        (("--workload", "math", "--tp", "1", "--set", "median_tokens=400000", "--set", "cap_tokens=900000"), "longest turn needs"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(words, says, capsys):
    words = words if "--model" in words or not words else ("--model", "qwen3-8b", *words)
    assert command("simulate", *(words or ("--model", "qwen3-8b")), "--seeds", "1", "--jobs", "1") == 2
    out, err = capsys.readouterr()
    assert says in err and err.count("\n") == 1 and err.startswith("verl-heddle simulate: ") and out == ""


def test_a_degree_that_nobody_chose_is_the_smallest_that_holds_the_longest_turn(capsys):
    words = ("--workload", "math", "--set", "median_tokens=300000", "--set", "cap_tokens=500000", "--arms", "stock", "--seeds", "1")
    small = ("--model", "qwen3-8b", "--gpus", "8", "--prompts", "2", "--samples", "2", "--jobs", "1")
    assert command("simulate", *words, *small) == 0
    lines = capsys.readouterr().out.splitlines()
    (why,) = [line for line in lines if "the smallest degree whose replica holds the longest turn" in line]
    assert why.startswith("tp=") and f"under stock verl at {why.partition(':')[0]} " in lines[0]
    assert command("simulate", *words, *small, "--tp", "1") == 2


def test_missing_matplotlib_is_said_before_the_work(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert command("simulate", "--workload", "math", *QUICK, "--png", str(tmp_path / "x.png")) == 2
    assert "needs matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["simulate", "plan"])
def test_help_teaches(name, capsys):
    assert command(name, "--help") == 0
    out = capsys.readouterr().out
    assert "examples:" in out and out.count(f"verl-heddle {name} --") >= 2 and "--gpu-memory-utilization" in out


def test_nothing_heavy_is_imported(tmp_path):
    """The commands answer on a laptop: no verl, Ray, vLLM, torch or xgboost."""
    code = (
        "import sys, argparse\n"
        "from verl_heddle.commands import plan, simulate\n"
        "light = {'numpy', 'matplotlib', 'jinja2'} & set(sys.modules)\n"
        "p = argparse.ArgumentParser(prog='verl-heddle'); s = p.add_subparsers(dest='command')\n"
        "simulate.add_parser(s); plan.add_parser(s)\n"
        f"words = ['--workload', 'math', *{QUICK!r}]\n"
        f"assert simulate.run(p.parse_args(['simulate', *words, '--html', {str(tmp_path / 'a.html')!r}])) == 0\n"
        "assert plan.run(p.parse_args(['plan', *words])) == 0\n"
        "heavy = {'verl', 'ray', 'vllm', 'torch', 'xgboost', 'hydra', 'pandas'} & set(sys.modules)\n"
        "assert not heavy and not light and 'matplotlib' not in sys.modules, (heavy, light)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


def test_progress_is_quiet_when_quick_and_rare_in_a_file():
    out = io.StringIO()
    meter = Meter(Clock(), out)
    for done in range(1, 41):
        meter(done, 40, "stock tp=1")
    lines = out.getvalue().splitlines()
    assert 1 <= len(lines) <= 3 and lines[0].startswith("simulated ") and "s left" in lines[0]


def test_progress_on_a_terminal_leaves_nothing_behind():
    out = io.StringIO()
    out.isatty = lambda: True
    meter = Meter(Clock(), out)
    for done in range(1, 6):
        meter(done, 5, "stock tp=1")
    meter.close()
    assert "\n" not in out.getvalue() and out.getvalue().endswith("\r")
