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
    """Teach OmegaConf `${heddle_path:x}`: file x of the package, wherever it is installed on the node that resolves it.

    verl takes a router's file by path only, and a relative path does not find an editable install.
    """
    OmegaConf.register_new_resolver("heddle_path", lambda name: str(PACKAGE / name), replace=True)


def options_of(config: Any) -> Options:
    """The `heddle` node of verl's config, checked against the schema.

    Raises:
        omegaconf.errors.OmegaConfBaseException: unknown key or wrong type.
    """
    given = OmegaConf.to_container(config["heddle"], resolve=True)  # while its interpolations still see the whole config
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Options), given))  # type: ignore[return-value]
