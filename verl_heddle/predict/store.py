"""Bytes that a predictor is kept in beside a checkpoint, and the one error when they cannot be used.

Layout: magic, format version, length of the header, crc32 of all that follows; the header is JSON; the arrays follow as raw little-endian
bytes in the header's order; header and arrays are compressed together. No pickle: a checkpoint from elsewhere must not run code.
"""

from __future__ import annotations

import json
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC = b"heddle-predict\n"

FORMAT = 1
"""Version of the layout and of what the header means; other versions are refused."""

MAX_BYTES = 2**31
"""Largest unpacked state accepted: ten times that of full tables; a damaged length must not ask for all memory."""

_HEAD = struct.Struct("<IIQ")  # format, crc32 of the packed body, length of the unpacked header


class StateError(ValueError):
    """A stored predictor that cannot be used, with what is wrong in one line. The remedy is a cold start."""


def pack(header: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> bytes:
    """Header and arrays as bytes."""
    contents = [(name, np.ascontiguousarray(array)) for name, array in arrays.items()]
    listed = [[name, array.dtype.newbyteorder("<").str, list(array.shape)] for name, array in contents]
    text = json.dumps({"header": header, "arrays": listed}, allow_nan=False).encode()
    body = zlib.compress(text + b"".join(array.astype(array.dtype.newbyteorder("<")).tobytes() for _, array in contents), 1)
    return MAGIC + _HEAD.pack(FORMAT, zlib.crc32(body), len(text)) + body


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Counterpart of `pack`.

    Raises:
        StateError: not such bytes, another version, cut off or damaged.
    """
    start = len(MAGIC) + _HEAD.size
    if not data.startswith(MAGIC) or len(data) < start:
        raise StateError("not a stored predictor")
    version, check, length = _HEAD.unpack_from(data, len(MAGIC))
    if version != FORMAT:
        raise StateError(f"stored in format {version}, this is format {FORMAT}")
    body = data[start:]
    if zlib.crc32(body) != check:
        raise StateError("damaged or cut off (checksum differs)")
    try:
        plain = zlib.decompressobj().decompress(body, MAX_BYTES)
        listed = json.loads(plain[:length])
        arrays, at = {}, length
        for name, kind, shape in listed["arrays"]:
            dtype, size = np.dtype(kind), int(np.prod(shape, dtype=np.int64))
            array = np.frombuffer(plain, dtype, size, at).reshape(shape)
            arrays[name] = array.astype(dtype.newbyteorder("="))
            at += array.nbytes
        return listed["header"], arrays
    except (ValueError, KeyError, TypeError, zlib.error) as error:
        raise StateError(f"damaged ({type(error).__name__}: {error})") from error
