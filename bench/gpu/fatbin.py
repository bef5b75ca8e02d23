"""Blank the GPU code in a CUDA shared library that one architecture does not need, so that the file compresses well.

Law: machine code runs only on its own major architecture. An sm_90 device uses the sm_90 image of a fat binary or, where there is none,
compiles its PTX of at most 90; exactly these are kept. Everything else of the image bytes becomes zeros: the file keeps its size and
layout, so symbols, relocations and offsets are untouched. Work on a copy: what is blanked is gone.

Format (CUDA binary utilities; read off CUDA 12 and 13 libraries). A fat binary is
    header   u32 magic 0xBA55ED50, u16 version 1, u16 header size 16, u64 size of the images that follow
    images   u16 kind (1 PTX, 2 machine code), u16 -, u32 image header size, u64 payload size, ..., u32 architecture at byte 28
Architectures read 80, 90, 100, ...; sm_90 and sm_90a both read 90. Cost: one pass over the file, which is held in memory.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

MAGIC = struct.pack("<I", 0xBA55ED50)
HEADER_SIZE = 16
ARCH_OFFSET = 28
PTX, MACHINE_CODE = 1, 2


@dataclass(frozen=True, slots=True)
class Image:
    """One piece of GPU code: `start` and `size` of its payload in the file, bytes."""

    kind: int
    arch: int
    start: int
    size: int

    @property
    def label(self) -> str:
        """As people write it: sm_90, PTX_80."""
        return f"{ {PTX: 'PTX', MACHINE_CODE: 'sm'}.get(self.kind, f'kind{self.kind}') }_{self.arch}"


@dataclass(slots=True)
class Report:
    """Bytes by label, before and after; `bare`: fat binaries that are left with nothing for the architecture."""

    found: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    bare: int = 0

    def lines(self) -> list[str]:
        """One line for each architecture."""
        rows = [f"{name:8} {self.found[name] / 2**20:8.1f} MiB, kept {self.kept[name] / 2**20:8.1f} MiB" for name in sorted(self.found)]
        return [*rows, f"fat binaries left with nothing: {self.bare}"]


def fat_binaries(data: bytes | bytearray) -> Iterator[list[Image]]:
    """The images of each fat binary in a library, in order. The magic number occurring by chance is passed over."""
    at = data.find(MAGIC)
    while at >= 0:
        if at + HEADER_SIZE > len(data):
            return
        version, header, size = struct.unpack_from("<HHQ", data, at + 4)
        end = at + header + size
        if version != 1 or header != HEADER_SIZE or end > len(data):
            at = data.find(MAGIC, at + 4)
            continue
        images, image = [], at + header
        while image + ARCH_OFFSET + 4 <= end:
            kind, _, image_header, payload = struct.unpack_from("<HHIQ", data, image)
            if image_header == 0:
                break
            images.append(Image(kind, struct.unpack_from("<I", data, image + ARCH_OFFSET)[0], image + image_header, payload))
            image += image_header + payload
        yield images
        at = data.find(MAGIC, end)


def is_needed(image: Image, siblings: Sequence[Image], arch: int) -> bool:
    """Whether a device of `arch` could ever use the image; `siblings`: all images of its fat binary."""
    if image.kind == MACHINE_CODE:
        return image.arch == arch
    compiled = any(one.kind == MACHINE_CODE and one.arch == arch for one in siblings)
    return image.kind == PTX and image.arch <= arch and not compiled


def strip(data: bytearray, arch: int) -> Report:
    """Blank in place what `arch` does not need; returns what there was and what is left."""
    report = Report()
    for images in list(fat_binaries(data)):
        kept = [one for one in images if is_needed(one, images, arch)]
        report.bare += bool(images) and not kept
        for one in images:
            report.found[one.label] += one.size
            if one in kept:
                report.kept[one.label] += one.size
            else:
                data[one.start : one.start + one.size] = bytes(one.size)
    return report


def remaining(data: bytes | bytearray) -> Counter[str]:
    """Bytes by label of the images that hold anything but zeros: what a listing after stripping shows."""
    left: Counter[str] = Counter()
    for images in fat_binaries(data):
        for one in images:
            if any(data[one.start : one.start + one.size]):
                left[one.label] += one.size
    return left
