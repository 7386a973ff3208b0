import jax
import numpy as np
import optax
import pytest

from finetune_jax.core.errors import UserError
from finetune_jax.optim import compile_phase
from finetune_jax.optim.schedules import SCHEDULES, Plateau
from finetune_jax.plans.phase import Phase

PEAK = 0.3
ARGS = {"warm_restarts": {"first_steps": 5}, "inverse_sqrt": {"timescale": 20}}


def phase_of(schedule="cosine", *, steps=50, args=None, **fields):
    fields = {"peak_lr": PEAK, "schedule_args": args or {}, **fields}
    return Phase(steps=steps, schedule=schedule, **fields)


def learning_rates(phase):
    return compile_phase(phase).learning_rates()


def plateau_of(phase):
    plateau = compile_phase(phase).plateau
    assert isinstance(plateau, Plateau)
    return plateau


def problems_of(phase):
    try:
        compile_phase(phase)
    except UserError as error:
        return [str(problem) for problem in error.problems]
    return []


def rates_of(schedule, **fields):
    """Returns the rates, computed in float64 and rounded to float32 at the end."""
    with jax.enable_x64(True):
        return learning_rates(phase_of(schedule, **fields))


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"one_cycle"}))
@pytest.mark.parametrize(("steps", "warmup"), [(1, 1), (9, 9), (9, 4)])
@pytest.mark.fast_runs("1-1-constant", "9-9-linear", "9-4-cosine")
def test_a_warm_up_rises_to_the_peak_before_any_schedule(name, steps, warmup):
    args = ARGS.get(name)
    rates = learning_rates(phase_of(name, steps=steps, warmup_steps=warmup, args=args))
    assert rates.shape == (steps,) and rates.dtype == np.float32
    rise = PEAK * np.arange(1, warmup + 1) / max(warmup, 1)
    np.testing.assert_allclose(rates[:warmup], rise, rtol=1e-6)
    if name != "inverse_sqrt":  # Its timescale is by default the warm-up's length.
        rest = learning_rates(phase_of(name, steps=max(steps - warmup, 1), args=args))
        assert (rates[warmup:] == rest[: steps - warmup]).all()


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.fast_runs("cosine")
def test_float32_differs_from_float64_by_rounding_only(name):
    args = ARGS.get(name)
    rounded = np.abs(
        learning_rates(phase_of(name, args=args)) - rates_of(name, args=args)
    )
    assert rounded.max() < 1e-6 * PEAK


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_only_a_schedule_that_has_an_end_takes_end_lr_scale(name):
    args = {"first_steps": 50} if name == "warm_restarts" else ARGS.get(name)
    phase = phase_of(name, args=args, end_lr_scale=0.1)
    problems = problems_of(phase)
    if name in ("constant", "step", "one_cycle", "inverse_sqrt"):
        assert f"{name!r} has no end" in problems[0]
    else:
        assert not problems
        rates = learning_rates(phase)
        assert rates.min() >= 0.1 * PEAK * (1 - 1e-6)
        if name != "plateau":
            assert rates.min() < 0.12 * PEAK


