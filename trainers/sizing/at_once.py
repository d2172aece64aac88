"""How much the engine and the losses take at once, which plans count as well.

Numbers alone: what computes imports them, and so they are part of a result's identity, as the arithmetic of plans is not.
"""

CHUNK_ELEMENTS = 2**26
"""Logits of one model held at once: 256 MiB in fp32."""
BLOCK = 8192
"""Rows of a head's gradient that are made at once where they are added to others."""
CELLS = 8192
"""Prompts that are read at once, times the longest one's tokens."""
NARROWEST = 128
"""Positions that widths of graphs go by, or an eighth of the power of two below: a graph for each."""
FEWEST_ROWS = 8
"""Side by side for which it is worth to have linear layers in the order in which a processor multiplies faster."""
LARGEST_COPY = 2**30
"""Bytes of all such copies: a model whose copies take more is left as it is, since there may be no room. Not what is free at
that moment: responses would then be others by rounding from one run to the next."""
