"""Peak memory of a whole process that builds ViT-B's encoder and encodes one image.

One process a way: this project's, ``segment_anything``'s and ``transformers``', in both formats.
"""

from __future__ import annotations

from common import Options, Row
from encoder import memory


def measure(options: Options) -> list[Row]:
    """Gigabytes, and ours over theirs. On the CPU, whatever the device."""
    return memory("vit_b", 512 if options.quick else 1024)
