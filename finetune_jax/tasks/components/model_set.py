"""The models of a task, applied whole or in part."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, final

import flax.linen as nn
import jax
import jax.numpy as jnp

from finetune_jax.core.pytrees import part, with_part
from finetune_jax.models.modes import EVALUATION, Mode, apply_model, model_key


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSet:
    """The models of a task, by the prefix of their parameters.

    'variables' below are {'params': ..., 'batch_stats': ...} of all models.

    Attributes:
        modules: Modules by prefix; '' if the task has one model.
        auxiliary: Prefixes of the modules that only the loss uses; exports drop them.
        examples: Shapes of one input of each module that does not read the examples.
        cacheable: Whether the input of a later stage may replace the examples in the loss.
        carried: Parts of a prepared batch that are cached with the features, because
            augmentation changes them.
        stage_names: All stages in order; None takes those of the modules.
        unused: Returns names of variables in a weight file that the models do not have,
            such as the last stage of a classifier that became a segmentation model.
    """

    modules: Mapping[str, nn.Module]
    auxiliary: frozenset[str] = frozenset()
    examples: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cacheable: bool = True
    carried: tuple[str, ...] = ()
    stage_names: tuple[str, ...] | None = None
    unused: Callable[[], tuple[str, ...]] = tuple

    def __getitem__(self, prefix: str) -> Any:
        """Returns the module of a prefix."""
        return self.modules[prefix]

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of all models in order, with their prefixes."""
        if self.stage_names is not None:
            return self.stage_names
        return tuple(
            f"{prefix}/{stage}" if prefix else stage
            for prefix in self.modules
            for stage in self[prefix].stages
        )

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The prefixes of the models."""
        return tuple(self.modules)

    @property
    def heads(self) -> tuple[str, ...]:
        """The last stage of each model, with its prefix."""
        return tuple(
            f"{prefix}/{self[prefix].stages[-1]}".removeprefix("/")
            for prefix in self.modules
        )

    @property
    def attention_heads(self) -> dict[str, int]:
        """The number of attention heads of each stage that has some, with prefixes."""
        return {
            f"{prefix}/{part.name}".removeprefix("/"): part.heads
            for prefix, module in self.modules.items()
            for part in getattr(module, "parts", ())
            if isinstance(getattr(part, "heads", None), int)
        }

    def served(self) -> "ModelSet":
        """Returns the models without the auxiliary ones."""
        kept = {k: v for k, v in self.modules.items() if k not in self.auxiliary}
        return dataclasses.replace(self, modules=kept, auxiliary=frozenset())

    def init(self, rng: jax.Array, x: Any) -> tuple[Any, Any]:
        """Returns random parameters and batch statistics.

        Args:
            rng: Each model samples with a key of its own.
            x: One input [1, ...], as the models take it.
        """
        params, batch_stats = {}, {}
        for prefix, module in self.modules.items():
            one = x
            if prefix in self.examples:
                one = jax.tree.map(jnp.zeros_like, self.examples[prefix])
            variables = module.init(model_key(rng, prefix), one, train=False)
            kind = getattr(module, "param_dtype", jnp.float32)
            # Flax starts running averages in float32, whatever the parameters are.
            averages = jax.tree.map(
                lambda leaf, kind=kind: leaf.astype(kind),
                variables.get("batch_stats", {}),
            )
            if not prefix:
                params, batch_stats = {**params, **variables["params"]}, averages
                continue
            params[prefix] = variables["params"]
            if averages:
                batch_stats = {**batch_stats, prefix: averages}
        return params, batch_stats

    def frozen_prefix_end(self, mode: Mode) -> str | None:
        """Returns the first stage in training mode, if frozen stages precede it.

        The input of this stage is the same for an example in every update. None if the
        first stage is trained, if nothing is trained, or if the task has several models.
        """
        runs = [mode.trains(stage) for stage in self.stages]
        one_model = self.cacheable and self.prefixes == ("",)
        if not one_model or True not in runs or runs[0]:
            return None
        return self.stages[runs.index(True)]

    def apply(
        self,
        variables: Mapping[str, Any],
        x: Any,
        *,
        prefix: str = "",
        mode: Mode = EVALUATION,
        first: str | None = None,
        last: str | None = None,
        rng: jax.Array | None = None,
    ) -> tuple[Any, Any]:
        """Returns the output of one model and the the batch statistics of all models."""
        own = {kind: part(tree, prefix) for kind, tree in variables.items()}
        if rng is not None:
            rng = model_key(rng, prefix)
        y, moved = apply_model(
            self[prefix], prefix, own, x, mode=mode, first=first, last=last, rng=rng
        )
        return y, with_part(variables.get("batch_stats", {}), prefix, moved)

    def forward(
        self,
        variables: Mapping[str, Any],
        x: Any,
        *,
        mode: Mode = EVALUATION,
        first: str | None = None,
        rng: jax.Array | None = None,
    ) -> tuple[Any, Any]:
        """Returns the output for an input of stage `first`, and all batch statistics.

        The output of several models is a dict of theirs by prefix; auxiliary models do
        not run.
        """
        if "" in self.modules:
            return self.apply(variables, x, mode=mode, first=first, rng=rng)
        outputs = {}
        for prefix in self.served().prefixes:
            outputs[prefix], moved = self.apply(
                variables, x, prefix=prefix, mode=mode, first=first, rng=rng
            )
            variables = {**variables, "batch_stats": moved}
        return outputs, variables["batch_stats"]

    def with_features(
        self, variables: Mapping[str, Any], batch: dict, *, first: str
    ) -> dict:
        """Returns a prepared batch with 'features', the input of a stage, for 'inputs'.

        Args:
            variables: Variables of the stages before it, at least.
            batch: Prepared.
            first: A stage from `frozen_prefix_end`.
        """
        last = self.stages[self.stages.index(first) - 1]
        features, _ = self.apply(variables, batch["inputs"], last=last)
        moved = ("inputs", *self.carried)
        rest = {name: array for name, array in batch.items() if name not in moved}
        # The barrier keeps XLA from fusing across it: the bits are those of the cache.
        features = jax.lax.optimization_barrier(features)
        if self.carried:
            carried = {name: batch[name] for name in self.carried}
            features = {"features": features, **carried}
        return {**rest, "features": features}

    def unpacked(self, batch: dict) -> dict:
        """Returns a batch from `with_features` with the features as its 'inputs'."""
        rest = {name: array for name, array in batch.items() if name != "features"}
        features = batch["features"]
        if not self.carried:
            return {**rest, "inputs": features}
        carried = {name: features[name] for name in self.carried}
        return {**rest, **carried, "inputs": features["features"]}
