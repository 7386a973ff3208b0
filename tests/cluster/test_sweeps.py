"""Sweeps whose workers are tasks of a SLURM cluster on this machine."""

import json
import os
import re
import subprocess
import time

import pytest
from slurm_nodes import environment as environment
from sweep_runs import SweepRun

from finetune_jax.parallel import launch
from finetune_jax.report.metrics_log import read_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.path.exists("/usr/sbin/slurmctld"),
        reason="slurmctld is not installed: apt-get install slurm-wlm munge",
    ),
]


class Jobs:
    """The workers of a sweep in the cluster."""

    def __init__(self, sweep, environment):
        self.sweep, self.environment, self.job = sweep, environment, None

    def submit(self, *, jobs):
        arguments = ("run", "--launcher=slurm", f"--jobs={jobs}")
        text = self.sweep.run(*arguments, environment=self.environment)
        self.job = re.search(r"job (\d+): ", text)[1]

    def command(self, *words):
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def states(self):
        """Returns state, restarts and node of each task of the array, in order."""
        text = self.command("scontrol", "show", "job", "--oneliner", self.job)
        found = []
        for line in text.splitlines():
            fields = dict(field.partition("=")[::2] for field in line.split())
            names = ("ArrayTaskId", "JobState", "Restarts", "NodeList")
            found.append(tuple(fields.get(name) for name in names))
        return sorted(found)

    def until(self, is_so, seconds=300):
        end = time.monotonic() + seconds
        while not (found := is_so()):
            assert time.monotonic() < end, f"{self.states()}\n{self.logs()}"
            time.sleep(0.2)
        return found

    def until_completed(self, seconds=300):
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}
        self.until(lambda: all(s[1] in over for s in self.states()), seconds)
        states = self.states()
        assert {s[1] for s in states} == {"COMPLETED"}, self.logs()
        return states

    def logs(self):
        files = sorted((self.sweep.folder / "logs").glob("worker-*.txt"))
        return "\n".join(f"{path}\n{path.read_text()}" for path in files)

    def step(self):
        """Returns the last step that any member has logged; -1 before any."""
        steps = [-1]
        for path in self.sweep.folder.glob("*/metrics.jsonl"):
            try:
                steps += [line["step"] for line in read_metrics(path)[-1:]]
            except json.JSONDecodeError:  # It is being written.
                pass
        return max(steps)


def test_a_sweep_over_two_nodes_has_the_table_of_this_machine(environment, tmp_path):
    # Runs beside a sweep are found by their configs; these must not be.
    sweeps = [SweepRun(tmp_path / at / "rates", rates=3, seeds=3) for at in "ab"]
    jobs, local = Jobs(sweeps[0], environment), sweeps[1]
    jobs.submit(jobs=2)
    # tests/sweeps/test_killed_workers.py compares several workers with one.
    local.run("run", "--jobs=2")
    states = jobs.until_completed()
    assert {node for *_, node in states} == {"n1", "n2"}
    assert jobs.sweep.outcome() == local.outcome()
    assert not jobs.sweep.failures() + local.failures()


# The urgent job ends at once; its partition takes the nodes from the workers.
URGENT = ("sbatch", "--partition=urgent", "--nodes=2", "--ntasks-per-node=1", "--wait",
          "--output=/dev/null", "--wrap=true")  # fmt: skip


@pytest.mark.parametrize(
    "processes, steps, slurm",
    [
        pytest.param(1, 1500, {}, id="one node"),
        pytest.param(
            2, 200, {"nodes": 2, "ntasks_per_node": 1},
            id="two nodes", marks=pytest.mark.exhaustive,
        ),
    ],
)  # fmt: skip
def test_a_preempted_member_goes_on_to_the_same_bits(
    environment, tmp_path, processes, steps, slurm
):
    options = dict(steps=steps, rates=1, seeds=1, processes=processes)
    sweep = SweepRun(tmp_path / "slurm" / "long", slurm=slurm, **options)
    whole = SweepRun(tmp_path / "whole" / "long", **options)
    # The names of the nodes do not resolve here.
    with launch.free_port() as port:
        address = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}"}
        address = address if processes > 1 else {}
        jobs = Jobs(sweep, environment | address)
        jobs.submit(jobs=1)
        jobs.until(lambda: jobs.step() >= 20)
        jobs.command(*URGENT)
        ((_, state, restarts, _),) = jobs.until_completed()
    assert (state, restarts) == ("COMPLETED", "1"), jobs.logs()
    attempts = sorted(path.read_text() for path in sweep.folder.glob("logs/*.[12].txt"))
    assert len(attempts) == 2, jobs.logs()
    stopped = re.search(r"saved at step (\d+)", jobs.logs())
    assert stopped and 20 <= int(stopped[1]) < steps, jobs.logs()
    assert any(f"resumed at step {stopped[1]}" in text for text in attempts)
    assert not sweep.failures()
    whole.run("run")
    assert sweep.outcome() == whole.outcome()


@pytest.mark.exhaustive
def test_a_sweep_that_takes_longer_than_the_time_limit_ends_in_the_same_bits(
    environment, tmp_path
):
    # SLURM counts in minutes. The signal comes after 90 to 100 seconds, long after the
    # start, and long before the end.
    slurm = {"time": "00:02:00", "signal": "USR1@20"}
    options = dict(steps=10_000, rates=1, seeds=6)
    sweep = SweepRun(tmp_path / "slurm" / "long", slurm=slurm, **options)
    whole = SweepRun(tmp_path / "whole" / "long", **options)
    jobs = Jobs(sweep, environment)
    jobs.submit(jobs=1)
    ((_, _, restarts, _),) = jobs.until_completed(3600)
    assert int(restarts) >= 1, jobs.logs()
    assert "resumed at step" in "".join(
        path.read_text() for path in sweep.folder.glob("logs/*.?.txt")
    )
    assert not sweep.failures()
    whole.run("run")
    assert sweep.outcome() == whole.outcome()
