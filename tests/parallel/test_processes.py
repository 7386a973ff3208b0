"""One run over several processes: the same bits, wherever the work is done."""

import json
import pathlib
import signal
import sys
import time

import numpy as np
import process_configs
import pytest
import texts

from finetune_jax.parallel.launch import start
from finetune_jax.report.metrics_log import read_lines, read_metrics

LIMIT_S = 600
pytestmark = pytest.mark.slow
FSDP = ("--config.parallel.fsdp=2", "--config.parallel.fsdp_min_mb=0")


def arguments(name, workdir, *more):
    config = f"--config={process_configs.PATH}:{name}"
    return [config, f"--workdir={workdir}", *more]


def ran(name, workdir, *more, processes=1, devices=1, status=0, env=None):
    """Runs a config, and returns the content of `result.json`."""
    given = arguments(name, workdir, *more)
    with start(given, processes=processes, devices=devices, env=env) as job:
        found = job.wait(LIMIT_S)
        outputs = [job.output(index) for index in range(processes)]
    assert found == status, "\n".join(outputs)
    path = workdir / "result.json"
    return json.loads(path.read_text()) if path.is_file() else None


def lines_of(workdir):
    """Returns the lines of `metrics.jsonl` without times."""
    lines = read_metrics(workdir / "metrics.jsonl")
    return [
        {k: v for k, v in line.items() if not k.startswith("time/")} for line in lines
    ]


def evidence(result, workdir):
    """Returns all that must be the same, whatever the number of processes."""
    names = "params_sha256", "state_sha256", "frozen_sha256", "final", "best", "steps"
    return {name: result[name] for name in names}, lines_of(workdir)


def inputs_of(name, folder):
    """Returns the arguments that give a config its data, in a folder."""
    if name == "bert":
        texts.write(folder / "texts")
        place = folder / "texts"
        return [f"--config.data.dir={place}", f"--config.data.tokenizer=file:{place}"]
    if name == "table":
        rng = np.random.default_rng(0)
        kinds, numbers = rng.integers(3, size=200), rng.normal(size=200)
        rows = [f"{k}{n:.3f},k{k},{int(n > 0)}" for k, n in zip(kinds, numbers)]
        (folder / "rows.csv").write_text("\n".join(["number,kind,label", *rows]))
        return [f"--config.data.dir={folder / 'rows.csv'}"]
    return []


@pytest.mark.parametrize(
    "name, more, layouts",
    [
        pytest.param("phases", FSDP, ((1, 2), (2, 1)), id="fsdp"),
        pytest.param(
            "phases", ("--config.parallel.mode=pmap",), ((1, 2), (2, 1)), id="pmap"
        ),
        pytest.param("prefix", (), ((1, 2), (2, 1)), id="prefix"),
        pytest.param("population", (), ((1, 2), (2, 1)), id="population"),
        pytest.param("joint", (), ((1, 2), (2, 1)), id="joint"),
        pytest.param("table", (), ((1, 2), (2, 1)), id="table"),
        pytest.param("bert", (), ((1, 4), (2, 2), (4, 1)), id="bert"),
        pytest.param("bert", FSDP, ((1, 4), (2, 2), (4, 1)), id="bert-fsdp"),
        pytest.param("resnet", (), ((1, 4), (2, 2), (4, 1)), id="resnet"),
        pytest.param("resnet", FSDP, ((1, 4), (2, 2), (4, 1)), id="resnet-fsdp"),
    ],
)
@pytest.mark.ci_runs("fsdp")
def test_the_number_of_processes_changes_no_bit(name, more, layouts, tmp_path):
    data = inputs_of(name, tmp_path)
    found = []
    for processes, devices in layouts:
        workdir = tmp_path / f"{processes}x{devices}"
        result = ran(
            name, workdir, *data, *more, processes=processes, devices=devices,
            # Tables of features are computed anew.
            env={"FINETUNE_JAX_CACHE": str(tmp_path / f"cache{processes}")},
        )  # fmt: skip
        found.append(evidence(result, workdir))
    assert all(other == found[0] for other in found[1:])


def wait_for(job, condition):
    """Waits until a condition holds, while the processes run."""
    until = time.monotonic() + LIMIT_S
    while not condition():
        assert job.running(), "\n".join(job.output(i) for i in (0, 1))
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.exhaustive
def test_a_run_that_is_stopped_or_killed_goes_on_with_the_same_bits(tmp_path):
    """A signal to one process, a kill of each, then one process instead of two."""
    alone, workdir = tmp_path / "alone", tmp_path / "run"
    wanted = evidence(ran("phases", alone, devices=2), alone)
    log = workdir / "metrics.jsonl"

    def has_logged(step):
        return log.is_file() and any(line["step"] >= step for line in read_metrics(log))

    with start(arguments("phases", workdir)) as job:
        wait_for(job, lambda: has_logged(10))
        job.signal(1, signal.SIGTERM)
        assert job.wait(60) == 75
        assert list(job.statuses.values()) == [75, 75]
        assert "stopped and saved" in job.output(0)
        assert "saved" not in job.output(1)
    for killed, step in ((1, 50), (0, 90)):
        with start(arguments("phases", workdir)) as job:
            wait_for(job, lambda step=step: has_logged(step))
            job.kill(killed)
            begin = time.monotonic()
            assert job.wait(60) not in (0, 75)
            assert time.monotonic() - begin < 30
            assert "resumed at step" in job.output(0)
        if killed == 1:
            assert job.statuses[0] == 1
            assert "another process is gone" in job.output(0)
    assert evidence(ran("phases", workdir, devices=2), workdir) == wanted


