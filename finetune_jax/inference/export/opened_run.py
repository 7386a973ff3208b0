"""The exported part of an opened run."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from finetune_jax import config as configs
from finetune_jax.core.errors import UserError
from finetune_jax.data.kind import kind_named
from finetune_jax.inference.export.exported_model import Trained
from finetune_jax.inference.predictor import Predictor
from finetune_jax.models.peft.lora import LoRA, merge


def trained_from(
    predictor: Predictor,
    manifest: Mapping[str, Any],
    layout: str | None,
    tokenizer: Mapping[str, str],
) -> Trained:
    """Returns the exported part of an opened run.

    Args:
        predictor: The run.
        manifest: `manifest.json` of the run.
        layout: Layout of the exported weights; None is the one they came in.
        tokenizer: Texts of the tokenizer's files in the workdir, by name.

    Raises:
        UserError: The task of the run has several models.
    """
    setup, state = predictor.setup, predictor.state
    config, task, models = setup.config, setup.task, setup.task.models.served()
    if models.prefixes != ("",):
        raise UserError(
            f"--mode=export: the task {config.task.name!r} has the models "
            f"{', '.join(map(repr, models.prefixes))}; only tasks of one model can be "
            "exported"
        )
    params = setup.devices.to_host(state.params)
    params = {k: v for k, v in params.items() if k in models.stages}
    batch_stats = setup.devices.to_host(state.placed.batch_stats)
    module = models[""]
    if isinstance(module, LoRA):
        params = jax.tree.map(np.asarray, merge(params, alpha=module.alpha))
        module = module.module
    models = dataclasses.replace(models, modules={"": module})
    spec = kind_named(predictor.spec.kind).serving_spec(predictor.spec)
    inputs: Any = task.inputs  # type: ignore[attr-defined]
    changes = {"models": models, "inputs": dataclasses.replace(inputs, data=spec)}
    return Trained(
        task=dataclasses.replace(task, **changes),  # type: ignore[arg-type]
        spec=spec,
        variables={"params": params, "batch_stats": batch_stats},
        step=predictor.step,
        model=dict(config.model),
        config=configs.to_json(config),
        pretrained=config.init.pretrained,
        weights_sha256=manifest.get("weights_sha256", {}),
        came_in=manifest.get("weights_layout"),
        layout=layout,
        tokenizer=tokenizer,
    )
