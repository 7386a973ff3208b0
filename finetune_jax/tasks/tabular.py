"""Tables: numbers and categories in a row; one class, or one number, each."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.core.errors import UserError
from finetune_jax.data.spec import DataSpec
from finetune_jax.models import ft_transformer, model_of, tabular
from finetune_jax.tasks.components.single_model import Answering, make_answer
from finetune_jax.tasks.components.targets import logits_asked
from finetune_jax.tasks.task import Mode

# Kinds of data and of labels.
ACCEPTS = (("tables", "classes"), ("tables", "numbers"))
# By what `config.data.labels` says.
METRICS = {
    "classes": ("accuracy", "loss", "roc_auc", "normalised_entropy", "f1_macro"),
    "numbers": ("mse", "mae", "r2"),
}
MODELS = {**tabular.MODELS, **ft_transformer.MODELS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tabular(Answering):
    """Answers rows of tables."""

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
        count = len(self.data.inputs.features)
        bits_BxF, categories_BxT = rows_BxF[:, :count], rows_BxF[:, count:]
        numbers_BxF = jax.lax.bitcast_convert_type(bits_BxF, jnp.float32)
        dtype = self.models[""].param_dtype  # type: ignore[attr-defined]
        return {"numbers": numbers_BxF.astype(dtype), "categories": categories_BxT}


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
    if model["name"] not in MODELS:
        raise UserError(
            f"config.model.name: {model['name']!r} takes no tables; {', '.join(MODELS)} do"
        )
    answer = make_answer(
        data,
        loss=loss,
        loss_args=loss_args,
        label_smoothing=label_smoothing,
        class_weights=class_weights,
        top_k=top_k,
        metrics=metrics,
        defaults=METRICS,
    )
    module = model_of(
        model,
        classes=logits_asked(model["classes"], answer),
        precision=precision,
        numbers=len(data.inputs.features),
        fields=data.inputs.fields,
    )
    return Tabular(models={"": module}, data=data, answer=answer)
