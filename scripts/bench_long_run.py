"""Claim: memory, open files and threads of a long run stay what they were.

.venv/bin/python scripts/bench_long_run.py [--steps=20000]

Trains a small network on digits with a checkpoint every 500 updates, an evaluation every
1,000 and a line of metrics every 10, and reads from /proc what the process holds after a
tenth of the updates and at the end.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from finetune_jax.report.metrics_log import read_metrics


def get_config(arg: str = "20000"):
    """Returns the config of a run of `arg` updates."""
    from finetune_jax import config as configs
    from finetune_jax.plans.phase import Phase, as_config

    config = configs.default()
    config.data.update(
        validation="validation", test="test", batch_size=32, image_size=8,
        augment=(("flip",),),
    )  # fmt: skip
    config.model.name = "cnn"
    config.model.convolutions, config.model.dense = (4, 4), (8,)
    config.plan = as_config((Phase(name="all", steps=int(arg), optimizer="adam"),))
    config.evaluate.update(every_steps=1000, best="validation/loss")
    config.checkpoint.every_steps = 500
    return config


def held(process: subprocess.Popen) -> dict[str, float]:
    """Returns resident memory in MB, open files and threads of a process."""
    place = pathlib.Path("/proc") / str(process.pid)
    pages = int((place / "statm").read_text().split()[1])
    return {
        "resident (MB)": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        "open files": len(list((place / "fd").iterdir())),
        "threads": len(list((place / "task").iterdir())),
    }


def main() -> None:
    """Runs it and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    steps = parser.parse_args().steps
    workdir = pathlib.Path(tempfile.mkdtemp(prefix="long_run-")) / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune_jax.main", f"--config={__file__}:{steps}",
         f"--workdir={workdir}"],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    begin, early, late = time.monotonic(), None, None
    while process.poll() is None:
        time.sleep(0.2)
        lines = read_metrics(workdir / "metrics.jsonl")
        step = lines[-1]["step"] if lines else -1
        if early is None and step >= steps // 10:
            early = held(process)
        if step >= steps - 200 and process.poll() is None and step < steps:
            late = held(process)
    if process.returncode or early is None or late is None:
        raise SystemExit(
            f"the run ended with {process.returncode}, or too fast to look"
        )
    print(f"{steps} updates in {time.monotonic() - begin:.0f} s")
    print(f"| | after {steps // 10} | at the end | ratio |\n|---|---|---|---|")
    for name, value in early.items():
        ratio = late[name] / value
        print(f"| {name} | {value:.0f} | {late[name]:.0f} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
