"""What happens on the user's console before Ray starts: the configuration is checked, and one banner line says what is on.

Both classes are Hydra callbacks, set by the flag's YAML. Hydra turns a callback's exceptions into warnings, so bad configuration leaves by
`SystemExit`.
"""

from __future__ import annotations

import os
from importlib import metadata
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

import verl_heddle
from verl_heddle.options import Options
from verl_heddle.verl_plugin import lint, nodes, parts
from verl_heddle.verl_plugin.log import log

EXIT_BAD_CONFIG = 2


class Startup(Callback):
    """Check, then announce. A job's start, not a run's, because a sweep (--multirun) has jobs only."""

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        findings = lint.lint(config)
        for finding in findings:
            log(str(finding))
        if any(finding.fatal for finding in findings):
            raise SystemExit(EXIT_BAD_CONFIG)
        if lint.idle(config) is not None:
            log(f"{verl_heddle.__version__} OFF, the run goes on as without the flag")
            return
        if not nodes.ready(config):
            raise SystemExit(EXIT_BAD_CONFIG)
        log(banner(config))


class Machine(Callback):
    """Give the driver the environment that Ray's runtime_env gives every other process."""

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        variables = OmegaConf.select(config, "ray_kwargs.ray_init.runtime_env.env_vars") or {}
        os.environ.update({name: str(value) for name, value in variables.items()})
        if os.environ.get("VERL_PLATFORM") == "cpu":
            from verl_heddle.verl_plugin import cpu_platform

            cpu_platform.select_here()


def banner(config: DictConfig) -> str:
    """One line: versions, what is on, where the trace goes."""
    options: Options = lint.options_or_none(config) or Options()
    on = {row.part for row in parts.table(config, options) if row.on}
    told = []
    if options.observe:
        told.append("observing only, verl's own rules decide")
    else:
        moving = f", moving{' with pre-warming' if options.place.transport == 'prewarm' else ''}" if options.place.moves else ""
        if "residents" in on:
            told.append(
                f"placement: resident sets, {'least served' if options.residents.order == 'least_served' else 'first to begin'} first"
            )
        elif options.place.enable:
            told.append(f"placement: planned from step 2{moving}")
        else:
            told.append("placement: verl's rule (sticky, least in-flight)")
        if options.priority.enable:
            order = "longest predicted first" if options.priority.order == "longest" else "by arrival, validation first"
            told.append(f"priority: {order}{', preempting on arrival where the engines can' if 'preemption' in on else ''}")
        else:
            told.append("priority: off")
        if "offload" in on:
            told.append("offload: evicted KV cache on the host")
        if options.predicts:
            told.append(f"prediction: {'trees on ' if options.predict.trees else ''}prompt history and siblings")
        if options.layout.enable:
            fixed = "-".join(map(str, options.layout.fixed))
            told.append(f"layout: {'by schedule' if options.layout.schedule else fixed or 'planned from step 2'}")
        if options.shape.enable:
            spare = "as many as pay" if options.shape.spare is None else f"{options.shape.spare:g} a prompt"
            told.append(f"shaping: spare samples, {spare}, at most {options.shape.most:g}n")
        if "admission" in on:
            told.append(f"admission: {options.admission.per_slot:g} turns per slot")
    mode = parts.get(config, "trainer.v1.trainer_mode")
    if mode in lint.MODES:
        told.append(f"trainer: {mode}, its weight updates are followed")
    told.append(f"poll: {options.poll_interval_s:g} s")
    told.append(f"trace: {options.trace.dir}/trace.jsonl" if options.trace.enable else "trace: off")
    found = ", ".join(f"{name} {_version(name)}" for name in ("verl", "vllm", "ray"))
    return f"{verl_heddle.__version__} on ({found}); " + "; ".join(told)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "missing"
