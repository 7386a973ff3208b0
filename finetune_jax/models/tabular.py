"""Models of tables: `table_mlp`, `dlrm` and `dcn_v2`. `ft_transformer` has its own file.

They take {'numbers': [B, F], 'categories': [B, T]}: F numbers, and for each of T fields a
row of its embedding. The embeddings are the first stage, `embeddings/FIELD/embedding`.
Sources: Naumov et al. 2019 (DLRM), Wang et al. 2021 (DCN-V2).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from finetune_jax.core.errors import UserError
from finetune_jax.models.layers.heads import check_widths
from finetune_jax.models.layers.stages import Staged, staged

# Name and number of rows of each embedding.
Fields = tuple[tuple[str, int], ...]
# Table of a model that is made only to read the names of its stages.
ANY_FIELDS: Fields = (("field", 3),)


def by_rows(
    key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32
) -> jax.Array:
    """Returns a random embedding within 1 / sqrt(rows), as in DLRM's code."""
    limit = shape[0] ** -0.5
    return jax.random.uniform(key, shape, dtype, -limit, limit)


class Embeddings(nn.Module):
    """An embedding for each category; numbers pass unchanged.

    Attributes:
        fields: Name and number of rows of each embedding.
        width: Width of a row.
        initialiser: Initialiser of the rows.
    """

    fields: Fields
    width: int
    initialiser: Any = by_rows
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @property
    def has_parameters(self) -> bool:
        """Whether the data has categories."""
        return bool(self.fields)

    @nn.compact
    def __call__(self, x: Mapping[str, jax.Array], *, train: bool) -> dict:
        """Returns {'numbers': [B, F], 'embedded': [B, T, D]}."""
        del train
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dtype = self.dtype or self.param_dtype
        found = [
            nn.Embed(
                rows, self.width, embedding_init=self.initialiser, name=field, **kinds
            )(x["categories"][:, place])
            for place, (field, rows) in enumerate(self.fields)
        ]
        batch = x["numbers"].shape[0]
        nothing_BxTxD = jnp.zeros((batch, 0, self.width), dtype)
        return {
            "numbers": x["numbers"].astype(dtype),
            "embedded": jnp.stack(found, axis=1) if found else nothing_BxTxD,
        }


def joined(x: Any) -> jax.Array:
    """Returns numbers and embeddings side by side, [B, F + T D]; arrays unchanged."""
    if not isinstance(x, Mapping):
        return x
    embedded_BxTxD = x["embedded"]
    flat_BxF = embedded_BxTxD.reshape(embedded_BxTxD.shape[0], -1)
    return jnp.concatenate([x["numbers"], flat_BxF], axis=-1)


class Dense(nn.Module):
    """Dense layers, each with ReLU and dropout.

    Attributes:
        widths: Widths of the layers.
        dropout: Rate of dropout.
    """

    widths: tuple[int, ...]
    dropout: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Any, *, train: bool) -> jax.Array:
        """Returns features [B, F]."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x_BxF = joined(x)
        for index, width in enumerate(self.widths):
            x_BxF = nn.relu(nn.Dense(width, name=f"dense{index + 1}", **kinds)(x_BxF))
            if self.dropout:
                x_BxF = nn.Dropout(self.dropout)(x_BxF, deterministic=not train)
        return x_BxF


class Bottom(nn.Module):
    """Dense layers that turn the numbers into one more embedding.

    Attributes:
        widths: Widths of the layers; the last is that of the embeddings.
    """

    widths: tuple[int, ...]
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Mapping[str, jax.Array], *, train: bool) -> dict:
        """Returns `x` with numbers of the width of the embeddings, [B, D]."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        layers = Dense(self.widths, name="layers", **kinds)
        return {**x, "numbers": layers(x["numbers"], train=train)}


class Interaction(nn.Module):
    """Dot products of all pairs of embeddings, that of the numbers included.

    Attributes:
        numbers: Whether the data has numbers.
    """

    numbers: bool
    has_parameters = False

    @nn.compact
    def __call__(self, x: Mapping[str, jax.Array], *, train: bool) -> jax.Array:
        """Returns features [B, D + T (T + 1) / 2], the numbers first.

        Source: Naumov et al. 2019, section 2.1.4; pairs as dlrm_s_pytorch.py orders them.
        """
        del train
        vectors_BxTxD = x["embedded"]
        if self.numbers:
            vectors_BxTxD = jnp.concatenate(
                [x["numbers"][:, None], vectors_BxTxD], axis=1
            )
        products_BxTxT = jnp.einsum("btd,bsd->bts", vectors_BxTxD, vectors_BxTxD)
        one, other = jnp.tril_indices(vectors_BxTxD.shape[1], -1)
        pairs_BxF = products_BxTxT[:, one, other]
        if not self.numbers:
            return pairs_BxF
        return jnp.concatenate([x["numbers"], pairs_BxF], axis=-1)


