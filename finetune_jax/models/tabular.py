"""Models of tables: `table_mlp`, `dlrm` and `dcn_v2`. `ft_transformer` has its own file.

They take {'numbers': [B, F], 'categories': [B, T]}: F numbers, and for each of T fields
the row of its embedding. The embeddings are the first stage, `embeddings/FIELD/embedding`.
Sources: Naumov et al. 2019 (DLRM), Wang et al. 2021 (DCN-V2).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from finetune_jax.core.errors import UserError
from finetune_jax.models.layers.heads import check_widths, make_head
from finetune_jax.models.layers.stages import run_stages

# Name and rows of each embedding.
Fields = tuple[tuple[str, int], ...]
# What stands for a table where only the names of stages are asked for.
ANY_FIELDS: Fields = (("field", 3),)


def by_rows(
    key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32
) -> jax.Array:
    """Returns an embedding at random, within 1 / sqrt(rows), as DLRM's code has it."""
    limit = shape[0] ** -0.5
    return jax.random.uniform(key, shape, dtype, -limit, limit)


class Embeddings(nn.Module):
    """A row of numbers for each category; numbers pass.

    Attributes:
        fields: Name and rows of each embedding.
        width: Of a row.
        initialiser: Of the rows.
    """

    fields: Fields
    width: int
    initialiser: Any = by_rows
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @property
    def has_parameters(self) -> bool:
        """Whether there are any fields."""
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
    """Returns numbers and embeddings side by side, [B, F + T D]; an array as it is."""
    if not isinstance(x, Mapping):
        return x
    embedded_BxTxD = x["embedded"]
    flat_BxF = embedded_BxTxD.reshape(embedded_BxTxD.shape[0], -1)
    return jnp.concatenate([x["numbers"], flat_BxF], axis=-1)


class Dense(nn.Module):
    """Dense layers, each with ReLU and dropout.

    Attributes:
        widths: Of the layers.
        dropout: Rate.
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
    """Dense layers that make of the numbers what stands beside the embeddings.

    Attributes:
        widths: Of the layers; the last is that of the embeddings.
    """

    widths: tuple[int, ...]
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Mapping[str, jax.Array], *, train: bool) -> dict:
        """Returns `x` with numbers of the width of the embeddings, [B, D]."""
        layers = Dense(
            self.widths, dtype=self.dtype, param_dtype=self.param_dtype, name="layers"
        )
        return {**x, "numbers": layers(x["numbers"], train=train)}


class Interaction(nn.Module):
    """Products of all pairs of embeddings, and of what the numbers have become.

    Attributes:
        numbers: Whether there are any.
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
        layers: How many.
        rank: Of W, which then is a product of two; None has it whole.
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
    """Dense layers behind, or beside, what was crossed.

    Attributes:
        widths: Of the layers.
        dropout: Rate.
    """

    widths: tuple[int, ...]
    dropout: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Any, *, train: bool) -> jax.Array:
        """Returns features [B, F]."""
        layers = Dense(
            self.widths, self.dropout, self.dtype, self.param_dtype, name="layers"
        )
        if not isinstance(x, Mapping):
            return layers(x, train=train)
        deep_BxF = layers(x["inputs"], train=train)
        return jnp.concatenate([x["crossed"], deep_BxF], axis=-1)


class Tabular(nn.Module):
    """Stages one after the other, then the head.

    Attributes:
        parts: Name of each stage before the head, the module, and its arguments.
        classes: Logits.
        head_arguments: Of the head.
    """

    parts: tuple[tuple[str, Any, tuple[tuple[str, Any], ...]], ...]
    classes: int
    head_arguments: Any = ()
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages in order."""
        return (*(name for name, *_ in self.parts), "head")

    def setup(self):
        """Makes a submodule a stage."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        for name, module, arguments in self.parts:
            own = {} if module is Interaction else kinds
            setattr(self, name, module(**dict(arguments), **own))
        self.head = make_head(dict(self.head_arguments), classes=self.classes, **kinds)

    def __call__(self, x, *, first=None, last=None, train: bool):
        """Returns the output of stage `last` for the input of stage `first`."""
        return run_stages(self, x, first=first, last=last, train=train)


