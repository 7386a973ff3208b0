"""Optimization algorithms by name: transformations of the gradient, all of optax.

An algorithm is a core transformation with the weight decay before it (L2 regularisation)
or after it (decoupled, Loshchilov & Hutter 2019), and the learning rate at the end. One
with another order has a function of `decay` and `rate`, which returns the whole chain.
`rate` multiplies by minus the learning rate, an argument of `update`. To add an
algorithm, give it a row in `OPTIMIZERS`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from finetune_jax.core import registry
from finetune_jax.core.errors import Problem, raise_if
from finetune_jax.core.registry import need
from finetune_jax.optim.penalty_path import PENALTIES, ProbeOptions

Link = Any  # An optax transformation; those with extra arguments are of another type.


def _sgd(
    decay: Link, rate: Link, *, momentum: float = 0.0, nesterov: bool = False
) -> Link:
    """Source: Sutskever et al. 2013, with torch's momentum: the rate comes after it."""
    need((not nesterov or momentum > 0, "nesterov=True: a momentum above 0"))
    core = optax.trace(momentum, nesterov) if momentum else optax.identity()
    return optax.chain(decay, core, rate)


def _adagrad(*, initial: float = 0.0, eps: float = 1e-10) -> Link:
    need((initial >= 0, f"initial {initial}; at least 0"))
    return optax.scale_by_rss(initial, eps)


def _rmsprop(
    decay: Link,
    rate: Link,
    *,
    alpha: float = 0.99,
    eps: float = 1e-8,
    momentum: float = 0.0,
    centered: bool = False,
) -> Link:
    """Source: Tieleman & Hinton 2012, lecture 6e, with torch's defaults and momentum."""
    scale = optax.scale_by_stddev if centered else optax.scale_by_rms
    core: Link = scale(alpha, eps, eps_in_sqrt=False)
    if momentum:
        core = optax.chain(core, optax.trace(momentum))
    return optax.chain(decay, core, rate)


def _adafactor(
    decay: Link,
    rate: Link,
    *,
    decay_rate: float = 0.8,
    min_dim_size_to_factor: int = 128,
    clipping_threshold: float = 1.0,
    scale_by_parameter: bool = True,
) -> Link:
    """Source: Shazeer & Stern 2018; torch's has other defaults and step sizes."""
    scaled = optax.scale_by_param_block_rms() if scale_by_parameter else None
    return optax.chain(
        optax.scale_by_factored_rms(
            decay_rate=decay_rate, min_dim_size_to_factor=min_dim_size_to_factor
        ),
        optax.clip_by_block_rms(clipping_threshold),
        scaled or optax.identity(),
        decay,
        rate,
    )


def _lars(
    decay: Link,
    rate: Link,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    trust_coefficient: float = 0.001,
) -> Link:
    """Source: You et al. 2017, but the ratio is that of |w| to |gradient + decay * w|.

    The momentum is that of updates, the rate in them. A parameter at zero has ratio 1.
    """
    trusted = optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient)
    return optax.chain(decay, trusted, rate, optax.trace(momentum, nesterov))


def _muon(
    decay: Link,
    rate: Link,
    *,
    beta: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    b1: float = 0.9,
    b2: float = 0.999,
) -> Link:
    """Source: Jordan et al. 2024. Kernels of convolutions count as [H W I, O] matrices.

    Leaves of fewer than two dimensions are left to Adam with `b1` and `b2`, or to NAdam if
    `nesterov`, which unlike Jordan's momentum is corrected for its start.
    """

    def as_matrices(leaves):
        return jax.tree.map(
            lambda leaf: (
                optax.contrib.MuonDimensionNumbers(
                    tuple(range(leaf.ndim - 1)), leaf.ndim - 1
                )
                if leaf.ndim > 1
                else None
            ),
            leaves,
        )

    core = optax.contrib.muon(
        1.0,
        beta=beta,
        nesterov=nesterov,
        ns_steps=ns_steps,
        adam_b1=b1,
        adam_b2=b2,
        muon_weight_dimension_numbers=as_matrices,
    )
    # Muon as a whole has its rate inside; at 1.0 that is a sign.
    return optax.chain(core, optax.scale(-1.0), decay, rate)


