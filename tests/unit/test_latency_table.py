"""The shipped table against values read from AIConfigurator by hand, and its names."""

from importlib.resources import files
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_heddle.latency import LatencyModel, available, load
from verl_heddle.latency.model import HOST_TO_GPU_BYTES_PER_S, WAKE_S
from verl_heddle.latency.shipped import TABLE

TOLERANCE = 0.03
TPS = (1, 2, 4, 8)

# bf16, 8192 tokens of context: ms per decode step at batch 1, 16, 64, 128; then ms to prefill 8192 tokens. One tuple per degree 1, 2, 4, 8.
AT_8K = {
    ("H200", "Qwen3-8B"): [
        (5.27, 10.2, 22.9, 40.5, 202),
        (3.73, 6.00, 12.5, 21.5, 118),
        (2.80, 3.94, 7.61, 12.2, 78),
        (2.32, 3.10, 5.08, 7.54, 55),
    ],
    ("H200", "Qwen3-32B"): [
        (18.6, 28.8, 52.6, 83.9, 864),
        (10.9, 15.3, 27.5, 44.5, 474),
        (7.22, 9.48, 15.9, 24.4, 281),
        (5.25, 6.52, 10.2, 14.8, 165),
    ],
    ("H200", "Qwen3-30B-A3B"): [
        (4.22, 13.1, 27.7, 41.4, 138),
        (3.92, 8.58, 16.5, 23.3, 96),
        (3.57, 6.00, 10.1, 14.5, 71),
        (3.44, 5.45, 8.96, 12.3, 58),
    ],
    ("H100", "Qwen3-8B"): [
        (6.60, 14.2, 31.5, 56.0, 204),
        (4.34, 7.61, 16.7, 29.4, 128),
        (3.07, 4.68, 9.85, 16.1, 82),
        (2.52, 3.51, 6.10, 9.44, 59),
    ],
    ("H100", "Qwen3-32B"): [
        (24.7, 37.6, 71.6, 117, 865),
        (13.7, 20.6, 37.7, 60.6, 476),
        (8.42, 11.9, 20.8, 32.0, 274),
        (5.90, 7.66, 12.8, 18.8, 173),
    ],
    ("H100", "Qwen3-30B-A3B"): [
        (4.85, 16.6, 38.3, 57.1, 153),
        (3.83, 10.7, 21.4, 30.4, 101),
        (3.45, 7.08, 12.7, 18.3, 77),
        (3.44, 6.33, 11.3, 15.5, 63),
    ],
}

# H200: ms per decode step at context 512, 2048, 8192, 32768 (columns) and batch 1, 16, 64, 256 (rows).
BY_CONTEXT = {
    ("Qwen3-8B", 1): [(5.05, 5.12, 5.27, 6.37), (5.39, 6.50, 10.2, 22.7), (7.00, 10.2, 22.9, 75.3), (13.0, 25.8, 76.9, 283)],
    ("Qwen3-8B", 8): [(2.20, 2.21, 2.32, 2.55), (2.49, 2.59, 3.10, 4.77), (2.86, 3.43, 5.08, 11.6), (4.48, 6.18, 12.6, 39.1)],
    ("Qwen3-32B", 8): [(4.98, 5.05, 5.25, 5.65), (5.44, 5.64, 6.52, 9.51), (6.29, 7.24, 10.2, 21.8), (9.85, 12.8, 25.0, 72.6)],
    ("Qwen3-30B-A3B", 1): [(4.00, 4.06, 4.22, 5.00), (10.1, 10.9, 13.1, 21.8), (17.0, 19.1, 27.7, 63.5), (23.7, 32.7, 67.9, 207)],
}

EVERY = [(gpu, model) for gpu, models in available().items() for model in models]


@pytest.mark.parametrize(("gpu", "model"), AT_8K)
def test_values_at_8k(gpu, model):
    latency = load(gpu, model)
    for tp, (*decode_ms, prefill_ms) in zip(TPS, AT_8K[gpu, model], strict=True):
        told = latency.decode_s(tp, np.array([1, 16, 64, 128]), 8192) * 1000
        assert told == pytest.approx(decode_ms, rel=TOLERANCE)
        assert latency.prefill_s(tp, 8192) * 1000 == pytest.approx(prefill_ms, rel=TOLERANCE)


@pytest.mark.parametrize(("model", "tp"), BY_CONTEXT)
def test_values_by_context(model, tp):
    told = load("H200", model).decode_s(tp, np.array([[1], [16], [64], [256]]), np.array([512, 2048, 8192, 32768])) * 1000
    assert told == pytest.approx(np.array(BY_CONTEXT[model, tp]), rel=TOLERANCE)


