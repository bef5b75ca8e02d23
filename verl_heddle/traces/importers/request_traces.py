"""Import request traces, one turn per request: Mooncake, Azure, BurstGPT, and detailed results of `vllm bench serve`.

Mooncake: JSON Lines of `timestamp` (ms), `input_length`, `output_length`. Azure LLM inference: CSV of `TIMESTAMP,ContextTokens,
GeneratedTokens`. BurstGPT: CSV of `Timestamp` (s), `Request tokens`, `Response tokens`. vLLM, with `--save-result --save-detailed`: an
object with lists `input_lens`, `output_lens`, `ttfts`, `itls`, `start_times`. The time of a vLLM request is measured at its client and
includes queueing. Sources: kvcache-ai/Mooncake, Azure/AzurePublicDataset and HPMLL/BurstGPT; `vllm/benchmarks/serve.py` of vLLM 0.27.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from verl_heddle.traces.importers.conversation import LONGEST_S
from verl_heddle.traces.importers.counting import Tally
from verl_heddle.traces.importers.document import Document
from verl_heddle.traces.importers.fields import count, get, name, real, unix_s
from verl_heddle.trajectory import Trajectory, Turn

UNIQUE_PROMPTS = True
NAME, TITLE = "requests", "single-turn requests (Mooncake, Azure, BurstGPT, vLLM benchmark)"


def _milliseconds(value: object) -> float | None:
    number = real(value)
    return None if number is None else number / 1000


@dataclass(frozen=True, slots=True)
class _Columns:
    workload: str
    when: str
    read: str
    made: str
    seconds: Callable[[Any], float | None]
    model: str = ""


COLUMNS = (
    _Columns("mooncake", "timestamp", "input_length", "output_length", _milliseconds),
    _Columns("azure", "TIMESTAMP", "ContextTokens", "GeneratedTokens", unix_s),
    _Columns("burstgpt", "Timestamp", "Request tokens", "Response tokens", real, "Model"),
)


def knows(value: object) -> bool:
    """Whether the first document has this format."""
    if not isinstance(value, dict):
        return False
    return _benchmark(value) or any({kind.when, kind.read, kind.made} <= value.keys() for kind in COLUMNS)


def read(documents: Iterable[Document], tally: Tally) -> Iterator[Trajectory]:
    """Yield a trajectory per answered request, numbered in file order."""
    number = 0
    kind: _Columns | None = None
    began: float | None = None
    for document in documents:
        row = document.value
        if kind is None and _benchmark(row):
            for item in _results(document, number, tally):
                number += 1
                if item is not None:
                    yield item
            continue
        kind = kind or next((columns for columns in COLUMNS if get(row, columns.read) is not None), None)
        if kind is None:
            document.fault("no input token count", allowed=" or ".join(columns.read for columns in COLUMNS))
        when = kind.seconds(get(row, kind.when))
        began = when if began is None else began
        prompt, output = (_size(document, get(row, key), key) for key in (kind.read, kind.made))
        request = _request(number, prompt, output, kind.workload, tally, began, when, model=name(get(row, kind.model)))
        number += 1
        if request is not None:
            yield request


def _benchmark(value: Any) -> bool:
    return isinstance(get(value, "input_lens"), list) and isinstance(get(value, "output_lens"), list)


def _results(document: Document, number: int, tally: Tally) -> Iterator[Trajectory | None]:
    """Requests of a vLLM result, which stores them as parallel lists."""
    result = document.value
    size = len(result["input_lens"])
    if len(result["output_lens"]) != size:
        document.fault(f"{len(result['output_lens'])} values", field="output_lens", allowed=f"{size}, as in input_lens")
    starts = [real(get(result, "start_times", index)) for index in range(size)]
    began = min((start for start in starts if start is not None), default=None)
    for index in range(size):
        prompt, output = (_size(document, result[key][index], f"{key}[{index}]") for key in ("input_lens", "output_lens"))
        gen_s = _generation_s(get(result, "ttfts", index), get(result, "itls", index))
        yield _request(number + index, prompt, output, "vllm-bench", tally, began, starts[index], gen_s, name(get(result, "model_id")))


def _generation_s(first: Any, rest: Any) -> float | None:
    """Seconds to the first token plus those between tokens; None if the answer was not streamed (vLLM writes 0)."""
    times = [real(first), *map(real, rest)] if isinstance(rest, list) else [None]
    known = [time for time in times if time is not None and 0 <= time < LONGEST_S]
    return sum(known) if len(known) == len(times) and 0 < sum(known) < LONGEST_S else None


def _size(document: Document, value: Any, field: str) -> int:
    tokens = count(value)
    if tokens is None:
        got = repr(value)[:40] if isinstance(value, str | int | float) else type(value).__name__
        document.fault(f"got {got}", field=field, allowed="a whole number of tokens")
    return tokens


def _request(
    number: int,
    prompt: int,
    output: int,
    workload: str,
    tally: Tally,
    began: float | None,
    when: float | None,
    gen_s: float | None = None,
    model: str | None = None,
) -> Trajectory | None:
    """Build one trajectory; None for a failed request (no output). Arrivals before the file's first request are negative."""
    if not output:
        tally.left_out["without output"] += 1
        return None
    tally.known["context"] += 1
    tally.known["output tokens"] += 1
    arrival = None if began is None or when is None else when - began
    meta = {} if arrival is None or not abs(arrival) < LONGEST_S else {"arrival_s": round(arrival, 6)}
    turn = Turn(input_tokens=0, output_tokens=output, gen_s=gen_s, ctx_tokens=prompt)
    return Trajectory(NAME, workload, f"request-{number}", 0, prompt, (turn,), None, model, meta)
