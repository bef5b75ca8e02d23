"""Adapts verl's own router and replay buffers to its plugin seams; `gate` returns them when heddle cannot run.

verl does not pass a custom sampler the arguments of its own buffer (DAPO filtering, refill of failed groups). The flag passes them
through `sampler_kwargs.heddle`, and `buffer_arguments` converts them back to verl's.
"""

from __future__ import annotations

from typing import Any

from verl.workers.rollout.router import GlobalRequestLoadBalancer

POLL_INTERVAL_S = 2.0
"""The default of verl's own buffer."""


class StockRouter(GlobalRequestLoadBalancer):
    """verl's balancer with the constructor signature of a router plugin: `(servers, yaml)`."""

    def __init__(self, servers: dict[str, Any], yaml_config: dict) -> None:
        super().__init__(servers)


def buffer_arguments(trainer_mode: str, settings: Any) -> dict[str, Any]:
    """The constructor arguments verl gives its own replay buffer (`PPOTrainer._build_replay_buffer`), from `sampler_kwargs.heddle`.

    Raises:
        ValueError: DAPO filtering is on without a metric, or needs rewards that a colocated reward model computes too late.
    """
    metric = None
    groups = settings.get("filter_groups") or {}
    if groups.get("enable"):
        metric = groups.get("metric")
        if not metric:
            raise ValueError("algorithm.filter_groups.metric must be set when group filtering is enabled")
        reward_model = settings.get("reward_model") or {}
        if reward_model.get("enable") and not reward_model.get("enable_resource_pool"):
            raise ValueError(
                "algorithm.filter_groups needs the reward at sampling time: use a rule-based reward or "
                "reward.reward_model.enable_resource_pool=True"
            )
        metric = str(metric)
    refill = bool(settings.get("sync_refill_failed_groups"))
    arguments: dict[str, Any] = {"filter_groups_metric": metric, "sync_refill_failed_groups": refill}
    if trainer_mode == "sync":
        batch = settings["train_batch_size"]
        arguments |= {
            "train_batch_size": batch,
            "gen_batch_size": 1 if metric is not None or refill else (settings.get("gen_batch_size") or batch),
            "max_inflight_gen_batches": groups.get("max_inflight_gen_batches", 1) if metric is not None else 1,
        }
    return arguments


def stock_sampler(trainer_mode: str, sampler_kwargs: Any, **kwargs: Any) -> Any:
    """verl's own buffer for the trainer mode, configured as it would be without the plugin."""
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

    cls = ReplayBuffer if trainer_mode == "sync" else ReplayBufferAsync
    arguments = buffer_arguments(trainer_mode, sampler_kwargs["heddle"])
    return cls(trainer_mode=trainer_mode, sampler_kwargs=sampler_kwargs, **arguments, **kwargs)