class Cross(nn.Module):
    """Layers x0 * (W x + b) + x, which multiply features with one another.

    Attributes:
        layers: Number of layers.
        rank: Rank of W as a product of two matrices; None for one full matrix.
        parallel: Whether the input is passed on beside the result.
    """

    layers: int
    rank: int | None
    parallel: bool
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Any, *, train: bool) -> Any:
        """Returns features [B, F], or {'inputs', 'crossed'}, both [B, F].

        Source: Wang et al. 2021, equations 1 and 2.
        """
        del train
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        first_BxF = x_BxF = joined(x)
        width = first_BxF.shape[-1]
        for index in range(1, self.layers + 1):
            inner = x_BxF
            if self.rank is not None:
                name = f"down{index}"
                inner = nn.Dense(self.rank, use_bias=False, name=name, **kinds)(x_BxF)
            layer = nn.Dense(width, name=f"cross{index}", **kinds)
            x_BxF = first_BxF * layer(inner) + x_BxF
        return {"inputs": first_BxF, "crossed": x_BxF} if self.parallel else x_BxF


class Deep(nn.Module):
    """Dense layers after, or parallel to, the crossing layers.

    Attributes:
        widths: Widths of the layers.
        dropout: Rate of dropout.
    """

    widths: tuple[int, ...]
    dropout: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Any, *, train: bool) -> jax.Array:
        """Returns features [B, F]."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        layers = Dense(self.widths, self.dropout, name="layers", **kinds)
        if not isinstance(x, Mapping):
            return layers(x, train=train)
        deep_BxF = layers(x["inputs"], train=train)
        return jnp.concatenate([x["crossed"], deep_BxF], axis=-1)


def check_table_model(name: str, width: int, dropout: float = 0.0) -> None:
    """Checks the arguments that all models of tables have.

    Raises:
        UserError: An argument is out of range.
    """
    check_widths("config.model.width", (width,))
    if not 0 <= dropout < 1:
        raise UserError(f"config.model.dropout: {dropout} is not in [0, 1), for {name}")


def table_mlp(
    *,
    classes: int,
    head: Mapping[str, Any],
    numbers: int = 1,
    fields: Fields = ANY_FIELDS,
    width: int = 16,
    hidden: tuple[int, ...] = (256, 128),
    dropout: float = 0.0,
    **kinds: Any,
) -> Staged:
    """Returns dense layers on numbers and embeddings, each a stage, and the head."""
    del numbers
    check_table_model("table_mlp", width, dropout)
    check_widths("config.model.hidden", hidden)
    layers = [
        Dense((size,), dropout, name=f"stage{index}", **kinds)
        for index, size in enumerate(hidden, start=1)
    ]
    if not layers:  # The head takes an array.
        layers = [Dense((), name="join", **kinds)]
    embeddings = Embeddings(fields, width, name="embeddings", **kinds)
    return staged([embeddings, *layers], head, classes=classes, **kinds)


def dlrm(
    *,
    classes: int,
    head: Mapping[str, Any],
    numbers: int = 1,
    fields: Fields = ANY_FIELDS,
    width: int = 16,
    bottom: tuple[int, ...] = (64,),
    top: tuple[int, ...] = (128, 64),
    **kinds: Any,
) -> Staged:
    """Returns a DLRM: embeddings, bottom layers, dot products, top layers, head.

    `bottom` is followed by one more layer, of the width of the embeddings.

    Raises:
        UserError: The data has no categories, or an argument is out of range.
    """
    check_table_model("dlrm", width)
    check_widths("config.model.bottom", bottom)
    check_widths("config.model.top", top)
    if not fields:
        raise UserError("config.model.name: 'dlrm' needs categories, the data has none")
    parts: list = [Embeddings(fields, width, name="embeddings", **kinds)]
    if numbers:
        parts.append(Bottom((*bottom, width), name="bottom", **kinds))
    parts.append(Interaction(bool(numbers), name="interaction"))
    parts.append(Dense(tuple(top), name="top", **kinds))
    return staged(parts, head, classes=classes, **kinds)


def dcn_v2(
    *,
    classes: int,
    head: Mapping[str, Any],
    numbers: int = 1,
    fields: Fields = ANY_FIELDS,
    width: int = 16,
    layers: int = 3,
    rank: int = 0,
    deep: tuple[int, ...] = (128, 64),
    structure: str = "parallel",
    dropout: float = 0.0,
    **kinds: Any,
) -> Staged:
    """Returns a DCN-V2: embeddings, crossing layers, dense layers, head.

    Args:
        classes: Number of logits.
        head: Arguments of the head.
        numbers: Number of numeric columns in the data.
        fields: Name and number of rows of each embedding.
        width: Width of the embeddings.
        layers: Number of crossing layers.
        rank: Rank of their matrices; 0 for full matrices.
        deep: Widths of the dense layers.
        structure: 'parallel' or 'stacked': place of the dense layers.
        dropout: Rate of dropout after dense layers.
        **kinds: `dtype` and `param_dtype`.

    Raises:
        UserError: An argument is out of range.
    """
    del numbers
    check_table_model("dcn_v2", width, dropout)
    check_widths("config.model.layers", (layers,))
    check_widths("config.model.deep", deep)
    if structure not in ("parallel", "stacked") or rank < 0:
        raise UserError(
            f"config.model: structure {structure!r}, rank {rank}; 'parallel' or 'stacked' "
            "and at least 0 are needed"
        )
    parallel = structure == "parallel"
    parts = (
        Embeddings(fields, width, name="embeddings", **kinds),
        Cross(layers, rank or None, parallel, name="cross", **kinds),
        Deep(tuple(deep), dropout, name="deep", **kinds),
    )
    return staged(parts, head, classes=classes, **kinds)


MODELS = {"table_mlp": table_mlp, "dlrm": dlrm, "dcn_v2": dcn_v2}
