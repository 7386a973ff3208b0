"""A linear probe is scikit-learn's logistic regression on the features of the model."""

import warnings

import numpy as np
import pytest
import small
from scipy.special import logsumexp, softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from finetune_jax.core.errors import TrainingError, UserError
from finetune_jax.core.pytrees import named
from finetune_jax.features.cache import Features, frozen_prefix
from finetune_jax.modes import evaluate
from finetune_jax.modes.options import Options
from finetune_jax.plans import head_only, linear_probe
from finetune_jax.plans.phase import Phase
from finetune_jax.report.terminal import Terminal
from finetune_jax.training.assembly import make_store
from finetune_jax.training.restore import best_state
from finetune_jax.training.run import run
from finetune_jax.training.setup import make_setup

pytestmark = pytest.mark.usefixtures("no_pictures")
PENALTIES = (1e-1, 1e-2, 1e-3)


def config(*, plan=None, overrides=(), **probe):
    plan = plan or linear_probe(penalties=PENALTIES, **probe)
    overrides = [("evaluate.best", "validation/accuracy"), *overrides]
    return small.config(plan=plan, overrides=overrides)


def features(config):
    """Returns (features, labels) of each split, as float64."""
    setup = make_setup(config)
    state, _ = setup.start()
    prefix = frozen_prefix(setup.task, state, setup.phase(0).mode)
    assert prefix is not None
    store = make_store(setup, Terminal(quiet=True))
    assert store is not None
    found = {}
    for name, split in {"train": setup.data.train, **setup.data.held_out}.items():
        rows = store.held_out(split, prefix).take(np.arange(len(split)))
        found[name] = rows["features"].astype(np.float64), rows["label"]
    return found


