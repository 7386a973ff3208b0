"""Tasks of labelled examples, put together from components."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, final

import jax
import numpy as np

from finetune_jax.data.spec import DataSpec
from finetune_jax.models.modes import Mode
from finetune_jax.tasks.components.model_set import ModelSet
from finetune_jax.tasks.components.targets import Target
from finetune_jax.tasks.components.teachers import Teachers
from finetune_jax.tasks.task import ExampleScores, LossOutput, StepContext, Task


class InputPipeline(Protocol):
    """Turns the examples of a kind of data into inputs of the models."""

    @property
    def data(self) -> DataSpec:
        """Description of the data."""
        ...

    def spec(self, *, training: bool) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shape and dtype of the parts of a batch besides the label."""
        ...

    def example(self) -> Any:
        """Returns one input [1, ...] as the models take it."""
        ...

    def prepare(self, batch: dict, rng: jax.Array, mode: Mode) -> dict:
        """Returns the batch as the models take it: see `Task.prepare`."""
        ...


class Objective(Protocol):
    """A training loss that needs more than the output of the models."""

    def loss(
        self,
        models: ModelSet,
        target: Any,
        variables: Mapping[str, Any],
        batch: dict,
        context: StepContext,
    ) -> LossOutput:
        """Returns the loss of a prepared batch: see `Task.loss`."""
        ...


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedTask(Task):
    """A task whose labels are compared with the output of its models.

    Attributes:
        models: The models.
        inputs: Prepares the inputs.
        target: Has the loss and the metrics.
        objective: Replaces the loss of the target in training.
        teachers: Models that the objective reads.
    """

    models: ModelSet
    inputs: InputPipeline
    target: Target
    objective: Objective | None = None
    teachers: Teachers | None = None

    @property
    def head_kind(self) -> str:  # type: ignore[override]
        """The kind of prediction."""
        return self.target.head_kind

    @property
    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Inputs as the source stores them, and labels."""
        return {**self.inputs.spec(training=False), "label": self.target.label}

    @property
    def train_batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The batch spec in training."""
        return {**self.inputs.spec(training=True), "label": self.target.label}

    def init(self, rng: jax.Array) -> tuple[Any, Any]:
        """Returns random parameters and batch statistics."""
        return self.models.init(rng, self.inputs.example())

    def prepare(self, batch: dict, rng: jax.Array, mode: Mode) -> dict:
        """Returns the batch with inputs as the models take them."""
        return self.inputs.prepare(batch, rng, mode)

    def loss(
        self, variables: Mapping[str, Any], batch: dict, context: StepContext
    ) -> LossOutput:
        """Returns the loss of the objective, or of the target."""
        if self.objective is not None:
            return self.objective.loss(
                self.models, self.target, variables, batch, context
            )
        output, batch_stats = self.models.forward(
            variables,
            batch["inputs"],
            mode=context.mode,
            first=context.first,
            rng=context.rng,
        )
        return self.target.loss(output, batch).replace(batch_stats=batch_stats)

    def outputs(
        self, variables: Mapping[str, Any], batch: dict, *, first: str | None = None
    ) -> dict:
        """Returns the rows from which metrics and records are computed."""
        output, _ = self.models.forward(variables, batch["inputs"], first=first)
        return self.target.outputs(output, batch)

    def serving_outputs(self, outputs: dict) -> dict:
        """Returns the outputs of an exported model."""
        return self.target.serving_outputs(outputs)

    def metrics(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray]
    ) -> dict[str, float]:
        """Returns the metrics of a split; 'loss' is that of the labels alone."""
        return self.target.metrics(outputs, batch)

    def example_scores(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray]
    ) -> ExampleScores:
        """Returns the scores of single examples."""
        # A target outside of the package may have none.
        found = getattr(self.target, "example_scores", None)
        return found(outputs, batch) if found else ExampleScores(scores={})

    def check_splits(self, labels: Mapping[str, np.ndarray]) -> list[str]:
        """Returns the metrics that are undefined on some splits."""
        return self.target.check_splits(labels)

    def records(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray]
    ) -> list[dict]:
        """Returns the prediction for each example."""
        return self.target.records(outputs, batch)


def one_model_task(
    module: Any, inputs: InputPipeline, target: Target
) -> SupervisedTask:
    """Returns the task of one model."""
    models = ModelSet(modules={"": module})
    return SupervisedTask(models=models, inputs=inputs, target=target)
