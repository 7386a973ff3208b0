"""Optimizers against torch's, and against papers written again in numpy, in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from finetune_jax.core.train_state import TrainState, eval_params
from finetune_jax.optim import compile_phase
from finetune_jax.plans.phase import Group, Phase

SHAPES = {
    "conv/kernel": (3, 3, 2, 4),
    "conv/bias": (4,),
    "head/kernel": (6, 5),
    "head/bias": (5,),
}
# The head is in a group of its own, at another rate.
SCALES = {name: 0.5 if name.startswith("head") else 1.0 for name in SHAPES}
RATES = 0.01 * np.linspace(1.0, 0.3, 20)
DECAY = 0.1


def decay_of(name, decay):
    return decay if name.endswith("kernel") else 0.0


@functools.cache
def problem():
    """Returns parameters, and of each update a slope and an offset of its gradient."""
    rng = np.random.default_rng(0)
    start = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    slopes = [{n: rng.uniform(0.5, 1.5, s) for n, s in SHAPES.items()} for _ in RATES]
    offsets = [{n: rng.normal(size=s) for n, s in SHAPES.items()} for _ in RATES]
    return start, slopes, offsets


def gradient_at(params, update):
    _, slopes, offsets = problem()
    return {n: slopes[update][n] * params[n] + offsets[update][n] for n in params}


def tree(leaves):
    return {
        stage: {name: leaves[f"{stage}/{name}"] for name in ("kernel", "bias")}
        for stage in ("conv", "head")
    }


def flat(params):
    return {
        f"{s}/{n}": leaf for s, leaves in params.items() for n, leaf in leaves.items()
    }


def ours(optimizer, args, decay):
    """Returns the parameters after each update, and the last state of the optimizer."""
    phase = Phase(steps=1, optimizer=optimizer, optimizer_args=args, weight_decay=decay)
    groups = {name: Group(scale, 0) for name, scale in SCALES.items()}
    _, slopes, offsets = problem()
    found = []
    with jax.enable_x64(True):
        transformation = compile_phase(phase).transformation(groups)

        @jax.jit
        def update(params, state, slope, offset, rate):
            def grad_fn(params, step=0):
                return jax.tree.map(lambda s, p, o: s * p + o, slope, params, offset)

            extra = {"grad_fn": grad_fn} if optimizer.startswith("sam") else {}
            updates, state = transformation.update(
                grad_fn(params), state, params, learning_rate=rate, **extra
            )
            return jax.tree.map(jnp.add, params, updates), state

        params = jax.tree.map(jnp.asarray, tree(problem()[0]))
        state = transformation.init(params)
        for slope, offset, rate in zip(slopes, offsets, RATES):
            params, state = update(params, state, tree(slope), tree(offset), rate)
            found.append(jax.tree.map(np.asarray, flat(params)))
    return found, state


def close(found, expected, rtol=1e-6):
    """Compares what was moved from the start with what should have been."""
    start = problem()[0]
    for update, (one, other) in enumerate(zip(found, expected, strict=True)):
        for name in SHAPES:
            moved = np.asarray(other[name]) - start[name]
            difference = np.abs(one[name] - start[name] - moved).max()
            assert difference <= rtol * np.abs(moved).max(), (update, name, difference)


# In numpy: (parameter, gradient, state) -> parameter. A state is a dict, empty before the
# first update; `t` counts updates from 1, `lr` is the rate of the group.


def ema(state, key, value, beta):
    state[key] = beta * state.get(key, 0.0) + (1 - beta) * value
    return state[key]


def adagrad(p, g, state, *, t, lr, wd, eps=1e-10):
    g = g + wd * p
    state["sum"] = state.get("sum", 0.0) + g * g
    return p - lr * g / np.sqrt(state["sum"] + eps)


def amsgrad(p, g, state, *, t, lr, wd, b1=0.9, b2=0.999, eps=1e-8):
    g = g + wd * p
    m = ema(state, "m", g, b1) / (1 - b1**t)
    v = ema(state, "v", g * g, b2) / (1 - b2**t)
    state["max"] = np.maximum(state.get("max", 0.0), v)
    return p - lr * m / (np.sqrt(state["max"]) + eps)


def nadam(p, g, state, *, t, lr, wd, b1=0.9, b2=0.999, eps=1e-8):
    g = g + wd * p
    m = b1 * ema(state, "m", g, b1) / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
    v = ema(state, "v", g * g, b2) / (1 - b2**t)
    return p - lr * m / (np.sqrt(v) + eps)


def adamw(p, g, state, *, t, lr, wd, b1=0.9, b2=0.999, eps=1e-8):
    m = ema(state, "m", g, b1) / (1 - b1**t)
    v = ema(state, "v", g * g, b2) / (1 - b2**t)
    return p - lr * (m / (np.sqrt(v) + eps) + wd * p)


def adafactor(p, g, state, *, t, lr, wd, factored=128, parameter=True):
    """Algorithms 4 and 5; of more than two axes the two longest are factored."""
    beta, squares = 1 - t**-0.8, g * g + 1e-30
    axes = np.argsort(p.shape)[-2:]
    if p.ndim > 1 and p.shape[axes[0]] >= factored:
        one, other = (int(axis) for axis in axes)
        row = ema(state, "row", squares.mean(other, keepdims=True), beta)
        column = ema(state, "column", squares.mean(one, keepdims=True), beta)
        v = row * column / row.mean(one, keepdims=True)
    else:
        v = ema(state, "v", squares, beta)
    u = g / np.sqrt(v)
    u = u / max(1.0, np.sqrt((u * u).mean()))
    size = max(1e-3, np.sqrt((p * p).mean())) if parameter else 1.0
    return p - lr * (size * u + wd * p)


def lamb(p, g, state, *, t, lr, wd, b1=0.9, b2=0.999, eps=1e-6):
    m = ema(state, "m", g, b1) / (1 - b1**t)
    v = ema(state, "v", g * g, b2) / (1 - b2**t)
    r = m / (np.sqrt(v) + eps) + wd * p
    return p - lr * np.linalg.norm(p) / np.linalg.norm(r) * r


def lars(p, g, state, *, t, lr, wd, momentum=0.9, eta=0.001):
    g = g + wd * p
    local = eta * np.linalg.norm(p) / np.linalg.norm(g)
    state["v"] = momentum * state.get("v", 0.0) + lr * local * g
    return p - state["v"]


def lion(p, g, state, *, t, lr, wd, b1=0.9, b2=0.99):
    sign = np.sign(b1 * state.get("m", 0.0) + (1 - b1) * g)
    ema(state, "m", g, b2)
    return p - lr * (sign + wd * p)


def newton_schulz(matrix, steps=5):
    x = matrix / np.linalg.norm(matrix)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def muon(p, g, state, *, t, lr, wd, beta=0.95, nesterov=True):
    if p.ndim < 2:
        # In optax, what is left to Adam follows Nesterov if the matrices do.
        return (nadam if nesterov else adamw)(p, g, state, t=t, lr=lr, wd=wd)
    m = ema(state, "m", g, beta)
    if nesterov:
        m = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
    matrix = m.reshape(-1, p.shape[-1])
    rows, columns = matrix.shape
    u = max(1, columns / rows) ** 0.5 * newton_schulz(matrix).reshape(p.shape)
    return p - lr * (u + wd * p)


def schedule_free_adamw(y, g, state, *, t, lr, wd, b1=0.9, b2=0.999, eps=1e-8):
    """The authors' later code, where the bias is corrected in the denominator."""
    z, x = state.get("z", y), state.get("x", y)
    v = ema(state, "v", g * g, b2) / (1 - b2**t)
    state["z"] = z - lr * (g / (np.sqrt(v) + eps) + wd * y)
    state["max"] = max(state.get("max", 0.0), lr)
    state["sum"] = state.get("sum", 0.0) + state["max"] ** 2
    c = state["max"] ** 2 / state["sum"]
    state["x"] = (1 - c) * x + c * state["z"]
    return b1 * state["x"] + (1 - b1) * state["z"]


