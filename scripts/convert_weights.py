"""Writes published weights as an orbax checkpoint in this project's names.

.venv/bin/python scripts/convert_weights.py ADDRESS --model=resnet50 --output=DIR

ADDRESS is one of file:PATH, package:MODULE/PATH, hf:OWNER/REPO[/FILE]. Use the checkpoint
as `--config.init.pretrained=orbax:DIR`, or in any program with orbax. Its `model.json` has
the variant of the network, such as its strides, the class names and the preprocessing.
--model.KEY=VALUE sets an argument of the model, such as a variant that no file beside the
weights has.
"""

import argparse
import ast
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from finetune_jax.core.errors import UserError
from finetune_jax.core.files import write_json
from finetune_jax.core.pytrees import count, named
from finetune_jax.models import make_model
from finetune_jax.training.initial.starting_state import told_of
from finetune_jax.weights.addresses import read_weights
from finetune_jax.weights.layout import recognise
from finetune_jax.weights.merge import load_weights
from finetune_jax.weights.metadata import architecture
from finetune_jax.weights.metadata.labels import names_at
from finetune_jax.weights.metadata.preprocessing import beside
from finetune_jax.weights.prefixes import without_prefix

LAST_BIAS = "params/head/logits/bias"


def converted(
    address: str,
    model: Mapping[str, Any],
    size: int,
    entry: str | None = None,
    accept: Sequence[str] = (),
) -> tuple[dict, dict]:
    """Returns parameters and batch statistics of a model, and the content of `model.json`.

    Args:
        address: Address of the weights.
        model: Name and arguments of the model.
        size: Side of the images in pixels, if the model's shapes depend on it.
        entry: Entry of a checkpoint that has several; None takes the usual one.
        accept: Kinds of numbers that are taken unchanged, as `config.init.accept`.

    Raises:
        UserError: The weights cannot be read, do not fit the model, or were trained for
            another network.
    """
    weights = read_weights(address, entry)
    lacking, notes = architecture.variant(model, address)
    full = {**model, **lacking}
    arguments = {key: value for key, value in full.items() if key != "name"}

    def shapes(classes: int) -> dict:
        module = make_model(
            model["name"], {"head": {}, **arguments}, classes=classes,
            dtype=jnp.float32, param_dtype=jnp.float32,
        )  # fmt: skip
        image = jnp.zeros((1, size, size, 3))
        return jax.eval_shape(
            lambda: module.init(jax.random.key(0), image, train=False)
        )

    names = named(shapes(1))
    weights = without_prefix(weights, names)
    layout = recognise(names, weights.tensors, address)
    described = architecture.Described("--model", "", full, address)
    named_lines = architecture.named(described, weights.arch, ())
    if named_lines is None:
        named_lines = architecture.assumed(described, layout.name)
    numbers = told_of(weights, "float32", accept)
    notes += [*weights.notes, *numbers, *named_lines]
    for note in notes:
        print(note, file=sys.stderr)
    bias = weights.tensors.get(layout.names([LAST_BIAS]).get(LAST_BIAS, ""))
    about = {
        "model": full,
        "labels": weights.class_names or names_at(address),
        "data": beside(address)[0],
    }
    leaves = shapes(1 if bias is None else len(bias))
    return load_weights(leaves, weights, accept=accept), about


def model_arguments(given: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of a model in flags such as --model.padding=same.

    Raises:
        UserError: Lists every other flag.
    """
    found, wrong = {}, []
    for flag in given:
        key, equals, text = flag.partition("=")
        if not key.startswith("--model.") or not equals:
            wrong.append(flag)
            continue
        try:
            found[key.removeprefix("--model.")] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[key.removeprefix("--model.")] = text
    if wrong:
        raise UserError(f"unknown: {' '.join(wrong)}")
    return found


def main() -> None:
    """Reads, converts and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("address")
    parser.add_argument("--model", required=True, help="its name")
    parser.add_argument(
        "--accept", nargs="*", default=(), help="such as nan, as config.init.accept"
    )
    parser.add_argument("--output", required=True, type=pathlib.Path)
    parser.add_argument("--entry", help="such as model_ema; the usual one by default")
    parser.add_argument("--image_size", type=int, default=224)
    arguments, rest = parser.parse_known_args()
    try:
        model = {"name": arguments.model, **model_arguments(rest)}
        if arguments.output.exists():
            raise UserError(f"--output: {arguments.output} exists already")
        variables, about = converted(
            arguments.address, model, arguments.image_size, arguments.entry,
            arguments.accept,
        )  # fmt: skip
        with ocp.PyTreeCheckpointer() as writer:
            writer.save(arguments.output.absolute(), variables)
        write_json(arguments.output / "model.json", about)
    except (UserError, OSError) as error:
        text = str(error).replace("config.init.", "--")
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)
    print(f"{count(variables):,} values in {arguments.output}")


if __name__ == "__main__":
    main()
