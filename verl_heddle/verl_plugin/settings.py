"""Converts verl's untyped config into heddle's typed options, and registers the resolvers that `configs/` uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from verl_heddle.options import Options

ADVANTAGES = "heddle_grpo"
"""Value of `algorithm.adv_estimator` for verl's grpo with weights (`advantage`)."""

PACKAGE = Path(__file__).parent.parent
"""The installed package, on this node."""

CONFIGS = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"
"""heddle's Hydra config groups: inside the package when installed, next to it in a checkout."""


def register_resolvers() -> None:
    """Register the OmegaConf resolvers that `configs/` uses.

    `${heddle_path:x}` is the path of the package's file x on the node that resolves it: verl accepts a router's file only by path, and a
    relative path does not find an editable install. `${heddle_default:x}` is x. Both are None while Hydra applies the overrides: Hydra
    refuses `+key=...` if the key has a value, and a user's command may add with `+` a key that stock verl leaves without one.
    """
    OmegaConf.register_new_resolver(
        "heddle_path", lambda name, *, _root_: None if _composing(_root_) else str(PACKAGE / name), replace=True
    )
    OmegaConf.register_new_resolver("heddle_default", lambda value, *, _root_: None if _composing(_root_) else value, replace=True)


def _composing(root: Any) -> bool:
    """Whether Hydra is still composing this configuration: it writes its version into it after applying the overrides."""
    runtime = OmegaConf.select(root, "hydra.runtime", throw_on_missing=False)
    return runtime is not None and OmegaConf.is_missing(runtime, "version")


def handed_on(rollout: Any, part: str) -> dict[str, Any]:
    """A part of `heddle.*` (`preempt`, `layout`), passed to code that sees only verl's rollout config; empty if it is missing.

    It is in `rollout.custom`, verl's place for foreign settings. Keys in `engine_kwargs.vllm` would go to vLLM, and into the hash by which
    vLLM finds compiled models.
    """
    ours = (rollout.get("custom") or {}).get("heddle") or {}
    return dict(ours.get(part) or {})


def options_of(config: Any) -> Options:
    """The `heddle` node of verl's config, checked against the schema.

    Raises:
        omegaconf.errors.OmegaConfBaseException: unknown key or wrong type.
    """
    given = OmegaConf.to_container(config["heddle"], resolve=True)  # resolve while interpolations can see the whole config
    options: Options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Options), given))  # type: ignore[assignment]
    options.trace.workload = (
        options.trace.workload or "verl"
    )  # defaults to trainer.project_name, which may be None; a trace line needs a name
    return options
