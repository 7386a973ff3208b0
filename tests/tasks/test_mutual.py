"""Several models in one task: their labels, starts and policies, and mutual learning."""

import json

import jax
import numpy as np
import pytest
import small
from mutual import CNN, LARGE, config

from finetune_jax import config as configs
from finetune_jax.config.members import member_models
from finetune_jax.core.errors import UserError
from finetune_jax.core.pytrees import named
from finetune_jax.inference.predictor import open_predictor
from finetune_jax.models.modes import EVALUATION, Mode
from finetune_jax.modes import plan as plan_mode
from finetune_jax.modes.options import Options
from finetune_jax.plans.strategies import full, partial, together
from finetune_jax.tasks.components.random_state import random_state
from finetune_jax.tasks.task import StepContext
from finetune_jax.training.run import run
from finetune_jax.training.setup import make_setup, metric_names

pytestmark = pytest.mark.usefixtures("no_pictures")

SMALL = {"label": "small", "name": "mlp", "hidden": (6,)}
THIRD = {"label": "third", "name": "mlp", "hidden": (5,)}


PREFIXES = ("large", "small", "third")


def task(*arguments, **keywords):
    return small.task_of(config(*arguments, **keywords), small.spec())


def test_a_member_says_what_differs_from_the_model():
    shared = config(
        ({"label": "a", "hidden": (3,), "head": {"dropout": 0.5}}, {**CNN}),
        overrides=[
            ("model.hidden", "(8,)"),
            ("model.head.activation", "gelu"),
            ("model.members[1].dense", "(9,)"),
            ("model.members[1].head.dropout", "0.25"),
        ],
    )
    found = member_models(shared.model)
    assert found["a"]["name"] == "mlp" and found["a"]["hidden"] == (3,)
    assert found["a"]["head"]["dropout"] == 0.5
    assert found["a"]["head"]["activation"] == "gelu"
    assert found["cnn"]["dense"] == (9,) and "hidden" not in found["cnn"]
    assert found["cnn"]["head"]["dropout"] == 0.25
    again = configs.from_json(configs.to_json(shared), "here")
    assert not configs.differences(shared, again)
    assert member_models(again.model) == found


@pytest.mark.parametrize(
    ("members", "changes", "message"),
    [
        ((LARGE,), {}, "2 at least learn from one another"),
        ((), {}, "2 at least"),
        ((LARGE, LARGE), {}, r"members\[1\].label: 'large' twice"),
        (({"name": "mlp"}, {"name": "mlp"}), {}, "'mlp' twice"),
        (({**LARGE, "label": "test"}, CNN), {}, "names other metrics"),
        (({**LARGE, "label": "a/b"}, CNN), {}, "a-z, 0-9 and _"),
        (({**LARGE, "classes": 12}, CNN), {}, "large 12, cnn 10"),
        (({**LARGE, "classes": 3}, CNN), {}, "the data has 10 classes"),
        (({**LARGE, "widht": 3}, CNN), {}, "widht: unknown"),
        ((LARGE, CNN), {"weight": -1.0}, "weight is 0 or more"),
        ((LARGE, CNN), {"temperature": 0.0}, "temperature above 0"),
        ((LARGE, CNN), {"name": "classify"}, "has one model"),
    ],
)
def test_what_cannot_learn_together_is_refused(members, changes, message):
    with pytest.raises(UserError, match=message):
        make_setup(config(members, **changes))


@pytest.mark.slow
def test_each_member_is_named_and_starts_as_if_the_others_were_not_there():
    both, other = task(), task((SMALL, CNN))
    assert both.models.stages == (
        "large/stage1", "large/stage2", "large/head", "cnn/stage1", "cnn/stage2",
        "cnn/head",
    )  # fmt: skip
    assert both.models.heads == ("large/head", "cnn/head")
    ours, theirs = (named(random_state(t, 0).params) for t in (both, other))
    for name in (n for n in ours if n.startswith("cnn/")):
        np.testing.assert_array_equal(ours[name], theirs[name])
    labels = metric_names(config())
    assert "accuracy" in labels and "cnn/accuracy" in labels
    assert "large/loss" in labels


def torch_losses(logits, label, weight, temperature):
    """Returns the loss and the gradient of every member's logits, by torch."""
    torch = pytest.importorskip("torch")
    F = torch.nn.functional

    given = {
        k: torch.tensor(np.asarray(v), requires_grad=True) for k, v in logits.items()
    }
    label, total = torch.tensor(np.asarray(label), dtype=torch.long), 0.0
    for name, own in given.items():
        apart = sum(
            F.kl_div(
                F.log_softmax(own / temperature, 1),
                F.softmax(other.detach() / temperature, 1),
                reduction="batchmean",
            )
            for rest, other in given.items()
            if rest != name
        ) / (len(given) - 1)
        total = total + F.cross_entropy(own, label) + weight * temperature**2 * apart
    total.backward()
    return total.item(), {k: v.grad.numpy() for k, v in given.items()}


@pytest.mark.slow
def test_loss_and_gradient_of_every_member_are_those_of_torch():
    with jax.enable_x64(True):
        ours = task(
            (LARGE, SMALL, THIRD), overrides=[("precision", "float64")],
            weight=0.7, temperature=2.0,
        )  # fmt: skip
        params, stats = jax.jit(ours.init)(jax.random.key(1))
        batch = jax.tree.map(lambda x: x[0], small.batch(16))
        batch = ours.prepare(batch, jax.random.key(0), EVALUATION)

        def logits(params):
            variables = small.variables(params, stats)
            return ours.models.forward(variables, batch["inputs"])[0]

        def loss(params):
            context = StepContext(rng=jax.random.key(0), mode=Mode())
            loss = ours.loss(small.variables(params, stats), batch, context)
            return loss.total / loss.weight

        value, found = jax.jit(jax.value_and_grad(loss))(params)
        given, back = jax.vjp(jax.jit(logits), params)
        wanted, by_logits = torch_losses(given, batch["label"], 0.7, 2.0)
        assert float(value) == pytest.approx(wanted, rel=1e-9)
        gradient = named(back(by_logits)[0])
        for name, leaf in named(found).items():
            np.testing.assert_allclose(leaf, gradient[name], rtol=1e-6, atol=1e-12)


