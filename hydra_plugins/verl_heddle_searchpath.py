"""Hydra finds this module by its namespace package and thereby `+plugin=heddle`, `+plugin=observe` and `+machine=cpu` on a stock
verl command.

It is imported whenever any Hydra application starts in this environment, so it does nothing but add names.
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.plugins.search_path_plugin import SearchPathPlugin

from verl_heddle.options import Options
from verl_heddle.verl_plugin.settings import CONFIGS, register_resolvers

register_resolvers()
ConfigStore.instance().store(name="heddle_options", node=Options, provider="verl-heddle")


class VerlHeddleSearchPath(SearchPathPlugin):
    """Appends our config groups to the search path of the application."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="verl-heddle", path=f"file://{CONFIGS}")
