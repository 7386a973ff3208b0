"""What learns in each phase of each strategy, at which rate, and what keeps its bits."""

import functools
import inspect
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from finetune_jax import models
from finetune_jax.core import registry
from finetune_jax.core.errors import UserError
from finetune_jax.core.pytrees import named
from finetune_jax.models.tabular import ANY_FIELDS
from finetune_jax.optim import compile_phase
from finetune_jax.optim.optimizer import carried
from finetune_jax.plans import strategies
from finetune_jax.plans.phase import carried_cohorts, check_plan, scales
from finetune_jax.tasks.components.random_state import random_state
from finetune_jax.tasks.components.text_inputs import tokens
from finetune_jax.training.phases import phase_setup
from finetune_jax.training.run import run
from finetune_jax.training.updates.programs import Updates

ROOT = pathlib.Path(__file__).parents[2]
CNN = dict(convolutions=(4, 4), dense=(8,))
STAGES = ("stage1", "stage2", "stage3", "head")
BODY = {"stage1": 1.0, "stage2": 1.0, "stage3": 1.0}
ALL = {**BODY, "head": 1.0}
HEAD, BOTH = {"head": 1.0}, {"stage1", "stage2"}
LORA = tuple(
    f"{layer}/lora_{side}" for layer in ("stage1/conv", "stage3/dense") for side in "ab"
)
UNFROZEN = (
    ("head", HEAD, set()),
    ("from_stage3", {"stage3": 1.0, **HEAD}, set()),
    ("from_stage2", {"stage2": 1.0, "stage3": 1.0, **HEAD}, {"stage2"}),
    ("all", ALL, BOTH),
)
# Written by hand: (phase, what learns and its share of the rate, whose averages move).
TABLE = {
    "full": ((("all", ALL, BOTH),), dict()),
    "head_only": ((("head", HEAD, set()),), dict()),
    "partial": ((("partial", {"stage3": 1.0, **HEAD}, set()),), dict(last=2)),
    "partial named": (
        (("partial", {"stage1/bn": 1.0, "stage2": 1.0}, BOTH),),
        dict(named=("stage1/bn", "stage2")),
    ),
    "layerwise": (UNFROZEN, dict()),
    "gradual": (
        (
            ("head", HEAD, set()),
            ("from_stage3", {"stage3": 0.5, **HEAD}, set()),
            ("from_stage2", {"stage2": 0.25, "stage3": 0.5, **HEAD}, {"stage2"}),
            ("all", {"stage1": 0.125, "stage2": 0.25, "stage3": 0.5, **HEAD}, BOTH),
        ),
        dict(decay=0.5),
    ),
    "gradual at one rate": (UNFROZEN, dict()),
    "progressive": (UNFROZEN, dict()),
    "two_stage": (
        (("head", HEAD, set()), ("all", ALL, BOTH)),
        dict(head_lr=0.1, all_lr=0.01),
    ),
    "alternating": (
        (("head1", HEAD, set()), ("backbone1", BODY, BOTH),
         ("head2", HEAD, set()), ("backbone2", BODY, BOTH)),
        dict(cycles=2),
    ),
    "discriminative": (
        (("all", {"head": 1.0, "stage3": 0.3, "stage2": 0.3**2, "stage1": 0.3**3},
          BOTH),),
        dict(decay=0.3),
    ),
    "surgical": (
        (("surgical", {"stage2": 1.0, **HEAD}, {"stage2"}),), dict(block="stage2"),
    ),
    "surgical deeper": (
        (("surgical", {"stage1/conv": 1.0}, {"stage1"}),),
        dict(block="stage1/conv", head=False),
    ),
    "bias_only": (
        (("biases", {"stage1/bn/bias": 1.0, "stage2/bn/bias": 1.0,
                     "stage3/dense/bias": 1.0, **HEAD}, set()),),
        dict(),
    ),
    "bias_only without head": (
        (("biases", {"stage1/bn/bias": 1.0, "stage2/bn/bias": 1.0,
                     "stage3/dense/bias": 1.0}, set()),),
        dict(head=False),
    ),
    "norm_only": (
        (("norms", {"stage1/bn": 1.0, "stage2/bn": 1.0, **HEAD}, BOTH),), dict(),
    ),
    "lora": ((("lora", {**dict.fromkeys(LORA, 1.0), **HEAD}, set()),), dict()),
}  # fmt: skip


