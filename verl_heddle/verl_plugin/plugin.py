"""Entry point of the group `verl.plugins`: verl imports this module at `import verl`, in every process, with or without the flag.

It must therefore be cheap and inert. It registers one OmegaConf resolver, registers the CPU platform if `VERL_PLATFORM=cpu` is set
(by `+machine=cpu`), and does nothing else: everything the flag enables is reached through config keys (`gate`). verl reports a plugin
that fails to load only at DEBUG, so the failure is logged here.
"""

from __future__ import annotations

import os

from verl_heddle.verl_plugin.log import log

try:
    from verl_heddle.verl_plugin.settings import register_resolvers

    register_resolvers()
    if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
        from verl_heddle.verl_plugin import cpu_platform

        cpu_platform.install()
except Exception as error:
    log(f"could not load ({type(error).__name__}: {error}); verl runs without it")
