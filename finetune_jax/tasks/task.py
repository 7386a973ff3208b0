"""The contract of a task.

The module of a task has `make`, which returns the task, and `METRICS`, the names of its
metrics where the config does not give any. `MEMBERS`, if there, says what
`config.model.members` are for the task: 'members', which are trained together, or
'teachers', which are not trained.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

import flax.struct
import jax
import numpy as np

from finetune_jax.models.modes import Mode
from finetune_jax.tasks.components.model_set import ModelSet

if TYPE_CHECKING:
    from finetune_jax.tasks.components.multi_domain import Domains
    from finetune_jax.tasks.components.teachers import Teachers

# Key of the teachers' outputs in a batch.
TEACHER_OUTPUTS = "taught"


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepContext:
    """Arguments of a loss besides variables and batch.

    Attributes:
        mode: How the stages run.
        rng: Random key of the micro-batch; None in losses without dropout.
        progress: Finished share of the phase, in [0, 1).
        first: The stage whose input `batch['inputs']` is; None is the first.
        fixed: Arrays that are read and never updated, such as the teachers' variables.
    """

    mode: Mode
    rng: Any = None
    progress: Any = 0.0
    first: str | None = None
    fixed: Any = None


@final
class LossOutput(flax.struct.PyTreeNode):
    """The loss of one micro-batch; nothing is summed over devices.

    Attributes:
        total: Sum of the loss; the loss of an update is the sum of totals divided by the
            sum of weights.
        weight: See `total`.
        metrics: Further (total, weight) pairs by name.
        batch_stats: Batch statistics of all models after the micro-batch.
    """

    total: jax.Array
    weight: jax.Array
    metrics: dict[str, tuple[jax.Array, jax.Array]]
    batch_stats: Any = flax.struct.field(default_factory=dict)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleScores:
    """Scores of the examples of a split, for the metrics that are means over examples.

    Attributes:
        scores: Scores [N] by the name of the metric that is their mean. Where a metric is
            a mean over parts of examples, such as words, they are scaled to that mean.
        predicted: Predicted class of each example, [N]; None without classes.
        first: Position in the split of the first row of each example, where several rows
            are one example, such as the windows of a question; None if each row is one.
    """

    scores: Mapping[str, np.ndarray]
    predicted: np.ndarray | None = None
    first: np.ndarray | None = None


class Task(abc.ABC):
    """A task: models, loss, outputs and metrics.

    Implementations are final frozen dataclasses made of components; they share code by
    calling functions. 'variables' are {'params': ..., 'batch_stats': ...} of all models.

    Attributes:
        models: The models.
        head_kind: The kind of prediction: 'classes', 'numbers', 'tags', 'spans', 'pixels'.
        teachers: Models that the loss reads and never updates; None without.
        domains: The domains of a multi-domain task; None for one data set.
    """

    models: ModelSet
    head_kind: str
    teachers: "Teachers | None" = None
    domains: "Domains | None" = None

    @property
    @abc.abstractmethod
    def batch_spec(self) -> dict[str, Any]:
        """Shape and dtype of each part of a batch, without the batch axis."""

    @property
    @abc.abstractmethod
    def train_batch_spec(self) -> dict[str, Any]:
        """Batch spec in training, where images have the size that augmentation takes."""

    @abc.abstractmethod
    def init(self, rng: jax.Array) -> tuple[Any, Any]:
        """Returns random parameters and batch statistics."""

    @abc.abstractmethod
    def prepare(self, batch: dict, rng: jax.Array, mode: Mode) -> dict:
        """Returns the batch as the models take it: normalised, in training augmented.

        Args:
            batch: As in `batch_spec`, and 'weight' [B] and 'position' [B], the place of
                each example in the update, from which its random key is derived.
            rng: Key of the update.
            mode: EVALUATION augments nothing.
        """

    @abc.abstractmethod
    def loss(
        self, variables: Mapping[str, Any], batch: dict, context: StepContext
    ) -> LossOutput:
        """Returns the loss of a prepared batch, and training metrics."""

    @abc.abstractmethod
    def outputs(
        self, variables: Mapping[str, Any], batch: dict, *, first: str | None = None
    ) -> dict:
        """Returns arrays of one row per example of a prepared batch, in evaluation.

        Args:
            variables: Variables of all models.
            batch: Prepared. A batch to predict has no 'label'.
            first: The stage whose input `batch['inputs']` is; None is the first.
        """

    @abc.abstractmethod
    def serving_outputs(self, outputs: dict) -> dict:
        """Returns the outputs of an exported model, computed from `outputs`; is traced."""

    @abc.abstractmethod
    def metrics(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray]
    ) -> dict[str, float]:
        """Returns the metrics of a split from the rows of all its examples.

        Args:
            outputs: Outputs of all examples.
            batch: Their 'label', and 'note' if the source has notes; examples of one
                group are consecutive.
        """

    def example_scores(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray]
    ) -> ExampleScores:
        """Returns the scores of single examples; none by default.

        Args:
            outputs: Outputs of all examples.
            batch: Their 'label' and 'note', as `metrics` takes them.
        """
        del outputs, batch
        return ExampleScores(scores={})

    @abc.abstractmethod
    def check_splits(self, labels: Mapping[str, np.ndarray]) -> list[str]:
        """Returns the metrics that are undefined on some splits, given their labels."""

    @abc.abstractmethod
    def records(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray]
    ) -> list[dict]:
        """Returns the prediction for each example, or group of examples.

        All is ready for JSON except 'mask', if there: uint8 [H, W], class indices.
        """
