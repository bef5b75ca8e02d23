"""`make demo` (RECIPE=math or coding): a recipe twice in a row, stock decisions and heddle, same seeds, and one table.

Both arms run the same stock command (`run.sh`) with the same instruments: `+plugin=observe` leaves every decision to verl,
`+plugin=heddle` takes them. Environment: RECIPE (math), MODEL (a path or name; needs a GPU unless it is tiny), STEPS (4), OUT
(outputs/<recipe>).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from verl_heddle.report.arms import Arm, read_arm, table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RECIPES = sorted(path.parent.name for path in HERE.glob("*/run.sh"))
RECIPE = os.environ.get("RECIPE") or "math"
ARMS = {"stock": "+plugin=observe", "heddle": "+plugin=heddle"}

SILENCE_S = 900
"""A run that prints nothing for so long is hung."""

PORT_TAKEN = "EADDRINUSE"
"""verl picks a port in one process and binds it in another; once in about 20 runs somebody else was faster. Worth one more try."""

MILESTONES = (
    (re.compile(r"Started a local Ray instance"), "Ray is up, starting trainer ranks and vLLM engines"),
    (re.compile(r"LLMServerManager: \["), "engines are up"),
    (re.compile(r"heddle: (.*)"), None),
)
STEP = re.compile(r"step:(\d+) - .*?heddle/makespan_s:([0-9.]+)")


def run_arm(name: str, flag: str, out: Path, steps: int) -> Arm:
    """Run one arm, show its progress, and read its trace.

    Raises:
        SystemExit: the run failed; says where its log is.
    """
    run = out / name
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    log = run / "train.log"
    machine = [] if shutil.which("nvidia-smi") else ["+machine=cpu"]
    environment = os.environ | {"NAME": name, "OUT": str(out), "STEPS": str(steps), "PYTHON": sys.executable, "WANDB_RUN_GROUP": out.name}
    command = ["bash", str(HERE / RECIPE / "run.sh"), flag, *machine, *sys.argv[1:]]
    for attempt in (1, 2):
        print(f"[{name}] {flag} {' '.join(machine)}  (log: {log})", flush=True)
        code = _follow(name, command, environment, log, steps)
        if code == 0:
            return read_arm(name, run / "heddle" / "trace.jsonl")
        if attempt == 1 and PORT_TAKEN in log.read_text(errors="replace"):
            print(f"[{name}] a port was taken by another process; trying once more", flush=True)
            continue
        break
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
    raise SystemExit(f"{tail}\n[{name}] failed with exit code {code}; the whole log is {log}")


def _follow(name: str, command: list[str], environment: dict[str, str], log: Path, steps: int) -> int:
    """Run the command, its output in the log and its milestones on the console; kills it after `SILENCE_S` of silence."""
    start = time.monotonic()
    heard = [start]
    seen: set[str] = set()
    with (
        open(log, "w") as file,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
        ) as process,
    ):

        def watch() -> None:
            while process.poll() is None:
                if time.monotonic() - heard[0] > SILENCE_S:
                    print(f"[{name}] silent for {SILENCE_S} s: stopping it", flush=True)
                    process.kill()
                time.sleep(1)

        threading.Thread(target=watch, daemon=True).start()
        assert process.stdout is not None
        for line in process.stdout:
            heard[0] = time.monotonic()
            file.write(line)
            text = _milestone(line, steps)
            if text and text not in seen:
                seen.add(text)
                print(f"[{name}] {heard[0] - start:5.0f} s  {text}", flush=True)
    return process.returncode


def _milestone(line: str, steps: int) -> str | None:
    if found := STEP.search(line):
        return f"step {found[1]}/{steps}: rollout {float(found[2]):.2f} s"
    for pattern, text in MILESTONES:
        if found := pattern.search(line):
            return text or found[0]
    return None


def main() -> None:
    """Both arms, the table, and where everything is."""
    start = time.monotonic()
    if RECIPE not in RECIPES:
        raise SystemExit(f"no recipe {RECIPE!r}: choose one of {', '.join(RECIPES)}, e.g. make demo RECIPE=coding")
    steps = int(os.environ.get("STEPS", "4"))
    out = Path(os.environ.get("OUT", ROOT / "outputs" / RECIPE)).resolve()
    if shutil.which("nvidia-smi") and not os.environ.get("MODEL"):
        raise SystemExit("there is a GPU here: say which model to train, e.g. MODEL=Qwen/Qwen3-0.6B make demo")
    arms = {name: run_arm(name, flag, out, steps) for name, flag in ARMS.items()}
    print()
    print(table(arms))
    print("medians over the steps after the first; queue to other: the trajectory that ended last, seconds")
    print(f"{time.monotonic() - start:.0f} s in all")
    print()
    for name in arms:
        runs = sorted((out / name / "wandb").glob("offline-run-*")) or sorted((out / name / "wandb").glob("run-*"))
        print(f"{name}: trace {out / name / 'heddle' / 'trace.jsonl'}, log {out / name / 'train.log'}")
        if runs:
            offline = runs[-1].name.startswith("offline")
            print(f"  W&B group {out.name}: {runs[-1]}" + (f" (offline; upload: wandb sync {runs[-1]})" if offline else ""))


if __name__ == "__main__":
    main()
