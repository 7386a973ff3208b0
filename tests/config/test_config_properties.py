"""Whatever stands in a config, it is run or refused in one message: never a traceback.

Every key of every config is set to values of other types, out of range and of other
keys;
`python tests/config/test_config_properties.py` prints how many were refused and accepted.
"""

import pathlib
import random
import sys
from collections import Counter

import pytest

from finetune_jax import config as configs
from finetune_jax import main as program
from finetune_jax.core.errors import TrainingError, UserError
from finetune_jax.modes import plan as plan_mode
from finetune_jax.plans.phase import plan_problems
from finetune_jax.training.setup import Setup

ROOT = pathlib.Path(__file__).parents[2]
VALUES = (
    "None", "0", "-1", "1", "3", "0.5", "1.0", "-0.5", "1e308", "1e999", "nan", "True",
    "10**9", str(2**31), str(2**64), "''", "abc", "()", "(1,)", "('a',)", "((),)",
    "(('a',),)", "('l2', 0.1, '.*')", "(('.*', 1.0),)", "(('head/.*', 0.0),)",
    "{'a': 1}", "[1, 2]", "validation/loss", "test/accuracy", "../x", "\x00", "é",
    "train[:0%]", "head/.*", "(", "*",
)  # fmt: skip
CONFIGS = {
    "iris_mlp": (),
    "diabetes_mlp": (),
    "resnet_head": (),
    "mnist_source": (
        "data.image_size=28", "data.channels=1", "model.classes=10",
    ),
    "pretrain_fashion_mnist": (
        "data.image_size=28", "data.channels=1", "model.classes=10",
    ),
    "mnist_target": (
        "data.image_size=28", "data.channels=1", "model.classes=10",
    ),
    "efficientnet_flowers": ("data.channels=3", "model.classes=5"),
}  # fmt: skip
ALWAYS = ("parallel.devices=1",)
MESSAGES = []  # Of the last refusal.
# A number too large for float32 is told so by numpy; the run may go on.
pytestmark = [
    pytest.mark.filterwarnings("default::RuntimeWarning"),
    pytest.mark.usefixtures("no_pictures"),
]


def keys(name):
    config, _ = configs.resolve(configs.load(str(ROOT / "configs" / f"{name}.py")))
    return sorted(configs.flat(config))


def cases():
    """Returns every (config, key, value): each key once, then each once more, and so on.

    The order is always the same.
    """
    draw, rounds = random.Random(0), [[] for _ in VALUES]
    for name in CONFIGS:
        for key in keys(name):
            values = draw.sample(VALUES, len(VALUES))
            for cases_of_round, value in zip(rounds, values):
                cases_of_round.append((name, key, value))
    for cases_of_round in rounds:
        draw.shuffle(cases_of_round)
    return [case for cases_of_round in rounds for case in cases_of_round]


def outcome(name, key, value, mode="plan", *more):
    """Returns 'ran' or 'refused'; another exception is a defect."""
    MESSAGES.clear()
    also = [text for text in more if not text.startswith("--")]
    more = [text for text in more if text.startswith("--")]
    given = [*CONFIGS.get(name, ()), *ALWAYS, f"{key}={value}", *also]
    arguments = [f"--config={ROOT / 'configs' / name}.py", f"--mode={mode}", *more]
    try:
        status = program.run([*arguments, *(f"--config.{text}" for text in given)])
    except UserError as error:
        assert str(error)
        MESSAGES.append(str(error))
        return "refused"
    assert status == 0
    return "ran"


def resolves(name, key, value):
    """The part that needs no data and no model, of which more cases are tried."""
    config = configs.load(str(ROOT / "configs" / f"{name}.py"))
    pairs = [tuple(text.split("=", 1)) for text in (*CONFIGS[name], *ALWAYS)]
    resolved, problems = configs.resolve(config, [*pairs, (key, value)])
    problems = problems or plan_problems(resolved.plan)
    return "refused" if problems else "ran"


