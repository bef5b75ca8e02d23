"""Install the bundle on a GPU host without network. Standard library only; run it with the host's Python 3.12.

    python3 bench/gpu/install.py look                                       what is here, what is missing; changes nothing
    python3 bench/gpu/install.py unpack engine --parts DIR --dest DEST      the first archive, from parts in DIR
    python3 bench/gpu/install.py unpack rest --parts DIR --dest DEST        the second; and the plugin itself, from this checkout
    python3 bench/gpu/install.py check --dest DEST                          libraries load, a stripped kernel is right on the GPU, imports
    . DEST/env.sh                                                           then: python3 bench/gpu/run.py ...

Nothing is installed into the host's Python: everything lies in DEST, which PYTHONPATH puts first. Deleting DEST undoes it.
"""

from __future__ import annotations

import argparse
import configparser
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.gpu import parts

PYTHON, TORCH, GLIBC = "3.12", "2.11.0", (2, 31)
FREE_GIB = 3.0
"""Unpacked 1 GB, archives beside it, compile caches."""

GIVEN = (
    *("accelerate", "aiohttp", "attrs", "certifi", "click", "cloudpickle", "einops", "filelock"),
    *("fsspec", "grpcio", "httpx", "huggingface-hub", "jinja2", "llvmlite", "msgpack", "networkx"),
    *("numba", "numpy", "opencv-python-headless", "packaging", "pandas", "peft", "pillow", "prometheus-client"),
    *("protobuf", "psutil", "py-cpuinfo", "pyarrow", "pybind11", "python-dateutil", "pyyaml", "regex"),
    *("requests", "rich", "safetensors", "scipy", "sentencepiece", "setuptools", "six", "sympy"),
    *("tensorboard", "tiktoken", "tqdm", "triton", "typer", "typing-extensions", "urllib3", "uvloop"),
    *("wrapt", "xxhash", "yarl"),
)
"""What a torch host with the usual scientific packages has; the bundle leaves it out."""

PROBE = """
import glob, torch
for library in sorted(glob.glob({dest!r} + "/vllm/**/*_C*.abi3.so", recursive=True)):
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise SystemExit(library + " does not load: " + str(error.__cause__ or error))
    print("loads:", library.rsplit("/", 1)[-1])
if not torch.cuda.is_available():
    raise SystemExit("no GPU that torch can use: the kernels were not tried")
x = torch.randn(4, 64, device="cuda", dtype=torch.bfloat16)
out, weight = torch.empty_like(x), torch.ones(64, device="cuda", dtype=x.dtype)
torch.ops._C.rms_norm(out, x, weight, 1e-6)
error = (out.float() - torch.nn.functional.rms_norm(x.float(), (64,), eps=1e-6)).abs().max().item()
print("a stripped kernel ran on", torch.cuda.get_device_name(), "largest error", error)
if not error < 0.05:
    raise SystemExit("the kernel's numbers are wrong")
"""


IMPORTS = (
    *("transformers", "vllm.v1.engine.async_llm", "vllm.v1.worker.gpu_worker", "vllm.v1.worker.gpu_model_runner"),
    *("vllm.v1.worker.gpu.model_runner", "vllm.v1.attention.backends.flash_attn", "vllm.model_executor.models.qwen3"),
    *("verl_heddle.verl_plugin.vllm_scheduler", "bench.gpu.one"),
)
"""What the experiments without verl import, in their processes."""

IMPORTS_OF_THE_REST = (
    *("ray", "xgboost", "verl.trainer.main_ppo", "verl.workers.engine.fsdp.transformer_impl", "vllm.entrypoints.openai.api_server"),
    *("verl.workers.rollout.vllm_rollout.vllm_async_server", "verl_heddle.verl_plugin.gate", "recipes.math.prepare", "jsonschema"),
)
"""What the end-to-end run and the results' check import besides."""


def complaints(dest: Path | None) -> list[str]:
    """What of this host is not as the bundle wants it; one line each."""
    told = []
    if not platform.python_version().startswith(PYTHON):
        told.append(f"Python is {platform.python_version()}, the bundle's packages are for {PYTHON}")
    told += [
        f"{name} is {found}, wanted {wanted}"
        for name, wanted, found in (("torch", TORCH, _version("torch")),)
        if not found.startswith(wanted)
    ]
    name, number = platform.libc_ver()
    if name == "glibc" and tuple(map(int, number.split(".")[:2])) < GLIBC:
        told.append(f"glibc is {number}, the bundle needs {'.'.join(map(str, GLIBC))}")
    if missing := [one for one in GIVEN if _version(one) == "missing"]:
        told.append(f"missing, and not in the bundle: {' '.join(missing)}")
    for tool, why in (("nvidia-smi", "no driver"), ("cc", "Triton compiles with it; without, engines run eagerly")):
        if shutil.which(tool) is None:
            told.append(f"{tool} is not here: {why}")
    place = next(one for one in [*([dest, *dest.parents] if dest else []), Path.cwd()] if one.exists())
    free = shutil.disk_usage(place).free / 2**30
    if free < FREE_GIB:
        told.append(f"{free:.1f} GiB free at {place}, {FREE_GIB} needed")
    return told


