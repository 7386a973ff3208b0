"""Inputs that are tokenised texts, and checks of the encoders that read them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.core.errors import UserError, raise_if
from finetune_jax.core.registry import closest
from finetune_jax.data.spec import DataSpec
from finetune_jax.models import model_of
from finetune_jax.models.layers.stages import Staged
from finetune_jax.models.modes import Mode
from finetune_jax.models.peft.lora import LoRA

# Embeddings are sometimes larger than the vocabulary, up to a multiple of this.
PADDED_TO = 128


def tokens(inputs_Bx2xT: jax.Array) -> dict[str, jax.Array]:
    """Returns token ids, segment types and the mask as an encoder takes them."""
    ids_BxT, sentence_BxT = inputs_Bx2xT[:, 0], inputs_Bx2xT[:, 1]
    return {
        "ids": ids_BxT,
        "types": jnp.maximum(sentence_BxT - 1, 0),
        "mask": (sentence_BxT > 0).astype(jnp.int32),
    }


def questions(inputs_Bx2xT: jax.Array) -> dict[str, jax.Array]:
    """Returns the same inputs with a mask that is 2 in the passage.

    The passage is the second sentence, without the special token at its end.
    """
    found, sentence_BxT = tokens(inputs_Bx2xT), inputs_Bx2xT[:, 1]
    next_BxT = jnp.pad(sentence_BxT[:, 1:], ((0, 0), (0, 1)))
    is_passage_BxT = (sentence_BxT == 2) & (next_BxT == 2)
    return {**found, "mask": found["mask"] + is_passage_BxT}


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class TextInputs:
    """Tokenised texts [2, T]: token ids, and the sentence of each token.

    Attributes:
        data: Description of the data.
        encode: Returns the inputs of an encoder: `tokens` or `questions`.
    """

    data: DataSpec
    encode: Callable[[jax.Array], dict[str, jax.Array]] = tokens

    def spec(self, *, training: bool) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns token ids and sentences [2, T]."""
        del training
        return {"inputs": jax.ShapeDtypeStruct(self.data.shape, np.dtype(np.int32))}

    def example(self) -> dict[str, jax.Array]:
        """Returns a text of two tokens."""
        return tokens(jnp.ones((1, 2, 2), jnp.int32))

    def prepare(self, batch: dict, rng: jax.Array, mode: Mode) -> dict:
        """Returns the batch with inputs as encoders take them."""
        del rng, mode
        return {**batch, "inputs": self.encode(batch["inputs"])}


def token_model(
    data: DataSpec,
    model: Mapping[str, Any],
    *,
    classes: int,
    precision: str,
    problems: Sequence[str],
) -> nn.Module:
    """Returns a model with logits for each token.

    Args:
        data: Description of the data.
        model: The section `config.model`.
        classes: Number of logits per token.
        precision: 'float32', 'bfloat16' or 'float64'.
        problems: Problems of the config that are known already.

    Raises:
        UserError: The model cannot read the texts, or lists all problems.
    """
    module = model_of(model, classes=classes, precision=precision)
    check_encoder(module, model["name"], data)
    if "pool" in module.stages:  # type: ignore[attr-defined]
        problem = "config.model.pool: 'none' keeps a vector for every token"
        problems = [*problems, problem]
    raise_if(problems, "The task does not fit:")
    return module


def unknown_metrics(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Returns the metrics of a config that a task does not have."""
    return [
        f"config.task.metrics: no {name!r}{closest(str(name), known)}"
        for name in names
        if name not in known
    ]


def embeddings_of(module: Any) -> Any:
    """Returns the first stage of an encoder; None if the model takes no texts."""
    model = module.module if isinstance(module, LoRA) else module
    first = model.parts[0] if isinstance(model, Staged) else None
    return first if hasattr(first, "vocabulary") else None


def check_encoder(module: Any, name: str, data: DataSpec) -> None:
    """Checks that a model can read the texts.

    Args:
        module: The model.
        name: `config.model.name`.
        data: Description of the data.

    Raises:
        UserError: The model is no encoder, has another vocabulary, or too few positions.
    """
    embeddings = embeddings_of(module)
    if embeddings is None:
        raise UserError(f"config.model.name: {name!r} takes no texts; 'minilm_l6' does")
    known, tokens = data.inputs.vocabulary, data.inputs.options.max_tokens
    problems = []
    if not known <= embeddings.vocabulary < known + PADDED_TO:
        problems.append(
            f"config.model.vocabulary: {embeddings.vocabulary} embeddings, but the "
            f"tokenizer knows {known} tokens: it is another model's; see "
            "config.data.tokenizer"
        )
    if tokens > embeddings.places:
        problems.append(
            f"config.data.max_tokens: {tokens}, but {name!r} has {embeddings.places} "
            "positions; longer texts are cut to max_tokens"
        )
    if len(data.inputs.options.text) > max(embeddings.types, 1) and embeddings.types:
        problems.append(
            f"config.model.types: {embeddings.types}, but there are 2 sentences"
        )
    raise_if(problems, "Texts and model do not fit together:")
