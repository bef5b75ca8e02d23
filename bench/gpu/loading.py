"""Are the stripped libraries still whole? As far as a machine without a GPU can tell.

1. Nothing but GPU code changed: every byte outside the blanked images equals the original's, so symbols and relocations do.
2. The dynamic symbols that a library defines and needs are the same as before (readelf).
3. Under the torch it was built for, and a stand-in for the driver's libcuda.so.1, it loads with every symbol resolved (RTLD_NOW) and
registers as many operators as the original. Needs an environment with torch 2.11 and a C compiler; said plainly where it was not done.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.gpu import fatbin

PROBE = """
import ctypes, os, sys, torch
schemas = lambda: {str(one) for one in torch._C._jit_get_all_schemas()}
before = schemas()
ctypes.CDLL(sys.argv[1], mode=os.RTLD_NOW | os.RTLD_GLOBAL)
print(torch.__version__, len(schemas() - before))
"""
"""Loads one library and counts the operators it registers."""

DRIVER = re.compile(r"\b(cu[A-Z]\w*)")
"""Names of the driver's functions."""


def same_outside(original: bytes, stripped: bytes) -> bool:
    """Whether only the payloads of images that were blanked differ."""
    if len(original) != len(stripped):
        return False
    at = 0
    for images in fatbin.fat_binaries(original):
        for one in images:
            end = one.start + one.size
            piece = stripped[one.start : end]
            if original[at : one.start] != stripped[at : one.start] or (any(piece) and piece != original[one.start : end]):
                return False
            at = end
    return original[at:] == stripped[at:]


def dynamic_symbols(library: Path) -> list[str]:
    """What `readelf` lists: every dynamic symbol with its binding, and the libraries needed."""
    done = subprocess.run(["readelf", "--wide", "--dyn-syms", "--dynamic", str(library)], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def stand_in(folder: Path, libraries: Sequence[Path]) -> Path | None:
    """A libcuda.so.1 with the driver functions that the libraries want, each doing nothing; None without a C compiler."""
    wanted = {name for one in libraries for line in dynamic_symbols(one) if " UND " in line for name in DRIVER.findall(line)}
    source, library = folder / "driver.c", folder / "libcuda.so.1"
    source.write_text("".join(f"int {name}(void) {{ return 1; }}\n" for name in sorted(wanted)) + "int heddle_stand_in;\n")
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return library


def load(python: Path, library: Path, stub: Path) -> str:
    """What the probe prints: torch's version and the number of operators.

    Raises:
        RuntimeError: it does not load; with the loader's words.
    """
    paths = os.pathsep.join([str(stub.parent), os.environ.get("LD_LIBRARY_PATH", "")]).rstrip(os.pathsep)
    environment = os.environ | {"LD_LIBRARY_PATH": paths}
    done = subprocess.run([str(python), "-c", PROBE, str(library)], capture_output=True, text=True, env=environment, timeout=300)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return done.stdout.strip()


def check(folder: Path, originals: Path, names: Sequence[str], environment: Path | None) -> int:
    """Check the libraries `names` in `folder` against their originals, and print what was found; returns the number of failures."""
    failures = 0
    with tempfile.TemporaryDirectory() as temporary:
        others = sorted(folder.glob("vllm_flash_attn/*.so"))
        stub = stand_in(Path(temporary), [*(folder / name for name in names), *others])
        for name in names:
            before, after = originals / name, folder / name
            whole = same_outside(before.read_bytes(), after.read_bytes())
            symbols = dynamic_symbols(before) == dynamic_symbols(after)
            failures += (not whole) + (not symbols)
            outside, same = "unchanged" if whole else "CHANGED", "the same" if symbols else "DIFFER"
            print(f"{name}: bytes outside GPU code {outside}, dynamic symbols {same}")
            if environment is None or stub is None:
                why = "no --torch environment given" if environment is None else "no C compiler for the stand-in of the driver"
                print(f"{name}: not loaded ({why})")
                continue
            failures += _load_both(environment / "bin" / "python", before, after, stub)
        if environment is not None and stub is not None:
            for library in others:
                failures += _load_both(environment / "bin" / "python", None, library, stub)
    return failures


def _load_both(python: Path, before: Path | None, after: Path, stub: Path) -> int:
    try:
        told = load(python, after, stub)
        same = before is None or load(python, before, stub) == told
    except RuntimeError as error:
        print(f"{after.name}: DOES NOT LOAD: {error}", file=sys.stderr)
        return 1
    print(f"{after.name}: loads, all symbols resolved; torch and operators: {told}{'' if same else ', DIFFERS from the original'}")
    return 0 if same else 1
