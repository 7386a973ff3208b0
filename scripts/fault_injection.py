"""Kills runs at random moments, and compares how they end with runs left alone.

.venv/bin/python scripts/fault_injection.py [--kills=100] [--jobs=2] [--seed=0]
  [--workdir=DIR]

Runs have one to four phases, with accumulation, dropout, augmentation, carried optimizer
state, averaged weights, a plateau, and photos that threads decode as they are needed. Each
is started as a user starts it, killed by SIGKILL at a random moment, started again, killed
again, and at last let go on to its end. Digests of the result and every line of
metrics.jsonl, but for `time/`, must be those of the run that nobody killed. Prints a table;
the exit status is 1 if one of them differs.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from typing import Any

from PIL import Image
from sklearn.datasets import load_digits

from finetune_jax.report.metrics_log import read_metrics

PHASES = 4
KEYS = ("params_sha256", "state_sha256", "frozen_sha256", "final", "best", "best_step")


def get_config(arg: str = "4"):
    """Returns the config of a run of `arg` phases; `data.dir` is given besides."""
    from finetune_jax import config as configs
    from finetune_jax.plans.phase import Phase, as_config

    config = configs.default()
    config.data.update(
        name="folder", validation="validation", test="test", batch_size=16,
        image_size=12, channels=1, augment=(("flip",), ("pad_crop", 1)), memory_gb=0.0,
    )  # fmt: skip
    config.model.name = "cnn"
    config.model.convolutions, config.model.dense = (4, 4), (8,)
    config.model.head.dropout = 0.2
    head = (("head/.*", 1.0), (".*", 0.0))
    upper = (("head/.*", 1.0), ("stage3/.*", 0.5), (".*", 0.0))
    plan = (
        Phase(name="head", steps=24, rules=head, accumulate_steps=2, clip_norm=1.0),
        Phase(name="upper", steps=60, rules=upper, optimizer_state="carry",
              plateau_metric="validation/loss", plateau_patience=2, plateau_restore=True),
        Phase(name="all", steps=24, optimizer="adam", optimizer_state="reset"),
        Phase(name="sgd", steps=24, optimizer="sgd", optimizer_args={"momentum": 0.9},
              accumulate_steps=4),
    )  # fmt: skip
    config.plan = as_config(plan[: int(arg)])
    config.evaluate.update(every_steps=8, best="validation/ema_loss", ema_decay=0.9)
    config.checkpoint.every_steps = 5
    config.report.every_steps = 1
    config.parallel.devices = 1
    return config


def make_photos(folder: pathlib.Path) -> None:
    """Writes 240 handwritten digits as PNG files, a folder a class."""
    digits: Any = load_digits()
    for index in range(240):
        place = folder / str(digits.target[index])
        place.mkdir(parents=True, exist_ok=True)
        pixels = (digits.images[index] * 15).astype("uint8")
        Image.fromarray(pixels).save(place / f"{index}.png")


def started(phases: int, workdir: pathlib.Path, photos: pathlib.Path):
    """Returns the process of a run."""
    command = [
        sys.executable, "-m", "finetune_jax.main", f"--config={__file__}:{phases}",
        f"--workdir={workdir}", f"--config.data.dir={photos}",
    ]  # fmt: skip
    workdir.parent.mkdir(parents=True, exist_ok=True)
    with workdir.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def outcome(workdir: pathlib.Path) -> tuple[list, list]:
    """Returns what must be the same however often a run was killed."""
    result = json.loads((workdir / "result.json").read_text())
    timeless = [
        {key: value for key, value in line.items() if not key.startswith("time/")}
        for line in read_metrics(workdir / "metrics.jsonl")
    ]
    return [result[key] for key in KEYS], timeless


def left_alone(phases: int, workdir: pathlib.Path, photos: pathlib.Path) -> None:
    """Lets a run come to its end."""
    if started(phases, workdir, photos).wait():
        raise SystemExit(workdir.with_suffix(".log").read_text())


def lines_of(workdir: pathlib.Path) -> int:
    """Returns how many lines of metrics a run has written."""
    try:
        return (workdir / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def killed(
    phases: int,
    moments: list[tuple[int, float]],
    workdir: pathlib.Path,
    photos: pathlib.Path,
) -> list[int]:
    """Kills a run at each moment, then lets it finish; returns steps at the kills.

    Args:
        phases: Of the run.
        moments: (lines of metrics that there are, seconds since).
        workdir: Of the run.
        photos: Its data.
    """
    steps = []
    for lines, seconds in moments:
        process = started(phases, workdir, photos)
        while process.poll() is None and lines_of(workdir) < lines:
            time.sleep(0.002)
        time.sleep(seconds)
        if process.poll() is not None:
            break  # It was faster.
        process.kill()
        process.wait()
        found = read_metrics(workdir / "metrics.jsonl")
        steps.append(found[-1]["step"] if found else -1)
    left_alone(phases, workdir, photos)
    return steps


def main() -> None:
    """Runs all of it and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=pathlib.Path)
    given = parser.parse_args()
    root = given.workdir or pathlib.Path(tempfile.mkdtemp(prefix="fault_injection-"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "programs"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    photos, draw = root / "photos", random.Random(given.seed)
    make_photos(photos)
    wanted, total = {}, {}

    def know(phases: int) -> None:
        if phases not in wanted:
            alone = root / f"alone-{phases}"
            left_alone(phases, alone, photos)
            wanted[phases], total[phases] = outcome(alone), lines_of(alone)

    kills = same = runs = 0
    rows = {phases: [0, 0, 0] for phases in range(1, PHASES + 1)}
    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        while kills < given.kills:
            trials = []
            for _ in range(given.jobs):
                phases = runs % PHASES + 1
                know(phases)
                # Between two lines an update, an evaluation or a save is under way.
                at = [draw.randint(1, total[phases]) for _ in range(draw.randint(1, 4))]
                moments = [(lines, draw.uniform(0, 0.3)) for lines in sorted(at)]
                place = root / f"killed-{runs}"
                trial = pool.submit(killed, phases, moments, place, photos)
                trials.append((phases, place, trial))
                runs += 1
            for phases, place, trial in trials:
                steps = trial.result()
                kills += len(steps)
                is_same = outcome(place) == wanted[phases]
                same += is_same
                rows[phases][0] += 1
                rows[phases][1] += len(steps)
                rows[phases][2] += is_same
                print(f"{place.name}: {phases} phases, killed after steps {steps}: "
                      f"{'same' if is_same else 'DIFFERENT'}", flush=True)  # fmt: skip
    print(
        "| phases | runs | kills | ended in the same bits and lines |\n|---|---|---|---|"
    )
    for phases, (count, died, equal) in rows.items():
        print(f"| {phases} | {count} | {died} | {equal} |")
    print(f"| all | {runs} | {kills} | {same} |")
    sys.exit(same != runs)


if __name__ == "__main__":
    main()