def plan_of(row, **fields):
    """Returns the phases of a row of the table."""
    name, _, _ = row.partition(" ")
    strategy, arguments = getattr(strategies, name), TABLE[row][1]
    takes = inspect.signature(strategy).parameters
    stages = (STAGES,) if "stages" in takes else ()
    return strategy(*stages, **{"steps": 2, **arguments, **fields})


def task_of(row):
    lora = dict(lora_rank=2, lora_targets=("stage1/.*", "stage3/.*"))
    return small.task("cnn", **CNN, **(lora if row == "lora" else {}))


def state_of(row):
    return start("lora" if row == "lora" else "full")


@functools.cache
def start(row):
    return jax.jit(lambda: random_state(task_of(row), 0))()


def shares(expected, names):
    """Returns the share of the rate of each name; what is not expected has none."""
    found = {
        name: share
        for name in names
        for part, share in expected.items()
        if name == part or name.startswith(f"{part}/")
    }
    assert all(any(n.startswith(part) for n in found) for part in expected)
    return found


def bits(tree):
    return {name: np.asarray(leaf).tobytes() for name, leaf in named(tree).items()}


def test_the_table_has_every_strategy():
    public = {
        name
        for name, function in inspect.getmembers(strategies, inspect.isfunction)
        if function.__module__ == strategies.__name__ and not name.startswith("_")
    }
    public.remove("together")  # It joins plans.
    public.remove("linear_probe")  # It makes a fit: tests/training/test_probe.py.
    assert public == {row.partition(" ")[0] for row in TABLE}


EACH_ROW = pytest.mark.parametrize("row", TABLE)


@EACH_ROW
@pytest.mark.ci_runs("head_only", "gradual", "bias_only", "lora")
@pytest.mark.slow
def test_exactly_what_a_phase_trains_moves_and_all_else_keeps_its_bits(row):
    task, state = task_of(row), state_of(row)
    plan = plan_of(row, optimizer="sgd")
    check_plan(plan, named(state.params))
    assert [phase.name for phase in plan] == [name for name, *_ in TABLE[row][0]]
    for phase, (_, expected, averages) in zip(plan, TABLE[row][0]):
        # Without jit: what keeps its bits does not rest on what XLA simplifies.
        trainer = small.Trainer(task, phase, jit=False, state=state)
        for seed in range(2):  # LoRA's first update leaves lora_a where it was.
            trainer.update(small.batch(16, seed=seed))
        before, after = bits(state.params), bits(trainer.state.params)
        moved = {name for name in before if before[name] != after[name]}
        assert moved == set(shares(expected, before)), phase.name
        before, after = bits(state.batch_stats), bits(trainer.state.batch_stats)
        moved = {name for name in before if before[name] != after[name]}
        wanted = {name for name in before if name.split("/")[0] in averages}
        assert moved == wanted, phase.name
        state = trainer.state


@EACH_ROW
@pytest.mark.ci_runs("head_only", "gradual", "bias_only", "lora")
@pytest.mark.fast_runs("head_only")
def test_a_unit_gradient_moves_each_parameter_by_minus_its_rate_bit_for_bit(row):
    task, params = task_of(row), state_of(row).params
    names, plan = tuple(named(params)), plan_of(row, optimizer="sgd")
    for index, (_, expected, _) in enumerate(TABLE[row][0]):
        optimizer = phase_setup(plan, index, task, names).optimizer()
        ones, rate = jax.tree.map(np.ones_like, params), jnp.asarray(0.1, jnp.float32)
        state = optimizer.init(params)
        updates, _ = optimizer.update(ones, state, params, learning_rate=rate)
        share = shares(expected, names)
        for name, update in named(updates).items():
            wanted = -np.float32(0.1) * np.float32(share.get(name, 0.0))
            assert (np.asarray(update) == wanted).all(), (plan[index].name, name)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0", "resnet20"])
def test_norms_are_all_that_has_one_axis_outside_the_head(name):
    params = abstract_params(name)
    (phase,) = strategies.norm_only(steps=1)
    found = {n for n, scale in scales(phase, params).items() if scale}
    # Convolutions of these models have no bias.
    assert found == {
        n for n, leaf in params.items() if leaf.ndim == 1 or n.startswith("head/")
    }


