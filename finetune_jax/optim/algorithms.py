"""Optimization algorithms by name: what becomes of a gradient.

All of it is optax. Each function takes the links that every algorithm needs somewhere in
its chain, `decay` and `rate`, puts them where its paper does, and returns the
transformation of one rate group. `rate` multiplies by minus the learning rate, which is
an argument of `update`; `decay` adds the weight decay. Before the algorithm's own
statistics that is L2 regularisation, after them it is decoupled (Loshchilov & Hutter
2019). To add one, write such a function and name it in `OPTIMIZERS`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from finetune_jax.core.errors import UserError, problems_error

Link = Any  # An optax transformation; those with extra arguments are of another type.


def _check(*, shares: dict[str, float] | None = None, **positive: float) -> None:
    """Raises a UserError unless shares are in [0, 1) and the others above 0."""
    problems = [
        f"optimizer_args: {name} {value}; 0 or more and less than 1 is needed"
        for name, value in (shares or {}).items()
        if not 0 <= value < 1
    ]
    problems += [
        f"optimizer_args: {name} {value}; more than 0 is needed"
        for name, value in positive.items()
        if not value > 0
    ]
    if problems:
        raise problems_error("The optimizer cannot be run:", problems)


def _sgd(
    decay: Link, rate: Link, *, momentum: float = 0.0, nesterov: bool = False
) -> Link:
    """Source: Sutskever et al. 2013, with torch's momentum: the rate comes after it."""
    _check(shares={"momentum": momentum})
    if nesterov and not momentum:
        raise UserError("optimizer_args: nesterov=True needs a momentum above 0")
    core = optax.trace(momentum, nesterov) if momentum else optax.identity()
    return optax.chain(decay, core, rate)


def _adagrad(
    decay: Link, rate: Link, *, initial: float = 0.0, eps: float = 1e-10
) -> Link:
    """Source: Duchi et al. 2011. `eps` is added under the root, in torch after it."""
    _check(eps=eps)
    if not 0 <= initial < float("inf"):
        raise UserError(f"optimizer_args: initial {initial}; at least 0 is needed")
    return optax.chain(decay, optax.scale_by_rss(initial, eps), rate)


def _adadelta(decay: Link, rate: Link, *, rho: float = 0.9, eps: float = 1e-6) -> Link:
    """Source: Zeiler 2012."""
    _check(shares={"rho": rho}, eps=eps)
    return optax.chain(decay, optax.scale_by_adadelta(rho, eps), rate)


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
    _check(shares={"alpha": alpha, "momentum": momentum}, eps=eps)
    scale = optax.scale_by_stddev if centered else optax.scale_by_rms
    core: Link = scale(alpha, eps, eps_in_sqrt=False)
    if momentum:
        core = optax.chain(core, optax.trace(momentum))
    return optax.chain(decay, core, rate)