def test_a_value_of_a_key_resolves_or_is_refused():
    found = Counter(resolves(*case) for case in cases()[:200])
    assert found["refused"] > 30 and found["ran"] > 30


@pytest.mark.parametrize("part", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_iris_is_planned_or_refused_with_any_value_of_any_key(part):
    chosen = [case for case in cases() if case[0] == "iris_mlp"]
    found = Counter(outcome(*case) for case in chosen[part * 20 : part * 20 + 20])
    assert found["refused"]


class Reached(Exception):
    """The setup of a training run is complete."""


def refusal(case, mode, patch, workdir):
    """Returns the message that refuses a case, or None; training stops after its setup."""

    def reached(*arguments, **keywords):
        raise Reached

    with patch.context() as inner:
        inner.setattr(Setup, "start", reached)
        for name in ("forward_flops", "step_flops"):
            inner.setattr(plan_mode, name, lambda *arguments: 1.0)
        # Training reads the weights after its setup.
        inner.setattr(plan_mode, "weights_lines", lambda *arguments: [])
        try:
            name, key, value, *more = case
            outcome(name, key, value, mode, f"--workdir={workdir}", *more)
        except Reached:
            return None
    return MESSAGES.pop() if MESSAGES else None


# Changes that the checks of several sections refuse together.
TOGETHER = [
    ("adapt_digits", "data.batch_size", "6", "plan[0].accumulate_steps=2"),
    ("resnet_head", "evaluate.cka", "1"),
    ("resnet_head", "init.fisher", "a"),
    ("iris_mlp", "task.metrics", "('auroc',)", "data.validation=train[:9]"),
    ("joint_digits_fashion", "evaluate.cka", "10"),
]


@pytest.mark.parametrize(
    "part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 4))]
)
def test_plan_and_train_refuse_the_same_configs(part, monkeypatch, tmp_path):
    # Only a plan compiles for a topology, and needs a compiler for it.
    here = [
        case
        for case in cases()
        if case[0] in ("iris_mlp", "resnet_head") and case[1] != "parallel.topology"
    ]
    chosen = here[part * 30 : part * 30 + 30] + (TOGETHER if part == 0 else [])
    refused = 0
    for number, case in enumerate(chosen):
        ways = [
            refusal(case, mode, monkeypatch, tmp_path / f"{number}")
            for mode in ("plan", "train")
        ]
        assert ways[0] == ways[1], case
        assert ways[0] or case not in TOGETHER, case
        refused += ways[0] is not None
    assert 5 < refused < len(chosen)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
@pytest.mark.ci_runs("0")
def test_all_configs_are_planned_or_refused(part):
    chosen = [case for case in cases() if case[0] != "efficientnet_flowers"]
    for case in chosen[part * 40 : part * 40 + 40]:
        outcome(*case)


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [4, 15])
@pytest.mark.ci_runs("4")
def test_what_is_accepted_runs(tmp_path, wanted):
    """Two updates of iris with values that a plan accepted."""
    ran = 0
    for number, (name, key, value) in enumerate(cases()):
        free = ("steps", "epochs", "report.wandb", "parallel")
        if name != "iris_mlp" or any(text in key for text in free):
            continue
        if outcome(name, key, value) != "ran":
            continue
        tiny = [f"--config={ROOT / 'configs' / 'iris_mlp.py'}:tiny"]
        arguments = [
            f"--workdir={tmp_path / str(number)}",
            "--config.parallel.devices=1",
        ]
        try:
            program.run([*tiny, *arguments, f"--config.{key}={value}"])
        except (UserError, TrainingError) as error:
            assert str(error)
        ran += 1
        if ran == wanted:
            break


if __name__ == "__main__":
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else len(cases())
    counts = Counter(f"{case[0]}: {outcome(*case)}" for case in cases()[:wanted])
    for line, count in sorted(counts.items()):
        print(line, count)
    tried = len({case[:2] for case in cases()[:wanted]})
    print(
        f"{sum(counts.values())} of {len(cases())} cases, {tried} of "
        f"{len(cases()) // len(VALUES)} keys, no traceback"
    )