def ended(workdir, rng, event):
    """Starts a run, and ends one process of two at a random moment, if it gets there.

    Returns whether the run has finished.
    """
    who, folder = int(rng.integers(2)), workdir / "checkpoints"
    begin = len(read_lines(workdir / "metrics.jsonl"))
    later = begin + int(rng.integers(1, 12))
    more = "--config.plan[1].steps=150", "--config.plan[2].steps=150"
    with start(arguments("phases", workdir, *more)) as job:

        def is_time():
            if not job.running():
                return True
            has_begun = len(read_lines(workdir / "metrics.jsonl")) > begin
            if event == "save":
                return has_begun and any(folder.glob("*tmp*"))
            return len(read_lines(workdir / "metrics.jsonl")) >= later

        until = time.monotonic() + LIMIT_S
        while not is_time() and time.monotonic() < until:
            time.sleep(0.005)
        number = signal.SIGTERM if event == "stop" else signal.SIGKILL
        if len(job.running()) == 2:
            job.signal(who, number)
            moment = time.monotonic()
            status = job.wait(LIMIT_S)
            assert time.monotonic() - moment < 60
            assert (status in (0, 75)) == (event == "stop" or status == 0), status
        return (workdir / "result.json").is_file()


@pytest.mark.parametrize("events", [["kill"] * 15 + ["save"] * 5 + ["stop"] * 10])
@pytest.mark.exhaustive
def test_random_kills_and_stops_change_no_bit(events, tmp_path):
    rng, left = np.random.default_rng(0), list(events)
    rng.shuffle(left)
    alone = tmp_path / "alone"
    more = "--config.plan[1].steps=150", "--config.plan[2].steps=150"
    wanted = evidence(ran("phases", alone, *more, devices=2), alone)
    number = 0
    while left:
        workdir, is_over = tmp_path / f"run{number}", False
        while left and not is_over:
            is_over = ended(workdir, rng, left.pop())
        assert evidence(ran("phases", workdir, *more, processes=2), workdir) == wanted
        number += 1


@pytest.mark.parametrize(
    "layouts", [((2, 2), (4, 1), (1, 4)), ((1, 4), (4, 1), (2, 2))]
)
@pytest.mark.exhaustive
def test_a_run_goes_on_with_another_number_of_processes(layouts, tmp_path):
    alone, workdir = tmp_path / "alone", tmp_path / "run"
    wanted = evidence(ran("phases", alone, devices=4), alone)
    for (processes, devices), step in zip(layouts, (10, 50, None)):
        given = arguments("phases", workdir)
        with start(given, processes=processes, devices=devices) as job:
            while step is not None and job.running():
                log = workdir / "metrics.jsonl"
                if log.is_file() and any(x["step"] >= step for x in read_metrics(log)):
                    job.signal(processes - 1, signal.SIGTERM)
                    break
                time.sleep(0.02)
            assert job.wait(LIMIT_S) == (0 if step is None else 75)
    result = json.loads((workdir / "result.json").read_text())
    assert evidence(result, workdir) == wanted


ODD = str(pathlib.Path(__file__).parents[1] / "odd_process.py")


def odd(how, workdir, *more):
    """Returns status, outputs and statuses of two processes, of which process 1 is odd."""
    given = [ODD, how, *arguments("phases", workdir, *more)]
    with start(given, program=(sys.executable,)) as job:
        status = job.wait(LIMIT_S)
        return status, [job.output(index) for index in (0, 1)], job.statuses


@pytest.mark.parametrize(
    "how, told",
    [
        pytest.param("raises", "photo 17 cannot be read", id="raises"),
        pytest.param("hangs", "process 1 has made no progress for", id="hangs"),
        pytest.param("stops", "process 1 has not answered for", id="stops"),
        pytest.param("deadlocks", "all processes have waited for", id="deadlocks"),
    ],
)
@pytest.mark.ci_runs("raises", "hangs")
def test_a_process_that_fails_or_hangs_ends_all(how, told, tmp_path):
    limit = "--config.parallel.hang_timeout_s=6"
    status, outputs, statuses = odd(how, tmp_path / "run", limit)
    assert status == 1 and told in outputs[0], outputs
    assert statuses[0] == 1 and (statuses[1] == 1 or how == "stops")


@pytest.mark.exhaustive
def test_processes_with_different_configs_name_each_other(tmp_path):
    status, outputs, _ = odd("--config.seed=1", tmp_path / "run")
    assert status == 2
    assert "config: process 0: " in outputs[0] and "; process 1: " in outputs[0]
    assert "Traceback" not in "".join(outputs)
    assert not (tmp_path / "run" / "config.json").exists()
