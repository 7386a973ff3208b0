"""Position embeddings of a Vision Transformer, fitted to images of another size."""

import math

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
    shares = _shares(old, new)
    found = np.einsum("ih,jw,hwd->ijd", shares, shares, np.asarray(grid, np.float64))
    found = found.astype(grid.dtype).reshape(1, new**2, -1)
    return np.concatenate([first, found], axis=1)


def _shares(old: int, new: int) -> np.ndarray:
    """Returns what each of the old places gives to each of the new ones, [new, old].

    On the host, without a compiled program, and exact: `jax.image.resize` is neither.
    Source: Keys 1981, equation 15, widened where places become fewer.
    """
    step = old / new
    centres = (np.arange(new)[:, None] + 0.5) * step
    far = np.abs(np.arange(old) + 0.5 - centres) / max(step, 1)
    near = (1.5 * far - 2.5) * far**2 + 1
    beyond = ((-0.5 * far + 2.5) * far - 4) * far + 2
    shares = np.where(far < 1, near, np.where(far < 2, beyond, 0))
    return shares / shares.sum(axis=1, keepdims=True)