@given(st.sampled_from(EVERY), st.sampled_from(TPS), st.data())
def test_times_do_not_fall_when_work_grows(which, tp, data):
    latency = load(*which)
    batch, context = st.floats(0, 2000), st.floats(0, 1e6)
    (b0, b1), (c0, c1) = (sorted([data.draw(axis), data.draw(axis)]) for axis in (batch, context))
    (n0, n1) = sorted(data.draw(st.integers(0, 300_000)) for _ in range(2))
    slack = 1 + 1e-9
    assert 0.001 < latency.decode_s(tp, b0, c0) <= latency.decode_s(tp, b1, c1) * slack
    assert 0.0 <= latency.prefill_s(tp, n0, c0) <= latency.prefill_s(tp, n1, c1) * slack
    assert latency.decode_s(tp, np.array([b0]), np.array([c0])).tolist() == [latency.decode_s(tp, b0, c0)]


@pytest.mark.parametrize(("gpu", "model"), EVERY)
def test_more_gpus_are_faster_hold_more_and_load_sooner(gpu, model):
    latency = load(gpu, model)
    assert latency.tps == TPS
    for few, many in pairwise(TPS):
        assert latency.decode_s(few, 64, 8192) > latency.decode_s(many, 64, 8192)
        assert latency.prefill_s(few, 8192) > latency.prefill_s(many, 8192)
        assert latency.kv_tokens(few) < latency.kv_tokens(many)
        assert latency.weight_load_s(few) > latency.weight_load_s(many) > WAKE_S
    assert latency.prefill_s(1, 0) == 0.0


@pytest.mark.parametrize(("gpu", "model"), EVERY)
def test_beyond_the_grid_doubling_the_work_about_doubles_the_time(gpu, model):
    latency = load(gpu, model)
    for tp in TPS:
        for context in (1024, 8192, 65536):
            assert 1.4 < latency.decode_s(tp, 1024, context) / latency.decode_s(tp, 512, context) < 2.1
        assert 1.9 < latency.decode_s(tp, 128, 262144) / latency.decode_s(tp, 128, 131072) < 2.05


def test_sizes_against_known_checkpoints():
    # 8 190 735 360, 14 768 307 200, 32 762 123 264 and 30 532 122 624 parameters, as the checkpoints say.
    for model, parameters in {"8B": 8_190_735_360, "14B": 14_768_307_200, "32B": 32_762_123_264, "30B-A3B": 30_532_122_624}.items():
        memory = load("H200", f"Qwen3-{model}").engines[1].memory
        assert memory is not None and memory.weight_bytes == pytest.approx(2 * parameters, rel=1e-3)
        assert load("H200", f"Qwen3-{model}").weight_load_s(1) == WAKE_S + memory.weight_bytes / HOST_TO_GPU_BYTES_PER_S
    assert load("H200", "Qwen3-8B").engines[1].memory.kv_bytes_per_token == 36 * 2 * 8 * 128 * 2
    # Four KV heads over eight GPUs: a head is held twice, tp=8 saves nothing per token.
    sparse = load("H200", "Qwen3-30B-A3B").engines
    assert sparse[4].memory.kv_bytes_per_token == sparse[8].memory.kv_bytes_per_token == 48 * 2 * 128 * 2


def test_what_fits():
    assert [load("H100", "Qwen3-32B").fits(tp) for tp in TPS] == [True] * 4
    assert [load("H100", "Qwen3-32B").fits(tp, 0.5) for tp in TPS] == [False, True, True, True]
    assert 15_000 < load("H100", "Qwen3-32B").kv_tokens(1) < 35_000
    assert 700_000 < load("H200", "Qwen3-8B").kv_tokens(1) < 800_000


@pytest.mark.parametrize("gpu", ["H200", "h200", "h200_sxm", "H200-SXM", "NVIDIA H200"])
@pytest.mark.parametrize("model", ["Qwen3-8B", "Qwen/Qwen3-8B", "qwen3-8b", "/models/Qwen3-8B/", "Qwen/Qwen3-8B-Base"])
def test_names(gpu, model):
    found = load(gpu, model)
    assert isinstance(found, LatencyModel) and found is load("H200", "Qwen3-8B")
    assert found.name == "Qwen3-8B on H200" and "AIConfigurator" in found.source


@pytest.mark.parametrize(
    ("gpu", "model", "wrong"),
    [("A100", "Qwen3-8B", "GPU 'A100'"), ("NVIDIA H100 PCIe", "Qwen3-8B", "GPU"), ("H100", "Qwen3-4B", "model 'Qwen3-4B'")],
)
def test_unknown_names_are_told_what_exists(gpu, model, wrong):
    with pytest.raises(ValueError) as caught:
        load(gpu, model)
    assert wrong in str(caught.value)
    for name in ("H100", "H200", "Qwen3-8B", "Qwen3-14B", "Qwen3-32B", "Qwen3-30B-A3B", "calibrate"):
        assert name in str(caught.value)


def test_table_is_small_and_attributed():
    data = files("verl_heddle").joinpath("data")
    assert len(files("verl_heddle").joinpath(TABLE).read_bytes()) < 300_000
    readme = data.joinpath("README.md").read_text()
    assert "Apache-2.0" in readme and "aiconfigurator==0.12.0" in readme
