"""Tables: conversion against pandas, rows a second against torch, memory, the best AUC.

    .venv/bin/python scripts/generate_clicks.py --rows=2000000 --output=clicks.txt
    .venv/bin/python scripts/bench_tables.py --table=clicks.txt [--part=convert|steps|auc]

`convert` reads the file into memory-mapped columns, in a cache of its own, and has pandas
read it, in turn (pandas from any environment: --pandas=PYTHON). `steps` makes updates of
a model from random rows of the columns, in turn with torch, which gets the same rows,
encoded by the same code: a model of the same sizes and Adam over all that it has, the
embeddings' rows too; `data` is what taking the rows alone costs. `auc` trains and compares
with the AUC of the true probabilities on the same rows.
"""

import argparse
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from finetune_jax import config as configs  # noqa: E402

# Dense layers of the models that torch has here too, as theirs are by default.
DENSE = {"dcn_v2": {"deep": (128, 64)}, "table_mlp": {"hidden": (256, 128)}}

PANDAS = """
import sys, time, pandas
types = {
    **{n: "float32" for n in range(1, 14)}, **{n: "str" for n in range(14, 40)}}
given = {
    "typed": {"dtype": types}, "inferred": {},
    "pyarrow": {"dtype": types, "engine": "pyarrow"}}[sys.argv[2]]
begin, cpu = time.perf_counter(), time.process_time()
rows = len(pandas.read_csv(sys.argv[1], sep="\\t", header=None, **given))
print(rows, time.perf_counter() - begin, time.process_time() - cpu)
"""
CONVERT = """
import pathlib, resource, sys, time
from finetune_jax.data.tables.columns import open_columns
from finetune_jax.data.sources.criteo import TABLE
from finetune_jax.data.tables.files import infer_schema
from finetune_jax.data.tables.schema import TableOptions
path = pathlib.Path(sys.argv[1])
options = TableOptions(header=TABLE.header)
begin, cpu = time.perf_counter(), time.process_time()
schema = infer_schema([path], TABLE, options)
rows = len(open_columns(path, TABLE, schema, sys.argv[2]))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(rows, time.perf_counter() - begin, time.process_time() - cpu, peak)
"""


def convert(table: pathlib.Path, python: str, rounds: int) -> None:
    """Prints the seconds that conversion and pandas take, in turn, and the memory.

    pandas reads with the types of the columns, with those that it infers, and with the
    types by pyarrow. On a machine that others use, seconds of processors say more.
    """
    ways = ("columns", "typed", "inferred", "pyarrow")
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    rows = peak = "0"
    for _ in range(rounds):
        for way in ways:
            with tempfile.TemporaryDirectory(dir=table.parent) as folder:
                command = [python, "-c", PANDAS, str(table), way]
                if way == "columns":
                    command = [sys.executable, "-c", CONVERT, str(table), folder]
                found = subprocess.run(
                    command, cwd=ROOT, stdout=subprocess.PIPE, check=True
                )
            rows, wall, cpu, *memory = found.stdout.decode().split()
            peak = memory[0] if memory else peak
            seconds[way].append((float(wall), float(cpu)))
            print(f"{way}: {wall} s, of processors {cpu} s", flush=True)
    print(f"{rows} rows; conversion's largest resident set {float(peak):,.0f} MB")
    for way, values in seconds.items():
        name = way if way == "columns" else f"pandas, {way}"
        walls, cpus = zip(*values)
        listed = ", ".join(f"{value:.1f}" for value in walls)
        print(
            f"{name:17} {statistics.median(walls):6.1f} s ({listed}), of processors "
            f"{statistics.median(cpus):.1f} s ({min(cpus):.1f} to {max(cpus):.1f})"
        )


def config_of(table: pathlib.Path, model: str) -> Any:
    """Returns the config of configs/criteo.py for a file."""
    config = configs.load(f"{ROOT / 'configs' / 'criteo.py'}:{model}")
    overrides = [("data.dir", str(table)), ("parallel.devices", "1")]
    resolved, problems = configs.resolve(config, overrides)
    assert not problems, problems
    return resolved


def torch_model(config: Any, spec: Any) -> Any:
    """Returns a function of numbers [B, F] and rows [B, T], and its parameters.

    It is `table_mlp` or `dcn_v2` in torch, of the sizes of the config.
    """
    import torch  # type: ignore[import-not-found]

    model, linear = config.model, torch.nn.Linear
    embeddings = [torch.nn.Embedding(rows, model.width) for _, rows in spec.fields]
    total = len(spec.features) + model.width * len(spec.fields)
    is_crossing = model.name == "dcn_v2"
    sizes = (total, *(model.deep if is_crossing else model.hidden))
    pairs = zip(sizes, sizes[1:])
    dense = [layer for a, b in pairs for layer in (linear(a, b), torch.nn.ReLU())]
    deep, crossing = torch.nn.Sequential(*dense), []
    for _ in range(model.layers if is_crossing else 0):
        down = [linear(total, model.rank, bias=False)] if model.rank else []
        up = linear(model.rank or total, total)
        crossing.append(torch.nn.Sequential(*down, up))
    head = linear(sizes[-1] + (total if is_crossing else 0), 2)

    def logits(numbers: Any, places: Any) -> Any:
        found = [layer(places[:, at]) for at, layer in enumerate(embeddings)]
        first = x = torch.cat([numbers, *found], dim=1)
        for layer in crossing:
            x = first * layer(x) + x
        return head(torch.cat([x, deep(first)], dim=1) if crossing else deep(first))

    parts = torch.nn.ModuleList([*embeddings, deep, *crossing, head])
    return logits, list(parts.parameters())


