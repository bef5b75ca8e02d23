"""Build what a GPU host without network needs to run vLLM, Ray and verl: two archives, in parts of at most 60 MiB.

    python bench/gpu/bundle.py                          download, strip to sm_90, pack, check; about five minutes, 1 GB of downloads
    python bench/gpu/bundle.py --torch .venv-pins       and load the stripped libraries under the torch of that environment

Needs uv, xz, tar and PyPI. The host has Python 3.12 and torch 2.11.0+cu130 already (README.md lists what else is taken for granted;
`install.py` checks it there). What is left out, and why, stands at the names below. Nothing is written into the working tree: everything
goes to $XDG_CACHE_HOME/verl-heddle/gpu-bundle, or --out. What is there and complete is not made again; --fresh starts over.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.gpu import fatbin, loading, parts

HERE = Path(__file__).resolve().parent
ARCH = 90
PYTHON = "3.12"
PLATFORM = "x86_64-manylinux_2_31"
"""The oldest for which all pinned packages have wheels (llguidance has none for 2.28)."""

ENGINE = (
    *("vllm==0.24.0", "transformers==5.9.0", "tokenizers==0.22.2"),
    *("compressed-tensors==0.17.0", "blake3==1.0.11", "depyf==0.20.0", "astor==0.8.1"),
)
"""The first archive: the riskiest part, whose libraries and kernels can be tried before the second one arrives."""

REST = ("ray==2.60.0", "xgboost-cpu==3.4.1")
"""The second, with packages.txt. `xgboost-cpu` is xgboost without its GPU library, 200 MB smaller."""

SDISTS = ("antlr4-python3-runtime",)
"""Packages without wheels, pure Python."""

STRIPPED = ("_C_stable_libtorch.abi3.so", "_moe_C_stable_libtorch.abi3.so")
"""Of vllm/: hold GPU code for six architectures. `_vllm_fa3_C` is sm_90 only, nothing to strip."""

LEFT_OUT = {
    "vllm/vllm-rs": "the Rust front end; unused unless VLLM_USE_RUST_FRONTEND=1",
    "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so": "FlashAttention 2; vLLM says it is unavailable and takes 3 on sm_90",
    "ray/dashboard/client": "web pages",
    "ray/jars": "Java",
    "ray/cpp": "C++ API",
    "ray/rllib": "not used by verl",
    "ray/tune": "not used by verl",
    "ray/serve": "not used by verl",
}


def cache() -> Path:
    """Where bundles are built."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "verl-heddle" / "gpu-bundle"


def fetch(target: Path, packages: list[str]) -> None:
    """Unpack wheels for the host's Python into `target`, whatever Python runs here, without resolving dependencies."""
    wheels = [one for one in packages if not one.startswith(SDISTS)]
    base = [
        "uv",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(target),
        "--python-version",
        PYTHON,
        "--python-platform",
        PLATFORM,
    ]
    subprocess.run([*base, "--only-binary", ":all:", *wheels], check=True)
    if sources := [one for one in packages if one.startswith(SDISTS)]:
        subprocess.run([*base, *sources], check=True)


def trim(folder: Path) -> int:
    """Delete what `LEFT_OUT` names, bytecode, and extensions for other Pythons; returns the bytes saved."""
    doomed = [folder / name for name in LEFT_OUT] + list(folder.rglob("__pycache__"))
    doomed += [path for path in folder.glob("vllm/third_party/**/_C.cpython-3*") if f"-{PYTHON.replace('.', '')}-" not in path.name]
    saved = 0
    for path in doomed:
        if path.is_dir():
            saved += sum(one.stat().st_size for one in path.rglob("*") if one.is_file())
            shutil.rmtree(path)
        elif path.exists():
            saved += path.stat().st_size
            path.unlink()
    return saved


