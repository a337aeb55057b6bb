"""PNG files of 16 bits a channel, which Pillow writes in grey alone and reads in colour as their 8 high bits."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # by the header's kind of colour


def low_bytes(data: bytes) -> bytes | None:
    """A PNG file whose high bytes are this one's low bytes: what a reader of 8 bits leaves out of 16.

    A filter of PNG works on each byte of a pixel by itself, so the two bytes of a value may change places in the
    filtered rows.

    Returns:
        None for a file of another kind: not 16 bits, interlaced, or broken.
    """
    if not data.startswith(_SIGNATURE):
        return None
    try:
        chunks = list(_chunks(data))
        width, height, depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", chunks[0][1])
        rows = zlib.decompressobj().decompress(b"".join(body for kind, body in chunks if kind == b"IDAT"))
    except (struct.error, zlib.error, IndexError):
        return None
    length = 1 + 2 * _CHANNELS.get(colour, 0) * width
    if depth != 16 or interlace or len(rows) != height * length:
        return None
    swapped = np.frombuffer(rows, np.uint8).reshape(height, length).copy()
    swapped[:, 1:] = swapped[:, 1:].reshape(height, -1, 2)[..., ::-1].reshape(height, -1)
    kept = [chunk for chunk in chunks if chunk[0] not in (b"IDAT", b"IEND")]
    return _joined([*kept, (b"IDAT", zlib.compress(swapped.tobytes(), 1)), (b"IEND", b"")])


def encode_rgb16(pixels: np.ndarray) -> bytes:
    """A PNG file of (H, W, 3) uint16."""
    height, width, _ = pixels.shape
    rows = np.ascontiguousarray(pixels.astype(">u2")).view(np.uint8).reshape(height, -1)
    rows[1:] -= rows[:-1].copy()  # the filter "up"
    filtered = np.concatenate([np.full((height, 1), 2, np.uint8), rows], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return _joined([(b"IHDR", header), (b"IDAT", zlib.compress(filtered.tobytes())), (b"IEND", b"")])


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and body of each chunk."""
    at = len(_SIGNATURE)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        yield kind, data[at + 8 : at + 8 + length]
        at += length + 12


def _joined(chunks: list[tuple[bytes, bytes]]) -> bytes:
    return _SIGNATURE + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
