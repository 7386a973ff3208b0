"""The job script of docs/clusters.md, run by a SLURM cluster on this machine."""

import contextlib
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time

import pytest
from slurm_nodes import environment as environment

from finetune_jax.parallel import launch
from finetune_jax.report.metrics_log import read_metrics

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
PAGE = (ROOT / "docs" / "clusters.md").read_text()
# Iris, long enough to be stopped on the way.
OVERRIDES = (
    "--config.plan[0].epochs=None", "--config.plan[0].steps=120",
    "--config.evaluate.every_epochs=None", "--config.evaluate.every_steps=60",
    "--config.report.every_steps=5",
)  # fmt: skip
DIGESTS = ("params_sha256", "state_sha256", "final", "best", "best_step")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.path.exists("/usr/sbin/slurmctld"),
        reason="slurmctld is not installed: apt-get install slurm-wlm munge",
    ),
]


def of_page(pattern):
    found = re.search(pattern, PAGE, re.S)
    assert found, pattern
    return found[1]


def swapped(text, workdir):
    """Returns a script or a command of the page with another config and workdir."""
    config = ROOT / "configs" / "iris_mlp.py"
    text = re.sub(r"--config=\S+", f"--config={config} {shlex.join(OVERRIDES)}", text)
    text = re.sub(r"--workdir=\S+", f"--workdir={workdir}", text)
    return text.replace("scripts/", f"{ROOT}/scripts/").replace(
        ".venv/bin/python", sys.executable
    )


def until(is_so, seconds, log):
    end = time.monotonic() + seconds
    while not (found := is_so()):
        assert time.monotonic() < end, log.read_text() if log.exists() else "no log"
        time.sleep(0.1)
    return found


def last_step(workdir):
    with contextlib.suppress(json.JSONDecodeError):
        lines = read_metrics(workdir / "metrics.jsonl")
        return lines[-1]["step"] if lines else -1


def outcome(workdir):
    result = json.loads((workdir / "result.json").read_text())
    lines = [
        {key: value for key, value in line.items() if not key.startswith("time/")}
        for line in read_metrics(workdir / "metrics.jsonl")
    ]
    return {key: result[key] for key in DIGESTS}, lines


def test_a_job_that_is_stopped_is_requeued_and_ends_in_the_same_bits(
    environment, tmp_path
):
    def command(*words):
        done = subprocess.run(
            words, env=environment | {"JAX_COORDINATOR_ADDRESS": address},
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def state():
        fields = command("scontrol", "show", "job", "--oneliner", job).split()
        return dict(field.partition("=")[::2] for field in fields)

    def is_over():
        return state()["JobState"] not in ("PENDING", "RUNNING", "COMPLETING")

    script, log = tmp_path / "train.sbatch", tmp_path / "job.log"
    script.write_text(swapped(of_page(r"Save it as `train.sbatch`:\n\n```bash\n(.*?)```"),
                              tmp_path / "stopped"))  # fmt: skip
    # Options of the command line replace those of the script.
    options = shlex.split(
        "--nodes=2 --ntasks-per-node=1 --gpus-per-node=0 --cpus-per-task=1"
    )
    # The names of the nodes do not resolve here.
    with launch.free_port() as port:
        address = f"127.0.0.1:{port}"
        job = command("sbatch", "--parsable", *options, f"--output={log}", str(script))
        job = job.strip()
        until(lambda: (last_step(tmp_path / "stopped") or 0) >= 20, 120, log)
        command("scancel", "--signal=USR1", job)
        until(is_over, 180, log)
    text, found = log.read_text(), state()
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), text
    assert text.count("2 processes with 1 device each, cpu, started by SLURM") == 2
    stopped = re.search(r"stopped and saved at step (\d+)", text)
    assert stopped and f"resumed at step {stopped[1]}" in text
    assert 20 <= int(stopped[1]) < 120

    words = shlex.split(
        swapped(
            of_page(r"    (\S+ scripts/launch_local.py [^\n]*)"), tmp_path / "whole"
        )
    )
    whole = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