def sklearn_fit(splits, penalty):
    """Returns scikit-learn's regression with a penalty of the mean loss."""
    x, y = (np.concatenate(parts) for parts in zip(*splits))
    regression = LogisticRegression(C=1 / (penalty * len(y)), max_iter=5000, tol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        return regression.fit(x, y)


def head_of(config, workdir):
    """Returns kernel and bias of the head of the best state."""
    state, _ = best_state(make_setup(config), workdir)
    head = {n: np.asarray(x) for n, x in named(state.params["head"]).items()}
    (kernel,) = (x for name, x in head.items() if name.endswith("kernel"))
    (bias,) = (x for name, x in head.items() if name.endswith("bias"))
    return kernel, bias


def objective(kernel, bias, splits, penalty):
    """Returns the mean cross entropy with the penalty of the kernel, in float64."""
    x, y = (np.concatenate(parts) for parts in zip(*splits))
    logits = x @ kernel.astype(np.float64) + bias
    right = logits[np.arange(len(y)), y]
    return (logsumexp(logits, axis=1) - right).mean() + penalty / 2 * (kernel**2).sum()


def check_is_minimum(head, regression, splits, penalty):
    """Checks that a head is as good as scikit-learn's, and predicts the same."""
    best = objective(regression.coef_.T, regression.intercept_, splits, penalty)
    # Line searches end where float32 cannot tell two losses apart.
    assert best - 1e-8 <= objective(*head, splits, penalty) <= best + 1e-5
    for x, _ in splits:
        probability = softmax(x @ head[0] + head[1], axis=1)
        # A difference of 1e-5 leaves the head a way to go in flat directions.
        np.testing.assert_allclose(probability, regression.predict_proba(x), atol=1e-2)


def test_a_probe_is_the_regression_that_scikit_learn_chooses_and_fits_again(tmp_path):
    found = run(config(), tmp_path)
    assert found["fitted_to"] == ["train", "validation"]
    splits = features(config())
    fits = {p: sklearn_fit([splits["train"]], p) for p in PENALTIES}
    score = {p: fit.score(*splits["validation"]) for p, fit in fits.items()}
    chosen = max(score, key=lambda p: score[p])
    assert sum(value == score[chosen] for value in score.values()) == 1
    # Its own validation metrics are from before the second fit.
    assert found["validation/accuracy"] == pytest.approx(score[chosen], abs=1 / 360)
    train, validation = len(splits["train"][1]), len(splits["validation"][1])
    both = splits["train"], splits["validation"]
    penalty = chosen * train / (train + validation)
    again = sklearn_fit(both, penalty)
    assert found["test/accuracy"] == pytest.approx(
        again.score(*splits["test"]), abs=1 / 359
    )
    check_is_minimum(head_of(config(), tmp_path), again, both, penalty)


@pytest.mark.slow
def test_without_a_refit_the_head_is_that_of_the_training_split(tmp_path):
    plain = config(refit=False)
    found = run(plain, tmp_path)
    splits = features(plain)
    train = [splits["train"]]
    score, penalty, best = max(
        (fit.score(*splits["validation"]), penalty, fit)
        for penalty in PENALTIES
        for fit in [sklearn_fit(train, penalty)]
    )
    check_is_minimum(head_of(plain, tmp_path), best, train, penalty)
    assert found["validation/accuracy"] == pytest.approx(score, abs=1 / 360)


@pytest.mark.slow
def test_evaluation_does_not_measure_a_validation_split_that_was_fitted(
    tmp_path, capsys
):
    found = run(config(), tmp_path)
    options = Options(
        config="", workdir=tmp_path, inputs=(), output=None, formats=(), layout=None
    )
    assert evaluate.main(config(), options) == 0
    assert f"{found['validation/loss']:.4f}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_was_fitted_to_its_validation_split_is_not_extended(tmp_path):
    run(config(), tmp_path / "a")
    longer = (
        *linear_probe(penalties=PENALTIES),
        Phase(name="all", steps=2, peak_lr=1e-3),
    )
    extended = config(plan=longer, overrides=[("extend", str(tmp_path / "a"))])
    with pytest.raises(UserError, match="config.extend: the run in .* was fitted to"):
        run(extended, tmp_path / "b")


def test_a_fit_that_is_not_finite_ends_the_run(tmp_path, monkeypatch):
    take = Features.take

    def broken(self, positions):
        return {**take(self, positions), "weight": np.zeros(len(positions), np.float32)}

    monkeypatch.setattr(Features, "take", broken)
    with pytest.raises(TrainingError, match="the loss of the fit is nan"):
        run(config(plan=linear_probe(penalties=(1e-2,), refit=False)), tmp_path)


@pytest.mark.slow
def test_few_labels_are_not_extended_by_those_of_the_validation_split(tmp_path, capsys):
    few = config(overrides=[("data.per_class", "5")])
    run(few, tmp_path)
    assert "fitted again" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_probe_before_other_phases_keeps_the_validation_split_unseen(
    tmp_path, capsys
):
    tuned = (*linear_probe(), Phase(name="all", steps=3, peak_lr=1e-3))
    found = run(config(plan=tuned), tmp_path / "a")
    assert "fitted again" not in capsys.readouterr().out
    assert found["steps"] == 4
    stopped, stops = small.run_with_stops(config(plan=tuned), tmp_path / "b")
    assert stops > 1 and small.same_result(stopped, found)
    assert small.lines(tmp_path / "a") == small.lines(tmp_path / "b")


@pytest.mark.slow
def test_a_probe_without_a_cache_gives_the_same_head(tmp_path):
    run(config(), tmp_path / "a")
    run(config(overrides=[("data.cache", "off")]), tmp_path / "b")
    for one, other in zip(
        head_of(config(), tmp_path / "a"), head_of(config(), tmp_path / "b")
    ):
        np.testing.assert_allclose(one, other, atol=1e-3)


@pytest.mark.slow
def test_augmentation_does_not_change_a_probe(tmp_path):
    run(config(), tmp_path / "a")
    augmented = config(overrides=[("data.augment", "(('flip',), ('pad_crop', 2))")])
    run(augmented, tmp_path / "b")
    for one, other in zip(
        head_of(config(), tmp_path / "a"), head_of(augmented, tmp_path / "b")
    ):
        np.testing.assert_allclose(one, other, atol=1e-3)


@pytest.mark.parametrize(
    ("plan", "overrides", "text"),
    [
        (None, [("data.sampling", "balanced")], "config.data.sampling: 'balanced', but"),
        (None, [("data.mix", "(('mixup', 0.2),)")], "config.data.mix: "),
        (None, [("data.validation", "None"), ("evaluate.best", "None")],
         "config.data.validation: None, but it chooses the penalty"),
        (None, [("task.threshold_rule", "f1")], "config.task.threshold_rule"),
        (None, [("plan[0].peak_lr", "0.1")], r"config.plan\[0\].peak_lr: 0.1, but"),
        (None, [("plan[0].optimizer_args.penalties", "(-1.0,)")],
         r"optimizer_args.penalties: \[-1.0\]"),
        (None, [("plan[0].rules", "(('.*', 1.0),)")], "no stage before the trained ones"),
        (None, [("data.memory_gb", "1e-6")], "config.data.memory_gb: 1e-06, but phase"),
        (head_only(epochs=1, optimizer="linear_probe", schedule="constant", peak_lr=1.0),
         [], r"config.plan\[0\].steps: None, but"),
    ],
)  # fmt: skip
def test_what_a_probe_cannot_do_is_refused(plan, overrides, text, tmp_path):
    with pytest.raises(UserError, match=text):
        run(config(plan=plan, overrides=overrides), tmp_path)
