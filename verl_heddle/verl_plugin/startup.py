"""Before Ray starts: check the configuration and print one banner line that says what is on.

Both classes are Hydra callbacks, set by the flag's YAML. Hydra turns a callback's exceptions into warnings, so a bad configuration raises
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
    """Check, then print the banner. On job start rather than run start, because a sweep (--multirun) only has jobs."""

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        findings = lint.lint(config)
        for finding in findings:
            log(str(finding))
        if any(finding.fatal for finding in findings):
            raise SystemExit(EXIT_BAD_CONFIG)
        if lint.idle(config) is not None:
            log(f"{verl_heddle.__version__} OFF, the run continues as without the flag")
            return
        if not nodes.ready(config):
            raise SystemExit(EXIT_BAD_CONFIG)
        log(banner(config))


class Machine(Callback):
    """Set the environment of Ray's runtime_env in the driver as well."""

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
    words = []
    if options.observe:
        words.append("observing only, verl's own rules decide")
    else:
        moving = f", moving{' with pre-warming' if options.place.transport == 'prewarm' else ''}" if options.place.moves else ""
        if "residents" in on:
            words.append(
                f"placement: resident sets, {'least served' if options.residents.order == 'least_served' else 'first to begin'} first"
            )
        elif options.place.enable:
            words.append(f"placement: planned from step 2{moving}")
        else:
            words.append("placement: verl's rule (sticky, least in-flight)")
        if options.priority.enable:
            order = "longest predicted first" if options.priority.order == "longest" else "by arrival, validation first"
            words.append(f"priority: {order}{', preempting on arrival where the engines can' if 'preemption' in on else ''}")
        else:
            words.append("priority: off")
        if "offload" in on:
            words.append("offload: evicted KV cache on the host")
        if options.predicts:
            words.append(f"prediction: {'trees on ' if options.predict.trees else ''}prompt history and siblings")
        if options.layout.enable:
            fixed = "-".join(map(str, options.layout.fixed))
            words.append(f"layout: {'by schedule' if options.layout.schedule else fixed or 'planned from step 2'}")
        if options.shape.enable:
            spare = "as many as pay" if options.shape.spare is None else f"{options.shape.spare:g} a prompt"
            words.append(f"shaping: spare samples, {spare}, at most {options.shape.most:g}n")
        if "admission" in on:
            words.append(f"admission: {options.admission.per_slot:g} turns per slot")
    mode = parts.get(config, "trainer.v1.trainer_mode")
    if mode in lint.MODES:
        words.append(f"trainer: {mode}, turns resume across its weight updates")
    words.append(f"poll: {options.poll_interval_s:g} s")
    words.append(f"trace: {options.trace.dir}/trace.jsonl" if options.trace.enable else "trace: off")
    found = ", ".join(f"{name} {_version(name)}" for name in ("verl", "vllm", "ray"))
    return f"{verl_heddle.__version__} on ({found}); " + "; ".join(words)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "missing"
