"""Folders of sweeps whose results are made up."""

import json
import pathlib

import numpy as np

from finetune_jax.evaluation import per_example
from finetune_jax.sweeps import Choice, Float, Search, Sweep
from finetune_jax.sweeps.folder import SweepFolder
from finetune_jax.sweeps.schedule import Schedule
from finetune_jax.sweeps.summary import write_sweep_report
from finetune_jax.sweeps.table import table_of

ROOT = pathlib.Path(__file__).parents[1]
IRIS = str(ROOT / "configs" / "iris_mlp.py")


def finish(folder, member, values, *, scores=None, train_s=1.0, steps=120):
    """Writes the result of a member, and scores of its test examples if given."""
    workdir = folder.workdir(member.key)
    workdir.mkdir(parents=True)
    result = {
        "best": values, "final": values, "best_step": steps, "steps": steps,
        "train_s": train_s, "wall_s": 2 * train_s, "cost": {"trained_parameters": 131},
    }  # fmt: skip
    (workdir / "result.json").write_text(json.dumps(result))
    if scores is not None:
        ids = np.arange(len(scores), dtype=np.uint64)
        per_example.write(workdir, {"test/id": ids, "test/accuracy": scores})


def learning_curve(folder, member, metric, values, every=10):
    """Writes the metrics of a member."""
    lines = [
        {"step": every * at, "phase": "all", metric: value}
        for at, value in enumerate(values)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder.workdir(member.key) / "metrics.jsonl").write_text(text)


def filled(root, sweep, value_of, **options):
    """Returns a folder all of whose members have finished, and its members.

    Args:
        root: Folder of the sweep.
        sweep: The sweep.
        value_of: Returns the metrics of a member; None leaves it out.
        **options: Further arguments of `finish`.
    """
    folder = SweepFolder(root, sweep)
    folder.make()
    schedule, done = Schedule(sweep), set()
    while True:
        wanted = schedule.wanted(folder.outcome)
        left = [member for member in wanted.members if member.key not in done]
        for member in left:
            done.add(member.key)
            values = value_of(member)
            if values is not None:
                finish(folder, member, values, **options)
        if not left:
            return folder, wanted


def page_of(folder):
    """Writes the page of all members that are known, and returns its text."""
    wanted = Schedule(folder.sweep).wanted(folder.outcome)
    folder.write_index("x", wanted)
    table = table_of(folder, wanted)
    return write_sweep_report(folder, "x", wanted, table, "sweep.py").read_text()


def a_search(root):
    """Returns the folder of a search with a named choice; the best rate of sgd is 0.1."""
    space = {
        "optimizer": Choice(
            {
                "sgd": {"plan[0].optimizer": "sgd",
                        "plan[0].peak_lr": Float(1e-3, 10.0, log=True)},
                "adam": {"plan[0].optimizer": "adam",
                         "plan[0].peak_lr": Float(1e-4, 1.0, log=True)},
            }
        ),
        "plan[0].weight_decay": Choice((0.0, 0.1)),
    }  # fmt: skip
    search = Search(
        space=space, metric="validation/accuracy", trials=12, sampler="random"
    )

    def values(member):
        distance = abs(np.log10(member.overrides["plan[0].peak_lr"] / 0.1))
        return None if member.trial % 4 == 3 else {search.metric: 0.9 - 0.1 * distance}

    sweep = Sweep(base=IRIS, search=search, seeds=1)
    folder, wanted = filled(root, sweep, values)
    for member in wanted.members:
        if member.trial % 4 == 3:
            (folder.claims / member.key).mkdir(parents=True)
            folder.pruned(member.key, {10: 0.2, 20: 0.3}, {"step": 20})
            folder.workdir(member.key).mkdir()
        learning_curve(folder, member, search.metric, [0.1, 0.2, 0.3])
    return folder


def cases_of_arms(root):
    """Returns the folder of a sweep of two cases, one arm of which has failed."""
    names = ["head only", "full fine-tuning", "gradual unfreezing from the top",
             "discriminative_rates_of_0.3_and_a_long_name", "lora (rank 4)", "l2_sp",
             "failing", "mixout"]  # fmt: skip
    rng, arms = np.random.default_rng(0), {}
    for place, name in enumerate(names):
        arms[name] = {"plan[0].epochs": 2 + place}
    sweep = Sweep(
        base=IRIS, arms=arms, seeds=3, attempts=1,
        cases={"digits, 20 labels": {}, "fashion": {"data.batch_size": 15}},
        tune={"plan[0].peak_lr": (0.01, 0.1)}, tune_by="validation/accuracy",
    )  # fmt: skip

    def values(member):
        if member.arm == "failing" and member.stage == "final":
            return None
        value = 0.7 + 0.03 * names.index(member.arm) + 0.02 * rng.standard_normal()
        return {"test/accuracy": value, "validation/accuracy": value}

    folder, wanted = filled(root, sweep, values)
    for member in wanted.members:
        result = folder.workdir(member.key) / "result.json"
        if not result.exists():
            (folder.claims / member.key).mkdir(parents=True)
            folder.failed(member.key, 0, "NotFinite: the loss is nan", again=False)
            continue
        cost = 20 * (1 + names.index(member.arm))
        text = result.read_text().replace('"steps": 120', f'"steps": {cost}')
        result.write_text(text)
        curve = 0.8 - 0.3 * np.exp(-np.arange(9) / 3) + 0.01 * rng.standard_normal(9)
        learning_curve(folder, member, "validation/accuracy", curve)
    return folder
