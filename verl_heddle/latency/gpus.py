"""GPU catalogue: published memory, bandwidth, dense tensor throughput and intra-node interconnect.

Sources: memory is the total that torch prints in out-of-memory errors, slightly below nominal (H20: 97,871 MiB in nvidia-smi minus the
context's share; the others as printed in public reports). The other numbers come from AIConfigurator and public pages for A100 80GB SXM,
H20, H100 SXM, H200 SXM, L40S and B200, without sparsity (B200's bandwidth: AIConfigurator has 7.7 TB/s); NVIDIA's datasheets were not
consulted. `verl_heddle/data/README.md` has the table. Interconnect is per GPU and direction: half of NVLink's bidirectional total, and
PCIe 4.0 x16 for the L40S.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from verl_heddle.latency.shipped import plain

GIB = 1 << 30

PCIE = 64e9
"""Bytes per second of PCIe 5.0 x16, one direction; anything faster is a dedicated GPU link."""

OWN = "name:mem=..GiB,bw=..TB/s,tflops=.."
"""Syntax for a GPU outside the catalogue."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """Published numbers of one GPU, in bytes, bytes per second and operations per second."""

    name: str
    memory_bytes: int
    """As torch reports it."""
    bandwidth: float
    bf16: float
    """Dense bf16 tensor operations per second."""
    fp8: float
    """Dense fp8; the bf16 number where the GPU has none."""
    link: float
    """Bandwidth to the other GPUs of the node, one direction."""
    aliases: tuple[str, ...] = ()

    @property
    def switched(self) -> bool:
        """Whether the GPUs of a node are linked by NVLink instead of sharing the host's PCIe."""
        return self.link > PCIE


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", int(79.25 * GIB), 2.039e12, 312e12, 312e12, 300e9, ("a100_sxm", "A100 80GB", "NVIDIA A100-SXM4-80GB")),
        Gpu("H20", int(95.22 * GIB), 4.0e12, 148e12, 296e12, 450e9, ("h20_sxm", "H20 96GB", "NVIDIA H20")),
        Gpu("H100", int(79.18 * GIB), 3.35e12, 989e12, 1979e12, 450e9, ("h100_sxm", "H100 80GB", "NVIDIA H100 80GB HBM3")),
        Gpu("H200", int(139.80 * GIB), 4.8e12, 989e12, 1979e12, 450e9, ("h200_sxm", "H200 141GB", "NVIDIA H200")),
        Gpu("L40S", int(44.42 * GIB), 864e9, 362e12, 733e12, 32e9, ("L40S 48GB", "NVIDIA L40S")),
        Gpu("B200", int(178.35 * GIB), 8.0e12, 2250e12, 4500e12, 900e9, ("b200_sxm", "B200 180GB", "NVIDIA B200")),
    )
}

_UNITS = {"mem": ("gib",), "bw": ("tb/s", "tbs"), "tflops": (), "fp8": (), "link": ("gb/s", "gbs")}
_SCALE = {"mem": float(GIB), "bw": 1e12, "tflops": 1e12, "fp8": 1e12, "link": 1e9}
_FIELD = {"mem": "memory_bytes", "bw": "bandwidth", "tflops": "bf16", "fp8": "fp8", "link": "link"}


def gpu_of(text: str) -> Gpu:
    """Parse a GPU name or specification.

    Args:
        text: "H100", "h200_sxm" or torch's device name, in any case; or `name:mem=48GiB,bw=0.96TB/s,tflops=181`, optionally with `fp8=`
            (dense TFLOPS; default: as bf16) and `link=` (GB/s to the other GPUs, one direction; default 32, PCIe 4.0). After the name of
            a known GPU, omitted values are that GPU's: `h20:mem=139.8,bw=4.8`.

    Raises:
        ValueError: unknown or malformed; one line that lists the known names or the syntax.
    """
    name, colon, numbers = text.partition(":")
    found = next((gpu for gpu in GPUS.values() if plain(name) in {plain(alias) for alias in (gpu.name, *gpu.aliases)}), None)
    if not colon:
        if found is None:
            raise ValueError(f"unknown GPU {text!r}. Known: {', '.join(GPUS)}; write any other as {OWN}")
        return found
    given: dict[str, float] = {}
    for part in numbers.split(","):
        key, _, value = part.strip().lower().partition("=")
        unit = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([a-z/]*)", value)
        if key not in _FIELD or unit is None or unit[2] not in ("", *_UNITS[key]):
            raise ValueError(f"GPU {text!r}: cannot read {part!r}; write {OWN}, plus fp8=.. (TFLOPS) and link=..GB/s if known")
        given[key] = float(unit[1])
    missing = [key for key in ("mem", "bw", "tflops") if key not in given]
    if not name or any(value <= 0 for value in given.values()) or (missing and found is None):
        raise ValueError(f"GPU {text!r}: needs a name and positive mem, bw and tflops; write {OWN}")
    fields = {_FIELD[key]: value * _SCALE[key] for key, value in given.items()}
    if "memory_bytes" in fields:
        fields["memory_bytes"] = int(fields["memory_bytes"])
    if found is not None:
        return replace(found, name=text, aliases=(), **fields)  # type: ignore[arg-type]
    return Gpu(name, **({"fp8": fields["bf16"], "link": 32e9} | fields))  # type: ignore[arg-type]