def _adam(
    decay: Link,
    rate: Link,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> Link:
    """Source: Kingma & Ba 2015."""
    _check(shares={"b1": b1, "b2": b2}, eps=eps)
    return optax.chain(decay, optax.scale_by_adam(b1, b2, eps), rate)


def _amsgrad(
    decay: Link,
    rate: Link,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> Link:
    """Source: Reddi et al. 2018; the maximum is of bias-corrected moments."""
    _check(shares={"b1": b1, "b2": b2}, eps=eps)
    return optax.chain(decay, optax.scale_by_amsgrad(b1, b2, eps), rate)


def _nadam(
    decay: Link,
    rate: Link,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> Link:
    """Source: Dozat 2016, with a constant b1; torch's follows a schedule of its own."""
    _check(shares={"b1": b1, "b2": b2}, eps=eps)
    return optax.chain(decay, optax.scale_by_adam(b1, b2, eps, nesterov=True), rate)


def _adamw(
    decay: Link,
    rate: Link,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> Link:
    """Source: Loshchilov & Hutter 2019."""
    _check(shares={"b1": b1, "b2": b2}, eps=eps)
    return optax.chain(optax.scale_by_adam(b1, b2, eps), decay, rate)


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
    _check(
        shares={"decay_rate": decay_rate},
        min_dim_size_to_factor=min_dim_size_to_factor,
        clipping_threshold=clipping_threshold,
    )
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


def _lamb(
    decay: Link,
    rate: Link,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
) -> Link:
    """Source: You et al. 2020."""
    _check(shares={"b1": b1, "b2": b2}, eps=eps)
    return optax.chain(
        optax.scale_by_adam(b1, b2, eps), decay, optax.scale_by_trust_ratio(), rate
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
    _check(shares={"momentum": momentum}, trust_coefficient=trust_coefficient)
    trusted = optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient)
    return optax.chain(decay, trusted, rate, optax.trace(momentum, nesterov))


def _lion(decay: Link, rate: Link, *, b1: float = 0.9, b2: float = 0.99) -> Link:
    """Source: Chen et al. 2023."""
    _check(shares={"b1": b1, "b2": b2})
    return optax.chain(optax.scale_by_lion(b1, b2), decay, rate)


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

    What has fewer than two dimensions is left to Adam with `b1` and `b2`, or to NAdam with
    Nesterov's momentum, which unlike Jordan's is corrected for its start.
    """
    _check(shares={"beta": beta, "b1": b1, "b2": b2}, ns_steps=ns_steps)

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

    That has the correction of the second moment in the rate, this in the denominator.
    What is evaluated is `state.eval_params`.
    """
    _check(shares={"b1": b1, "b2": b2}, eps=eps, b1=b1)
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
    _check(memory=memory, max_linesearch_steps=max_linesearch_steps)
    search = optax.lbfgs(
        memory_size=memory,
        linesearch=optax.scale_by_zoom_linesearch(
            max_linesearch_steps, initial_guess_strategy="one"
        ),
    )

    def update(updates, state, params=None, *, learning_rate, **extra):
        del learning_rate
        return search.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(
        search.init,
        update,  # type: ignore[arg-type]
    )


def _around_sam(inner: Link, *, rho: float = 0.05) -> Link:
    """Source: Foret et al. 2021, equation 2; unlike torch, optax has one."""
    _check(rho=rho)

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

    return optax.GradientTransformationExtraArgs(
        bound({}).init,
        update,  # type: ignore[arg-type]
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Algorithm:
    """An algorithm that `Phase.optimizer` can name.

    Attributes:
        make: Of (decay, rate, **arguments); the transformation of one rate group.
        around: Of (transformation of all groups, **arguments), where there is more.
        evaluates: What of the objective is computed at other points within an update:
            'nothing', 'gradient', or 'value' (which line searches need).
    """

    make: Callable[..., Link]
    around: Callable[..., Link] | None = None
    evaluates: str = "nothing"


OPTIMIZERS = {
    "sgd": Algorithm(make=_sgd),
    "adagrad": Algorithm(make=_adagrad),
    "adadelta": Algorithm(make=_adadelta),
    "rmsprop": Algorithm(make=_rmsprop),
    "adam": Algorithm(make=_adam),
    "amsgrad": Algorithm(make=_amsgrad),
    "nadam": Algorithm(make=_nadam),
    "adamw": Algorithm(make=_adamw),
    "adafactor": Algorithm(make=_adafactor),
    "lamb": Algorithm(make=_lamb),
    "lars": Algorithm(make=_lars),
    "lion": Algorithm(make=_lion),
    "muon": Algorithm(make=_muon),
    "schedule_free_adamw": Algorithm(make=_schedule_free_adamw),
    "sam": Algorithm(make=_sgd, around=_around_sam, evaluates="gradient"),
    "sam_adamw": Algorithm(make=_adamw, around=_around_sam, evaluates="gradient"),
    "lbfgs": Algorithm(make=_lbfgs, evaluates="value"),
}
