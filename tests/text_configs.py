"""Configs of small runs on texts."""

from finetune_jax import config as configs
from finetune_jax.plans.phase import Phase, as_config

TINY = {
    "layers": 2, "width": 16, "heads": 2, "hidden": 16, "vocabulary": 16,
    "positions": 32, "dropout": 0.0, "attention_dropout": 0.0, "pool": "mean",
}  # fmt: skip


def config(folder, *, plan=(), overrides=(), model=(), **data):
    given = configs.default()
    given.task.name = "text"
    given.data.update(
        name="tsv",
        dir=str(folder),
        text=("sentence",),
        header=("sentence", "label"),
        tokenizer=f"file:{folder}",
        validation="validation",
        test="test",
        batch_size=8,
        max_tokens=12,
        buckets=(4, 8),
        **{},
    )
    given.data.update(data)
    given.model.name = "minilm_l6"
    for name, value in {**TINY, **dict(model)}.items():
        given.model[name] = value
    given.plan = as_config(plan or (Phase(name="all", steps=4, peak_lr=1e-2),))
    given.parallel.devices = 1
    resolved, problems = configs.resolve(given, overrides)
    assert not problems, problems
    return resolved


def tag_config(folder, **fields):
    names = {"text": ("words",), "label": "tags", "labels": "tags", "header": ()}
    task = [("task.name", "tokens")]
    return config(
        folder, name="jsonl", overrides=task, model={"pool": "none"}, **names, **fields
    )
