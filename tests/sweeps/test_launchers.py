"""Launchers start the workers of a sweep, on this machine or by scripts and commands."""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from sweep_runs import SweepRun

from finetune_jax.core.errors import UserError
from finetune_jax.sweeps import claims
from finetune_jax.sweeps.launchers import command, local, slurm
from finetune_jax.sweeps.launchers.launch import Launch

ROOT = pathlib.Path(__file__).parents[2]
# Tells the index of the worker's start in the file of its place, then does something.
BEGIN = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def claimed(name):
    try: os.close(os.open(folder / name, os.O_CREAT | os.O_EXCL))
    except FileExistsError: return False
    return True
me = next(index for index in range(99) if claimed(f"start.{index}"))
got = []
"""
UNTIL_STOPPED = """
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, _: got.append(number))
(folder / f"ready.{me}").write_text("")
while not got: time.sleep(0.01)
(folder / f"got.{me}").write_text(signal.Signals(got[0]).name)
sys.exit(75)
"""


def launch_of(folder, does, *, jobs=2, **options):
    worker = (sys.executable, "-c", BEGIN + does, str(folder))
    return Launch(
        worker=worker, jobs=jobs, folder=folder, threads=1, **options
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "runs" / "rates").mkdir(parents=True)
    return tmp_path / "runs" / "rates"


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def until(is_so, seconds=20):
    end = time.monotonic() + seconds
    while not (found := is_so()):
        assert time.monotonic() < end, "it did not become so"
        time.sleep(0.01)
    return found


@pytest.mark.parametrize(
    "statuses, expected", [((0, 0), 0), ((0, 75), 75), ((2, 75), 1), ((1, 0), 1)]
)
def test_the_status_is_that_of_all_workers(folder, statuses, expected, capfd):
    assert local.run(launch_of(folder, f"sys.exit({statuses}[me])")) == expected
    failed = [status for status in statuses if status not in (0, 75)]
    assert capfd.readouterr().out.count("ended with exit status") == len(failed)


def test_workers_have_the_threads_of_the_sweep_and_know_its_folder(folder):
    does = "names = ('NPROC', 'FINETUNE_JAX_CLAIMS', 'XLA_FLAGS')\n"
    does += "found = [os.environ.get(name) for name in names]\n"
    does += "(folder / f'env.{me}').write_text(json.dumps(found))"
    assert local.run(launch_of(folder, does, jobs=3)) == 0
    expected = ["1", claims.token(folder / "claims"), os.environ.get("XLA_FLAGS")]
    found = [json.loads((folder / f"env.{k}").read_text()) for k in range(3)]
    assert found == [expected] * 3


def test_lines_say_which_worker_they_are_of(folder, capfd):
    does = "print('hello', flush=True); print('oh', file=sys.stderr)"
    assert local.run(launch_of(folder, does)) == 0
    lines = capfd.readouterr().out.splitlines()
    assert sorted(line for line in lines if line.startswith("[")) == [
        "[0] hello", "[0] oh", "[1] hello", "[1] oh",
    ]  # fmt: skip


def test_a_killed_worker_is_started_again_while_the_others_go_on(folder, capfd):
    does = (
        "while not (folder / 'start.2').exists(): time.sleep(0.01)\n"
        "if me < 2: os.kill(os.getpid(), 9 if me else 11)\n"
        "while me < 4 and not (folder / 'start.4').exists(): time.sleep(0.01)"
    )
    assert local.run(launch_of(folder, does, jobs=3)) == 0
    text = capfd.readouterr().out
    assert "worker ended by SIGKILL; it is started again (1 of 3)" in text
    assert "worker ended by SIGSEGV; it is started again" in text
    assert not (folder / "start.5").exists()


def test_a_worker_that_is_killed_again_and_again_is_given_up(folder, capfd):
    does = "if me: os.kill(os.getpid(), 9)"
    assert local.run(launch_of(folder, does)) == 1
    text = capfd.readouterr().out
    assert "it is started again (3 of 3)" in text
    assert text.rstrip().endswith("worker ended by SIGKILL")
    assert (folder / "start.4").exists() and not (folder / "start.5").exists()


def test_a_worker_that_lost_its_claim_is_started_again(folder, capfd):
    assert local.run(launch_of(folder, "sys.exit(0 if me else 70)", jobs=1)) == 0
    assert "ended with exit status 70; it is started again" in capfd.readouterr().out


LAUNCHER = """
import json, pathlib, sys
from finetune_jax.sweeps.launchers import command, local, slurm
from finetune_jax.sweeps.launchers.launch import Launch
given = json.loads(sys.argv[1])
given["folder"] = pathlib.Path(given["folder"])
status = local.run(Launch(**given))
assert "jax" not in sys.modules
sys.exit(status)
"""


def started(launch):
    """Returns the local launcher as a program of its own."""
    given = vars(launch) | {"folder": str(launch.folder)}
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, json.dumps(given)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_reaches_all_workers(folder, name):
    process = started(launch_of(folder, UNTIL_STOPPED))
    until(lambda: all((folder / f"ready.{k}").exists() for k in range(2)))
    process.send_signal(getattr(signal, name))
    assert process.wait(20) == 75, process.stdout.read()
    process.communicate()
    assert [(folder / f"got.{k}").read_text() for k in range(2)] == [name] * 2


def test_a_signal_stops_workers_that_have_only_begun(folder):
    does = "(folder / f'ready.{me}').write_text(''); time.sleep(60)"
    process = started(launch_of(folder, does))
    until(lambda: all((folder / f"ready.{k}").exists() for k in range(2)))
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=20)
    assert process.returncode == 75 and "started again" not in text


def test_workers_end_with_their_launcher(folder):
    does = "(folder / f'pid.{me}').write_text(str(os.getpid())); time.sleep(60)"
    process = started(launch_of(folder, does))

    def pids():
        found = [folder / f"pid.{k}" for k in range(2)]
        return all(p.exists() and p.read_text() for p in found) and [
            int(p.read_text()) for p in found
        ]

    workers = until(pids)
    process.kill()
    process.communicate()
    until(lambda: not any(is_alive(pid) for pid in workers))


def is_alive(pid):
    try:
        return "Z" not in pathlib.Path(f"/proc/{pid}/stat").read_text().split()[2]
    except FileNotFoundError:
        return False


def test_a_worker_of_several_processes_gets_an_address(folder):
    does = (
        "names = ('JAX_NUM_PROCESSES', 'JAX_PROCESS_ID', 'JAX_COORDINATOR_ADDRESS')\n"
        "print('at', *[os.environ[name] for name in names])\n"
    )
    process = started(launch_of(folder, does, processes=2))
    text, _ = process.communicate(timeout=30)
    lines = [line.partition("at ") for line in text.splitlines() if "at " in line]
    found = {begin.strip(): end.split() for begin, _, end in lines}
    assert found.keys() == {"[0]", "[0] [1]", "[1]", "[1] [1]"}
    assert [found[key][:2] for key in sorted(found)] == [["2", "0"], ["2", "1"]] * 2
    assert found["[0]"][2] == found["[0] [1]"][2] != found["[1]"][2]


@pytest.mark.parametrize(
    "visible, jobs, processes, expected, note",
    [
        ("0,1", 2, 1, ["0", "1"], None),
        ("4,7", 1, 1, ["4"], "1 of 2 GPUs are idle; --jobs=2 uses them"),
        ("4,7", 3, 1, ["4", "7", "4"], "3 workers share 2 GPUs, so jax does not reserve"),
        ("a,b,c,d", 2, 2, ["a,b", "c,d"], None),
        ("0,1,2", 1, 2, ["0,1"], None),
        ("0,-1,1", 1, 1, ["0"], None),
        ("-1", 2, 1, [None, None], None),
    ],
)  # fmt: skip
def test_each_worker_has_its_gpus(
    folder, monkeypatch, visible, jobs, processes, expected, note
):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    launch = launch_of(folder, "", jobs=jobs, processes=processes)
    found = local.environments(launch)
    assert [env.get("CUDA_VISIBLE_DEVICES") for env in found] == expected
    are_shared = jobs * processes > len(visible.split(",")) > 1
    assert all(("XLA_PYTHON_CLIENT_PREALLOCATE" in env) == are_shared for env in found)
    lines = local.notes(launch)
    assert lines[0].startswith(note) if note else not lines
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    assert all(len(env) <= 1 for env in local.environments(launch))


def test_a_dry_run_prints_the_commands_of_the_workers(folder, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    found = local.lines(launch_of(folder, "it's", jobs=2))
    token = claims.token(folder / "claims")
    begin = ["env", "NPROC=1", f"FINETUNE_JAX_CLAIMS={token}"]
    assert [shlex.split(line) for line in found] == [
        [*begin, f"CUDA_VISIBLE_DEVICES={gpu}", *launch_of(folder, "it's").worker]
        for gpu in (2, 3)
    ]


def test_too_many_threads_are_told(folder, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert not local.notes(launch_of(folder, ""))
    (line,) = local.notes(launch_of(folder, "", jobs=8))
    assert line.startswith("8 workers have 8 threads together on 2 cores")


def test_wrong_numbers_are_refused_before_anything_starts(folder, monkeypatch):
    with pytest.raises(UserError) as caught:
        local.run(launch_of(folder, "", jobs=0, processes=-1))
    assert str(caught.value) == (
        "--jobs: 0; at least 1 is needed\nprocesses: -1; at least 1 is needed"
    )
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UserError, match="processes: 3, but there are 2 GPUs here"):
        local.run(launch_of(folder, "", processes=3))
    assert not list(folder.iterdir())


def test_a_worker_that_is_killed_while_all_stop_is_not_started_again(folder):
    does = (
        "signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), 9))\n"
        "(folder / f'ready.{me}').write_text(''); time.sleep(60)"
    )
    process = started(launch_of(folder, does, jobs=1))
    until(lambda: (folder / "ready.0").exists())
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 1
    assert "ended by SIGKILL\n" in process.communicate()[0]
    assert not (folder / "start.1").exists()


def test_the_job_script_has_the_options_of_the_site(folder, monkeypatch):
    monkeypatch.chdir(folder)
    options = {
        "partition": "gpu", "gpus_per_task": 1, "time": "04:00:00", "comment": "a b",
        "requeue": False, "exclusive": True, "signal": "TERM@300", "ntasks": 8,
        "setup": ("module load cuda", "ulimit -n 4096"),
    }  # fmt: skip
    launch = launch_of(folder, "", jobs=4, processes=2, options=options)
    text = "\n".join(slurm.lines(launch))
    assert re.findall(r"#SBATCH (.*)", text) == [
        "--job-name=rates", "--array=0-3", f"--output={folder}/logs/worker-%A_%a.txt",
        "--ntasks=8", "--cpus-per-task=1", "--signal=TERM@300", "--open-mode=append",
        "--partition=gpu", "--gpus-per-task=1", "--time=04:00:00", "--comment='a b'",
        "--exclusive",
    ]  # fmt: skip
    begin = f"cd {folder} || exit\nmodule load cuda\nulimit -n 4096\nexport SRUN_CPUS"
    assert begin in text
    token = claims.token(folder / "claims")
    assert f"  env NPROC=1 FINETUNE_JAX_CLAIMS={token} {sys.executable} -c" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_a_dry_run_of_the_command_writes_nothing(tmp_path, monkeypatch):
    # Python itself keeps the compiled file of the sweep beside it.
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    sweep = SweepRun(tmp_path / "rates", slurm={"cpus_per_task": 3}, threads=None)
    before = {*tmp_path.iterdir()}
    text = sweep.run("run", "--launcher=slurm", "--jobs=3", "--dry-run")
    assert "#SBATCH --array=0-2\n" in text and "  env NPROC=3 " in text
    text = sweep.run("run", "--jobs=3", "--dry-run")
    assert text.count(" -m finetune_jax.sweep --sweep=") == 3
    assert {*tmp_path.iterdir()} == before


def test_options_that_are_not_of_sbatch_are_named_together(folder):
    options = {
        "array": "0-9", "--time": "1:00", "comment": "a\nb", "open mode": 1, "setup": [3],
    }  # fmt: skip
    with pytest.raises(UserError) as caught:
        slurm.lines(launch_of(folder, "", jobs=0, options=options))
    assert str(caught.value).splitlines() == [
        "--jobs: 0; at least 1 is needed",
        "slurm['array']: leave it out: --jobs gives the number of workers",
        "slurm['--time']: no option of sbatch; give its long name without the dashes",
        "slurm['comment']: 'a\\nb'; one line is needed",
        "slurm['open mode']: no option of sbatch; give its long name without the dashes",
        "slurm['setup']: [3]; lines of a shell are needed",
    ]


@pytest.mark.parametrize(
    "options, expected",
    [({}, 1), ({"cpus_per_task": 8}, 8), ({"cpus-per-task": "2"}, 2),
     ({"cpus_per_task": "many"}, 1), ({"setup": "true"}, 1)],
)  # fmt: skip
def test_a_worker_has_the_threads_of_its_cpus(options, expected):
    assert slurm.threads(options) == expected


def test_without_sbatch_nothing_is_written(folder, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(
        UserError, match="--launcher=slurm: sbatch is missing; run this"
    ):
        slurm.run(launch_of(folder, ""))
    assert not list(folder.iterdir())


def test_a_command_is_made_and_run_for_each_worker(folder, capfd, monkeypatch):
    monkeypatch.chdir(folder.parent)
    template = "echo {index} {name} ${{HOME:+home}}; (cd / && bash -c {worker})"
    options = {"command": template}
    does = "print(f'worker {me}', os.getcwd(), os.environ['NPROC'])  # it's quoted"
    launch = launch_of(folder, does, options=options)
    assert len(command.lines(launch)) == 2
    assert command.run(launch) == 0
    found = sorted(capfd.readouterr().out.splitlines())
    assert [line for line in found if "home" in line] == [
        "[0] 0 rates home", "[1] 1 rates home",
    ]  # fmt: skip
    ends = sorted(line.partition("] ")[2] for line in found if "worker" in line)
    assert ends == [f"worker {k} {folder.parent} 1" for k in range(2)]
    failing = launch_of(folder, "", options={"command": "false {worker} {index}"})
    assert command.lines(failing)[1].endswith(" 1")
    assert command.run(failing) == 1


def test_wrong_templates_are_refused(folder):
    def message(**options):
        with pytest.raises(UserError) as caught:
            command.lines(launch_of(folder, "", jobs=3, options=options))
        return str(caught.value).splitlines()

    for missing in ({}, {"command": None}):
        (text,) = message(**missing)
        assert text.startswith("Sweep.command: missing; give a template such as 'ssh ")
    template = text.split("'")[1]
    options = {"command": template}
    assert len(command.lines(launch_of(folder, "", options=options))) == 2
    assert message(command="ssh {host {worker}")[0].startswith("Sweep.command: 'ssh {h")
    fields = "there are {worker}, {index}, {name}; write {{ for a brace"
    assert message(command="ssh {indx} ${HOME}") == [
        f"Sweep.command: unknown field {{indx}}; did you mean 'index'?; {fields}",
        f"Sweep.command: unknown field {{HOME}}; {fields}",
        "Sweep.command: 'ssh {indx} ${HOME}' has no {worker}, so it starts none",
    ]
