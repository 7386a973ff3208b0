"""Distillation: what teachers say, what is learned from it, and what is refused."""

import dataclasses
import json
from types import SimpleNamespace

import devices
import jax
import mutual
import numpy as np
import pytest
import small

from finetune_jax.core.errors import UserError
from finetune_jax.core.pytrees import named
from finetune_jax.features.cache import FeatureStore, Teachers
from finetune_jax.inference.export.opened_run import trained_from
from finetune_jax.inference.predictor import open_predictor
from finetune_jax.models.modes import EVALUATION
from finetune_jax.modes import plan as plan_mode
from finetune_jax.modes.options import Options
from finetune_jax.plans.phase import Phase
from finetune_jax.tasks.components.random_state import random_state
from finetune_jax.tasks.objectives import feature_losses
from finetune_jax.tasks.task import TEACHER_OUTPUTS, StepContext
from finetune_jax.training.run import run
from finetune_jax.training.setup import make_setup

pytestmark = pytest.mark.usefixtures("no_pictures")

CNN = {"name": "cnn", "convolutions": (3,), "dense": (8,)}
WIDE = {"label": "wide", "name": "cnn", "convolutions": (4, 6), "dense": (8,)}
MLP = {"label": "deep", "name": "mlp", "hidden": (8,)}
NOWHERE = "file:nowhere.npz"


def config(members, model=None, plan=(), overrides=(), **task):
    model = model or {"name": "mlp", "hidden": (6,)}
    given = small.editable(small.config(model=model["name"], plan=plan))
    given.task = {"name": "distill", **task}
    given.model.update(model)
    given.model.members = tuple({"pretrained": NOWHERE, **m} for m in members)
    return small.resolved(given, overrides)


def task(*arguments, **keywords):
    return small.task_of(config(*arguments, **keywords), small.spec())


def drawn(ours, seed=5):
    """Returns variables of all teachers at random."""
    shapes = ours.teachers.shapes()
    rng = np.random.default_rng(seed)
    found = jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype), shapes
    )
    for variables in found.values():  # Variances are positive.
        variables["batch_stats"] = jax.tree.map(np.abs, variables["batch_stats"])
    return found


