"""The exported part of a run: its best checkpoint, without training state."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from finetune_jax.core.backend import traced_for
from finetune_jax.data.kind import kind_named
from finetune_jax.data.spec import DataSpec
from finetune_jax.models.modes import EVALUATION
from finetune_jax.tasks.components.decision import threshold_of
from finetune_jax.tasks.task import Task
from finetune_jax.weights.metadata.architecture import effective


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """The best checkpoint of a run; low-rank updates are merged into their kernels.

    Attributes:
        task: Task with the model.
        spec: Description of its inputs.
        variables: 'params' and 'batch_stats', on the host.
        step: Step of the checkpoint.
        model: The section `config.model` of the run.
        config: Resolved config of the run, as JSON.
        pretrained: The address of the weights that the run began with, if any.
        weights_sha256: Digests of the files there, by path.
        came_in: Layout of these weights.
        layout: Layout that the user asked for, if any.
        tokenizer: Texts of the tokenizer's files in the workdir, by name; may be empty.
    """

    task: Task
    spec: DataSpec
    variables: Mapping[str, Any]
    step: int
    model: Mapping[str, Any]
    config: str
    pretrained: str | None
    weights_sha256: Mapping[str, str]
    came_in: str | None
    layout: str | None
    tokenizer: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def inputs(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of one example."""
        return self.task.batch_spec["inputs"]

    def about(self) -> dict[str, Any]:
        """Returns the description of the model for other programs, ready for JSON."""
        spec, inputs = self.spec, self.inputs
        found: dict[str, Any] = {
            "model": {"name": self.model["name"], **(effective(self.model) or {})},
            "inputs": {"shape": list(inputs.shape), "dtype": str(inputs.dtype)},
            "outputs": {
                name: [None, *answer.shape[1:]]
                for name, answer in self.answer_shapes().items()
            },
        }
        names = {"labels": spec.class_names, "targets": spec.targets}
        found |= {key: list(values) for key, values in names.items() if values}
        found |= kind_named(spec.kind).serving_inputs(spec)
        if (threshold := threshold_of(self.task)) is not None:
            found["threshold"] = threshold
        return json.loads(json.dumps(found))

    def answer_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of the serving outputs of one example."""
        one = jax.ShapeDtypeStruct((1, *self.inputs.shape), self.inputs.dtype)
        return jax.eval_shape(partial(answer, self.task), self.variables, one)


def for_any_platform(trained: Trained) -> Callable:
    """Returns `answer` for inputs alone, fast on each platform it runs on."""

    def traced(backend: str) -> Callable:
        def traced_answer(variables, inputs):
            with traced_for(backend):
                return answer(trained.task, variables, inputs)

        return traced_answer

    variables = jax.tree.map(jnp.asarray, trained.variables)
    branches = {"cpu": traced("cpu"), "default": traced("gpu")}
    return lambda inputs: jax.lax.platform_dependent(variables, inputs, **branches)


def answer(
    task: Task, variables: Mapping[str, Any], inputs: Any
) -> dict[str, jax.Array]:
    """Returns the serving outputs of a batch, as evaluation computes them.

    Args:
        task: Task with the model.
        variables: 'params' and 'batch_stats'.
        inputs: [B, ...], as stored in a file: images in bytes, not normalised; texts
            [B, 2, T], token ids and sentences.
    """
    batch = task.prepare({"inputs": inputs}, jax.random.key(0), EVALUATION)
    return task.serving_outputs(task.outputs(variables, batch))
