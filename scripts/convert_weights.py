"""Writes published weights as an orbax checkpoint in this project's names.

python scripts/convert_weights.py ADDRESS --model=resnet50 --output=DIR

ADDRESS is one of file:PATH, package:MODULE/PATH, hf:OWNER/REPO[/FILE]. What is written
can be used as `--config.init.pretrained=orbax:DIR`, or by any program with orbax. Its
`model.json` keeps the variant of the network, such as its strides, and the class names.
"""

import argparse
import pathlib
import sys

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from finetune_jax.errors import UserError
from finetune_jax.models import make_model
from finetune_jax.pretrained import architecture
from finetune_jax.pretrained.addresses import read_weights
from finetune_jax.pretrained.labels import names_at
from finetune_jax.pretrained.layout import recognise
from finetune_jax.pretrained.load import load_weights
from finetune_jax.pretrained.prefixes import without_prefix
from finetune_jax.trees import count, named
from finetune_jax.workdir import write_json

LAST_BIAS = "params/head/logits/bias"


def converted(
    address: str, model: str, size: int, entry: str | None = None
) -> tuple[dict, dict]:
    """Returns parameters and batch statistics of a model, and the content of `model.json`.

    Args:
        address: Of the weights.
        model: Its name.
        size: Of the images, where the model's shapes depend on it.
        entry: Entry of a checkpoint with several; None takes the usual one.

    Raises:
        UserError: The weights cannot be read, do not fit the model, or were trained for
            another network.
    """
    weights = read_weights(address, entry)
    arguments, notes = architecture.variant(model, address)

    def shapes(classes: int) -> dict:
        module = make_model(
            model, {"head": {}, **arguments}, classes=classes, dtype=jnp.float32,
            param_dtype=jnp.float32,
        )  # fmt: skip
        image = jnp.zeros((1, size, size, 3))
        return jax.eval_shape(
            lambda: module.init(jax.random.key(0), image, train=False)
        )

    names = named(shapes(1))
    weights = without_prefix(weights, names)
    layout = recognise(names, weights.tensors, address)
    described = architecture.Described("--model", "", {"name": model}, address)
    notes += [*weights.notes, *architecture.assumed(described, layout.name)]
    for note in notes:
        print(note, file=sys.stderr)
    bias = weights.tensors.get(layout.names([LAST_BIAS]).get(LAST_BIAS, ""))
    about = {
        "model": {"name": model, **arguments},
        "labels": weights.class_names or names_at(address),
    }
    return load_weights(shapes(1 if bias is None else len(bias)), weights), about


def main() -> None:
    """Reads, converts and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("address")
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True, type=pathlib.Path)
    parser.add_argument("--entry", help="such as model_ema; the usual one by default")
    parser.add_argument("--image_size", type=int, default=224)
    arguments = parser.parse_args()
    try:
        if arguments.output.exists():
            raise UserError(f"--output: {arguments.output} exists already")
        variables, about = converted(
            arguments.address, arguments.model, arguments.image_size, arguments.entry
        )
        with ocp.PyTreeCheckpointer() as writer:
            writer.save(arguments.output.absolute(), variables)
        write_json(arguments.output / "model.json", about)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{count(variables):,} values in {arguments.output}")


if __name__ == "__main__":
    main()
