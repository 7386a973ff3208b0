"""BERT encoders: BERT itself, MiniLM and DistilBERT.

Stages before `pool` take and return {'hidden': [B, T, D], 'mask': [B, T]}; `pool` returns
one vector for each text. No position attends to one that the mask leaves out.

Source: Devlin et al. 2018; Wang et al. 2020 (MiniLM); Sanh et al. 2019 (DistilBERT). The
numbers are those of the published config.json files.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from finetune_jax.core import registry
from finetune_jax.core.errors import raise_if
from finetune_jax.models.layers.activations import HIDDEN_ACTIVATIONS
from finetune_jax.models.layers.attention import Attention, argument_problems
from finetune_jax.models.layers.heads import ACTIVATIONS, Head, make_head
from finetune_jax.models.layers.stages import MaskedMean, Staged, layer_norm, staged

INITIAL = nn.initializers.normal(0.02)
# Poolings of the tokens of a text; 'none' keeps one vector for each token.
POOLS = ("cls", "mean", "none")


class Embeddings(nn.Module):
    """The normalised sum of the embeddings of token, position and sentence.

    Attributes:
        width: Width of the vectors.
        vocabulary: Number of tokens in the vocabulary.
        places: Number of positions.
        types: Number of sentence embeddings; 0 has none.
        dropout: Rate of dropout.
        epsilon: Number added to the variance in the LayerNorm.
    """

    width: int
    vocabulary: int
    places: int
    types: int
    dropout: float
    epsilon: float = 1e-12
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self):
        """Makes the embedding tables and the LayerNorm."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        table = partial(nn.Embed, features=self.width, embedding_init=INITIAL, **kinds)
        self.words = table(self.vocabulary)
        self.positions = table(self.places)
        if self.types:
            self.sentences = table(self.types)
        self.norm = layer_norm(epsilon=self.epsilon, **kinds)
        self.drop = nn.Dropout(self.dropout)

    def __call__(
        self, x: Mapping[str, jax.Array], *, train: bool
    ) -> dict[str, jax.Array]:
        """Returns the input of the first block.

        Args:
            x: 'ids', 'types' (of the sentence, from 0) and 'mask' [B, T].
            train: Whether dropout runs.
        """
        hidden_BxTxD = self.words(x["ids"])
        if self.types:
            hidden_BxTxD += self.sentences(x["types"])
        hidden_BxTxD += self.positions(jnp.arange(x["ids"].shape[1]))[None]
        hidden_BxTxD = self.drop(self.norm(hidden_BxTxD), deterministic=not train)
        return {"hidden": hidden_BxTxD, "mask": x["mask"]}