def abstract_params(name, **arguments):
    config = small.config(model=name, **arguments)
    task = small.task_of(config, small.spec((64, 64, 3)))
    return named(jax.eval_shape(lambda: random_state(task, 0)).params)


def test_the_rate_of_progressive_grows_back_by_equal_factors():
    plan = strategies.progressive(STAGES, peak_lr=0.8, start_scale=0.001, steps=1)
    rates = [phase.peak_lr for phase in plan]
    np.testing.assert_allclose(rates, [0.0008, 0.008, 0.08, 0.8], rtol=1e-12)
    assert rates[-1] == 0.8
    assert strategies.progressive(("head",), steps=1, peak_lr=0.5)[0].peak_lr == 0.5


def test_gradual_rates_are_slanted_triangles():
    """Compared with the formula of Howard & Ruder 2018, sec. 3.2."""
    (phase, *_) = strategies.gradual(STAGES, steps=1000, peak_lr=0.01)
    rates, cut, ratio = compile_phase(phase).learning_rates(), 100, 32
    for step in (100, 101, 500, 999):
        p = 1 - (step - cut) / (cut * (1 / 0.1 - 1))
        assert rates[step] == pytest.approx(0.01 * (1 + p * (ratio - 1)) / ratio)
    assert rates.argmax() in (99, 100)
    assert (np.diff(rates[:100]) > 0).all() and (np.diff(rates[100:]) < 0).all()
    given = strategies.gradual(STAGES, epochs=3, warmup_steps=7, schedule="cosine")
    assert {(p.warmup_steps, p.schedule) for p in given} == {(7, "cosine")}


def test_lengths_and_rates_may_differ_from_phase_to_phase():
    plan = strategies.two_stage(head_lr=0.1, all_lr=0.01, epochs=(5, 20))
    assert [(p.epochs, p.peak_lr) for p in plan] == [(5, 0.1), (20, 0.01)]
    plan = strategies.alternating(STAGES, cycles=2, steps=(3, 7), peak_lr=0.5)
    assert [(p.steps, p.peak_lr) for p in plan] == [(3, 0.5), (7, 0.5)] * 2
    with pytest.raises(UserError, match="steps: 2 values for 4 phases"):
        strategies.gradual(STAGES, steps=(1, 2))


def test_the_first_phase_of_many_carries_nothing_and_the_others_as_asked():
    for row in ("layerwise", "gradual", "progressive", "two_stage", "alternating"):
        plan = plan_of(row, optimizer_state="carry")
        assert [p.optimizer_state for p in plan] == [
            "reset", *["carry"] * (len(plan) - 1),
        ]  # fmt: skip
        assert {p.optimizer_state for p in plan_of(row)} == {"reset"}
    # A single phase may follow another.
    assert plan_of("full", optimizer_state="carry")[0].optimizer_state == "carry"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: strategies.surgical(STAGES, block="stgae2", steps=1),
         "no stage 'stgae2'; did you mean 'stage2'?"),
        (lambda: strategies.partial(STAGES, named=("haed", "stage9/x"), steps=1),
         "no stage 'haed'; did you mean 'head'"),
        (lambda: strategies.partial(STAGES, last=0, steps=1), "last=0; 1 to 4"),
        (lambda: strategies.partial(STAGES, last=5, steps=1), "last=5; 1 to 4"),
        (lambda: strategies.partial(STAGES, steps=1), "exactly one"),
        (lambda: strategies.partial(STAGES, last=1, named=("head",)), "exactly one"),
        (lambda: strategies.alternating(STAGES, cycles=0, steps=1), "cycles=0"),
        (lambda: strategies.alternating(("head",), cycles=1, steps=1), "2 or more"),
        (lambda: strategies.discriminative(STAGES, decay=0.0, steps=1), "decay=0.0"),
        (lambda: strategies.gradual(STAGES, decay=-1.0, steps=1), "decay=-1.0"),
        (lambda: strategies.progressive(STAGES, start_scale=0.0), "start_scale=0.0"),
        (lambda: strategies.layerwise((), steps=1), "1 or more"),
        (lambda: strategies.layerwise("resnet50", steps=1), "models.stages_of"),
        (lambda: models.stages_of("resnet500"), "did you mean 'resnet50'"),
        (lambda: models.stages_of("mlp", {"hiden": (1,)}), "did you mean 'hidden'"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_refused(call, message):
    with pytest.raises(UserError) as found:
        call()
    assert message in str(found.value)


def with_parameters(name):
    """Returns the stages of a model that have parameters, by its initialisation."""
    model = models.make_model(name, {"head": {}}, classes=2)
    x = jnp.zeros((1, 224, 224, 3))
    if hasattr(model.parts[0], "vocabulary"):
        x = tokens(jnp.ones((1, 2, 2), jnp.int32))
    if hasattr(model.parts[0], "fields"):
        categories = jnp.zeros((1, len(ANY_FIELDS)), jnp.int32)
        x = {"numbers": jnp.zeros((1, 1)), "categories": categories}
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)
    return tuple(stage for stage in model.stages if stage in shapes["params"])


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet20", "resnet18"])
def test_the_stages_of_a_model_are_those_with_parameters(name):
    found = models.stages_of(name, {"name": name, "classes": 3, "lora_rank": 2})
    assert found == with_parameters(name) and found[-1] == "head"


