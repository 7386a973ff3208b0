"""Position embeddings of a Vision Transformer, fitted to images of another size."""

import math

import jax
import numpy as np

POSITIONS = "position_embedding"  # What leaves of this kind are called.


def resized(positions_1xTxD: np.ndarray, tokens: int, prefix: int) -> np.ndarray:
    """Returns the embeddings of a square grid of patches, resized to another one.

    What is no square, or has the right size, is returned as it is.

    Args:
        positions_1xTxD: Of the class token, if there is one, and of the patches.
        tokens: Wanted, T.
        prefix: How many are of no patch: 1 with a class token, otherwise 0.

    Source: timm/layers/pos_embed.py, `resample_abs_pos_embed`: bicubic, antialiased.
    """
    if positions_1xTxD.ndim != 3:
        return positions_1xTxD
    counts = positions_1xTxD.shape[1] - prefix, tokens - prefix
    old, new = (math.isqrt(max(count, 0)) for count in counts)
    if old == new or (old**2, new**2) != counts or not old:
        return positions_1xTxD
    first = positions_1xTxD[:, :prefix]
    grid = positions_1xTxD[0, prefix:].reshape(old, old, -1)
    wide = np.asarray(grid, np.promote_types(grid.dtype, np.float32))
    found = jax.image.resize(wide, (new, new, grid.shape[-1]), "bicubic")
    found = np.asarray(found, grid.dtype).reshape(1, new**2, -1)
    return np.concatenate([first, found], axis=1)
