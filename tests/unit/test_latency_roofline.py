"""The roofline against every shipped table, its law in the limits, GPUs by name and by numbers, and which source is taken and said."""

import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_heddle.latency import load
from verl_heddle.latency.gpus import GIB, GPUS, gpu_of
from verl_heddle.latency.roofline import FACTORS, HELD_OUT, TPS, decode_s, prefill_s, roofline
from verl_heddle.latency.shape import known, read_shape
from verl_heddle.latency.shipped import available
from verl_heddle.latency.times import table, tables, times, would_fit

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.latency_export import roofline as bench  # noqa: E402

PAIRS = [(gpu, model) for gpu in GPUS for model in known()]
DATA = ROOT / "verl_heddle" / "data"


def test_the_stated_error_is_that_of_the_tables_held_out():
    for of, some in bench.held_out().items():
        found = bench.errors(some)
        assert {kind: tuple(round(value, 2) for value in pair) for kind, pair in found.items()} == HELD_OUT[of], of
        assert len(some) > 10 and not any(bench.fitted(pair) for pair in some)


def test_no_table_is_far_from_the_roofline():
    for pair in bench.pairs():
        assert bench.errors([pair])["decode step"][0] < 0.25, pair


def test_the_page_shows_what_the_bench_makes():
    assert bench.page() == bench.PAGE.read_text()


def test_the_fit_does_not_leave_the_factors_it_starts_from_for_worse():
    few = [("H200", "Qwen3-8B")]
    off = replace(FACTORS, memory=0.5)
    fitted = bench.fit(few, off)
    assert bench.errors(few, fitted)["decode step"][0] < 0.5 * bench.errors(few, off)["decode step"][0]


@pytest.mark.parametrize("gpu", ["H20", "B200"])
def test_a_large_batch_at_long_context_is_bound_by_bandwidth_and_a_long_prefill_by_flops(gpu):
    place, shape = GPUS[gpu], known()["Qwen3-8B"]
    batch, context = np.array(512.0), np.array(131072.0)
    least = (batch * context * 147456 + shape.weight_bytes(1)) / place.bandwidth
    assert least / FACTORS.memory == pytest.approx(decode_s(place, shape, 1, batch, context), rel=0.05)
    new = np.array(8192.0)
    products = 2 * (shape.parameters - 2 * shape.vocab * shape.hidden) * new / place.bf16
    pairs = 4 * shape.layers * shape.heads * shape.head_dim * new**2 / 2 / place.bf16
    told = prefill_s(place, shape, 1, new, np.array(0.0))
    assert products / FACTORS.compute + pairs / FACTORS.attention == pytest.approx(told, rel=0.05)


def test_a_batch_of_one_reads_its_experts_and_a_large_one_all():
    place, shape = GPUS["H200"], known()["Qwen3-30B-A3B"]
    few, many = (decode_s(place, shape, 1, np.array(float(batch)), np.array(1.0)) for batch in (1, 512))
    every = shape.expert_layers * shape.experts * 3 * shape.hidden * shape.expert_width * 2 / (FACTORS.memory * place.bandwidth)
    assert few < 0.6 * every < every < many


def test_a_window_bounds_what_a_long_context_costs():
    config = {key: value for key, value in known()["Qwen3-8B"].config.items()}
    slides = read_shape(config | {"model_type": "mistral", "sliding_window": 4096}, "m")
    place = GPUS["H100"]
    at = [float(decode_s(place, slides, 1, np.array(64.0), np.array(context))) for context in (2048.0, 4096.0, 65536.0)]
    assert at[0] < at[1] == at[2]
    new, cached = np.array(1024.0), np.array([0.0, 8192.0, 65536.0])
    seen = prefill_s(place, slides, 1, new, cached)
    assert (
        seen[0] < seen[1] and seen[1] < 1.2 * seen[0] and seen[2] < 1.2 * seen[1] < prefill_s(place, known()["Qwen3-8B"], 1, new, cached)[2]
    )