@pytest.mark.slow
def test_the_stages_of_all_families_are_those_with_parameters():
    names = [
        next(iter(module.MODELS))
        for module in registry.modules(models).values()
        if hasattr(module, "MODELS")
    ]
    assert {n: models.stages_of(n) for n in names} == {
        n: with_parameters(n) for n in names
    }


def test_asking_for_stages_in_a_config_file_starts_no_backend():
    """Else the number of host threads would be set too late, and give other bits."""
    done = subprocess.run(
        [sys.executable, "-c",
         "from finetune_jax import models; print(models.stages_of('resnet50'))"],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "JAX_PLATFORMS": "there_is_none"},
    )  # fmt: skip
    assert done.returncode == 0 and "'stage4', 'head'" in done.stdout, done.stderr


@pytest.mark.slow
def test_twenty_cycles_of_alternating_compile_two_steps(
    tmp_path, monkeypatch, no_pictures
):
    programs = []
    found = Updates.program

    def kept(self, *arguments):
        program, compile_s, cost = found(self, *arguments)
        programs.append(program)
        return program, compile_s, cost

    monkeypatch.setattr(Updates, "program", kept)
    plan = strategies.alternating(
        ("stage1", "head"), cycles=20, steps=(1, 2), optimizer="sgd"
    )
    config = small.config(model="mlp", hidden=(8,), plan=plan)
    result = run(config, tmp_path / "run")
    assert result["steps"] == 60 and len(plan) == 40
    assert len(set(map(id, programs))) == 2


@pytest.mark.slow
def test_on_unfreezing_state_goes_on_and_what_joins_starts_as_a_fresh_optimizer():
    """Adam with one count for all would take 2.5 times the rate for what joins."""
    task, params = task_of("full"), state_of("full").params
    names, rate = tuple(named(params)), jnp.asarray(0.1, jnp.float32)
    plan = strategies.layerwise(
        STAGES, steps=5, optimizer="adam", optimizer_state="carry"
    )
    rng = np.random.default_rng(0)
    state: object = None
    for index, joining in enumerate(("head", "stage3", "stage2", "stage1")):
        setup = phase_setup(plan, index, task, names)
        optimizer = setup.optimizer()
        update = jax.jit(optimizer.update)
        fresh = optimizer.init(params)
        old = state
        state = carried(old, fresh, carried_cohorts(plan, index, names))
        counts = [int(v) for n, v in named(state).items() if n.endswith("count")]
        assert sorted(counts) == [5 * k for k in range(index + 1)]
        for step in range(5):
            gradient = jax.tree.map(
                lambda p: rng.normal(size=p.shape).astype(np.float32), params
            )
            ours, state = update(gradient, state, params, learning_rate=rate)
            if step == 0:
                theirs, _ = update(gradient, fresh, params, learning_rate=rate)
                ours, theirs = named(ours), named(theirs)
                for name in setup.groups:
                    most = np.abs(theirs[name]).max()
                    assert np.abs(ours[name]).max() <= most * (1 + 1e-6), name
                    if name.startswith(joining):
                        np.testing.assert_array_equal(ours[name], theirs[name])
