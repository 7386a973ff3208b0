"""Pruning rules agree with optuna or a rewrite, and end runs at the same step always."""

import json
import math

import numpy as np
import optuna
import pytest
import small

from finetune_jax.plans.phase import Phase
from finetune_jax.sweeps.search.proposals import Float, Search, is_pruned
from finetune_jax.sweeps.search.pruning import (
    Halving,
    Judge,
    Median,
    Trial,
    Wilcoxon,
    curve_of,
)
from finetune_jax.training.loop import Preempted
from finetune_jax.training.preemption import Stop
from finetune_jax.training.run import run

STEPS = range(0, 90, 5)  # The first value is that before training.


def curves(count, seed=0, steps=STEPS):
    """Returns noisy curves that rise to different heights, some with crossings."""
    random = np.random.default_rng(seed)
    return [
        {
            step: float(height * (1 - math.exp(-step / pace)) + random.normal(0, 0.02))
            for step in steps
        }
        for height, pace in zip(
            random.uniform(0.5, 1, count), random.uniform(5, 60, count)
        )
    ]


def trial(number, curve, state="complete", value=None, seed=0):
    """Returns a trial with one curve, or several if it is a list."""
    found = dict(enumerate(curve)) if isinstance(curve, list) else {seed: curve}
    last = np.mean([c[max(c)] for c in found.values()])
    value = float(last) if value is None and state == "complete" else value
    return Trial(
        number=number, overrides={}, params={}, value=value, curves=found, state=state
    )


def search(pruner, metric="validation/accuracy", batch=1):
    return Search(
        space={"x": Float(0, 1)}, metric=metric, trials=99, batch=batch, pruner=pruner
    )


def run_by_run(wanted, all_curves):
    """Returns the trials of a search in which each run is judged as it goes on."""
    done = {}
    for number, whole in enumerate(all_curves):
        curve = {}
        for step in whole:
            curve[step] = whole[step]
            if step and step < max(whole) and is_pruned(wanted, done, number, curve):
                done[number] = trial(number, curve, state="pruned")
                break
        else:
            done[number] = trial(number, curve)
    return done


def live(pruner, all_curves, direction="maximize"):
    """Returns the last step of each trial in a study of optuna, in a storage of its own."""
    study, ends = optuna.create_study(direction=direction, pruner=pruner), []
    for curve in all_curves:
        running = study.ask()
        for step in curve:
            if not step:
                continue
            running.report(curve[step], step)
            if step < max(curve) and running.should_prune():
                study.tell(running, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(running, curve[step])
        ends.append(step)
    return ends


@pytest.fixture(autouse=True)
def quiet_optuna():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


@pytest.mark.parametrize("is_loss", [False, True])
def test_the_median_prunes_what_a_live_study_of_optuna_prunes(is_loss):
    found, sign = curves(40), -1 if is_loss else 1
    found = [{step: sign * value for step, value in c.items()} for c in found]
    metric = "validation/loss" if is_loss else "validation/accuracy"
    wanted = search(Median(startup=4, warmup_steps=12), metric)
    ends = [max(t.curves[0]) for t in run_by_run(wanted, found).values()]
    pruner = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=12)
    assert ends == live(pruner, found, "minimize" if is_loss else "maximize")
    assert 5 < sum(end < max(STEPS) for end in ends) < 35


@pytest.mark.parametrize("is_loss", [False, True])
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_halving_prunes_what_a_live_study_of_optuna_prunes(factor, is_loss):
    # optuna also prunes where a rung has fewer values than the factor; not if each of the
    # first trials is better than those before it.
    first = [{step: step / 100 + n for step in STEPS} for n in range(factor - 1)]
    later = [{s: v + factor for s, v in c.items()} for c in curves(40, seed=factor)]
    sign = -1 if is_loss else 1
    found = [{s: sign * v for s, v in c.items()} for c in first + later]
    metric = "validation/loss" if is_loss else "validation/accuracy"
    wanted = search(Halving(first_steps=7, factor=factor), metric)
    ends = [max(t.curves[0]) for t in run_by_run(wanted, found).values()]
    pruner = optuna.pruners.SuccessiveHalvingPruner(
        min_resource=7, reduction_factor=factor
    )
    assert ends == live(pruner, found, "minimize" if is_loss else "maximize")
    assert {10, max(STEPS)} < set(ends) and max(STEPS) in ends[factor:]


