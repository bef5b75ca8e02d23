"""The router's length model: fitted between steps in a thread, saved for checkpoints and for a restarted router."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

from verl_heddle.orchestrator import Orchestrator
from verl_heddle.predict.predictor import Predictor, StateError
from verl_heddle.verl_plugin.log import log_once


class Learning:
    """Base of the router; does nothing if the orchestrator has no predictor."""

    _orchestrator: Orchestrator
    _cap_tokens: int | None
    failures: Counter[str]
    _fit: asyncio.Future | None = None
    _fit_s = 0.0

    def learnt(self) -> bytes | None:
        """The predictor's state, for a checkpoint; None without a predictor."""
        predictor = self._orchestrator.predictor
        return None if predictor is None else predictor.to_bytes()

    def learn_again(self, state: bytes) -> str | None:
        """Restore a state from `learnt`; returns the reason if that fails."""
        if self._orchestrator.predictor is None:
            return None
        try:
            self._orchestrator.predictor = Predictor.from_bytes(state, self._cap_tokens)
        except StateError as error:
            return str(error)
        return None

    def _fitted(self, fit: asyncio.Future, began_s: float) -> None:
        self._fit_s = time.monotonic() - began_s
        try:
            model = fit.result()
            if self._orchestrator.predictor is not None:
                self._orchestrator.predictor.adopt(model)
        except Exception as error:
            self.failures["fit"] += 1
            log_once(f"the length model could not be fitted ({type(error).__name__}: {error}); predictions continue without it")

    def _fit_anew(self) -> None:
        """Start a fit to the data so far, unless one is still running."""
        predictor = self._orchestrator.predictor
        if predictor is not None and (self._fit is None or self._fit.done()):
            began = time.monotonic()
            self._fit = asyncio.get_running_loop().run_in_executor(None, predictor.fit_job().run)
            self._fit.add_done_callback(lambda fit: self._fitted(fit, began))

    def _fit_facts(self) -> dict[str, float]:
        """Facts of the last fit, for `stats`."""
        predictor = self._orchestrator.predictor
        if predictor is None:
            return {}
        return {"fit_s": self._fit_s, "fit_rows": predictor.model.rows if predictor.model else 0}
