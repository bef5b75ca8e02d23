"""From verl's untyped config to our typed options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from verl_heddle.options import Options

ADVANTAGES = "heddle_grpo"
"""verl's grpo with weights (`advantage`), as `algorithm.adv_estimator` names it."""

PACKAGE = Path(__file__).parent.parent
"""The installed package, on this node."""

CONFIGS = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"
"""Our Hydra config groups: inside the package when installed, beside it in a checkout."""


def register_resolvers() -> None:
    """Teach OmegaConf what `configs/` uses: `${heddle_path:x}`, file x of the package, wherever it is installed on the node that resolves
    it (verl takes a router's file by path only, and a relative path does not find an editable install), and `${heddle_default:x}`, x.

    Both are none while Hydra applies a command line's overrides: Hydra refuses `+key=...` where the key has a value, and a user's command
    adds, by `+`, keys that stock verl leaves without one.
    """
    OmegaConf.register_new_resolver(
        "heddle_path", lambda name, *, _root_: None if _composing(_root_) else str(PACKAGE / name), replace=True
    )
    OmegaConf.register_new_resolver("heddle_default", lambda value, *, _root_: None if _composing(_root_) else value, replace=True)


def _composing(root: Any) -> bool:
    """Whether Hydra is still at work on this configuration: it writes its version into it when overrides have been applied."""
    runtime = OmegaConf.select(root, "hydra.runtime", throw_on_missing=False)
    return runtime is not None and OmegaConf.is_missing(runtime, "version")


def handed_on(rollout: Any, part: str) -> dict[str, Any]:
    """A part of `heddle.*` (`preempt`, `layout`) as the flag hands it to where only verl's rollout config is seen; empty without it.

    In `rollout.custom`, verl's place for settings that are not its own. What is in `engine_kwargs.vllm` goes to vLLM, and into the hash by
    which it finds compiled models.
    """
    ours = (rollout.get("custom") or {}).get("heddle") or {}
    return dict(ours.get(part) or {})


def options_of(config: Any) -> Options:
    """The `heddle` node of verl's config, checked against the schema.

    Raises:
        omegaconf.errors.OmegaConfBaseException: unknown key or wrong type.
    """
    given = OmegaConf.to_container(config["heddle"], resolve=True)  # while its interpolations still see the whole config
    options: Options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Options), given))  # type: ignore[assignment]
    options.trace.workload = options.trace.workload or "verl"  # trainer.project_name, which may be none; a trace's line needs a name
    return options
