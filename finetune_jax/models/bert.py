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
from finetune_jax.core.errors import problems_error
from finetune_jax.models.layers.activations import HIDDEN_ACTIVATIONS
from finetune_jax.models.layers.heads import ACTIVATIONS, make_head
from finetune_jax.models.layers.stages import MaskedMean, run_stages

INITIAL = nn.initializers.normal(0.02)
# Poolings of the tokens of a text; 'none' keeps one vector for each token.
POOLS = ("cls", "mean", "none")


def _dense(width: int, kinds: Mapping[str, Any]) -> nn.Dense:
    return nn.Dense(width, kernel_init=INITIAL, **kinds)


def _norm(epsilon: float, kinds: Mapping[str, Any]) -> nn.LayerNorm:
    # The fast variance is a difference of means and loses digits.
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, **kinds)


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
        self.norm = _norm(self.epsilon, kinds)
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


class Attention(nn.Module):
    """Attention of every token to the tokens of its text.

    Attributes:
        heads: Number of heads, a divisor of the width.
        dropout: Rate of dropout of the attention weights.
    """

    heads: int
    dropout: float
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, hidden_BxTxD: jax.Array, mask_BxT: jax.Array, *, train: bool
    ) -> jax.Array:
        """Returns [B, T, D]."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        *places, width = hidden_BxTxD.shape
        parts = (*places, self.heads, width // self.heads)
        query_BxTxNxF, key_BxTxNxF, value_BxTxNxF = (
            nn.Dense(width, kernel_init=INITIAL, name=name, **kinds)(
                hidden_BxTxD
            ).reshape(parts)
            for name in ("query", "key", "value")
        )
        # Sums of exponentials need float32, also after products of lower precision.
        wide = jnp.promote_types(query_BxTxNxF.dtype, jnp.float32)
        score_BxNxTxT = jnp.einsum(
            "btnf,bsnf->bnts", query_BxTxNxF, key_BxTxNxF, preferred_element_type=wide
        )
        score_BxNxTxT *= parts[-1] ** -0.5
        mask_Bx1x1xT = mask_BxT.astype(bool)[:, None, None]
        score_BxNxTxT = jnp.where(mask_Bx1x1xT, score_BxNxTxT, jnp.finfo(wide).min)
        share_BxNxTxT = jax.nn.softmax(score_BxNxTxT, axis=-1)
        share_BxNxTxT = share_BxNxTxT.astype(value_BxTxNxF.dtype)
        drop = nn.Dropout(self.dropout)
        share_BxNxTxT = drop(share_BxNxTxT, deterministic=not train)
        y_BxTxNxF = jnp.einsum("bnts,bsnf->btnf", share_BxNxTxT, value_BxTxNxF)
        output = nn.Dense(width, kernel_init=INITIAL, name="output", **kinds)
        return output(y_BxTxNxF.reshape(hidden_BxTxD.shape))


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
        self.attention = Attention(self.heads, self.attention_dropout, **kinds)
        self.attention_norm = _norm(self.epsilon, kinds)
        self.dense1, self.dense2 = _dense(self.hidden, kinds), _dense(self.width, kinds)
        self.dense_norm = _norm(self.epsilon, kinds)
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
        classes: Number of logits of a token.
        arguments: Arguments of the head, as pairs.
    """

    classes: int
    arguments: Any = ()
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self):
        """Makes the head, which shares its parameters with this stage."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.inner = make_head(dict(self.arguments), classes=self.classes, **kinds)
        nn.share_scope(self, self.inner)

    def __call__(self, x: Mapping[str, jax.Array], *, train: bool) -> jax.Array:
        """Returns logits [B, T, K]."""
        hidden_BxTxD = x["hidden"]
        *places, width = hidden_BxTxD.shape
        logits = self.inner(hidden_BxTxD.reshape(-1, width), train=train)
        return logits.reshape(*places, -1)


class Bert(nn.Module):
    """A text encoder.

    Attributes:
        embeddings_arguments: Arguments of `Embeddings`, as pairs.
        block_arguments: Arguments of `Block`, as pairs.
        layers: Number of blocks.
        pooling: One of `POOLS`.
        activation: Activation of the first token's dense layer.
        classes: Number of logits.
        head_arguments: Arguments of the head, as pairs.
    """

    embeddings_arguments: Any
    block_arguments: Any
    layers: int
    pooling: str
    activation: str
    classes: int
    head_arguments: Any = ()
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages in order."""
        blocks = (f"block{index + 1}" for index in range(self.layers))
        pool = () if self.pooling == "none" else ("pool",)
        return ("embeddings", *blocks, *pool, "head")

    @property
    def vocabulary(self) -> int:
        """Number of tokens in the vocabulary."""
        return dict(self.embeddings_arguments)["vocabulary"]

    @property
    def positions(self) -> int:
        """Number of positions."""
        return dict(self.embeddings_arguments)["places"]

    @property
    def types(self) -> int:
        """Number of sentence embeddings."""
        return dict(self.embeddings_arguments)["types"]

    def setup(self):
        """Makes one submodule for each stage."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.embeddings = Embeddings(**dict(self.embeddings_arguments), **kinds)
        for index in range(self.layers):
            block = Block(**dict(self.block_arguments), **kinds)
            setattr(self, f"block{index + 1}", block)
        if self.pooling == "cls":
            self.pool = FirstToken(self.activation, **kinds)
        elif self.pooling == "mean":
            self.pool = MaskedMean()
        if self.pooling == "none":
            self.head = TokenHead(self.classes, self.head_arguments, **kinds)
        else:
            arguments = dict(self.head_arguments)
            self.head = make_head(arguments, classes=self.classes, **kinds)

    def __call__(self, x, *, first=None, last=None, train: bool):
        """Returns the output of stage `last` for the input of stage `first`."""
        return run_stages(self, x, first=first, last=last, train=train)


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
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
) -> Bert:
    """Returns an encoder; `MODELS` has the sizes by name.

    Raises:
        UserError: Lists every argument that is out of range.
    """
    registry.choose(dict.fromkeys(POOLS), pool, "config.model.pool")
    registry.choose(ACTIVATIONS, activation, "config.model.activation")
    where = "config.model.hidden_activation"
    registry.choose(HIDDEN_ACTIVATIONS, hidden_activation, where)
    _check(
        {
            "layers": layers, "width": width, "heads": heads, "hidden": hidden,
            "vocabulary": vocabulary, "positions": positions,
        },
        {"dropout": dropout, "attention_dropout": attention_dropout},
        types,
        epsilon,
    )  # fmt: skip
    embeddings = {
        "width": width, "vocabulary": vocabulary, "places": positions,
        "types": types, "dropout": dropout, "epsilon": epsilon,
    }  # fmt: skip
    block = {
        "width": width, "heads": heads, "hidden": hidden, "dropout": dropout,
        "attention_dropout": attention_dropout, "remat": remat,
        "activation": hidden_activation, "epsilon": epsilon,
    }  # fmt: skip
    return Bert(
        embeddings_arguments=tuple(embeddings.items()),
        block_arguments=tuple(block.items()),
        layers=layers,
        pooling=pool,
        activation=activation,
        classes=classes,
        head_arguments=tuple(sorted(head.items())),
        dtype=dtype,
        param_dtype=param_dtype,
    )


def _check(
    sizes: Mapping[str, int], rates: Mapping[str, float], types: int, epsilon: float
) -> None:
    problems = [
        f"config.model.{name}: {size}; 1 or more is needed"
        for name, size in sizes.items()
        if size < 1
    ] + [
        f"config.model.{name}: {rate} is not in [0, 1)"
        for name, rate in rates.items()
        if not 0 <= rate < 1
    ]
    heads, width = sizes["heads"], sizes["width"]
    if heads > 0 and width % heads:
        problems.append(f"config.model.heads: {heads} does not divide width={width}")
    if epsilon <= 0:
        problems.append(f"config.model.epsilon: {epsilon} is not above 0")
    if types < 0:
        problems.append(f"config.model.types: {types}; 0 or more is needed")
    if problems:
        raise problems_error("config.model does not fit:", problems)


_MINILM = {"width": 384, "heads": 12, "hidden": 1536}
_BASE = {"width": 768, "heads": 12, "hidden": 3072}
MODELS = {
    "bert_base": partial(_bert, layers=12, **_BASE),
    "bert_large": partial(_bert, layers=24, width=1024, heads=16, hidden=4096),
    "minilm_l6": partial(_bert, layers=6, **_MINILM),
    "minilm_l12": partial(_bert, layers=12, **_MINILM),
    "distilbert_base": partial(_bert, layers=6, types=0, activation="relu", **_BASE),
}