def run_numpy(step, decay, *, rho=None, **args):
    """Returns the parameters after each update, and the states of all parameters."""
    params, states, found = problem()[0], {name: {} for name in SHAPES}, []
    for update, rate in enumerate(RATES):
        gradient = gradient_at(params, update)
        if rho is not None:
            norm = np.sqrt(sum((g * g).sum() for g in gradient.values()))
            above = {n: p + rho * gradient[n] / norm for n, p in params.items()}
            gradient = gradient_at(above, update)
        params = {
            name: step(
                p,
                gradient[name],
                states[name],
                t=update + 1,
                lr=rate * SCALES[name],
                wd=decay_of(name, decay),
                **args,
            )
            for name, p in params.items()
        }
        found.append(params)
    return found, states


def sgd(p, g, state, *, t, lr, wd, momentum=0.0):
    state["m"] = momentum * state.get("m", 0.0) + g + wd * p
    return p - lr * state["m"]


@pytest.mark.parametrize("decay", [pytest.param(0.0, marks=pytest.mark.slow), DECAY])
@pytest.mark.parametrize(
    ("name", "args", "step", "their_args"),
    [
        ("adagrad", {}, adagrad, {}),
        ("amsgrad", {"b1": 0.8, "b2": 0.9}, amsgrad, {"b1": 0.8, "b2": 0.9}),
        ("nadam", {"b1": 0.8}, nadam, {"b1": 0.8}),
        ("adafactor", {"min_dim_size_to_factor": 3}, adafactor, {"factored": 3}),
        ("adafactor", {"scale_by_parameter": False}, adafactor, {"parameter": False}),
        ("lamb", {}, lamb, {}),
        ("lars", {}, lars, {}),
        ("lion", {}, lion, {}),
        ("muon", {}, muon, {}),
        ("muon", {"nesterov": False}, muon, {"nesterov": False}),
        ("schedule_free_adamw", {}, schedule_free_adamw, {}),
        ("sam", {"rho": 0.1, "momentum": 0.9}, sgd, {"rho": 0.1, "momentum": 0.9}),
        ("sam_adamw", {"rho": 0.1}, adamw, {"rho": 0.1}),
    ],
)
@pytest.mark.fast_runs(
    "nadam-args2-nadam-their_args2-0.1", "lion-args7-lion-their_args7-0.1"
)
def test_an_optimizer_is_that_of_its_paper(name, args, step, their_args, decay):
    close(ours(name, args, decay)[0], run_numpy(step, decay, **their_args)[0])


