"""Writes the tables of docs/models.md, from the registries of models and of layouts.

.venv/bin/python scripts/models_page.py

What follows the tables is edited by hand.
"""

import pathlib

import jax
import jax.numpy as jnp

from finetune_jax.core.pytrees import count
from finetune_jax.models import constructors, make_model, stages_of
from finetune_jax.weights.layout import family_module

# Family: (title, inputs of the count, what the page says about it).
FAMILIES = {
    "resnet": ("ResNets", (64, 64, 3), "1000 outputs; published at 224 pixels."),
    "efficientnet_lite": (
        "EfficientNet-Lite",
        (64, 64, 3),
        "1000 outputs; published at 224 (`0`), 240, 260, 280 and 300 pixels (`4`).",
    ),
    "convnext": ("ConvNeXt", (64, 64, 3), "1000 outputs; published at 224 pixels."),
    "vgg": ("VGG", (32, 32, 3), "1000 outputs; published at 224 pixels."),
    "vit": (
        "Vision transformers",
        (224, 224, 3),
        "1000 outputs, 224 pixels. Position embeddings of another size are interpolated.",
    ),
    "resnet_cifar": (
        "Small ResNets",
        (32, 32, 3),
        "10 outputs; for images of 16 to 32 pixels (He et al. 2016, section 4.2).\n"
        "`zoo:resnet20_fashion_mnist` has weights for `resnet20` with one channel.",
    ),
    "bert": (
        "Text encoders",
        (4,),
        "Without the head; `config.model.pool` is `cls`, `mean` or `none`.",
    ),
}
LIBRARIES = (
    "torchvision", "timm", "transformers", "sentence-transformers",
    "efficientnet-lite-pytorch",
)  # fmt: skip
HEADER = """\
# Models

`config.model.name` selects one of these. `.venv/bin/python scripts/models_page.py` writes
the tables from the code.

Parameters are in millions. *Layouts* are the libraries whose weight files are read and
written ([weights.md](weights.md)). *Stages* are the parts of a model, in order, that plans
freeze and train.
"""
PAGE = pathlib.Path(__file__).parents[1] / "docs" / "models.md"
BY_HAND = "## Networks for tables and vectors"


def main() -> None:
    """Writes the tables, and keeps the rest of the page."""
    lines = [HEADER]
    for family, (title, _, text) in FAMILIES.items():
        names = [name for name, (of, _) in constructors().items() if of == family]
        lines += [
            f"## {title}\n\n{text}\n",
            "| model | parameters | stages | layouts |",
        ]
        lines += ["|---|---|---|---|", *map(row, names), ""]
    _, heading, rest = PAGE.read_text().partition(BY_HAND)
    PAGE.write_text("\n".join(lines) + "\n" + heading + rest)


def row(name: str) -> str:
    """Returns the row of a model."""
    family = constructors()[name][0]
    shape = FAMILIES[family][1]
    classes = 10 if family == "resnet_cifar" else 1000
    model = make_model(
        name, {"head": {}}, classes=classes, dtype=jnp.float32, param_dtype=jnp.float32
    )
    inputs = jnp.zeros((1, *shape))
    if family == "bert":
        ids = jnp.zeros((1, *shape), jnp.int32)
        inputs = {"ids": ids, "types": ids, "mask": ids}
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs, train=False))
    params = dict(shapes["params"])
    if family == "bert":
        params.pop("head")
    cells = (
        f"`{name}`",
        f"{count(params) / 1e6:.2f}",
        _stages(name),
        _libraries(family),
    )
    return f"| {' | '.join(cells)} |"


def _stages(name: str) -> str:
    """Returns the stages of a model; a numbered series is named by its ends."""
    found, last = [], ""
    for stage in stages_of(name):
        kind = stage.rstrip("0123456789")
        if kind != stage and kind == last.rstrip("0123456789"):
            found[-1] = f"{found[-1].partition(' to ')[0]} to `{stage}`"
        else:
            found.append(f"`{stage}`")
        last = stage
    return ", ".join(found)


def _libraries(family: str) -> str:
    module = family_module(family)
    words = (
        {word for layout in module.LAYOUTS for word in layout.words} if module else ()
    )
    return ", ".join(library for library in LIBRARIES if library in words)


if __name__ == "__main__":
    main()
