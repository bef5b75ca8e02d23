"""The latency model: surfaces, formulas, what every model promises."""

import ast
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import verl_heddle.latency as latency
from verl_heddle.latency import AffineDecode, LatencyModel, Memory, Surface, monotone_fit
from verl_heddle.latency.surface import REACH

AXIS = st.lists(st.floats(1, 1e6), min_size=2, max_size=6, unique=True).map(sorted)


@st.composite
def grids(draw):
    """Axes with lines a little apart, and values that need not be monotone."""
    xs, ys = (np.cumsum([line + 0.5 for line in draw(AXIS)]).tolist() for _ in range(2))
    return xs, ys, draw(arrays(float, (len(xs), len(ys)), elements=st.floats(1e-3, 1e3)))


@given(grids(), st.data())
def test_surface_is_monotone_bounded_and_the_same_for_arrays(grid, data):
    xs, ys, values = grid
    surface = Surface.fitted(xs, ys, values)
    x = np.sort(data.draw(arrays(float, 8, elements=st.floats(0, 2 * REACH * xs[-1]))))
    y = np.sort(data.draw(arrays(float, 8, elements=st.floats(0, 2 * REACH * ys[-1]))))
    many = surface(x[:, None], y[None, :])
    assert many.shape == (8, 8)
    assert many.tolist() == [[surface(float(a), float(b)) for b in y] for a in x]
    slack = 1e-9 * many.max()
    assert np.diff(many, axis=0).min() >= -slack and np.diff(many, axis=1).min() >= -slack
    inside = surface(np.clip(x, 0, xs[-1])[:, None], np.clip(y, 0, ys[-1])[None, :])
    assert inside.min() >= values.min() - slack and inside.max() <= values.max() + slack


@given(grids())
def test_monotone_fit_is_monotone_idempotent_and_never_worse_than_the_dips(grid):
    _, _, values = grid
    fit = monotone_fit(values)
    assert np.diff(fit, axis=0).min() >= -1e-12 and np.diff(fit, axis=1).min() >= -1e-12
    assert np.allclose(monotone_fit(fit), fit, rtol=1e-12)
    # No non-decreasing table can be closer, at its worst point, than half the deepest dip: some value above a later, smaller one.
    dips = [np.log(values[i, j] / values[i:, j:].min()) for i in range(values.shape[0]) for j in range(values.shape[1])]
    assert np.abs(np.log(fit / values)).max() == pytest.approx(max(dips) / 2, abs=1e-9)


@given(st.floats(0, 1), st.floats(0, 1e-2), st.floats(0, 1e-6), st.floats(1, 600), st.floats(128, 2e5))
def test_surface_loses_nothing_on_a_roofline(base, per_seq, per_context, batch, context):
    truth = AffineDecode(base, per_seq, per_context)
    xs, ys = (1.0, 7.0, 512.0), (128.0, 5000.0, 131072.0)
    surface = Surface.fitted(xs, ys, [[truth(x, y) for y in ys] for x in xs])
    assert surface(batch, context) == pytest.approx(truth(batch, context), rel=1e-6, abs=1e-9)


def test_surface_takes_grid_values_and_is_flat_below_the_grid():
    surface = Surface((1.0, 2.0), (10.0, 20.0), ((1.0, 2.0), (3.0, 5.0)))
    assert [surface(1, 10), surface(1, 20), surface(2, 10), surface(2, 20)] == pytest.approx([1, 2, 3, 5])
    assert surface(0, 0) == pytest.approx(1.0)
    assert surface(3, 10) == pytest.approx(5.0) and surface(1, 30) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("xs", "ys", "values", "complaint"),
    [
        ((1.0,), (1.0, 2.0), ((1.0, 2.0),), "two or more"),
        ((1.0, 2.0), (1.0, 2.0), ((1.0, 2.0),), "two or more"),
        ((2.0, 1.0), (1.0, 2.0), ((1.0, 2.0), (3.0, 4.0)), "increase"),
        ((1.0, 2.0), (1.0, 2.0), ((1.0, 2.0), (0.5, 4.0)), "fitted"),
        ((1.0, 2.0), (1.0, 2.0), ((1.0, float("nan")), (3.0, 4.0)), "finite"),
    ],
)
def test_surface_refuses_what_is_not_a_monotone_grid(xs, ys, values, complaint):
    with pytest.raises(ValueError, match=complaint):
        Surface(xs, ys, values)