def test_a_schedule_free_optimizer_is_evaluated_at_the_average():
    params, state = ours("schedule_free_adamw", {}, DECAY)
    _, states = run_numpy(schedule_free_adamw, DECAY)
    with jax.enable_x64(True):
        whole = TrainState.create(tree(params[-1]), {}, jax.random.key(0))
        average = eval_params(whole.replace(opt_state=state))
        found = jax.tree.map(np.asarray, flat(average))
    for name in SHAPES:
        np.testing.assert_allclose(found[name], states[name]["x"], rtol=1e-6)
        assert np.abs(found[name] - params[-1][name]).max() > 1e-5


def run_torch(name, decay, shown=lambda name, p: p, only="", **args):
    """Returns the parameters after each update of an optimizer of torch.

    Args:
        name: In `torch.optim`.
        decay: Of the kernels.
        shown: Gives of (name, parameter) what torch is shown, which is a view of it.
        only: End of the names of the parameters that it moves.
        **args: Of the optimizer.
    """
    torch = pytest.importorskip("torch")
    params = {n: torch.nn.Parameter(torch.tensor(p)) for n, p in problem()[0].items()}
    with torch.no_grad():
        views = {
            n: torch.nn.Parameter(shown(n, p))
            for n, p in params.items()
            if n.endswith(only)
        }
    optimizer = getattr(torch.optim, name)(
        [{"params": [p], "weight_decay": decay_of(n, decay)} for n, p in views.items()],
        **args,
    )
    found = []
    for update, rate in enumerate(RATES):
        leaves = {n: p.detach().numpy() for n, p in params.items()}
        gradient = gradient_at(leaves, update)
        for n, group in zip(views, optimizer.param_groups):
            views[n].grad = shown(n, torch.tensor(gradient[n]))
            group["lr"] = rate * SCALES[n]
        optimizer.step()
        found.append({n: p.detach().numpy().copy() for n, p in params.items()})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.0, DECAY])
@pytest.mark.parametrize(
    ("name", "args", "theirs", "their_args"),
    [
        ("sgd", {}, "SGD", {}),
        ("sgd", {"momentum": 0.9}, "SGD", {"momentum": 0.9}),
        ("sgd", {"momentum": 0.9, "nesterov": True}, "SGD",
         {"momentum": 0.9, "nesterov": True}),
        # torch adds its epsilon after the root.
        ("adagrad", {"eps": 1e-30}, "Adagrad", {"eps": 1e-30}),
        ("adadelta", {}, "Adadelta", {}),
        ("adadelta", {"rho": 0.8, "eps": 1e-4}, "Adadelta", {"rho": 0.8, "eps": 1e-4}),
        ("rmsprop", {}, "RMSprop", {}),
        ("rmsprop", {"alpha": 0.9, "momentum": 0.8, "centered": True}, "RMSprop",
         {"alpha": 0.9, "momentum": 0.8, "centered": True}),
        ("adam", {}, "Adam", {}),
        ("adam", {"b1": 0.8, "b2": 0.9, "eps": 1e-3}, "Adam",
         {"betas": (0.8, 0.9), "eps": 1e-3}),
        ("adamw", {}, "AdamW", {}),
        # A decay at infinity makes torch's own schedule of b1 constant.
        ("nadam", {}, "NAdam", {"momentum_decay": 1e12}),
        # Rates are below torch's bound of 1 / sqrt(t) here.
        ("adafactor", {"min_dim_size_to_factor": 1}, "Adafactor",
         {"eps": (1e-30, 1e-3)}),
    ],
)  # fmt: skip
def test_an_optimizer_is_that_of_torch(name, args, theirs, their_args, decay):
    if name == "adafactor":
        # torch factors the last two axes, optax the longest two.
        def shown(name, p):
            return p.permute(0, 2, 1, 3) if name == "conv/kernel" else p

        their_args = {**their_args, "shown": shown}
    close(ours(name, args, decay)[0], run_torch(theirs, decay, **their_args))


