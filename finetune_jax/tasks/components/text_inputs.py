"""What tasks of texts share: texts as encoders take them, and encoders that can."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from finetune_jax.core.errors import UserError, problems_error
from finetune_jax.data.spec import DataSpec
from finetune_jax.models import model_of
from finetune_jax.models.peft.lora import LoRA

# Embeddings are at times larger than the vocabulary, up to a multiple of this.
PADDED_TO = 128


def tokens(inputs_Bx2xT: jax.Array) -> dict[str, jax.Array]:
    """Returns ids and sentences as an encoder takes them."""
    ids_BxT, sentence_BxT = inputs_Bx2xT[:, 0], inputs_Bx2xT[:, 1]
    return {
        "ids": ids_BxT,
        "types": jnp.maximum(sentence_BxT - 1, 0),
        "mask": (sentence_BxT > 0).astype(jnp.int32),
    }


def questions(inputs_Bx2xT: jax.Array) -> dict[str, jax.Array]:
    """Returns ids and sentences likewise; the mask is 2 where the passage is.

    It is the second sentence, without the special token at its end.
    """
    found, sentence_BxT = tokens(inputs_Bx2xT), inputs_Bx2xT[:, 1]
    next_BxT = jnp.pad(sentence_BxT[:, 1:], ((0, 0), (0, 1)))
    is_passage_BxT = (sentence_BxT == 2) & (next_BxT == 2)
    return {**found, "mask": found["mask"] + is_passage_BxT}


def token_model(
    data: DataSpec, model: Mapping[str, Any], *, classes: int, precision: str
) -> tuple[nn.Module, list[str]]:
    """Returns a model that gives each token its logits, and what does not fit it.

    Args:
        data: What the examples look like.
        model: The section `config.model`.
        classes: Logits of a token.
        precision: 'float32', 'bfloat16' or 'float64'.

    Raises:
        UserError: It cannot read the texts.
    """
    module = model_of(model, classes=classes, precision=precision)
    check_encoder(module, model["name"], data)
    problems = []
    if "pool" in module.stages:  # type: ignore[attr-defined]
        problems.append("config.model.pool: 'none' keeps a vector for every token")
    return module, problems


def initial(module: nn.Module, rng: jax.Array) -> tuple[Any, Any]:
    """Returns random parameters of an encoder, and no batch statistics."""
    x = tokens(jnp.ones((1, 2, 2), jnp.int32))
    return module.init(rng, x, train=False)["params"], {}


def check_encoder(module: Any, name: str, data: DataSpec) -> None:
    """Checks that a model can read the texts.

    Args:
        module: The model.
        name: `config.model.name`.
        data: What the examples look like.

    Raises:
        UserError: It is no encoder, has another vocabulary, or too few positions.
    """
    encoder = module.module if isinstance(module, LoRA) else module
    if not hasattr(encoder, "vocabulary"):
        raise UserError(f"config.model.name: {name!r} takes no texts; 'minilm_l6' does")
    known, tokens = data.inputs.vocabulary, data.inputs.options.max_tokens
    problems = []
    if not known <= encoder.vocabulary < known + PADDED_TO:
        problems.append(
            f"config.model.vocabulary: {encoder.vocabulary} embeddings, but the tokenizer "
            f"knows {known} tokens: it is another model's; see config.data.tokenizer"
        )
    if tokens > encoder.positions:
        problems.append(
            f"config.data.max_tokens: {tokens}, but {name!r} has {encoder.positions} "
            "positions; longer texts are cut to max_tokens"
        )
    if len(data.inputs.options.text) > max(encoder.types, 1) and encoder.types:
        problems.append(
            f"config.model.types: {encoder.types}, but there are 2 sentences"
        )
    if problems:
        raise problems_error("Texts and model do not fit together:", problems)