def test_affine_is_exact():
    model = LatencyModel.affine(0.5, 0.25, 0.125, prefill_per_token_s=2.0, prefill_base_s=3.0, prefill_per_context_s=0.5, weight_load_s=4.0)
    assert model.decode_s(1, 8, 16) == 0.5 + 8 * 0.25 + 8 * 16 * 0.125
    assert model.prefill_s(1, 10, 100) == 3.0 + 20.0 + 0.5 * 10 * 105
    assert model.prefill_s(1, 0, 100) == 0.0
    assert model.prefill_s(1, np.array([0, 10]), 100).tolist() == [0.0, 548.0]
    assert model.decode_s(1, np.array([8, 16]), 16).tolist() == [18.5, 36.5]
    assert (model.weight_load_s(1), model.kv_tokens(1), model.fits(1), model.tps) == (4.0, None, True, (1,))


def test_affine_speedup_divides_times_by_degree():
    model = LatencyModel.affine(1.0, 0.5, prefill_per_token_s=2.0, tps=(4, 1), speedup={4: 2.0})
    assert model.tps == (1, 4)
    assert model.decode_s(4, 2, 0) == model.decode_s(1, 2, 0) / 2 == 1.0
    assert model.prefill_s(4, 3) == 3.0


@pytest.mark.parametrize(
    "bad", [{"base_s": -1.0}, {"base_s": 1.0, "tps": ()}, {"base_s": 1.0, "speedup": {1: 0.0}}, {"base_s": 1.0, "tps": (0,)}]
)
def test_affine_refuses_impossible_numbers(bad):
    with pytest.raises(ValueError):
        LatencyModel.affine(**bad)


def test_memory_and_fit():
    memory = Memory(gpu_bytes=100_000, weight_bytes=40_000, kv_bytes_per_token=4, overhead_bytes=10_000)
    model = LatencyModel.affine(1.0, memory=memory)
    assert model.kv_tokens(1, 0.9) == 10_000 and model.fits(1, 0.9)
    assert model.kv_tokens(1, 0.6) == 2_500 and not model.fits(1, 0.6)
    assert model.kv_tokens(1, 0.3) == 0
    assert not model.fits(2)
    with pytest.raises(ValueError, match="gpu_memory_utilization"):
        model.kv_tokens(1, 1.5)


def test_unknown_degree_names_what_there_is():
    model = LatencyModel.affine(1.0, tps=(1, 2))
    for ask in (lambda: model.decode_s(8, 1, 1), lambda: model.prefill_s(8, 1), lambda: model.kv_tokens(8), lambda: model.weight_load_s(8)):
        with pytest.raises(ValueError, match=r"\[1, 2\], not 8"):
            ask()


def test_models_are_values():
    model = LatencyModel.affine(1.0, 0.5, tps=(1, 2))
    assert pickle.loads(pickle.dumps(model)) == model
    surface = Surface((1.0, 2.0), (10.0, 20.0), ((1.0, 2.0), (3.0, 5.0)))
    again = pickle.loads(pickle.dumps(surface))
    assert again == surface and again(1.5, 12) == surface(1.5, 12)


def test_core_is_pure():
    forbidden = {"verl", "ray", "vllm", "torch", "time", "datetime", "random", "aiconfigurator"}
    for path in Path(latency.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not {name.split(".")[0] for name in names} & forbidden, path