@pytest.mark.slow
def test_muon_is_that_of_torch_in_float64_and_without_nesterov(monkeypatch):
    torch = pytest.importorskip("torch")
    # torch's is in bfloat16 and takes matrices [out, in] only.
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())

    def shown(name, p):
        return p.reshape(-1, p.shape[-1]).T

    args = {"shown": shown, "nesterov": False}
    theirs = run_torch("Muon", DECAY, only="kernel", **args)
    found = ours("muon", {"nesterov": False}, DECAY)[0]
    for one, other in zip(found, theirs):
        other.update({name: one[name] for name in SHAPES if name.endswith("bias")})
    close(found, theirs)


def two_loops(gradient, pairs):
    """Returns the direction of L-BFGS; Nocedal & Wright 2006, algorithm 7.4."""
    q, shares = gradient.copy(), []
    for s, y in reversed(pairs):
        shares.append(s @ q / (s @ y))
        q -= shares[-1] * y
    if pairs:
        s, y = pairs[-1]
        q *= s @ y / (y @ y)
    else:
        q *= min(1.0, 1 / np.linalg.norm(gradient))  # Ours: no length is known yet.
    for (s, y), share in zip(pairs, reversed(shares)):
        q += (share - y @ q / (s @ y)) * s
    return -q


@pytest.mark.slow
def test_lbfgs_steps_along_the_direction_of_its_paper_and_obeys_strong_wolfe():
    start, slopes, offsets = problem()
    start, slopes, offsets = tree(start), tree(slopes[0]), tree(offsets[0])
    # Curvatures from 1 to 300, so that twenty updates do not end at the minimum.
    slopes = jax.tree.map(lambda s: np.exp(5.7 * (s - 0.5)), slopes)

    def loss(params):
        def part(p, s, o):
            return jnp.sum(s * p * p / 2 + o * p + jnp.log(jnp.cosh(p)))

        return sum(jax.tree.leaves(jax.tree.map(part, params, slopes, offsets)))

    phase = Phase(
        steps=1, optimizer="lbfgs", optimizer_args={"memory": 4},
        peak_lr=1.0, schedule="constant", fixed_batch=True,
    )  # fmt: skip

    def line(params):
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])

    with jax.enable_x64(True):
        transformation = compile_phase(phase).transformation(
            {n: Group(1.0, 0) for n in SHAPES}
        )

        @jax.jit
        def update(params, state):
            value, gradient = jax.value_and_grad(loss)(params)
            extra = {"value": value, "grad": gradient, "value_fn": loss}
            updates, state = transformation.update(
                gradient, state, params, learning_rate=1.0, **extra
            )
            return jax.tree.map(jnp.add, params, updates), state, value, gradient

        params = jax.tree.map(jnp.asarray, start)
        state, seen = transformation.init(params), []
        for _ in range(21):
            moved, state, value, gradient = update(params, state)
            seen.append((line(params), float(value), line(gradient)))
            params = moved
    pairs = []
    for (p, value, g), (next_p, next_value, next_g) in itertools.pairwise(seen):
        direction, moved = two_loops(g, pairs[-4:]), next_p - p
        length = moved @ direction / (direction @ direction)
        assert length > 0
        difference = np.abs(moved - length * direction).max()
        assert difference <= 1e-6 * np.abs(moved).max()
        assert next_value <= value + 1e-4 * length * (g @ direction)
        assert abs(next_g @ direction) <= 0.9 * abs(g @ direction)
        pairs.append((moved, next_g - g))
    assert np.linalg.norm(seen[-1][2]) > 1e-6