def test_each_schedule_is_its_formula():
    t = np.arange(50)
    args = {"boundaries": (0.2, 0.5, 0.501), "factor": 0.2}
    step = np.where(t < 10, 1, np.where(t < 25, 0.2, 0.2**3))
    close(rates_of("step", args=args), PEAK * step)
    # The boundaries are shares of what follows the warm-up.
    warm = rates_of("step", args={"boundaries": (0.5,)}, warmup_steps=10)
    assert (np.flatnonzero(warm < 0.9 * PEAK)[-20:] == np.arange(30, 50)).all()

    close(rates_of("exponential"), PEAK * 0.01 ** (t / 50))
    args = {"gamma": 0.5, "every_steps": 7}
    floor = PEAK * np.maximum(0.5 ** (t / 7), 0.1)
    close(rates_of("exponential", args=args, end_lr_scale=0.1), floor)

    root = PEAK * (0.1 + 0.9 * np.sqrt(1 - t / 50))
    close(rates_of("polynomial", args={"power": 0.5}, end_lr_scale=0.1), root)
    assert (rates_of("polynomial") == rates_of("linear")).all()

    after = PEAK * np.sqrt(10 / (np.arange(40) + 10))
    close(rates_of("inverse_sqrt", warmup_steps=10)[10:], after)
    args = {"timescale": 3}
    after = PEAK * np.sqrt(3 / (np.arange(40) + 3))
    close(rates_of("inverse_sqrt", args=args, warmup_steps=10)[10:], after)

    assert (rates_of("plateau") == np.float32(PEAK)).all()
    rise = 1 + (1 / 25 - 1) * (1 + np.cos(np.pi * t[:15] / 15)) / 2
    last = 1 / 25 / 1e4
    fall = last + (1 - last) * (1 + np.cos(np.pi * t[:35] / 35)) / 2
    close(rates_of("one_cycle"), PEAK * np.concatenate([rise, fall]))


@pytest.mark.parametrize("multiplier", [1, 2, 3])
def test_warm_restarts_are_the_cycles_of_optax(multiplier):
    lengths = [4 * multiplier**i for i in range(15)]
    cycles = [
        {"init_value": PEAK, "peak_value": PEAK, "warmup_steps": 0}
        | {"decay_steps": length, "end_value": 0.1 * PEAK}
        for length in lengths
    ]
    args = {"first_steps": 4, "multiplier": multiplier}
    with jax.enable_x64(True):
        theirs = jax.vmap(optax.sgdr_schedule(cycles))(np.arange(50))
    close(rates_of("warm_restarts", args=args, end_lr_scale=0.1), theirs)


def test_wrong_names_and_arguments_of_schedules_are_refused_where_they_stand():
    phase = phase_of("cosin", name="head")
    assert "schedule: no 'cosin'" in problems_of(phase)[0]
    assert "did you mean 'cosine'" in problems_of(phase)[0]
    for name, args, text in [
        ("step", {"boundary": (0.5,)}, "boundary: unknown; did you mean 'boundaries'"),
        ("step", {"steps": 3}, "schedule_args.steps: unknown"),
        ("step", {"boundaries": (30, 60)}, "schedule_args: boundaries (30, 60)"),
        ("step", {"factor": 10.0}, "factor 10.0"),
        ("exponential", {"gamma": 1.0}, "gamma 1.0"),
        ("exponential", {"every_steps": -1}, "every_steps -1"),
        ("exponential", {"every_steps": 1.5}, "schedule_args.every_steps: 1.5"),
        ("polynomial", {"power": 0.0}, "power 0.0"),
        ("one_cycle", {"pct_start": 30.0}, "pct_start 30.0"),
        ("one_cycle", {"div_factor": 0.0}, "div_factor 0.0"),
        ("inverse_sqrt", {}, "without warmup_steps"),
        ("warm_restarts", {}, "first_steps 0"),
        ("warm_restarts", {"first_steps": 2, "multiplier": 0}, "multiplier 0"),
        ("plateau", {"factor": 1.0, "patience": 0}, "factor 1.0"),
        ("plateau", {"factor": 1.0, "patience": 0}, "patience 0"),
        ("plateau", {"threshold": 0.1}, "threshold: unknown"),
    ]:
        (problem,) = problems_of(phase_of(name, args=args, name="head"))
        assert problem.startswith("schedule_args") and text in problem, problem
    problem = problems_of(phase_of("one_cycle", warmup_steps=3))[0]
    assert "warmup_steps 3" in problem
    # A phase in epochs has no length yet.
    assert not problems_of(Phase(epochs=3, warmup_steps=9, schedule="step"))