def _schedule_free_adamw(
    decay: Link,
    rate: Link,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_lr_power: float = 2.0,
) -> Link:
    """Source: the code of Defazio et al. 2024, not their algorithm 1.

    The paper corrects the second moment in the rate, the code in the denominator. Metrics
    are those of the averaged parameters, `train_state.eval_params`.
    """
    base = optax.chain(optax.scale_by_adam(0.0, b2, eps), decay, rate)

    def averaged(learning_rate):
        return optax.contrib.schedule_free(
            base,  # type: ignore[arg-type]
            lambda step: learning_rate,
            b1=b1,
            weight_lr_power=weight_lr_power,
        )

    def update(updates, state, params=None, *, learning_rate, **extra):
        extra["learning_rate"] = learning_rate
        return averaged(learning_rate).update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(
        averaged(0.0).init,
        update,  # type: ignore[arg-type]
    )


def _lbfgs(
    decay: Link, rate: Link, *, memory: int = 10, max_linesearch_steps: int = 20
) -> Link:
    """Source: Liu & Nocedal 1989; the step obeys the strong Wolfe conditions."""
    del decay, rate  # Neither is part of the function that the line search sees.
    search = optax.lbfgs(
        memory_size=memory,
        linesearch=optax.scale_by_zoom_linesearch(
            max_linesearch_steps, initial_guess_strategy="one"
        ),
    )

    def update(updates, state, params=None, *, learning_rate, **extra):
        del learning_rate
        return search.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(search.init, update)  # type: ignore


def _linear_probe(
    decay: Link,
    rate: Link,
    *,
    penalties: tuple = PENALTIES,
    iterations: int = 300,
    refit: bool = True,
) -> Link:
    """Returns a transformation without state; `training.updates.probe_run` does the fit."""
    del decay, rate
    options = ProbeOptions(penalties=penalties, iterations=iterations, refit=refit)
    raise_if(options.problems())
    return optax.set_to_zero()


def _around_sam(inner: Link, *, rho: float = 0.05) -> Link:
    """Source: Foret et al. 2021, equation 2; unlike torch, optax has one."""

    def ascent(updates, params=None):
        del params
        # The small number is that of the authors' code: a zero gradient stays zero.
        scale = -rho / (optax.tree.norm(updates) + 1e-12)
        return jax.tree.map(lambda u: (scale * u).astype(u.dtype), updates)

    def bound(extra):
        # optax's SAM hands on no extra arguments, such as the learning rate.
        base = optax.GradientTransformation(
            inner.init,
            lambda updates, state, params=None: inner.update(
                updates, state, params, **extra
            ),
        )
        return optax.contrib.sam(base, optax.stateless(ascent), opaque_mode=True)

    def update(updates, state, params=None, *, grad_fn, **extra):
        return bound(extra).update(updates, state, params, grad_fn=grad_fn)

    return optax.GradientTransformationExtraArgs(bound({}).init, update)  # type: ignore


