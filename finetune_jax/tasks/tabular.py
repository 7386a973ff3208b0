"""Tables: numbers and categories in a row; one class, or one number, each."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.answers import Answer, logits_asked, make_classes, make_numbers
from finetune_jax.data.spec import DataSpec
from finetune_jax.errors import UserError
from finetune_jax.models import ft_transformer, make_model, tabular
from finetune_jax.tasks.task import Mode, Task

# By what `config.data.labels` says.
METRICS = {
    "classes": ("accuracy", "loss", "roc_auc", "normalised_entropy", "f1_macro"),
    "numbers": ("mse", "mae", "r2"),
}
MODELS = {**tabular.MODELS, **ft_transformer.MODELS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tabular(Task):
    """Answers rows of tables.

    Attributes:
        models: The one model, under ''.
        data: What the examples look like.
        answer: Has losses and metrics.
    """

    models: Mapping[str, nn.Module]
    data: DataSpec
    answer: Answer

    @property
    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Rows as `TableSpec` has them, and what the label is."""
        return {
            "inputs": jax.ShapeDtypeStruct(self.data.shape, np.dtype(np.int32)),
            "label": self.answer.label,
        }

    def init(self, rng: jax.Array) -> tuple[Any, Any]:
        """Returns random parameters, and no batch statistics."""
        x = self._columns(jnp.zeros((1, *self.data.shape), jnp.int32))
        return self.models[""].init(rng, x, train=False)["params"], {}

    def prepare(self, batch: dict, rng: jax.Array, mode: Mode) -> dict:
        """Returns the batch with inputs as models of tables take them."""
        del rng, mode
        return {**batch, "inputs": self._columns(batch["inputs"])}

    def _columns(self, rows_BxF: jax.Array) -> dict[str, jax.Array]:
        """Returns {'numbers': [B, F], 'categories': [B, T]} of rows."""
        assert self.data.table is not None
        count = len(self.data.table.features)
        bits_BxF, categories_BxT = rows_BxF[:, :count], rows_BxF[:, count:]
        numbers_BxF = jax.lax.bitcast_convert_type(bits_BxF, jnp.float32)
        dtype = self.models[""].param_dtype  # type: ignore[attr-defined]
        return {"numbers": numbers_BxF.astype(dtype), "categories": categories_BxT}

    def loss(
        self,
        params: Any,
        batch_stats: Any,
        fixed: Any,
        batch: dict,
        *,
        rng: jax.Array,
        progress: jax.Array,
        mode: Mode,
        first: str | None = None,
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, dict]]:
        """Returns the weighed loss and its metrics as (total, weight) pairs."""
        del fixed, progress
        logits_BxK, batch_stats = self.given(
            params, batch_stats, batch, mode=mode, first=first, rng=rng
        )
        loss, found = self.answer.loss(logits_BxK, batch)
        return loss, (batch_stats, found)

    def outputs(
        self,
        params: Any,
        batch_stats: Any,
        fixed: Any,
        batch: dict,
        *,
        first: str | None = None,
    ) -> dict:
        """Returns what metrics and records are made of."""
        del fixed
        logits_BxK, _ = self.given(params, batch_stats, batch, first=first)
        return self.answer.outputs(logits_BxK)

    def metrics(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray]
    ) -> dict[str, float]:
        """Returns what is to be measured."""
        return self.answer.metrics(outputs, batch)

    def check_splits(self, labels: Mapping[str, np.ndarray]) -> list[str]:
        """Returns what cannot be measured on some splits."""
        return self.answer.check_splits(labels)

    def answers(self, outputs: dict) -> dict:
        """Returns what the labels are answered with."""
        return self.answer.answers(outputs)

    def records(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray]
    ) -> list[dict]:
        """Returns the classes, best first, or the number of each row."""
        del batch
        return self.answer.records(outputs)


def make(
    *,
    data: DataSpec,
    model: Mapping[str, Any],
    precision: str,
    loss: str | None = None,
    loss_args: Mapping[str, Any] = MappingProxyType({}),
    label_smoothing: float = 0.0,
    class_weights: str = "none",
    top_k: int = 5,
    metrics: tuple[str, ...] | None = None,
) -> Tabular:
    """Returns the task that `config.task` describes.

    Args:
        data: What the examples look like.
        model: The section `config.model`.
        precision: 'float32', 'bfloat16' or 'float64'.
        loss: A name in `losses.CLASSIFICATION`, or in `losses.REGRESSION` where labels
            are numbers; None is cross entropy, or the squared error.
        loss_args: Its arguments by name.
        label_smoothing: As `tasks.classify` has it.
        class_weights: Likewise.
        top_k: Likewise.
        metrics: Names in `metrics.METRICS`; None is `METRICS`.

    Raises:
        UserError: Something unknown or out of range, or what is no table, or no model of
            tables.
    """
    if data.table is None:
        raise UserError(
            "config.task.name: 'tabular', but the data is no table; config.data.name is "
            "'criteo', 'csv', 'tsv' or 'parquet' for one"
        )
    arguments = {**model}
    name = arguments.pop("name")
    if name not in MODELS:
        raise UserError(
            f"config.model.name: {name!r} takes no tables; {', '.join(MODELS)} do"
        )
    kind = "numbers" if data.targets else "classes"
    shared = {
        "loss": loss or {"numbers": "mse", "classes": "cross_entropy"}[kind],
        "loss_args": loss_args,
        "class_weights": class_weights,
        "metrics": METRICS[kind] if metrics is None else metrics,
    }
    answer: Answer
    if kind == "numbers":
        answer = make_numbers(data, **shared)
    else:
        answer = make_classes(
            data, label_smoothing=label_smoothing, top_k=top_k, **shared
        )
    module = make_model(
        name,
        arguments,
        classes=logits_asked(arguments.pop("classes"), answer),
        numbers=len(data.table.features),
        fields=data.table.fields,
        dtype=jnp.dtype(precision),
        param_dtype=jnp.dtype("float64" if precision == "float64" else "float32"),
    )
    return Tabular(models={"": module}, data=data, answer=answer)