def torch_steps(config: Any, spec: Any) -> Any:
    """Returns a function of a batch that makes an update of the same model in torch."""
    import torch  # type: ignore[import-not-found]

    logits, parameters = torch_model(config, spec)
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)
    count = len(spec.features)

    def step(rows: np.ndarray, label: np.ndarray, threads: int) -> None:
        torch.set_num_threads(threads)
        numbers = torch.from_numpy(rows[:, :count].view(np.float32))
        places = torch.from_numpy(rows[:, count:].astype(np.int64))
        target = torch.from_numpy(label.astype(np.int64))
        loss = torch.nn.functional.cross_entropy(logits(numbers, places), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def our_steps(config: Any, data: Any) -> Any:
    """Returns a function of a batch that makes an update, as a run does one a call."""
    import functools

    import jax

    from finetune_jax.core.pytrees import named
    from finetune_jax.plans.phase import plan_from_config
    from finetune_jax.tasks import make_task
    from finetune_jax.tasks.components.random_state import random_state
    from finetune_jax.training.phases import phase_setup
    from finetune_jax.training.step import train_step

    task = make_task(config.task, config.model, config.precision, data.spec)
    state = jax.jit(lambda: random_state(task, 0))()
    plan = plan_from_config(config.plan)
    phase = phase_setup(plan, 0, task, tuple(named(state.params)))
    state = state.replace(opt_state=jax.jit(phase.optimizer().init)(state.params))
    static = phase.update(task)
    step = jax.jit(functools.partial(train_step, static=static), donate_argnums=0)
    held = [state]

    def update(batch: dict) -> None:
        batch = {name: array[None] for name, array in batch.items()}
        number = np.float32(1e-3), np.float32(0)
        held[0], _ = step(held[0], {"task": {}}, batch, *number)
        jax.block_until_ready(held[0].step)

    return update


def steps(table: pathlib.Path, model: str, rounds: int, updates: int) -> None:
    """Prints rows a second from columns through an update, in turn with torch."""
    from finetune_jax.training.initial.starting_state import run_data

    config = config_of(table, model)
    config = config.replaced(model=DENSE[model])
    data = run_data(config)
    size, rng = config.data.batch_size, np.random.default_rng(0)
    spec = data.spec.inputs
    assert spec is not None
    ours, theirs = our_steps(config, data), torch_steps(config, spec)
    place = np.arange(size, dtype=np.int32)
    # On a machine that others use, torch's threads wait for one another.
    threads = {"torch": os.cpu_count() or 1, "torch, 1 thread": 1}
    rates: dict[str, list[float]] = {way: [] for way in ("data", "here", *threads)}
    peaks = []
    for turn in range(rounds + 1):
        rows = rng.integers(0, len(data.train), (updates, size))
        times = [time.perf_counter()]
        for chosen in rows:
            data.train.take(chosen)
        times.append(time.perf_counter())
        for chosen in rows:
            ours({**data.train.take(chosen), "position": place})
        times.append(time.perf_counter())
        for count in threads.values():
            for chosen in rows:
                batch = data.train.take(chosen)
                theirs(batch["inputs"], batch["label"], count)
            times.append(time.perf_counter())
        if turn:  # The first compiles.
            for name, seconds in zip(rates, np.diff(times)):
                rates[name].append(updates * size / float(seconds))
        print(f"round {turn}: {np.diff(times).round(2).tolist()} s", flush=True)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(
        f"{model}, batches of {size}, {sum(n for _, n in spec.fields):,} rows of "
        f"embeddings; largest resident set {peaks[0]:,.0f} MB, at last {peaks[-1]:,.0f} MB"
    )
    for name, values in rates.items():
        listed = f"{min(values):,.0f} to {max(values):,.0f}"
        print(f"{name:15} {statistics.median(values):10,.0f} rows/s ({listed})")
    for name in threads:
        ratios = [one / other for one, other in zip(rates["here"], rates[name])]
        listed = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"here / {name}: {statistics.median(ratios):.2f} ({listed})")


def auc(table: pathlib.Path, model: str) -> None:
    """Trains and prints how far the AUC is from that of the true probabilities."""
    from sklearn.metrics import roc_auc_score

    from finetune_jax.training.initial.starting_state import run_data
    from finetune_jax.training.run import run

    config = config_of(table, model)
    test = run_data(config).held_out["test"]
    truth = np.load(table.with_name(f"{table.name}.probability.npy"))[test.indices]
    best = float(roc_auc_score(test.label, truth))
    with tempfile.TemporaryDirectory(dir=table.parent) as folder:
        found = run(config, pathlib.Path(folder) / "run")["best"]
    ours = found["test/roc_auc"]
    print(
        f"{model}: AUC {ours:.4f}, best possible {best:.4f}, short of it {best - ours:.4f}"
    )
    print({name: round(value, 4) for name, value in found.items()})


def main() -> None:
    """Runs the parts that are asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--table", type=pathlib.Path, required=True)
    parser.add_argument("--part", choices=("convert", "steps", "auc"))
    parser.add_argument("--model", default="dcn_v2")
    parser.add_argument("--pandas", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=50)
    arguments = parser.parse_args()
    table = arguments.table.resolve()
    if arguments.part in (None, "convert"):
        convert(table, arguments.pandas, arguments.rounds)
    if arguments.part in (None, "steps"):
        steps(table, arguments.model, arguments.rounds, arguments.updates)
    if arguments.part in (None, "auc"):
        auc(table, arguments.model)


if __name__ == "__main__":
    main()
