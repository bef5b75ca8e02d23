"""What a router learns of lengths: fitted between steps in a thread, kept for checkpoints and for the process that comes after it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

from verl_heddle.orchestrator import Orchestrator
from verl_heddle.predict.predictor import Predictor, StateError
from verl_heddle.verl_plugin.log import log_once


class Learning:
    """Of a router's orchestrator; nothing where nobody predicts."""

    _orchestrator: Orchestrator
    _cap_tokens: int | None
    failures: Counter[str]
    _fit: asyncio.Future | None = None
    _fit_s = 0.0

    def learnt(self) -> bytes | None:
        """What the predictor knows, for a checkpoint; None if nobody predicts."""
        predictor = self._orchestrator.predictor
        return None if predictor is None else predictor.to_bytes()

    def learn_again(self, state: bytes) -> str | None:
        """Take up what `learnt` gave; returns why not, if not."""
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
            log_once(f"the length model could not be fitted ({type(error).__name__}: {error}); predictions go on without it")

    def _fit_anew(self) -> None:
        """Begin a fit to what has been seen by now, unless the last has not ended."""
        predictor = self._orchestrator.predictor
        if predictor is not None and (self._fit is None or self._fit.done()):
            began = time.monotonic()
            self._fit = asyncio.get_running_loop().run_in_executor(None, predictor.fit_job().run)
            self._fit.add_done_callback(lambda fit: self._fitted(fit, began))

    def _fit_facts(self) -> dict[str, float]:
        """Of the last fit, for `stats`."""
        predictor = self._orchestrator.predictor
        if predictor is None:
            return {}
        return {"fit_s": self._fit_s, "fit_rows": predictor.model.rows if predictor.model else 0}
