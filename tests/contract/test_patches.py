"""Each patch is still needed. A failure here is good news: drop the patch named in the test."""

import inspect
import os

import pytest

pytest.importorskip("verl")


def test_verl_still_doubles_the_cpu_backend(preloaded, tmp_path):
    """patches/cpu_process_group.md"""
    from verl.utils import distributed

    assert 'f"cpu:gloo,{get_device_name()}:{get_nccl_backend()}"' in inspect.getsource(distributed)
    code = "import torch.distributed as d; d.init_process_group('cpu:gloo,cpu:gloo', init_method='tcp://127.0.0.1:0', rank=0, world_size=1)"
    done = preloaded.run(["-c", code], tmp_path, os.environ)
    assert done.returncode != 0 and "Duplicate device type cpu" in done.stderr


def test_vllm_still_packs_cpu_weights():
    """patches/cpu_plain_linear.md"""
    from vllm.model_executor.layers import utils

    source = inspect.getsource(utils.dispatch_cpu_unquantized_gemm)
    assert "_supports_onednn" in source and "remove_weight" in source


def test_vllm_workers_still_look_without_a_pause(preloaded, tmp_path):
    """patches/cpu_quiet_worker.md"""
    from vllm.distributed.device_communicators import shm_broadcast

    assert "sched_yield()" in inspect.getsource(shm_broadcast.SpinCondition.wait)
    code = (
        "import time\n"
        "from vllm.distributed.device_communicators import shm_broadcast\n"
        "from verl_heddle.verl_plugin import cpu_platform\n"
        "cpu_platform.install()\n"
        "begun = time.monotonic()\n"
        "for _ in range(500): shm_broadcast.sched_yield()\n"
        "print(time.monotonic() - begun > 500 * cpu_platform.NAP_S)"
    )
    done = preloaded.run(["-c", code], tmp_path, os.environ)
    assert done.stdout.split()[-1:] == ["True"], done.stderr


def test_the_cpu_platform_is_whole_and_never_chosen_by_itself(preloaded, tmp_path):
    """Every abstract method of verl's platform is there, and auto-detection passes it by."""
    code = (
        "from verl.plugin.platform.platform_manager import PlatformRegistry, _detect_platform_name\n"
        "from verl_heddle.verl_plugin import cpu_platform\n"
        "cpu_platform.install(); cpu_platform.install()\n"
        "platform = PlatformRegistry.get('cpu')()\n"
        "assert _detect_platform_name() != 'cpu'\n"
        "print(platform.device_name, platform.ray_resource_name(), platform.communication_backend_name())"
    )
    done = preloaded.run(["-c", code], tmp_path, os.environ)
    assert done.stdout.split() == ["cpu", "GPU", "gloo"], done.stderr
