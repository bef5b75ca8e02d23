"""Nodes of a Ray cluster that lack the package: told in one line before verl starts anything there."""

import pytest

pytest.importorskip("verl")

import verl_heddle
from verl_heddle.verl_plugin import nodes, startup
from verl_heddle.verl_plugin.nodes import Answer, judge

OURS = verl_heddle.__version__


def test_nodes_that_have_it_need_no_word():
    assert judge({}) == (False, []) and judge({"a": Answer(OURS, True), "b": Answer(OURS, True)}) == (False, [])


def test_each_kind_of_trouble_is_one_line_that_names_the_nodes():
    fatal, lines = judge({"10.0.0.1": Answer(OURS, True), "10.0.0.2": Answer(), "10.0.0.3": Answer()})
    assert fatal and len(lines) == 1 and "10.0.0.2, 10.0.0.3" in lines[0] and "10.0.0.1" not in lines[0]
    fatal, lines = judge({"a": Answer(OURS, False)})
    assert fatal and "verl does not load it" in lines[0]
    fatal, lines = judge({"a": Answer("9.9", True), "b": Answer(OURS, True)})
    assert not fatal and len(lines) == 1 and "a (9.9)" in lines[0]
    fatal, lines = judge({"a": Answer(error="no answer within 60 s")})
    assert not fatal and len(lines) == 1 and "no answer" in lines[0]
    assert "and 92 more" in judge({f"n{i}": Answer() for i in range(100)})[1][0]


def test_a_start_is_refused_only_where_a_node_lacks_the_package(monkeypatch, capsys):
    from verl_heddle.verl_plugin.overrides import compose

    config = compose(["actor_rollout_ref.rollout.name=vllm", "trainer.default_local_dir=/tmp/heddle-test", "+plugin=heddle"])
    start = startup.Startup().on_job_start
    monkeypatch.setattr(nodes, "_ask_cluster", lambda config: {"10.0.0.2": Answer()})
    with pytest.raises(SystemExit) as left:
        start(config)
    said = capsys.readouterr().err.splitlines()
    assert left.value.code == startup.EXIT_BAD_CONFIG and len(said) == 1 and "not installed on 10.0.0.2" in said[0]
    monkeypatch.setattr(nodes, "_ask_cluster", lambda config: 1 / 0)
    start(config)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "could not check that every node has verl-heddle (ZeroDivisionError" in said[0] and " on (" in said[1], (
        "a run that stock would do goes on"
    )


def test_without_a_cluster_nobody_is_asked(monkeypatch, tmp_path):
    from omegaconf import OmegaConf

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda folder: None)
    monkeypatch.setattr("ray.init", lambda *a, **k: pytest.fail("Ray was started"))
    assert nodes._ask_cluster(OmegaConf.create({"ray_kwargs": {"ray_init": {"num_cpus": None}}})) == {}


def test_the_nodes_of_a_real_cluster_answer(monkeypatch, tmp_path):
    """Two nodes in one machine; the run's environment hides the package on a second asking."""
    import ray
    from omegaconf import OmegaConf
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        given = {"address": cluster.address}
        config = OmegaConf.create({"ray_kwargs": {"ray_init": given}})
        monkeypatch.setattr(
            nodes, "_runtime_env", lambda config, given: OmegaConf.to_container(given.get("runtime_env") or OmegaConf.create({}))
        )
        answers = nodes._ask_cluster(config)
        assert len(answers) == 2 and all(answer.version == OURS and not answer.error for answer in answers.values()), answers
        assert not ray.is_initialized()
        hide = tmp_path / "hide"
        hide.mkdir()
        (hide / "sitecustomize.py").write_text(HIDE)
        config.ray_kwargs.ray_init.runtime_env = {"env_vars": {"PYTHONPATH": str(hide)}}
        fatal, lines = judge(nodes._ask_cluster(config))
        assert fatal and len(lines) == 1 and "is not installed on" in lines[0], lines
    finally:
        cluster.shutdown()


HIDE = """
import sys
class Hider:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "verl_heddle":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hider())
"""