def make_tabular(
    parts: Sequence[tuple[str, Any, Mapping[str, Any]]],
    head: Mapping[str, Any],
    **given,
) -> Tabular:
    """Returns a model of some stages, each (name, module, arguments), and a head."""
    return Tabular(
        parts=tuple((n, module, tuple(own.items())) for n, module, own in parts),
        head_arguments=tuple(sorted(head.items())),
        **given,
    )


def check_table_model(name: str, width: int, dropout: float = 0.0) -> None:
    """Checks what models of tables have in common.

    Raises:
        UserError: It is out of range.
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
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
) -> Tabular:
    """Returns dense layers on numbers and embeddings, a stage each, then the head."""
    del numbers
    check_table_model("table_mlp", width, dropout)
    check_widths("config.model.hidden", hidden)
    layers = [
        (f"stage{index + 1}", Dense, {"widths": (size,), "dropout": dropout})
        for index, size in enumerate(hidden)
    ]
    if not layers:  # The head takes an array.
        layers = [("join", Dense, {"widths": ()})]
    embeddings = ("embeddings", Embeddings, {"fields": fields, "width": width})
    return make_tabular(
        [embeddings, *layers],
        head,
        classes=classes,
        dtype=dtype,
        param_dtype=param_dtype,
    )


def dlrm(
    *,
    classes: int,
    head: Mapping[str, Any],
    numbers: int = 1,
    fields: Fields = ANY_FIELDS,
    width: int = 16,
    bottom: tuple[int, ...] = (64,),
    top: tuple[int, ...] = (128, 64),
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
) -> Tabular:
    """Returns embeddings, dense layers on the numbers, products of all pairs, the top.

    The last bottom layer, of the width of the embeddings, is added to `bottom`.

    Raises:
        UserError: There are no fields, or something is out of range.
    """
    check_table_model("dlrm", width)
    check_widths("config.model.bottom", bottom)
    check_widths("config.model.top", top)
    if not fields:
        raise UserError("config.model.name: 'dlrm' needs categories, the data has none")
    parts: list = [("embeddings", Embeddings, {"fields": fields, "width": width})]
    if numbers:
        parts.append(("bottom", Bottom, {"widths": (*bottom, width)}))
    parts.append(("interaction", Interaction, {"numbers": bool(numbers)}))
    parts.append(("top", Dense, {"widths": tuple(top)}))
    return make_tabular(
        parts, head, classes=classes, dtype=dtype, param_dtype=param_dtype
    )


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
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
) -> Tabular:
    """Returns embeddings, crossing layers, and dense ones behind or beside them.

    Args:
        classes: Logits.
        head: Arguments of the head.
        numbers: That the data has.
        fields: Name and rows of each embedding.
        width: Of the embeddings.
        layers: That cross.
        rank: Of their matrices; 0 has them whole.
        deep: Widths of the dense layers.
        structure: 'parallel' or 'stacked'.
        dropout: Rate behind dense layers.
        dtype: Of the computation.
        param_dtype: Of the parameters.

    Raises:
        UserError: Something is out of range.
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
    crossing = {"layers": layers, "rank": rank or None, "parallel": parallel}
    parts = [
        ("embeddings", Embeddings, {"fields": fields, "width": width}),
        ("cross", Cross, crossing),
        ("deep", Deep, {"widths": tuple(deep), "dropout": dropout}),
    ]
    return make_tabular(
        parts, head, classes=classes, dtype=dtype, param_dtype=param_dtype
    )


MODELS = {"table_mlp": table_mlp, "dlrm": dlrm, "dcn_v2": dcn_v2}
