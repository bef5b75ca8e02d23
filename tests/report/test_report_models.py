"""`simulate` and `plan` for any model and GPU: which source of step times is taken and told, and calibration on one's own run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from report_cases import command

from verl_heddle.latency import AffineDecode, AffinePrefill, Engine, LatencyModel
from verl_heddle.latency.shape import known
from verl_heddle.latency.times import calibrated, times
from verl_heddle.report.document import schema
from verl_heddle.report.setting import ROOM_TOKENS, least_usual, setting
from verl_heddle.simulate import EngineOptions, make_fleet, simulate
from verl_heddle.simulate.baselines import Stock
from verl_heddle.traces import generate, replayable, write
from verl_heddle.traces.steps import training_steps

FEW = ("--prompts", "4", "--samples", "2", "--seeds", "1", "--jobs", "1")
SLOWER = 1.5


def own_run(folder: Path, tp: int | None = 2, steps: int = 3, mode: str | None = None) -> Path:
    """A trace of engines whose steps take `SLOWER` times those of the table's affine fit at tp=2, host time included; the first step is
    ten times slower."""
    table = times("h200", "qwen3-8b").latency.with_host(0.001, "assumed")
    low, high = table.decode_s(2, 1, 2048), table.decode_s(2, 33, 2048)
    per_context = (table.decode_s(2, 16, 8192) - table.decode_s(2, 16, 2048)) / (16 * 6144)
    per_seq = (high - low) / 32 - per_context * 2048
    base = low - per_seq - per_context * 2048
    lives = []
    for number in range(1, steps + 1):
        factor = SLOWER * (10 if number == 1 else 1)
        engine = Engine(
            AffineDecode(factor * base, factor * per_seq, factor * per_context), AffinePrefill(factor * 2e-5, base_s=factor * base)
        )
        latency = LatencyModel("own", {2: engine})
        work = [replayable(item) for item in generate("search", 12, 4, seed=number, cap_tokens=4000, tool_mean_s=0.2)]
        result = simulate(work, make_fleet(2, 2, latency, 64), latency, Stock(number), engine=EngineOptions(), step=number)
        for life in result.trajectories():
            life.meta.update({"start_s": life.meta["start_s"] + 1e4 * number, "end_s": life.meta["end_s"] + 1e4 * number, "run": "r"})
            life.meta.update({} if tp is None else {"tp": tp})
            life.meta.update({} if mode is None else {"trainer_mode": mode})
            lives.append(life)
    write(folder / "trace.jsonl", lives)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return own_run(tmp_path_factory.mktemp("run"))


def asked(*words: str, capsys) -> dict:
    assert command(*words, *FEW, "--json", "-") == 0
    value = json.loads(capsys.readouterr().out)
    import jsonschema

    jsonschema.validate(value, schema())
    return value["config"]


def test_a_table_a_roofline_and_a_calibration_are_told_apart(run, capsys):
    arms = ("simulate", "--workload", "search", "--arms", "stock")
    table = asked(*arms, "--model", "qwen3-8b", capsys=capsys)
    assert table["times"] == {"kind": "table", "errors": {}, "turns": None, "file": None} and table["weights"] == table["kv"] == "bf16"
    roof = asked(*arms, "--model", "glm-4.5-air", "--gpu", "h20", "--weights", "fp8", capsys=capsys)
    assert roof["times"]["kind"] == "roofline" and roof["times"]["errors"]["decode step"]["p90"] > 0 and roof["weights"] == "fp8"
    own = asked(*arms, "--model", "qwen3-8b", "--calibrate", str(run), capsys=capsys)
    assert own["times"]["kind"] == "calibrated" and own["times"]["turns"] > 100 and own["times"]["file"] == str(run)
    assert own["times"]["errors"]["turns at tp=2"]["median"] < 0.1
    assert "host_s" not in own["assumed"] and "host_s" in table["assumed"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--model", "qwen3-8b"), "step times: table, AIConfigurator"),
        (
            ("--model", "qwen3-8b", "--gpu", "h20"),
            "step times: roofline, not measured; its error against held-out tables of dense models is ",
        ),
        (("--model", "qwen3-8b", "--calibrate", "RUN"), "step times: calibrated on "),
    ],
)
@pytest.mark.parametrize("which", ["simulate", "plan"])
def test_the_text_says_it_in_one_line(which, words, says, run, capsys):
    words = [str(run) if word == "RUN" else word for word in words]
    assert command(which, "--workload", "search", *words, *FEW, *(("--arms", "stock") if which == "simulate" else ())) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "step times:" in line]
    assert says in line
    if "--calibrate" in words:
        assert f"turns of {run} at tp=2" in line and "tp=1, 4, 8: the table with host time, scaled by 1.5" in line


def test_calibration_finds_the_engines_and_scales_the_others(run):
    base = times("h200", "qwen3-8b")
    records = [item for step in list(training_steps(run / "trace.jsonl").values())[1:] for item in step]
    found = calibrated(base, records, "mine")
    host = base.latency.with_host(0.001, "assumed")
    for batch in (2, 16):
        assert found.latency.decode_s(2, batch, 2000) == pytest.approx(SLOWER * host.decode_s(2, batch, 2000), rel=0.07)
        for tp in (1, 4, 8):
            assert found.latency.decode_s(tp, batch, 2000) == pytest.approx(SLOWER * host.decode_s(tp, batch, 2000), rel=0.07)
    assert found.latency.engines[2].fit is not None and found.latency.kv_tokens(2) == base.latency.kv_tokens(2)
    with_roofline = calibrated(times("h20", "qwen3-8b"), records, "mine")
    assert "the roofline with host time" in with_roofline.latency.source


def test_the_first_step_is_left_out_and_the_setting_adds_no_host_time(run, capsys):
    from verl_heddle.commands.asking import _live

    steps = training_steps(run / "trace.jsonl")
    records = _live(str(run))
    assert len(records) == sum(map(len, list(steps.values())[1:]))
    where = setting("qwen3-8b", "h200", 8, run=(str(run), records))
    assert where.latency.decode_s(2, 4, 2000) == pytest.approx(
        calibrated(times("h200", "qwen3-8b"), records, "x").latency.decode_s(2, 4, 2000), rel=1e-12
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--calibrate", "RUN", "--host-s", "0.002"), "--host-s is part of what --calibrate measures"),
        (("--calibrate", "/nowhere"), "/nowhere"),
        (("--calibrate", "SILENT"), "does not record the tensor-parallel degree of its engines: pass --tp"),
        (("--calibrate", "ASYNC"), "trainer_mode"),
        (("--model", "LACKS"), "lacks num_attention_heads"),
        (("--model", "kimi-k2"), "no tensor-parallel degree within a node"),
        (("--model", "qwen2.5-7b", "--tp", "8"), "--tp 8 does not divide the model's 28 heads"),
        (("--weights", "fp4"), "invalid choice"),
        (("--gpu", "x:mem=3"), "needs a name and positive mem, bw and tflops"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(words, says, run, tmp_path, capsys):
    lacks = tmp_path / "config.json"
    lacks.write_text(json.dumps({key: value for key, value in known()["Qwen3-8B"].config.items() if key != "num_attention_heads"}))
    names = {"RUN": run, "LACKS": lacks}
    if "SILENT" in words:
        names["SILENT"] = own_run(tmp_path, tp=None)
    if "ASYNC" in words:
        names["ASYNC"] = own_run(tmp_path, mode="async")
    words = [str(names.get(word, word)) for word in words]
    words = words if "--model" in words else ["--model", "qwen3-8b", *words]
    assert command("simulate", "--workload", "search", *words, *FEW) == 2
    out, err = capsys.readouterr()
    assert says in err and err.count("\n") == 1 and out == ""


def test_a_silent_trace_takes_the_degree_that_is_given(tmp_path, capsys):
    config = asked(
        *("simulate", "--workload", "search", "--arms", "stock", "--model", "qwen3-8b", "--tp", "2"),
        *("--calibrate", str(own_run(tmp_path, tp=None))),
        capsys=capsys,
    )
    assert config["tp"] == 2 and config["times"]["kind"] == "calibrated"


def test_the_usual_degree_of_every_model():
    for name, shape in known().items():
        heavy = not shape.experts and shape.parameters > 30e9
        assert least_usual(shape) == (2 if heavy else 1), name
    assert least_usual(known()["Qwen3-32B"].in_precision("fp8")) == 1
    for model, gpu in (("qwen2.5-32b", "h200"), ("qwen3-32b", "h200"), ("qwen2.5-32b", "b200")):
        assert setting(model, gpu, 8).tp == 2, model
    for gpu in ("a100", "h20", "h100"):
        where = setting("qwen2.5-32b", gpu, 8)
        assert where.tp >= 2 and where.kv_tokens[where.tp] >= ROOM_TOKENS
    assert setting("qwen3-30b-a3b", "b200", 8).tp == 1 and setting("qwen3-4b", "l40s", 8).tp == 2


def test_a_model_made_by_hand_has_its_source_alone():
    where = replace(setting("qwen3-8b", "h200", 8), times=None)
    assert where.step_times == where.latency.source
