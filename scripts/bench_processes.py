"""Peak memory of each process with and without fsdp: `bench_processes.py [--width=N]`.

Four processes with one CPU device each train a network with large layers for a few updates,
first with a copy of the state in each process, then with the state divided by four. Prints
the peak resident memory of each process, less that of a run with a small network.
"""

import argparse
import pathlib
import tempfile
import time

from finetune_jax.parallel.launch import start

CONFIG = """
from finetune_jax import config as configs
from finetune_jax.plans import as_config, full


def get_config(arg):
    config = configs.default()
    config.data.update(name="digits", validation=None, test="test", batch_size=16)
    config.data.image_size = 8
    config.model.name = "mlp"
    config.model.hidden = (int(arg),) * 3
    config.plan = as_config(full(steps=5, optimizer="adamw", peak_lr=1e-3))
    return config
"""
PROCESSES = 4


def peaks(config: pathlib.Path, width: int, fsdp: int) -> list[float]:
    """Returns the peak resident memory of each process in MB."""
    with tempfile.TemporaryDirectory() as folder:
        given = [
            f"--config={config}:{width}",
            f"--workdir={folder}/run",
            f"--config.parallel.fsdp={fsdp}",
        ]
        with start(given, processes=PROCESSES, devices=1) as job:
            found = [0.0] * PROCESSES
            while job.running():
                for index, process in enumerate(job.processes):
                    found[index] = max(found[index], _peak(process.pid))
                time.sleep(0.05)
            if job.wait():
                raise SystemExit(job.output(0))
    return found


def _peak(pid: int) -> float:
    """Returns the peak resident memory of a process in MB; 0 if it has ended."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    sizes = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return int(sizes[0]) / 1e3 if sizes else 0.0


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=4096)
    width = parser.parse_args().width
    with tempfile.TemporaryDirectory() as folder:
        config = pathlib.Path(folder, "large.py")
        config.write_text(CONFIG)
        base = peaks(config, 16, 1)
        state = 3 * 4 * (2 * width**2 + 64 * width) / 1e6
        print(f"parameters and moments: {state:,.0f} MB; base: {max(base):,.0f} MB")
        for fsdp in (1, PROCESSES):
            more = [one - other for one, other in zip(peaks(config, width, fsdp), base)]
            text = "  ".join(f"{value:6,.0f}" for value in more)
            print(f"fsdp={fsdp}: more than the base by {text} MB, by process")


if __name__ == "__main__":
    main()
