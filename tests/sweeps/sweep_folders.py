"""Folders of sweeps whose results are made up."""

import json

import numpy as np

from finetune_jax.evaluation import per_example
from finetune_jax.sweeps.folder import SweepFolder
from finetune_jax.sweeps.schedule import Schedule


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
