"""How safe is it here, and how does a program fare?

python -m recipes.sandbox                    the level on this machine and what it lacks
python -m recipes.sandbox program.py         run it (its standard input is ours); --level, --wall-s, --memory-mb
"""

import argparse
import sys
from pathlib import Path

from recipes.sandbox.limits import Limits
from recipes.sandbox.local import Sandbox


def main() -> int:
    parser = argparse.ArgumentParser(prog="recipes.sandbox", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path, nargs="?", help="a Python file to run")
    parser.add_argument("--level", default="auto", help="auto, bubblewrap or process (auto)")
    parser.add_argument("--wall-s", type=float, default=10.0, help="seconds (10)")
    parser.add_argument("--memory-mb", type=int, default=512, help="MiB of all processes together (512)")
    args = parser.parse_args()
    try:
        sandbox = Sandbox(Limits(wall_s=args.wall_s, memory_mb=args.memory_mb), args.level, parallel=1)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    with sandbox:
        if args.program is None:
            print(f"level: {sandbox.level.name}")
            print("\n".join(f"lacks: {lack}" for lack in sandbox.level.lacks) or "lacks nothing that this sandbox knows of")
            return 0
        result = sandbox.run({"main.py": args.program.read_text()}, stdin="" if sys.stdin.isatty() else sys.stdin.read())
    sys.stdout.write(result.stdout)
    sys.stderr.write(result.stderr)
    print(f"{result.status} after {result.wall_s:.2f} s: {result.explain()}", file=sys.stderr)
    return 0 if result.ok else 1


if __name__ == "__main__":
    sys.exit(main())