def test_fp8_reads_half_and_computes_in_fp8_only_where_the_gpu_can():
    batch, context, new = np.array(1.0), np.array(1.0), np.array(65536.0)
    shape = known()["Qwen2.5-72B"]
    small = shape.in_precision("fp8")
    for gpu in (GPUS["H100"], GPUS["A100"]):
        assert decode_s(gpu, small, 8, batch, context) < 0.7 * decode_s(gpu, shape, 8, batch, context)
    faster = {
        name: prefill_s(GPUS[name], small, 1, new, np.array(0.0)) / prefill_s(GPUS[name], shape, 1, new, np.array(0.0)) for name in GPUS
    }
    assert faster["A100"] == pytest.approx(1.0, rel=0.01) and faster["H100"] < 0.8
    kv = shape.in_precision(kv="fp8")
    many, long = np.array(256.0), np.array(65536.0)
    assert decode_s(GPUS["H100"], kv, 8, many, long) == pytest.approx(decode_s(GPUS["H100"], shape, 8, many, long) / 2, rel=0.1)


@settings(deadline=None)
@given(st.sampled_from(PAIRS), st.data())
def test_times_do_not_fall_when_work_grows(pair, data):
    found = times(*pair).latency
    tp = data.draw(st.sampled_from(found.tps))
    (b0, b1), (c0, c1) = (sorted([data.draw(axis), data.draw(axis)]) for axis in (st.floats(1, 2000), st.floats(0, 1e6)))
    n0, n1 = sorted(data.draw(st.integers(0, 300_000)) for _ in range(2))
    slack = 1 + 1e-9
    assert 0 < found.decode_s(tp, b0, c0) <= found.decode_s(tp, b1, c1) * slack
    assert 0 <= found.prefill_s(tp, n0, c0) <= found.prefill_s(tp, n1, c1) * slack


@pytest.mark.parametrize("model", ["Qwen3-8B", "Qwen3-30B-A3B", "gpt-oss-120b", "DeepSeek-V3"])
def test_surfaces_are_the_law(model):
    rng = np.random.default_rng(0)
    shape, place = known()[model], GPUS["H20"]
    made = roofline(place, shape)
    batch, context = (np.round(np.exp(rng.uniform(0, np.log(top), 300))) for top in (512, 131072))
    new, cached = (np.round(np.exp(rng.uniform(np.log(16), np.log(131072), 300))) for _ in range(2))
    for tp in made.tps:
        assert made.decode_s(tp, batch, np.maximum(context, 128)) == pytest.approx(
            decode_s(place, shape, tp, batch, np.maximum(context, 128)), rel=0.03
        )
        assert made.prefill_s(tp, new, cached) == pytest.approx(prefill_s(place, shape, tp, new, cached), rel=0.05)


def test_every_pair_has_times_and_says_which():
    for gpu, model in PAIRS:
        found = times(gpu, model)
        has = model in tables()[gpu]
        assert found.kind == ("table" if has else "roofline"), (gpu, model)
        assert set(found.latency.tps) <= {tp for tp in TPS if known()[model].splits(tp)}
        told = found.told(found.latency.source)
        assert told.startswith("table, AIConfigurator" if has else "roofline, not measured; ") and "\n" not in told
        assert found.latency.name.endswith(f" on {gpu}") and found.latency.name.startswith(model)
        document = json.loads(json.dumps(found.document()))
        assert document["kind"] == found.kind and bool(document["errors"]) != has
    assert sum(len(models) for models in tables().values()) >= 60 and "H20" in GPUS and len(GPUS) == 6


@pytest.mark.parametrize(("gpu", "model"), [(gpu, model) for gpu, models in available().items() for model in models])
def test_the_first_tables_are_as_they_were(gpu, model):
    assert times(gpu, model).latency is load(gpu, model) is table(gpu, model)


def test_another_precision_is_not_the_tables():
    for weights, kv in (("fp8", None), (None, "fp8"), ("fp8", "fp8")):
        found = times("h200", "qwen3-8b", weights, kv)
        assert found.kind == "roofline" and f"({weights or 'bf16'} weights, {kv or 'bf16'} KV)" in found.latency.name
    assert times("h200", "qwen3-8b", "bf16", "bf16").kind == "table"
    assert times("h200", "gpt-oss-20b").kind == "table" and times("h200", "gpt-oss-20b", "bf16").kind == "roofline"


