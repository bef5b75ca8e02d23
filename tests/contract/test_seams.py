"""Every seam of the installed verl, vLLM and Ray, and that our checks can fail."""

import pytest

pytest.importorskip("verl")

from verl_heddle.verl_plugin import compat


@pytest.mark.parametrize("seam", compat.SEAMS, ids=lambda seam: seam.name)
def test_seam(seam):
    seam.check()


def test_a_missing_parameter_is_found():
    with pytest.raises(TypeError, match="no parameter nonsense"):
        compat.takes("verl.workers.rollout.router:get_router_handle", "servers", "nonsense")


def test_a_missing_attribute_is_found():
    with pytest.raises(AttributeError, match="nonsense"):
        compat.has("verl.workers.rollout.router:GlobalRequestLoadBalancer", "acquire_server", "nonsense")


def test_an_attribute_that_a_scheduler_lost_is_found(monkeypatch):
    """By `doctor`, which builds no scheduler: vLLM 0.31 dropped one that we read."""
    from verl_heddle.verl_plugin import vllm_seams

    monkeypatch.setattr(vllm_seams, "ATTRIBUTES", (*vllm_seams.ATTRIBUTES, "nonsense"))
    assert vllm_seams.mismatch() == "the scheduler has no nonsense"


def test_require_names_the_seam_and_the_supported_versions(monkeypatch):
    def broken():
        raise TypeError("moved")

    monkeypatch.setattr(compat, "SEAMS", (compat.Seam("the thing", "off", broken),))
    with pytest.raises(RuntimeError, match=r"'the thing' is missing \(moved\); supported: verl 0\.9\.1"):
        compat.require()
    monkeypatch.setattr(compat, "SEAMS", (compat.Seam("the thing", "less", broken, needed=False),))
    compat.require()
    assert compat.examine()[0].error == "TypeError: moved"