def oracle(logits, features, taught, label, *, alpha, temperature, weights):
    """Returns loss, gradient by logits and by features, by torch; all in float64."""
    torch = pytest.importorskip("torch")
    F = torch.nn.functional

    def given(x):
        return torch.tensor(np.asarray(x), requires_grad=True)

    def attention(x):  # As the authors': channels are the last axis here.
        return F.normalize(x.pow(2).mean(-1).reshape(len(x), -1))

    own, maps = given(logits), {k: given(v) for k, v in features.items()}
    said = jax.tree.map(lambda x: torch.tensor(np.asarray(x)), taught)
    apart = sum(
        F.kl_div(
            F.log_softmax(own / temperature, 1),
            F.softmax(of["logits"] / temperature, 1),
            reduction="batchmean",
        )
        for of in said.values()
    ) / len(said)
    loss = (1 - alpha) * F.cross_entropy(own, torch.tensor(np.asarray(label)).long())
    loss = loss + alpha * temperature**2 * apart
    if maps:
        theirs = said["wide"]["stage2"]
        half = (maps["mapped"] - said["wide"]["stage1"]).pow(2)
        loss = loss + weights[0] * half.flatten(1).mean(1).mean() / 2
        pooled = F.avg_pool2d(maps["stage1"].permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        apart = (attention(pooled) - attention(theirs)).pow(2).mean(1).mean()
        loss = loss + weights[1] * apart
    loss.backward()
    return loss.item(), (own.grad.numpy(), {k: v.grad.numpy() for k, v in maps.items()})


@pytest.mark.slow
@pytest.mark.parametrize("features", [False, True])
def test_loss_and_gradient_are_those_of_torch(features):
    members = (WIDE,) if features else (WIDE, MLP)
    asked = dict(alpha=0.3, temperature=3.0)
    if features:
        asked |= dict(
            hints=(("stage1", "stage1"),), attention=(("stage1", "wide/stage2"),),
            hints_weight=0.7, attention_weight=20.0,
        )  # fmt: skip
    with jax.enable_x64(True):
        ours = task(members, CNN, overrides=[("precision", "float64")], **asked)
        params, stats = jax.jit(ours.init)(jax.random.key(1))
        batch = jax.tree.map(lambda x: x[0], small.batch(16))
        batch = ours.prepare(batch, jax.random.key(0), EVALUATION)
        fixed = drawn(ours)
        batch[TEACHER_OUTPUTS] = jax.jit(ours.teachers.outputs)(fixed, batch["inputs"])
        context = StepContext(mode=EVALUATION, rng=jax.random.key(0), fixed=fixed)

        def loss(params):
            loss = ours.loss(small.variables(params, stats), batch, context)
            return loss.total / loss.weight

        def parts(params):
            variables, context = (
                small.variables(params, stats),
                StepContext(mode=EVALUATION),
            )
            logits, found, _ = ours.objective.student(
                ours.models, variables, batch["inputs"], context
            )
            if features:
                mapped = ours.objective.mapped(ours.models, variables, found, context)
                (found["mapped"],) = mapped.values()
            return logits, found

        value, found = jax.jit(jax.value_and_grad(loss))(params)
        (logits, maps), back = jax.vjp(jax.jit(parts), params)
        wanted, by_parts = oracle(
            logits, maps, batch[TEACHER_OUTPUTS], batch["label"], weights=(0.7, 20.0),
            alpha=0.3, temperature=3.0,
        )  # fmt: skip
        assert float(value) == pytest.approx(wanted, rel=1e-9)
        gradient = named(back(by_parts)[0])
        assert ("regressor/stage1_to_wide_stage1/kernel" in gradient) == features
        for name, leaf in named(found).items():
            np.testing.assert_allclose(leaf, gradient[name], rtol=1e-6, atol=1e-12)


@pytest.mark.slow
def test_attention_of_nothing_is_zero_and_has_a_gradient():
    zeros, ones = np.zeros((2, 4, 4, 3)), np.ones((2, 2, 2, 5))
    value = feature_losses.attention_apart(zeros, ones)
    np.testing.assert_allclose(value, 0.25)  # (0 - 1/2)^2 at each of 4 places.
    gradient = jax.grad(lambda x: feature_losses.attention_apart(x, ones).sum())(zeros)
    np.testing.assert_array_equal(gradient, 0)


def test_a_teachers_logits_are_taken_in_the_order_of_the_classes():
    ours = task((MLP,))
    teacher = ours.teachers.members["deep"]
    names = tuple(map(str, range(10)))
    assert list(teacher.order(names)) == list(range(10))
    turned = dataclasses.replace(teacher, class_names=names[::-1])
    assert list(turned.order(names)) == list(range(10))[::-1]


@pytest.mark.parametrize(
    ("members", "changes", "message"),
    [
        ((), {}, "one teacher at least"),
        (({**MLP, "pretrained": None},), {}, "a teacher needs the address"),
        ((MLP, MLP), {}, "'deep' twice"),
        (({**MLP, "classes": 12},), {}, "a teacher of 12 classes, and the data has 10"),
        ((MLP,), {"alpha": 1.5}, "at most 1"),
        ((MLP,), {"alpha": 0.0}, "nothing is learned from teachers"),
        ((MLP,), {"temperature": 0.0}, "more than 0"),
        ((MLP,), {"head": "theirs"}, "no 'theirs'"),
        ((MLP,), {"head": "teacher"}, "the input of the head is"),
        ((MLP,), {"hints": (("stage9", "stage1"),)}, "no stage 'stage9'"),
        ((MLP,), {"hints": (("stage1", "head"),)}, "before a teacher's head"),
        ((WIDE,), {"hints": (("stage1", "stage1"),)}, "cannot be compared"),
        ((MLP,), {"attention": (("stage1", "stage1"),)}, "not maps or tokens"),
        ((MLP,), {"hints": ("stage1",)}, "is not .stage of the model"),
        (({**MLP, "pretrained": "start"},), {}, "remove its other keys"),
    ],
)
def test_what_cannot_teach_is_refused(members, changes, message):
    with pytest.raises(UserError, match=message):
        make_setup(config(members, **changes))


def test_a_plan_counts_the_teachers_and_says_which_are_not_there(capsys):
    with pytest.raises(UserError, match="config.init.pretrained: no file"):
        plan_mode.main(config((MLP,)), Options(config="", workdir=None))
    printed = capsys.readouterr().out
    assert printed.startswith("mlp, taught by deep: ") and "head" in printed
    with pytest.raises(UserError, match="no file"):
        plan_mode.main(config((WIDE,)), Options(config="", workdir=None))
    assert capsys.readouterr().out != printed
    with pytest.raises(UserError, match="a teacher of 12 classes"):
        plan_mode.main(
            config(({**MLP, "classes": 12},)), Options(config="", workdir=None)
        )


def test_what_is_missing_names_the_teacher():
    with pytest.raises(UserError, match=r"members\[0\].*nowhere"):
        make_setup(config((MLP,))).fixed(None)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """Returns the workdirs of a teacher, of a student, and the student's result."""
    folder = tmp_path_factory.mktemp("distill")
    run(small.config(model="mlp", hidden=(8,)), folder / "teacher")
    ours = student(folder)
    return folder, run(ours, folder / "student")


def student(folder, overrides=(), **changes):
    member = {**MLP, "pretrained": f"orbax:{folder / 'teacher'}"}
    return config(
        (member,),
        overrides=[
            ("checkpoint.every_steps", "2"), ("report.every_steps", "1"),
            ("data.cache_dir", str(folder / "cache")), ("data.per_class", "8"),
            *overrides,
        ],
        plan=(Phase(name="all", steps=4),),
        **{"hints": (("stage1", "stage1"),), **changes},
    )  # fmt: skip


@pytest.mark.slow
def test_a_student_resumes_to_the_same_bits_and_needs_no_teacher_afterwards(
    taught, monkeypatch, tmp_path
):
    folder, result = taught
    assert "test/accuracy" in result
    manifest = json.loads((folder / "student" / "manifest.json").read_text())
    assert any("teacher" in path for path in manifest["weights_sha256"])
    line = small.lines(folder / "student")[1]
    assert {"train/divergence", "train/hints", "train/label_loss"} <= set(line)
    small.die_before(monkeypatch, 3)
    ours = student(folder)
    with pytest.raises(small.Killed):
        run(ours, tmp_path / "run")
    again = run(ours, tmp_path / "run")
    assert again["state_sha256"] == result["state_sha256"]
    (folder / "teacher").rename(folder / "elsewhere")
    try:
        predictor = open_predictor(ours, folder / "student")
        data = make_setup(small.config(model="mlp")).data.held_out["test"]
        assert len(predictor.records(data)) == len(data)
        trained = trained_from(predictor, manifest, None, {})
        assert trained.task.models.prefixes == ("",)
        assert set(trained.variables["params"]) == {"stage1", "head"}
        assert trained.answer_shapes()["logits"].shape == (1, 10)
    finally:
        (folder / "elsewhere").rename(folder / "teacher")


@pytest.mark.bits
@pytest.mark.slow
@pytest.mark.parametrize("hinted", [True, False])
@pytest.mark.ci_runs("True")
def test_answers_kept_are_the_same_bits_as_answers_computed(
    taught, hinted, tmp_path, capsys
):
    """Without hints the frozen stage is kept too, and the batches have no inputs."""
    folder, _ = taught
    head = (Phase(name="head", steps=4, rules=small.HEAD),)
    changes = {} if hinted else {"hints": (), "plan": head}

    def made(name, cache):
        ours = student(folder, [("data.cache", cache)])
        if not hinted:
            ours = config(
                ({**MLP, "pretrained": f"orbax:{folder / 'teacher'}"},),
                overrides=[
                    ("data.cache", cache), ("data.per_class", "8"),
                    ("data.cache_dir", str(folder / "cache")),
                ],
                plan=changes["plan"],
            )  # fmt: skip
        return run(ours, tmp_path / name)["state_sha256"]

    kept = made("kept", "auto")
    assert "outputs of teachers" in capsys.readouterr().out
    assert kept == made("computed", "off")


def test_where_images_are_augmented_answers_are_not_kept_and_it_says_why():
    said = []
    tables = SimpleNamespace(say=said.append)
    store = FeatureStore(task=None, devices=None, tables=tables, batch_size=8)
    for changes in ({"augment": (("flip",),)}, {"mix": (("mixup", 0.2),)}):
        found = store.training(
            None, Teachers(fixed={}, rng=0), spec=small.spec(**changes), mode=EVALUATION,
            views=None, batch_size=8, examples=8,
        )  # fmt: skip
        assert found is None
        assert (
            f"outputs of teachers are not kept: config.data.{[*changes][0]}" in said[-1]
        )


@pytest.mark.slow
def test_a_teacher_of_other_classes_is_refused_by_their_names(taught, tmp_path):
    folder, _ = taught
    manifest = folder / "teacher" / "manifest.json"
    before = manifest.read_text()
    changed = json.loads(before)
    changed["data"]["class_names"][3] = "three"
    manifest.write_text(json.dumps(changed))
    try:
        with pytest.raises(UserError, match="does not know 3; the data has no three"):
            make_setup(student(folder))
        make_setup(student(folder, alpha=0.0))
    finally:
        manifest.write_text(before)
    wrong = ({**MLP, "hidden": (9,), "pretrained": f"orbax:{folder / 'teacher'}"},)
    with pytest.raises(UserError, match=r"members\[0\]: .*does not fit"):
        make_setup(config(wrong)).fixed(None)


@pytest.mark.slow
def test_the_model_at_the_start_teaches_and_shares_nothing_with_the_state():
    ours = task(({"pretrained": "start"},), hints=(("stage1", "stage1"),))
    state = jax.tree.map(np.asarray, jax.jit(lambda: random_state(ours, 0))())
    fixed = ours.teachers.variables(state)["mlp"]
    own = named(state.params)
    for name, leaf in named(fixed["params"]).items():
        np.testing.assert_array_equal(leaf, own[name])
        assert not np.shares_memory(leaf, own[name])


@pytest.mark.slow
def test_the_teachers_head_keeps_what_features_said_of_other_classes():
    """Li & Hoiem's loss: the old head's logits, on old features and on new ones."""
    old = {**MLP, "hidden": (6,), "classes": 4}
    ours = task((old,), head="teacher", alpha=0.5, temperature=2.0)
    params, stats = jax.jit(ours.init)(jax.random.key(0))
    fixed = drawn(ours)
    batch = jax.tree.map(lambda x: x[0], small.batch(8))
    batch = ours.prepare(batch, jax.random.key(0), EVALUATION)
    batch[TEACHER_OUTPUTS] = ours.teachers.outputs(fixed, batch["inputs"])

    @jax.jit
    def losses(params, fixed, batch):
        context = StepContext(mode=EVALUATION, rng=jax.random.key(0), fixed=fixed)
        return ours.loss(small.variables(params, stats), batch, context)

    found = losses(params, fixed, batch).metrics
    (head,) = fixed["deep"]["params"]["head"].values()
    module = ours.models[""]
    features = module.apply(
        {"params": params}, batch["inputs"], last="stage1", train=False
    )
    mine = np.asarray(features, np.float64) @ head["kernel"] + head["bias"]
    theirs = np.asarray(batch[TEACHER_OUTPUTS]["deep"]["logits"], np.float64)
    p, q = (np.exp(x / 2) / np.exp(x / 2).sum(1, keepdims=True) for x in (theirs, mine))
    wanted = 4 * (p * np.log(p / q)).sum(1)
    total, weight = found["divergence"]
    assert float(total / weight) == pytest.approx(wanted.mean(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mutual", "distill"])
@pytest.mark.ci_runs("distill")
def test_eight_devices_train_as_one_does(name, monkeypatch):
    """Under jit and pmap, in float64, BatchNorm over all devices."""
    with jax.enable_x64(True):
        double = [("precision", "float64")]
        if name == "mutual":
            pair = ({"label": "cnn", **CNN}, MLP)
            ours = small.task_of(mutual.config(pair, overrides=double), small_spec())
            fixed = {}
        else:
            asked = dict(hints=(("stage1", "stage1"),))
            ours = small.task_of(
                config((WIDE,), CNN, overrides=double, **asked), small_spec()
            )
            fixed = drawn(ours)
        monkeypatch.setattr(devices, "FIXED", {"task": fixed})
        phase = Phase(name="all", steps=2, optimizer="sgd")
        found = {
            kind: devices.trained(kind, ours, phase, devices.batches(2))
            for kind in ("one", "jit", "pmap")
        }
    state, losses, logits = found["one"]
    for kind in ("jit", "pmap"):
        mine, my_losses, my_logits = found[kind]
        devices.assert_close(mine.params, state.params, 1e-10)
        devices.assert_close(mine.batch_stats, state.batch_stats, 1e-10)
        np.testing.assert_allclose(my_logits, logits, rtol=1e-9, atol=1e-9)
        for one, other in zip(my_losses, losses):
            assert one == pytest.approx(other, rel=1e-8)


def small_spec():
    return small.spec((8, 8, 1))
