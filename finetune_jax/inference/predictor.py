"""A finished run on new inputs: what predictions from files and in notebooks share."""

import dataclasses
import pathlib
from typing import Any

from finetune_jax.config import Config
from finetune_jax.core.errors import UserError
from finetune_jax.data.dataset import Dataset, no_data
from finetune_jax.data.kind import InputReader, kind_named
from finetune_jax.data.spec import DataSpec, spec_from_json
from finetune_jax.evaluation.evaluator import EvaluatedState
from finetune_jax.report.workdir import read_manifest
from finetune_jax.training.restore import best_state, with_threshold_of_run
from finetune_jax.training.setup import Setup, make_setup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predictor:
    """The best checkpoint of a run.

    Attributes:
        setup: Setup of the run, without its data.
        state: State of the checkpoint.
        step: Step of the checkpoint.
        reader: Reader of new inputs.
    """

    setup: Setup
    state: EvaluatedState
    step: int
    reader: InputReader

    @property
    def spec(self) -> DataSpec:
        """Description of the inputs."""
        return self.setup.data.spec

    def with_batch_size(self, examples: int) -> "Predictor":
        """Returns the predictor, computing at most so many examples at once."""
        return dataclasses.replace(self, state=self.state.with_batch_size(examples))

    def records(self, dataset: Dataset) -> list[dict[str, Any]]:
        """Returns the prediction for each example, ready for JSON.

        Predicted masks are the exception: 'mask' has class indices, uint8 [H, W], in the
        size of the model's images.
        """
        outputs = self.state.outputs(dataset)
        return self.setup.task.records(outputs, dataset.on_host())


def open_predictor(
    config: Config, workdir: pathlib.Path, reader: InputReader | None = None
) -> Predictor:
    """Returns the best checkpoint of a run, ready for inputs.

    If the run has several domains, the model of the last one predicts.

    Args:
        config: Config of the run, resolved.
        workdir: Workdir of the run.
        reader: Reader of its inputs, if it is open already.

    Raises:
        UserError: There is no checkpoint yet, the manifest does not describe the data, or
            a file that the run has kept is gone.
    """
    spec = _whole_spec(config, workdir)
    reader = reader or open_reader(config, workdir)
    setup = with_threshold_of_run(make_setup(config, no_data(spec)), workdir)
    state, step = best_state(setup, workdir)
    if (domains := setup.task.domains) is not None:
        domain, task = list(domains.tasks.items())[-1]
        own, placed = spec.domains[domain], state.placed
        variables = {"params": state.params, "batch_stats": placed.batch_stats}
        variables = domains.variables_of(domain, variables)
        placed = placed.replace(**variables, opt_state={}, ema={})
        setup = dataclasses.replace(setup, task=task, data=no_data(own))
        evaluator = dataclasses.replace(
            state.evaluator, task=task, ema=False, chosen_ema=False
        )
        state = EvaluatedState(evaluator=evaluator, placed=placed, prefix=None)
    return Predictor(setup=setup, state=state, step=step, reader=reader)


def open_reader(config: Config, workdir: pathlib.Path) -> InputReader:
    """Returns the reader of new inputs for a run, those of its last domain.

    Args:
        config: Config of the run, resolved.
        workdir: Workdir of the run.

    Raises:
        UserError: The manifest does not describe the data, or a file that the run has
            kept is gone.
    """
    spec = _whole_spec(config, workdir)
    spec = list(spec.domains.values())[-1] if spec.domains else spec
    return kind_named(spec.kind).reader(spec, config.data, workdir)


def _whole_spec(config: Config, workdir: pathlib.Path) -> DataSpec:
    """Returns the description of a run's data, without the data.

    Raises:
        UserError: The manifest has none.
    """
    looks = (read_manifest(workdir) or {}).get("data")
    try:
        return spec_from_json(looks or {}, config.data)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(
            f"--workdir: {workdir}/manifest.json does not describe the data; "
            "it is of an older version, or damaged"
        ) from error