@dataclasses.dataclass(frozen=True, kw_only=True)
class Algorithm:
    """An algorithm that `Phase.optimizer` can name, by `core` or by `make`.

    Attributes:
        core: Function (**arguments) to the transformation before the rate is applied.
        decoupled: Whether weight decay comes after the core instead of before it.
        make: Function (decay, rate, **arguments) to the transformation of a rate group.
        around: Function (transformation of all groups, **arguments) to the whole one.
        evaluates: Part of the objective that is computed at other points in an update:
            'nothing', 'gradient', 'value' (line searches), or 'all examples' (a fit that
            is the only update of its phase).
        shares: Names of arguments in [0, 1).
        positive: Names of arguments above 0.
    """

    core: Callable[..., Link] = optax.identity
    decoupled: bool = False
    make: Callable[..., Link] | None = None
    around: Callable[..., Link] | None = None
    evaluates: str = "nothing"
    shares: tuple[str, ...] = ()
    positive: tuple[str, ...] = ()

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Checks the ranges of arguments.

        Raises:
            UserError: Lists the arguments that are out of range.
        """
        wrong = {name: "above 0" for name in self.positive}
        wrong |= {name: "0 or more and less than 1" for name in self.shares}
        both = set(self.shares) & set(self.positive)
        wrong |= {name: "above 0 and less than 1" for name in both}
        raise_if(
            Problem(f"optimizer_args.{name}", f"{value!r}; {wrong[name]} is needed")
            for name, value in arguments.items()
            if type(value) in (int, float)  # Else `transformation` refuses it.
            and (
                (name in self.shares and not 0 <= value < 1)
                or (name in self.positive and not value > 0)
            )
        )

    def transformation(
        self, decay: Link, rate: Link, arguments: Mapping[str, Any]
    ) -> Link:
        """Returns the transformation of a rate group.

        Raises:
            UserError: Unknown or unsuitable arguments.
        """
        where = "optimizer_args"
        if self.make is not None:
            return registry.call(self.make, arguments, where, decay=decay, rate=rate)
        core = registry.call(self.core, arguments, where)
        links = (core, decay) if self.decoupled else (decay, core)
        return optax.chain(*links, rate)


def _adam(*, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Link:
    return optax.scale_by_adam(b1, b2, eps)


_BETAS = {"shares": ("b1", "b2"), "positive": ("eps",)}
OPTIMIZERS = registry.Choices(
    "optimizer",
    {
        "sgd": Algorithm(make=_sgd, shares=("momentum",)),
        # Duchi et al. 2011. `eps` is added under the root, in torch after it.
        "adagrad": Algorithm(core=_adagrad, positive=("eps",)),
        # Zeiler 2012.
        "adadelta": Algorithm(
            core=lambda *, rho=0.9, eps=1e-6: optax.scale_by_adadelta(rho, eps),
            shares=("rho",),
            positive=("eps",),
        ),
        "rmsprop": Algorithm(
            make=_rmsprop, shares=("alpha", "momentum"), positive=("eps",)
        ),
        # Kingma & Ba 2015.
        "adam": Algorithm(core=_adam, **_BETAS),
        # Reddi et al. 2018; the maximum is of bias-corrected moments.
        "amsgrad": Algorithm(
            core=lambda *, b1=0.9, b2=0.999, eps=1e-8: optax.scale_by_amsgrad(
                b1, b2, eps
            ),
            **_BETAS,
        ),
        # Dozat 2016, with a constant b1; torch's follows a schedule of its own.
        "nadam": Algorithm(
            core=lambda *, b1=0.9, b2=0.999, eps=1e-8: optax.scale_by_adam(
                b1, b2, eps, nesterov=True
            ),
            **_BETAS,
        ),
        # Loshchilov & Hutter 2019.
        "adamw": Algorithm(core=_adam, decoupled=True, **_BETAS),
        "adafactor": Algorithm(
            make=_adafactor,
            shares=("decay_rate",),
            positive=("min_dim_size_to_factor", "clipping_threshold"),
        ),
        # You et al. 2020.
        "lamb": Algorithm(
            make=lambda decay, rate, *, b1=0.9, b2=0.999, eps=1e-6: optax.chain(
                optax.scale_by_adam(b1, b2, eps),
                decay,
                optax.scale_by_trust_ratio(),
                rate,
            ),
            **_BETAS,
        ),
        "lars": Algorithm(
            make=_lars, shares=("momentum",), positive=("trust_coefficient",)
        ),
        # Chen et al. 2023.
        "lion": Algorithm(
            core=lambda *, b1=0.9, b2=0.99: optax.scale_by_lion(b1, b2),
            decoupled=True,
            shares=("b1", "b2"),
        ),
        "muon": Algorithm(
            make=_muon, shares=("beta", "b1", "b2"), positive=("ns_steps",)
        ),
        "schedule_free_adamw": Algorithm(
            make=_schedule_free_adamw, shares=("b1", "b2"), positive=("b1", "eps")
        ),
        "sam": Algorithm(
            make=_sgd,
            around=_around_sam,
            evaluates="gradient",
            shares=("momentum",),
            positive=("rho",),
        ),
        "sam_adamw": Algorithm(
            core=_adam,
            decoupled=True,
            around=_around_sam,
            evaluates="gradient",
            shares=("b1", "b2"),
            positive=("eps", "rho"),
        ),
        "lbfgs": Algorithm(
            make=_lbfgs, evaluates="value", positive=("memory", "max_linesearch_steps")
        ),
        # L-BFGS on the cached features, with an L2 penalty that validation chooses.
        "linear_probe": Algorithm(make=_linear_probe, evaluates="all examples"),
    },
)
