"""What of a run is exported: its best checkpoint, without what only training needs."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax import config as configs
from finetune_jax.core.backend import traced_for
from finetune_jax.core.errors import UserError
from finetune_jax.data.spec import DataSpec
from finetune_jax.inference.predictor import Predictor
from finetune_jax.models.peft.lora import LoRA, merge
from finetune_jax.tasks.task import EVALUATION, Task
from finetune_jax.weights.metadata.architecture import effective

# How images of the run became what the model takes.
_PREPROCESSING = ("resize", "interpolation", "mean", "std")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """The best checkpoint of a run; low-rank updates are merged into their kernels.

    Attributes:
        task: Has the model.
        spec: What its inputs look like.
        variables: 'params' and 'batch_stats', on the host.
        fixed: What the task reads besides.
        step: Of the checkpoint.
        model: The section `config.model` of the run.
        config: Of the run, resolved; as JSON.
        pretrained: The address of the weights that the run began with, if any.
        weights_sha256: Of the files there, by path.
        came_in: The layout of these weights.
        layout: The layout that is asked for, if any.
        tokenizer: Its files as the run has kept them, by name; empty of what is no text.
    """

    task: Task
    spec: DataSpec
    variables: Mapping[str, Any]
    fixed: Any
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

    def answer(self, variables: Any, inputs: Any) -> dict[str, jax.Array]:
        """Returns what the model says of a batch, as evaluation computes it.

        Args:
            variables: As the attribute.
            inputs: [B, ...], as a file has them: images in bytes, not normalised.
        """
        return answer(self.task, variables, self.fixed, inputs)

    def about(self) -> dict[str, Any]:
        """Returns what a program that uses the model needs to know, ready for JSON."""
        spec, inputs = self.spec, self.inputs
        found: dict[str, Any] = {
            "model": {"name": self.model["name"], **(effective(self.model) or {})},
            "inputs": {"shape": list(inputs.shape), "dtype": str(inputs.dtype)},
            "outputs": {
                name: [None, *answer.shape[1:]]
                for name, answer in self.answer_shapes().items()
            },
        }
        if spec.class_names:
            found["labels"] = list(spec.class_names)
        if spec.targets:
            found["targets"] = list(spec.targets)
        looks = dataclasses.asdict(spec)
        if spec.text is not None:
            options = spec.text.options
            found["text"] = {
                "sentences": len(options.text),
                "max_tokens": options.max_tokens,
                "tokenizer": "tokenizer.json",
            }
        if len(spec.shape) == 3:
            found["preprocessing"] = {key: looks[key] for key in _PREPROCESSING}
        return json.loads(json.dumps(found))

    def answer_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns what `answer` gives for one example."""
        one = jax.ShapeDtypeStruct((1, *self.inputs.shape), self.inputs.dtype)
        return jax.eval_shape(self.answer, self.variables, one)


def trained_from(
    predictor: Predictor,
    manifest: Mapping[str, Any],
    layout: str | None,
    tokenizer: Mapping[str, str],
) -> Trained:
    """Returns what is exported of an opened run.

    Args:
        predictor: The run.
        manifest: `manifest.json` of the run.
        layout: That weights are asked for in; None is the one they came in.
        tokenizer: Its files in the workdir, by name.

    Raises:
        UserError: Its task has several models.
    """
    setup, state = predictor.setup, predictor.state
    config, task = setup.config, setup.task.served()
    if tuple(task.models) != ("",):
        raise UserError(
            f"--mode=export: the task {config.task.name!r} has the models "
            f"{', '.join(map(repr, task.models))}; only tasks of one model can be exported"
        )
    params = setup.devices.to_host(state.params)
    params = {k: v for k, v in params.items() if k in task.stages}
    batch_stats = setup.devices.to_host(state.placed.batch_stats)
    module: Any = task.models[""]
    if isinstance(module, LoRA):
        params = jax.tree.map(np.asarray, merge(params, alpha=module.alpha))
        module = module.module
    spec, changes = predictor.spec, dict[str, Any](models={"": module})
    if spec.text is not None:  # Others may be longer than those of the run.
        shape = (spec.shape[0], spec.text.options.max_tokens)
        spec = dataclasses.replace(spec, shape=shape, train_shape=shape)
        changes["data"] = spec
    return Trained(
        task=dataclasses.replace(task, **changes),  # type: ignore[arg-type]
        spec=spec,
        variables={"params": params, "batch_stats": batch_stats},
        fixed=setup.devices.to_host(state.evaluator.fixed["task"]),
        step=predictor.step,
        model=dict(config.model),
        config=configs.to_json(config),
        pretrained=config.init.pretrained,
        weights_sha256=manifest.get("weights_sha256", {}),
        came_in=manifest.get("weights_layout"),
        layout=layout,
        tokenizer=tokenizer,
    )


def for_any_platform(trained: Trained) -> Callable:
    """Returns `trained.answer` for inputs alone, fast on each platform it runs on."""

    def traced(backend: str) -> Callable:
        def traced_answer(variables, inputs):
            with traced_for(backend):
                return trained.answer(variables, inputs)

        return traced_answer

    variables = jax.tree.map(jnp.asarray, trained.variables)
    branches = {"cpu": traced("cpu"), "default": traced("gpu")}
    return lambda inputs: jax.lax.platform_dependent(variables, inputs, **branches)


def write_json(path: pathlib.Path, values: Any) -> None:
    """Writes a dict, or a list, as JSON."""
    path.write_text(json.dumps(values, indent=2) + "\n")


def answer(
    task: Task, variables: Mapping[str, Any], fixed: Any, inputs: Any
) -> dict[str, jax.Array]:
    """Returns what a model says of a batch, as evaluation computes it.

    Args:
        task: Has the model.
        variables: 'params' and 'batch_stats'.
        fixed: What the task reads besides.
        inputs: [B, ...], as a file has them: images in bytes, not normalised; of
            texts [B, 2, T], ids and sentences.
    """
    data = getattr(task, "data", None)
    if data is not None and data.text is not None:
        # Texts may have another length than those of the run.
        data = dataclasses.replace(data, shape=inputs.shape[1:])
        task = dataclasses.replace(task, data=data)  # type: ignore[call-arg]
    # Outputs may have a part that compares with labels, which is left out of answers.
    batch = {
        name: jnp.zeros((inputs.shape[0], *leaf.shape), leaf.dtype)
        for name, leaf in task.batch_spec.items()
    }
    batch = task.prepare({**batch, "inputs": inputs}, jax.random.key(0), EVALUATION)
    state = variables["params"], variables["batch_stats"], fixed
    return task.answers(task.outputs(*state, batch))
