"""Pictures of a block mask: text, and PNG without a library for it."""

from __future__ import annotations

import struct
import zlib
from typing import Any

MOST_CHARACTERS = 48  # rows and columns of text
MOST_PIXELS = 1024


def text(kept: Any) -> list[str]:
    """One line per query block. In a large picture a character is several blocks: any kept."""
    return ["".join("█" if x else "·" for x in row) for row in _smaller(kept, MOST_CHARACTERS)]


def png(kept: Any) -> bytes:
    """Kept blocks dark on white, a few pixels each; of a large mask a pixel is several blocks."""
    import numpy as np

    kept = _smaller(kept, MOST_PIXELS)
    cell = max(1, min(8, MOST_PIXELS // max(kept.shape)))
    shade = np.where(kept, 0x30, 0xFF).astype(np.uint8).repeat(cell, 0).repeat(cell, 1)
    if cell >= 4:  # a line between blocks
        shade[cell - 1 :: cell] = shade[:, cell - 1 :: cell] = 0xE0
    height, width = shade.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), shade], axis=1)  # 0: rows as they are
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows.tobytes(), 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


def _smaller(kept: Any, most: int) -> Any:
    import numpy as np

    for axis in (0, 1):
        step = -(-kept.shape[axis] // most)
        at = np.arange(0, kept.shape[axis], step)
        kept = np.logical_or.reduceat(kept, at, axis=axis)
    return kept
