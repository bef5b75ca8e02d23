"""A palette image as PNG bytes: all that a page needs of an image library. Source: PNG specification (ISO/IEC 15948), colour type 3."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
from numpy.typing import NDArray


def png(pixels: NDArray[np.uint8], palette: NDArray[np.uint8]) -> bytes:
    """`pixels` of shape [rows, columns] index `palette` of shape [256, 3], RGB."""
    rows, columns = pixels.shape
    filtered = np.zeros((rows, columns + 1), dtype=np.uint8)  # each row is led by its filter type, 0: none
    filtered[:, 1:] = pixels
    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)
    parts = [(b"IHDR", header), (b"PLTE", palette.tobytes()), (b"IDAT", zlib.compress(filtered.tobytes(), 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def data_uri(image: bytes) -> str:
    """For the `src` of an image in a page that must stand alone."""
    return "data:image/png;base64," + base64.b64encode(image).decode("ascii")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