def test_together_is_measured_by_mean_probabilities():
    ours = task()
    rng, label = np.random.default_rng(0), np.arange(8) % 10
    each = {
        k: rng.normal(size=(8, 10)).astype(np.float32) for k in ours.models.prefixes
    }
    probabilities = np.mean([jax.nn.softmax(v) for v in each.values()], axis=0)
    outputs = {"logits": np.log(probabilities)}
    outputs |= {f"{k}/logits": v for k, v in each.items()}
    found = ours.metrics(outputs, {"label": label})
    assert found["accuracy"] == (probabilities.argmax(1) == label).mean()
    for prefix, logits in each.items():
        right = (logits.argmax(1) == label).mean()
        assert found[f"{prefix}/accuracy"] == pytest.approx(right)


def test_plans_of_members_stand_side_by_side():
    fields = dict(steps=2, optimizer="sgd")
    (phase,) = together(
        {
            "large": partial(("stage1", "stage2", "head"), last=1, **fields),
            "cnn": full(**fields),
        }
    )
    setup = make_setup(config(plan=(phase,)))
    stages = setup.phase(0).mode.learning
    assert stages == {"large/head", "cnn/stage1", "cnn/stage2", "cnn/head"}
    with pytest.raises(UserError, match="more than name and rules"):
        together({"a": full(steps=1), "b": full(steps=2)})
    with pytest.raises(UserError, match="2 phases"):
        together({"a": full(steps=1), "b": (*full(steps=1), *full(steps=1))})


def test_a_plan_names_members_and_their_stages(capsys):
    assert plan_mode.main(config(), Options(config="", workdir=None)) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("large, cnn: ") and "cnn/head" in printed
    with pytest.raises(UserError, match="twice"):
        plan_mode.main(config((LARGE, LARGE)), Options(config="", workdir=None))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Returns the workdir and the result of a small run."""
    workdir = tmp_path_factory.mktemp("mutual") / "run"
    chosen = [
        ("report.every_steps", "1"),
        ("checkpoint.every_steps", "2"),
        ("evaluate.best", "validation/accuracy"),
    ]
    return workdir, run(config(overrides=chosen), workdir)


@pytest.mark.slow
def test_a_run_measures_all_and_each_and_resumes_to_the_same_bits(
    straight, tmp_path, monkeypatch
):
    workdir, result = straight
    for name in ("accuracy", "loss", "large/accuracy", "cnn/loss"):
        assert f"test/{name}" in result
    line = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[1])
    assert "train/large/divergence" in line and "train/accuracy" in line
    small.die_before(monkeypatch, 3)
    ours = configs.from_json((workdir / "config.json").read_text(), "here")
    with pytest.raises(small.Killed):
        run(ours, tmp_path / "run")
    again = run(ours, tmp_path / "run")
    assert again["state_sha256"] == result["state_sha256"]
    assert small.lines(tmp_path / "run") == small.lines(workdir)
    predictor = open_predictor(ours, workdir)
    record = predictor.records(make_setup(ours).data.held_out["test"])[0]
    assert {"class", "top"} <= set(record)


@pytest.mark.slow
def test_members_begin_with_weights_of_their_own_or_of_a_former_run(straight, tmp_path):
    workdir, _ = straight
    alone = run(small.config(model="mlp", hidden=(8, 8)), tmp_path / "alone")
    assert alone["steps"] == 4
    where = f"orbax:{tmp_path / 'alone'}"
    setup = make_setup(
        config(
            ({**LARGE, "pretrained": where}, CNN),
            overrides=[("init.fresh", "('large/head/.*',)")],
        )
    )
    start, loaded = setup.start()
    plain = make_setup(config()).start()[0]
    ours, drawn = named(start.params), named(plain.params)
    saved = make_setup(
        small.config(model="mlp", hidden=(8, 8), overrides=[("init.pretrained", where)])
    ).start()[0]
    for name, leaf in ours.items():
        theirs = named(saved.params).get(name.removeprefix("large/"))
        is_loaded = name.startswith("large/") and "head" not in name
        np.testing.assert_array_equal(leaf, theirs if is_loaded else drawn[name])
    assert set(loaded.layouts) == {"large"} and loaded.sha256
    whole = make_setup(config(overrides=[("init.pretrained", f"orbax:{workdir}")]))
    assert whole.start()[1].layout == "finetune_jax"
    with pytest.raises(UserError, match="give one or the other"):
        make_setup(
            config(
                ({**LARGE, "pretrained": where}, CNN),
                overrides=[("init.pretrained", where)],
            )
        )
    wrong = ({**LARGE, "hidden": (7, 8), "pretrained": where}, CNN)
    with pytest.raises(UserError, match="does not fit the model 'large'"):
        make_setup(config(wrong)).start()
    with pytest.raises(UserError, match="'stem/.*' matches nothing"):
        make_setup(
            config(
                ({**LARGE, "pretrained": where}, CNN),
                overrides=[("init.fresh", "('stem/.*',)")],
            )
        ).start()