def test_a_plateau_lowers_the_rate_after_its_patience_and_never_below_the_end():
    args = {"factor": 0.5, "patience": 2, "metric": "validation/accuracy"}
    phase = phase_of("plateau", args=args | {"min_change": 0.1}, end_lr_scale=0.2)
    seen, drops = (None, 0, 0), []
    for value in (0.1, 0.3, 0.35, 0.3, 0.5, float("nan"), 0.5, 0.5, 0.5, 0.5, 0.5):
        seen = plateau_of(phase).after(value, *seen)
        drops.append(seen[2])
    assert drops == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4]
    assert [plateau_of(phase).scale(n) for n in range(5)] == [1, 0.5, 0.25, 0.2, 0.2]
    assert plateau_of(phase).metric == "validation/accuracy"
    assert compile_phase(phase_of()).plateau is None


def torch_rates(steps, make, after=None):
    """Returns the rates that schedulers of torch give to an optimizer."""
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = make(torch.optim.lr_scheduler, optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "end", "args", "theirs", "their_args"),
    [
        ("linear", 0.2, {}, "LinearLR",
         {"start_factor": 1.0, "end_factor": 0.2, "total_iters": 50}),
        ("cosine", 0.2, {}, "CosineAnnealingLR", {"T_max": 50, "eta_min": 0.2 * PEAK}),
        ("step", 0.0, {"boundaries": (0.26, 0.5, 0.9), "factor": 0.3}, "MultiStepLR",
         {"milestones": [13, 25, 45], "gamma": 0.3}),
        ("step", 0.0, {"boundaries": (0.2, 0.4, 0.6, 0.8)}, "StepLR",
         {"step_size": 10}),
        ("exponential", 0.0, {"gamma": 0.93, "every_steps": 1}, "ExponentialLR",
         {"gamma": 0.93}),
        ("polynomial", 0.0, {"power": 2.5}, "PolynomialLR",
         {"total_iters": 50, "power": 2.5}),
        ("warm_restarts", 0.1, {"first_steps": 7, "multiplier": 2},
         "CosineAnnealingWarmRestarts",
         {"T_0": 7, "T_mult": 2, "eta_min": 0.1 * PEAK}),
        # Its peak and its end come one update earlier, and it divides otherwise.
        ("one_cycle", 0.0, {"pct_start": 0.3}, "OneCycleLR",
         {"max_lr": PEAK, "total_steps": 51, "pct_start": 16 / 51}),
    ],
)  # fmt: skip
def test_a_schedule_is_that_of_torch(schedule, end, args, theirs, their_args):
    oracle = torch_rates(50, lambda lib, opt: getattr(lib, theirs)(opt, **their_args))
    close(rates_of(schedule, args=args, end_lr_scale=end), oracle)


@pytest.mark.slow
def test_a_warm_up_is_torch_s_linear_rise_followed_by_the_schedule():
    def make(library, optimizer):
        rise = library.LinearLR(optimizer, start_factor=1 / 8, total_iters=7)
        fall = library.CosineAnnealingLR(optimizer, T_max=42)
        return library.SequentialLR(optimizer, [rise, fall], [8])

    close(rates_of("cosine", warmup_steps=8), torch_rates(50, make))


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["validation/loss", "validation/accuracy"])
@pytest.mark.parametrize("seed", range(10))
def test_plateaus_are_those_of_torch_with_one_evaluation_less_of_patience(metric, seed):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    patience, change = int(rng.integers(1, 5)), float(rng.choice([0, 0.02]))
    args = {"factor": 0.5, "patience": patience, "min_change": change, "metric": metric}
    phase = phase_of("plateau", args=args, end_lr_scale=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    oracle = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer,
        "min" if metric.endswith("loss") else "max",
        factor=0.5,
        patience=patience - 1,
        threshold=change,
        threshold_mode="abs",
        min_lr=0.1 * PEAK,
    )
    sign = 1 if metric.endswith("loss") else -1
    values = sign * (np.exp(-np.arange(60) / 10) + 0.05 * rng.normal(size=60))
    values[rng.random(60) < 0.1] = np.nan
    seen = (None, 0, 0)
    for value in values:
        seen = plateau_of(phase).after(float(value), *seen)
        oracle.step(float(value))
        rate = PEAK * plateau_of(phase).scale(seen[2])
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
    assert seen[2] > 0
