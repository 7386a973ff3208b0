"""L-BFGS on all examples at once, and the L2 penalties that a linear probe tries."""

import dataclasses
from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.flatten_util import ravel_pytree

from finetune_jax.core.errors import Problem

# Strengths in half decades. The best one depends on the scale of the features; these
# include it for pooled features of ResNets, EfficientNets, ViTs and BERTs. Chosen by us.
PENALTIES = tuple(10.0 ** (power / 2) for power in range(6, -11, -1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """Arguments of the optimizer 'linear_probe'.

    Attributes:
        penalties: L2 penalties of the mean loss, of which the validation split chooses
            one; a single one needs no validation split.
        iterations: Largest number of L-BFGS iterations for each penalty.
        refit: Whether the last phase of a plan fits once more, with the chosen penalty, to
            training and validation examples together; not with config.data.per_class.
    """

    penalties: tuple[float, ...] = PENALTIES
    iterations: int = 300
    refit: bool = True

    def problems(self) -> list[Problem]:
        """Returns the arguments that are out of range."""
        given, problems = self.penalties, []
        if not isinstance(given, tuple | list) or not given:
            text = f"{given!r}; a tuple of numbers such as (1e-3, 1e-4) is needed"
            problems.append(Problem("optimizer_args.penalties", text))
        elif wrong := [x for x in given if type(x) not in (int, float) or not x >= 0]:
            text = f"{wrong!r}; penalties are numbers of 0 or more"
            problems.append(Problem("optimizer_args.penalties", text))
        if type(self.iterations) is not int or self.iterations < 1:
            text = f"{self.iterations!r}; a whole number above 0 is needed"
            problems.append(Problem("optimizer_args.iterations", text))
        if type(self.refit) is not bool:
            text = f"{self.refit!r}; True or False is needed"
            problems.append(Problem("optimizer_args.refit", text))
        return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """A minimum of the penalised loss.

    Attributes:
        leaves: Parameters by name, float32.
        loss: Mean loss of the examples, without the penalty.
        evaluations: Number of passes over the examples.
    """

    leaves: Mapping[str, np.ndarray]
    loss: float
    evaluations: int


def minimise(
    loss_and_gradient: Callable[[Mapping[str, np.ndarray]], tuple],
    start: Mapping[str, np.ndarray],
    *,
    penalised: Collection[str],
    penalty: float,
    iterations: int,
) -> Fit:
    """Returns the parameters that minimise loss + penalty / 2 * |penalised leaves|².

    scikit-learn's LogisticRegression(C) on N examples has the penalty 1 / (C N).

    Args:
        loss_and_gradient: Returns the mean loss of all examples, and its gradient.
        start: Parameters to start from, by name.
        penalised: Names of the leaves with a penalty.
        penalty: Strength of the penalty.
        iterations: Largest number of iterations.

    Source: Liu & Nocedal 1989, as scipy has it.
    """
    flat, unravel = ravel_pytree(dict(start))
    strength = {
        name: np.full(np.shape(leaf), penalty if name in penalised else 0.0)
        for name, leaf in start.items()
    }
    strengths = np.concatenate([strength[name].ravel() for name in sorted(strength)])
    losses = []

    def penalised_loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        loss, gradient = loss_and_gradient(unravel(jnp.asarray(values, flat.dtype)))
        losses.append(float(loss))
        added = strengths * values
        total = losses[-1] + float(added @ values) / 2
        return total, np.asarray(ravel_pytree(gradient)[0], np.float64) + added

    found = scipy.optimize.minimize(
        penalised_loss,
        np.asarray(flat, np.float64),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": iterations, "gtol": 1e-6, "ftol": 1e-10, "maxls": 50},
    )
    leaves = jax.tree.map(np.asarray, unravel(jnp.asarray(found.x, flat.dtype)))
    final, _ = loss_and_gradient(leaves)
    return Fit(leaves=leaves, loss=float(final), evaluations=len(losses) + 1)