def halved(all_curves, batch, first, factor):
    """Returns the last step of each trial under asynchronous halving, in numpy."""
    values = np.array([[c[s] for s in STEPS] for c in all_curves])
    steps, ends = np.array(STEPS), np.full(len(values), len(STEPS) - 1)
    rungs = [np.argmax(steps >= first * factor**k) for k in range(9)]
    rungs = [index for index in rungs if 0 < index < len(STEPS) - 1]
    for number in range(len(values)):
        known = number // batch * batch
        for index in rungs:
            rival = values[:known, index][ends[:known] >= index]
            better = np.sum(rival > values[number, index])
            size = len(rival) + 1
            if size >= factor and better >= size // factor:
                ends[number] = index
                break
    return steps[ends].tolist()


@pytest.mark.parametrize("batch", [1, 4])
def test_halving_agrees_with_a_rewrite_also_in_batches(batch):
    found = curves(60, seed=5)
    wanted = search(Halving(first_steps=10, factor=3), batch=batch)
    ends = [max(t.curves[0]) for t in run_by_run(wanted, found).values()]
    assert ends == halved(found, batch, 10, 3)
    assert len(set(ends)) > 2


def test_wilcoxon_prunes_what_optunas_own_object_prunes():
    random, results = np.random.default_rng(0), []
    best = random.normal(0.9, 0.02, 12)
    known = trial(0, [{7: v} for v in best])
    wanted = search(Wilcoxon(p=0.1, startup=3))
    for lower in (-0.05, 0.0, 0.02, 0.05):
        values = best - lower + random.normal(0, 0.01, 12)
        study = optuna.create_study(
            direction="maximize",
            pruner=pytest.warns(
                optuna.exceptions.ExperimentalWarning,
                optuna.pruners.WilcoxonPruner, p_threshold=0.1, n_startup_steps=3,
            ),
        )  # fmt: skip
        study.add_trial(
            optuna.trial.create_trial(
                value=best.mean(), intermediate_values=dict(enumerate(best))
            )
        )
        running, seeds = study.ask(), {}
        for seed, value in enumerate(map(float, values)):
            running.report(value, seed)
            seeds[seed] = value
            results.append((lower, is_pruned(wanted, {0: known}, 1, seeds)))
            assert results[-1][1] == running.should_prune()
    assert not any(pruned for lower, pruned in results if lower < 0)
    assert sum(pruned for lower, pruned in results if lower == 0.05) > 8


def test_a_run_is_compared_with_the_same_seed_of_other_trials():
    low, high = {5: 0.1, 9: 0.2}, {5: 0.8, 9: 0.9}
    done = {n: trial(n, [low, high]) for n in range(6)}
    for pruner in (Median(), Halving(first_steps=5, factor=2)):
        judged = [
            is_pruned(search(pruner), done, 6, {5: 0.5}, seed=seed)
            for seed in (0, 1, 2)
        ]
        assert judged == [False, True, False]


@pytest.mark.parametrize("pruner", [Median(), Halving(first_steps=5), Wilcoxon()])
def test_trials_of_the_same_batch_and_later_ones_do_not_count(pruner):
    good = [{5: 0.9, 10: 0.9}] * 4
    done = {n: trial(n, good) for n in range(30)}
    bad = dict.fromkeys(range(4) if pruner.over_seeds else (5, 10), 0.1)
    wanted = search(pruner, batch=8)
    assert is_pruned(wanted, done, 17, bad) == is_pruned(wanted, done, 23, bad)
    early = {n: done[n] for n in range(16)}
    assert is_pruned(wanted, early, 17, bad) == is_pruned(wanted, done, 17, bad)
    assert not is_pruned(wanted, done, 7, bad)
    assert not is_pruned(search(None), {}, 7, bad)
    with pytest.raises(ValueError, match="have not ended"):
        is_pruned(wanted, {}, 8, bad)


def test_a_value_that_is_not_finite_is_pruned():
    done = {n: trial(n, [{5: 0.5}] * 3) for n in range(8)}
    for pruner in (Median(), Halving(first_steps=5), Wilcoxon()):
        curve = {0: math.nan} if pruner.over_seeds else {0: 0.1, 5: math.nan}
        assert is_pruned(search(pruner), done, 8, curve)