def test_a_fine_tune_has_the_table_of_its_shape_and_another_shape_the_roofline(tmp_path):
    config = dict(known()["Qwen3-8B"].config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tuned = times("h200", str(tmp_path))
    assert tuned.latency is load("h200", "Qwen3-8B")
    assert tuned.told("x") == f"table of Qwen3-8B, which has the same shape as {tmp_path.name}, x"
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 35}))
    assert times("h200", str(tmp_path)).kind == "roofline"
    assert times("h200:mem=141,bw=4.8,tflops=989", "qwen3-8b").kind == "roofline"  # not the very GPU of the table


def test_gpus_by_name_and_by_numbers():
    assert gpu_of("NVIDIA H100 80GB HBM3") is GPUS["H100"] and gpu_of("b200") is GPUS["B200"]
    own = gpu_of("rtx6000:mem=95GiB,bw=1.8TB/s,tflops=500")
    assert (own.name, own.memory_bytes, own.bandwidth, own.bf16, own.fp8, own.link) == ("rtx6000", 95 * GIB, 1.8e12, 500e12, 500e12, 32e9)
    assert not own.switched and all(gpu.switched for name, gpu in GPUS.items() if name != "L40S")
    changed = gpu_of("h20:mem=139.8,bw=4.8")
    assert (changed.bandwidth, changed.bf16, changed.link) == (4.8e12, GPUS["H20"].bf16, GPUS["H20"].link)


@pytest.mark.parametrize(
    "text",
    ["abacus", "NVIDIA H100 PCIe", "x:mem=95", ":mem=95,bw=1,tflops=1", "x:mem=0,bw=1,tflops=1", "x:mem=95GB,bw=1,tflops=1", "h20:size=3"],
)
def test_a_gpu_that_is_none_is_one_line_with_what_to_write(text):
    with pytest.raises(ValueError, match="name:mem=") as caught:
        gpu_of(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("gpu", "model", "gpus", "share", "says"),
    [
        ("h100", "qwen3-32b", 1, 0.5, "raise --gpu-memory-utilization to 0.9; or --weights fp8; or --gpu H200 or B200"),
        ("h200", "deepseek-v3", 8, 0.5, "raise --gpu-memory-utilization to 0.7; or --gpu B200"),
        ("h100", "kimi-k2", 8, 0.5, "--gpu B200 with --gpu-memory-utilization 0.9"),
        ("b200", "kimi-k2", 2, 0.5, "--gpus 8 with --gpu-memory-utilization 0.9"),
        ("l40s:mem=10", "kimi-k2", 2, 0.5, "no known GPU holds it within a node"),
    ],
)
def test_what_would_fit(gpu, model, gpus, share, says):
    assert says in would_fit(times(gpu, model), gpus, share)


def test_further_tables_are_small_and_pickle():
    sizes = [file.stat().st_size for file in DATA.glob("latency_*.json.gz")]
    assert len(sizes) == 5 and sum(sizes) < 2_000_000
    found = times("b200", "llama-3.1-70b")
    assert pickle.loads(pickle.dumps(found)).latency.decode_s(8, 16, 4096) == found.latency.decode_s(8, 16, 4096)


# AIConfigurator asked by hand: ms per decode step at batch 1 and 64 with 8192 tokens of context, ms to prefill 8192; tp=4, Qwen3-4B tp=1.
BY_HAND = {
    ("A100", "Qwen2.5-7B"): (4.25, 9.35, 170.6),
    ("A100", "Llama-3.1-70B"): (28.34, 59.12, 1371.5),
    ("H200", "gpt-oss-120b"): (3.26, 8.86, 77.8),
    ("H200", "Qwen3-4B"): (3.58, 20.79, 123.8),
    ("L40S", "Qwen2.5-32B"): (27.51, 105.9, 5132.7),
    ("B200", "Qwen3-235B-A22B"): (7.18, 27.06, 170.7),
    ("B200", "Qwen3-4B"): (2.53, 13.35, 64.4),
}


@pytest.mark.parametrize("pair", BY_HAND)
def test_further_tables_against_their_source(pair):
    latency, tp = times(*pair).latency, 1 if pair[1] == "Qwen3-4B" else 4
    told = (latency.decode_s(tp, 1, 8192), latency.decode_s(tp, 64, 8192), latency.prefill_s(tp, 8192))
    assert [1000 * value for value in told] == pytest.approx(BY_HAND[pair], rel=0.05)