def strip(library: Path, originals: Path) -> dict[str, Any]:
    """Strip a library in place, its original kept aside for the checks; returns architectures before and after, bytes by name."""
    originals.mkdir(parents=True, exist_ok=True)
    shutil.copy2(library, originals / library.name)
    data = bytearray(library.read_bytes())
    report = fatbin.strip(data, ARCH)
    library.write_bytes(data)
    left = fatbin.remaining(library.read_bytes())
    for line in report.lines():
        print(f"    {line}")
    unwanted = [name for name in left if not report.kept[name]]
    if unwanted:
        raise SystemExit(f"{library.name}: {', '.join(unwanted)} still there after stripping")
    return {"library": library.name, "bytes": len(data), "before": dict(report.found), "after": dict(left), "bare": report.bare}


def pack(folder: Path, archive: Path) -> dict[str, Any]:
    """Archive a folder and cut it; returns its entry of the manifest."""
    environment = os.environ | {"XZ_OPT": "-6 -T0"}
    order = ["--sort=name", "--owner=0", "--group=0", "--numeric-owner"]
    subprocess.run(["tar", *order, "-cJf", str(archive), "-C", str(folder), "."], check=True, env=environment)
    return parts.split(archive)


def build(out: Path) -> dict[str, Any]:
    """Everything; returns the manifest."""
    unpacked, originals = out / "unpacked", out / "originals"
    lists = {"engine": list(ENGINE), "rest": [*REST, *(HERE / "packages.txt").read_text().split()]}
    told: dict[str, Any] = {"python": PYTHON, "arch": ARCH, "packages": lists, "archives": [], "stripped": []}
    for name, packages in lists.items():
        folder = unpacked / name
        print(f"{name}: {len(packages)} packages from PyPI", flush=True)
        fetch(folder, packages)
        print(f"{name}: {trim(folder) / 2**20:.0f} MiB left out", flush=True)
        if name == "engine":
            for library in STRIPPED:
                print(f"  {library}, for sm_{ARCH}:", flush=True)
                told["stripped"].append(strip(folder / "vllm" / library, originals))
        print(f"{name}: packing", flush=True)
        told["archives"].append(pack(folder, out / f"heddle-gpu-{name}.tar.xz"))
    (out / parts.MANIFEST).write_text(json.dumps(told, indent=1) + "\n")
    return told


def is_complete(out: Path) -> bool:
    """Whether `out` holds a whole bundle of these packages."""
    try:
        told = parts.manifest([out])
    except parts.BundleError:
        return False
    wanted = {"engine": list(ENGINE), "rest": [*REST, *(HERE / "packages.txt").read_text().split()]}
    there = all((out / part["name"]).is_file() for entry in told["archives"] for part in entry["parts"])
    return there and told["packages"] == wanted and (out / "originals").is_dir()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=cache(), help=f"folder to build in ({cache()})")
    parser.add_argument("--fresh", action="store_true", help="build again although a complete bundle is there")
    parser.add_argument("--torch", type=Path, help="environment (bin/python inside) with torch 2.11: load the libraries under it")
    args = parser.parse_args(argv)
    for tool in ("uv", "xz", "tar"):
        if shutil.which(tool) is None:
            parser.error(f"{tool} is not installed")
    if args.fresh or not is_complete(args.out):
        shutil.rmtree(args.out, ignore_errors=True)
        args.out.mkdir(parents=True)
        told = build(args.out)
    else:
        told = parts.manifest([args.out])
        print(f"{args.out}: complete, not built again (--fresh does)")
    for entry in told["archives"]:
        for part in entry["parts"]:
            print(f"{part['bytes'] / 2**20:6.1f} MiB  {args.out / part['name']}")
            if part["bytes"] > parts.LIMIT_BYTES:
                raise SystemExit("a part is above the limit: this is a defect of bundle.py")
    for one in told["stripped"]:
        told_sizes = [f"{name} {size / 2**20:.1f}" for name, size in sorted(one["before"].items())]
        print(f"{one['library']}: before {', '.join(told_sizes)} MiB; after {', '.join(sorted(one['after']))}")
    failures = loading.check(args.out / "unpacked/engine/vllm", args.out / "originals", STRIPPED, args.torch)
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