def test_failed_trials_and_values_before_training_do_not_count():
    failed = [
        Trial(number=n, overrides={}, params={}, value=None, state="failed")
        for n in range(8)
    ]
    for pruner in (Median(startup=1), Halving(first_steps=1, factor=2), Wilcoxon()):
        wanted = search(pruner)
        assert not is_pruned(wanted, dict(enumerate(failed)), 8, {0: 0.1, 5: 0.1})
    started = {n: trial(n, {0: 0.9, 5: 0.9}) for n in range(8)}
    for pruner in (Median(startup=1), Halving(first_steps=1, factor=2)):
        assert not is_pruned(search(pruner), started, 8, {0: 0.1})
        assert is_pruned(search(pruner), started, 8, {0: 0.1, 5: 0.1})


def test_a_curve_has_the_evaluations_of_a_log(tmp_path):
    values = [
        {"step": 0, "validation/accuracy": 0.1},
        {"step": 3, "train/loss": 2.0},
        {"step": 5, "validation/accuracy": 0.3, "validation/loss": 1.0},
        {"step": 10, "validation/accuracy": None},
        {"step": 10, "validation/accuracy": 0.5},
        {"step": 15, "validation/accuracy": None},
    ]
    assert curve_of(tmp_path, "validation/accuracy") == {}
    text = "".join(json.dumps(line) + "\n" for line in values) + '{"step": 20, "valid'
    (tmp_path / "metrics.jsonl").write_text(text)
    found = curve_of(tmp_path, "validation/accuracy")
    assert [*found] == [0, 5, 10, 15] and math.isnan(found.pop(15))
    assert found == {0: 0.1, 5: 0.3, 10: 0.5}
    assert curve_of(tmp_path, "validation/accuracy", until=5) == {0: 0.1, 5: 0.3}


def log(workdir, values):
    lines = [{"step": s, "validation/loss": v} for s, v in values.items()]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (workdir / "metrics.jsonl").write_text(text)


def test_each_evaluation_is_judged_once_in_order_whenever_the_judge_is_asked(tmp_path):
    values = {0: 1.0, 5: 0.9, 10: 0.7, 15: 0.8, 20: 0.1}

    def judge():
        seen = []

        def rises(curve):
            seen.append([*curve])
            steps = [*curve]
            return len(steps) > 1 and curve[steps[-1]] > curve[steps[-2]]

        return Judge(tmp_path, "validation/loss", rises), seen

    often, seen = judge()
    assert not often()
    for step in values:
        log(tmp_path, {s: v for s, v in values.items() if s <= step})
        assert often() == (step >= 15)
        assert often() == (step >= 15)
    assert often.pruned_at == 15
    assert seen == [[0], [0, 5], [0, 5, 10], [0, 5, 10, 15]]
    late, again = judge()
    assert late() and late.pruned_at == 15 and again == seen


CONFIG = {
    "evaluate.every_steps": "2",
    "evaluate.best": "validation/loss",
    "data.per_class": "5",
    "data.batch_size": "10",
}


def config():
    return small.config(
        model="cnn", convolutions=(4,), dense=(),
        plan=(Phase(name="all", steps=8),), overrides=[*CONFIG.items()],
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_stops_after_the_evaluation_that_ends_it(tmp_path, no_pictures):
    whole = run(config(), tmp_path / "whole")
    seen, stop = [], Stop()

    def at_four(curve):
        seen.append([*curve])
        return max(curve) >= 4

    stop.judge = judge = Judge(tmp_path / "pruned", "validation/loss", at_four)
    with pytest.raises(Preempted, match="pruned and saved at step 4"):
        run(config(), tmp_path / "pruned", stop)
    assert judge.pruned_at == 4 and seen == [[0], [0, 2], [0, 2, 4]]
    found = curve_of(tmp_path / "pruned", "validation/loss")
    all_values = curve_of(tmp_path / "whole", "validation/loss")
    assert [*found] == [0, 2, 4] and found.items() < all_values.items()
    # A worker may be killed before it has noted the decision: the next one decides alike.
    stop.judge = again = Judge(tmp_path / "pruned", "validation/loss", lambda c: 4 in c)
    with pytest.raises(Preempted, match="pruned and saved at step 4"):
        run(config(), tmp_path / "pruned", stop)
    assert again.pruned_at == 4
    assert curve_of(tmp_path / "pruned", "validation/loss") == found
    # The last evaluation ends nothing, and what was pruned could go on.
    stop.judge = last = Judge(tmp_path / "pruned", "validation/loss", lambda c: 8 in c)
    assert small.same_result(run(config(), tmp_path / "pruned", stop), whole)
    assert last.pruned_at is None and last() and last.pruned_at == 8
