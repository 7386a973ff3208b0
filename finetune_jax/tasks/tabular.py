"""Tables: rows of numbers and categories; one class or one number each."""

import dataclasses
from collections.abc import Mapping
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.core.errors import UserError
from finetune_jax.data.spec import DataSpec
from finetune_jax.models import ft_transformer, tabular
from finetune_jax.models.modes import Mode
from finetune_jax.tasks.components.supervised import SupervisedTask, one_model_task
from finetune_jax.tasks.components.targets import (
    TargetOptions,
    class_or_regression_target,
    model_for,
)

# Pairs (kind of data, kind of labels) that the task takes.
ACCEPTS = (("tables", "classes"), ("tables", "numbers"))
# Default metrics for each value of `config.data.labels`.
METRICS = {
    "classes": ("accuracy", "loss", "roc_auc", "normalised_entropy", "f1_macro"),
    "numbers": ("mse", "mae", "r2"),
}
OPTIONS = TargetOptions()
MODELS = {**tabular.MODELS, **ft_transformer.MODELS}


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class TableInputs:
    """Rows of a table.

    Attributes:
        data: Description of the data.
        dtype: Dtype of the parameters, which the models get numbers in.
    """

    data: DataSpec
    dtype: Any

    def spec(self, *, training: bool) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns rows as `TableSpec` has them."""
        del training
        return {"inputs": jax.ShapeDtypeStruct(self.data.shape, np.dtype(np.int32))}

    def example(self) -> dict[str, jax.Array]:
        """Returns the columns of one row of zeros."""
        return self._columns(jnp.zeros((1, *self.data.shape), jnp.int32))

    def prepare(self, batch: dict, rng: jax.Array, mode: Mode) -> dict:
        """Returns the batch with the columns that the models take."""
        del rng, mode
        return {**batch, "inputs": self._columns(batch["inputs"])}

    def _columns(self, rows_BxF: jax.Array) -> dict[str, jax.Array]:
        """Returns {'numbers': [B, F], 'categories': [B, T]} of rows."""
        count = len(self.data.inputs.features)
        bits_BxF, categories_BxT = rows_BxF[:, :count], rows_BxF[:, count:]
        numbers_BxF = jax.lax.bitcast_convert_type(bits_BxF, jnp.float32)
        return {
            "numbers": numbers_BxF.astype(self.dtype),
            "categories": categories_BxT,
        }


def make(
    *,
    data: DataSpec,
    model: Mapping[str, Any],
    precision: str,
    options: TargetOptions = OPTIONS,
) -> SupervisedTask:
    """Returns the task that `config.task` describes.

    Args:
        data: Description of the data.
        model: The section `config.model`.
        precision: 'float32', 'bfloat16' or 'float64'.
        options: Loss and metrics.

    Raises:
        UserError: Something unknown or out of range, data that is no table, or a model
            that takes no tables.
    """
    if model["name"] not in MODELS:
        raise UserError(
            f"config.model.name: {model['name']!r} takes no tables; {', '.join(MODELS)} do"
        )
    target = class_or_regression_target(data, options, METRICS)
    module: Any = model_for(
        target,
        model,
        precision=precision,
        numbers=len(data.inputs.features),
        fields=data.inputs.fields,
    )
    return one_model_task(
        module, TableInputs(data=data, dtype=module.param_dtype), target
    )