def unpack(name: str, folders: list[Path], dest: Path) -> None:
    """One archive into `dest`.

    Raises:
        parts.BundleError: parts are missing or damaged, or there is no such archive.
    """
    entries = {one["name"].removeprefix("heddle-gpu-").removesuffix(".tar.xz"): one for one in parts.manifest(folders)["archives"]}
    if name not in entries:
        raise parts.BundleError(f"no archive {name!r}; there is {', '.join(entries)}")
    dest.mkdir(parents=True, exist_ok=True)
    archive = parts.join(entries[name], folders, dest / entries[name]["name"])
    try:
        with tarfile.open(archive) as file:
            file.extractall(dest, filter="tar")
    finally:
        archive.unlink()


def plug_in(dest: Path) -> None:
    """Make this checkout count as an installed plugin: verl finds it by its entry point. Its code stays here, on PYTHONPATH."""
    told = configparser.ConfigParser()
    told.read(ROOT / "setup.cfg")
    source = (ROOT / "verl_heddle/__init__.py").read_text()
    number = source.partition("__version__ = ")[2].split()[0].strip("\"'")
    info = dest / f"verl_heddle-{number}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: verl-heddle\nVersion: {number}\n")
    sections = [f"[{name}]\n{value.strip()}\n" for name, value in told["options.entry_points"].items()]
    (info / "entry_points.txt").write_text("\n".join(sections))


def write_environment(dest: Path) -> Path:
    """The file to source before a run; code of the checkout, packages of the bundle."""
    lines = [
        f"export PYTHONPATH={ROOT}:{dest}",
        f"export CUDA_CACHE_PATH={dest}/cuda_cache VLLM_CACHE_ROOT={dest}/vllm_cache TRITON_CACHE_DIR={dest}/triton_cache",
        f"export TORCHINDUCTOR_CACHE_DIR={dest}/inductor_cache",
        "export VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_USE_DEEP_GEMM=0 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1",
        "export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=disabled WANDB_MODE=offline",
        "unset PYTHONDONTWRITEBYTECODE RAY_ADDRESS",
    ]
    path = dest / "env.sh"
    path.write_text("\n".join(lines) + "\n")
    return path


def check(dest: Path) -> int:
    """Load the libraries, run one kernel, import what runs import, each in a process of its own; returns the number of failures."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, dest))), "VLLM_LOGGING_LEVEL": "ERROR"}
    failures = 0
    if (dest / "vllm").is_dir():
        failures += bool(subprocess.run([sys.executable, "-c", PROBE.format(dest=str(dest))], env=environment, timeout=300).returncode)
    for name in (*IMPORTS, *IMPORTS_OF_THE_REST) if (dest / "ray").is_dir() else ():  # vLLM's own small packages are in the second archive
        line = [sys.executable, "-W", "ignore", "-c", f"import {name}"]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
        failures += bool(done.returncode)
        print(f"imports: {name}" if not done.returncode else f"DOES NOT IMPORT: {name}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return failures


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("look", "unpack", "check"))
    parser.add_argument("archive", nargs="?", choices=("engine", "rest"), help="for unpack")
    parser.add_argument("--parts", type=Path, action="append", default=[], help="folder with parts and manifest.json; may be repeated")
    parser.add_argument("--dest", type=Path, help="folder to install to, outside of the checkout")
    args = parser.parse_args(argv)
    if args.what != "look" and args.dest is None:
        parser.error("--dest is missing: a folder outside of the checkout")
    dest = args.dest.resolve() if args.dest else None
    for line in complaints(dest):
        print(f"note: {line}")
    if args.what == "unpack":
        if args.archive is None or not args.parts:
            parser.error("say which archive, engine or rest, and where its parts are (--parts)")
        assert dest is not None
        try:
            unpack(args.archive, args.parts, dest)
        except parts.BundleError as error:
            parser.error(str(error))
        plug_in(dest)
        print(f"{args.archive} is in {dest}; before a run: . {write_environment(dest)}")
    elif args.what == "check":
        assert dest is not None
        raise SystemExit(1 if check(dest) else 0)
    elif _version("vllm") != "missing":
        print(f"vllm {_version('vllm')} at {distribution('vllm').locate_file('')}")


if __name__ == "__main__":
    main()
