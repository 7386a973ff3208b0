"""Pictures of segmentation: images, their masks, and what was predicted."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from finetune_jax.data.augmentation.masks import IGNORED, palette
from finetune_jax.report.plots import shortened

# Of one image, and of the names of the rows, in inches.
SIDE_IN, LEFT_IN, LEGEND_IN = 1.4, 0.8, 0.25
ROWS = ("image", "true", "predicted")
COLUMNS, MOST_NAMED = 6, 24


def segments_figure(
    images: np.ndarray,
    masks: np.ndarray,
    predicted: np.ndarray,
    names: Sequence[str],
    classes: Sequence[str],
) -> Figure:
    """Returns a picture: a column an example, with its image, mask and predicted mask.

    Ignored pixels are white.

    Args:
        images: uint8 [N, H, W, C], C 1 or 3.
        masks: uint8 [N, H, W], class indices.
        predicted: Predicted class index of each pixel.
        names: Names of the examples.
        classes: Names of the pixels' classes.
    """
    count, colours = len(images), palette(len(classes))
    there = [k for k in range(len(classes)) if ((masks == k) | (predicted == k)).any()]
    legend_in = LEGEND_IN * -(-min(len(there) + 1, MOST_NAMED) // COLUMNS) + 0.2
    figure = Figure(
        figsize=(LEFT_IN + SIDE_IN * count, SIDE_IN * len(ROWS) + legend_in + 0.3),
        layout="constrained",
    )
    grid = figure.subplots(len(ROWS), count, squeeze=False)
    shown = (np.broadcast_to(images, (*images.shape[:3], 3)), masks, predicted)
    for panels, row, pictures in zip(grid, ROWS, shown):
        for panel, picture in zip(panels, pictures):
            rgb = colours[picture] if picture.ndim == 2 else picture
            panel.imshow(rgb, interpolation="nearest")
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_color("#999999")
        panels[0].set_ylabel(row, fontsize=9)
    for panel, name in zip(grid[0], names):
        panel.set_title(shortened(name, 20), fontsize=7, parse_math=False)
    patches = [
        Patch(facecolor=colours[k] / 255, edgecolor="#999999", label=label)
        for k, label in [
            *((k, shortened(classes[k], 20)) for k in there[: MOST_NAMED - 1]),
            (IGNORED, "ignored"),
        ]
    ]
    figure.legend(
        handles=patches,
        loc="outside lower center",
        ncols=COLUMNS,
        frameon=False,
        fontsize=8,
    )
    return figure


def for_page(
    images: np.ndarray,
    masks: np.ndarray,
    predicted: np.ndarray,
    names: Sequence[str],
    classes: Sequence[str],
) -> dict[str, Any]:
    """Returns the images and masks of a page, with the colours of the classes.

    Args:
        images: uint8 [N, H, W, C], C 1 or 3.
        masks: uint8 [N, H, W], class indices.
        predicted: Predicted class index of each pixel.
        names: Names of the examples.
        classes: Names of the pixels' classes.
    """
    colours = palette(len(classes))
    there = [k for k in range(len(classes)) if ((masks == k) | (predicted == k)).any()]
    known = [(classes[k], k) for k in there[:MOST_NAMED]]
    ignored = [("ignored", IGNORED)] if (masks == IGNORED).any() else []
    return {
        "legend": [
            (name, "#" + bytes(colours[k].tolist()).hex())
            for name, k in [*known, *ignored]
        ],
        "cards": [
            (name, list(zip(ROWS, (image, colours[mask], colours[found]))))
            for name, image, mask, found in zip(names, images, masks, predicted)
        ],
    }