class Block(nn.Module):
    """Attention and two dense layers, each added to its input and normalised.

    Attributes:
        width: Width of the vectors.
        heads: Number of attention heads.
        hidden: Width between the dense layers.
        dropout: Rate of dropout.
        attention_dropout: Rate of dropout of the attention weights.
        remat: Whether the backward pass computes the block again instead of keeping it.
        activation: Activation between the dense layers, a key of `HIDDEN_ACTIVATIONS`.
        epsilon: Number added to the variance in the LayerNorms.
    """

    width: int
    heads: int
    hidden: int
    dropout: float
    attention_dropout: float
    remat: bool
    activation: str = "gelu"
    epsilon: float = 1e-12
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self):
        """Makes the layers of the block."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = partial(nn.Dense, kernel_init=INITIAL, **kinds)
        norm = partial(layer_norm, epsilon=self.epsilon, **kinds)
        self.attention = Attention(
            self.heads, self.attention_dropout, INITIAL, "output", **kinds
        )
        self.attention_norm, self.dense_norm = norm(), norm()
        self.dense1, self.dense2 = dense(self.hidden), dense(self.width)
        self.drop1, self.drop2 = nn.Dropout(self.dropout), nn.Dropout(self.dropout)

    def __call__(
        self, x: Mapping[str, jax.Array], *, train: bool
    ) -> dict[str, jax.Array]:
        """Returns the input of the next block."""

        def layers(block, hidden_BxTxD, mask_BxT):
            y_BxTxD = block.attention(hidden_BxTxD, mask_BxT, train=train)
            y_BxTxD = block.drop1(y_BxTxD, deterministic=not train)
            hidden_BxTxD = block.attention_norm(y_BxTxD + hidden_BxTxD)
            activation = HIDDEN_ACTIVATIONS[block.activation]
            y_BxTxF = activation(block.dense1(hidden_BxTxD))
            y_BxTxD = block.drop2(block.dense2(y_BxTxF), deterministic=not train)
            return block.dense_norm(y_BxTxD + hidden_BxTxD)

        run = nn.remat(layers) if self.remat else layers
        return {"hidden": run(self, x["hidden"], x["mask"]), "mask": x["mask"]}


class FirstToken(nn.Module):
    """A dense layer on the first token, whose output is the feature of the text.

    Attributes:
        activation: Activation after the layer: 'tanh' in BERT, 'relu' in DistilBERT.
    """

    activation: str
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Mapping[str, jax.Array], *, train: bool) -> jax.Array:
        """Returns features [B, D]."""
        del train
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        first_BxD = x["hidden"][:, 0]
        dense = nn.Dense(
            first_BxD.shape[-1], kernel_init=INITIAL, name="dense", **kinds
        )
        return ACTIVATIONS[self.activation](dense(first_BxD))


class TokenHead(nn.Module):
    """The common head, applied to each token.

    Attributes:
        inner: The head, which shares its parameters with this stage.
    """

    inner: Head

    def setup(self):
        """Gives the parameters of the head the names of this stage."""
        nn.share_scope(self, self.inner)

    def __call__(self, x: Mapping[str, jax.Array], *, train: bool) -> jax.Array:
        """Returns logits [B, T, K]."""
        hidden_BxTxD = x["hidden"]
        *places, width = hidden_BxTxD.shape
        logits = self.inner(hidden_BxTxD.reshape(-1, width), train=train)
        return logits.reshape(*places, -1)


def _bert(
    *,
    classes: int,
    head: Mapping[str, Any],
    layers: int,
    width: int,
    heads: int,
    hidden: int,
    vocabulary: int = 30522,
    positions: int = 512,
    types: int = 2,
    pool: str = "cls",
    activation: str = "tanh",
    hidden_activation: str = "gelu",
    epsilon: float = 1e-12,
    dropout: float = 0.1,
    attention_dropout: float = 0.1,
    remat: bool = False,
    **kinds: Any,
) -> Staged:
    """Returns an encoder; `MODELS` has the sizes by name.

    Raises:
        UserError: Lists every argument that is out of range.
    """
    registry.choose(dict.fromkeys(POOLS), pool, "config.model.pool")
    registry.choose(ACTIVATIONS, activation, "config.model.activation")
    where = "config.model.hidden_activation"
    registry.choose(HIDDEN_ACTIVATIONS, hidden_activation, where)
    sizes = {
        "layers": layers, "width": width, "heads": heads, "hidden": hidden,
        "vocabulary": vocabulary, "positions": positions,
    }  # fmt: skip
    problems = [
        f"config.model.{name}: {size}; 1 or more is needed"
        for name, size in sizes.items()
        if size < 1
    ]
    rates = {"dropout": dropout, "attention_dropout": attention_dropout}
    problems += argument_problems(width, max(heads, 1), epsilon, **rates)
    if types < 0:
        problems.append(f"config.model.types: {types}; 0 or more is needed")
    raise_if(problems, "config.model does not fit:")
    common = {"dropout": dropout, "epsilon": epsilon, **kinds}
    embeddings = Embeddings(
        width, vocabulary, positions, types, name="embeddings", **common
    )
    options = {"attention_dropout": attention_dropout, "remat": remat, **common}
    options["activation"] = hidden_activation
    blocks = [
        Block(width, heads, hidden, name=f"block{index + 1}", **options)
        for index in range(layers)
    ]
    if pool == "none":
        last = TokenHead(make_head(head, classes=classes, **kinds), name="head")
        return Staged((embeddings, *blocks, last), **kinds)
    pooled: nn.Module = MaskedMean(name="pool")
    if pool == "cls":
        pooled = FirstToken(activation, name="pool", **kinds)
    return staged([embeddings, *blocks, pooled], head, classes=classes, **kinds)


_MINILM = {"width": 384, "heads": 12, "hidden": 1536}
_BASE = {"width": 768, "heads": 12, "hidden": 3072}
MODELS = {
    "bert_base": partial(_bert, layers=12, **_BASE),
    "bert_large": partial(_bert, layers=24, width=1024, heads=16, hidden=4096),
    "minilm_l6": partial(_bert, layers=6, **_MINILM),
    "minilm_l12": partial(_bert, layers=12, **_MINILM),
    "distilbert_base": partial(_bert, layers=6, types=0, activation="relu", **_BASE),
}
