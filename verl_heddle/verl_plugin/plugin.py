"""Entry point of the group `verl.plugins`: verl imports this module at `import verl`, in every process, flag or no flag.

So it must be cheap and inert. It teaches OmegaConf one resolver, registers the CPU platform where `VERL_PLATFORM=cpu` asks for it
(`+machine=cpu` sets that) and does nothing else: everything the flag switches on is reached through config keys (`gate`). verl
reports a plugin that fails to load at DEBUG only, so the failure is said here.
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
