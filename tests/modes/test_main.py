"""The command line: what it answers to mistakes, and the modes that need no training."""

import json
import os
import subprocess
import sys

import jax
import pytest
from command_line import IRIS, ROOT, refused

from finetune_jax import config as configs
from finetune_jax import main
from finetune_jax.modes import startup

HEAD = f"--config={ROOT / 'configs' / 'resnet_head.py'}"
ONE_DEVICE = "--config.parallel.devices=1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "holds no run"),
        (["--config=configs/resnet_hed.py"], "no file"),
        ([IRIS, "--mode=trian"], "did you mean 'train'"),
        ([IRIS, "--wrokdir=x"], "did you mean '--workdir'"),
        ([IRIS, "stray"], "stray: unknown"),
        ([IRIS, "--config.data.batch_sise=3"], "did you mean 'batch_size'"),
        ([IRIS, "--config.data.batch_size=many"], "'many' is not an integer"),
        ([IRIS, "--config.data.batch_size=0"], "config.data.batch_size: 0"),
        ([IRIS, "--config.data.batch_size=31", "--config.parallel.devices=8"],
         "31 examples in 1 micro-batches over 8 devices"),
        ([IRIS, "--config.plan[0].accumulate_steps=7"], "in 7 micro-batches"),
        ([IRIS, "--config.plan[0].rules=(('haed/.*', 1.0), ('.*', 0.0))"],
         "config.plan[0].rules[0]: 'haed/.*' matches nothing"),
        ([IRIS, "--config.plan[0].rules=(('head/.*', 1.0),)"],
         "config.plan[0].rules: no rule matches stage1/dense/bias"),
        ([IRIS, "--config.plan[0].optimizer=adamm"], "did you mean 'adam"),
        ([IRIS, "--config.evaluate.best=validation/acuracy"],
         "did you mean 'validation/accuracy'"),
        ([IRIS, "--config.data.test=test[:0%]"], "is empty"),
        ([IRIS, "--config.data.train=train[:2]"], "have no training example"),
        ([IRIS, "--config.init.pretrained=file:none.safetensors"], "no file"),
        ([HEAD, "--config.init.fresh=()", "--config.model.classes=12"],
         "params/head/logits/bias: model (12,), weights (10,)"),
        ([HEAD, "--config.model.name=resnet32"], "not in the weights"),
        ([IRIS, "--config.plan[0].optimizer_args.b1=abc"], "optimizer_args.b1: 'abc'"),
        ([IRIS, "--config.plan[0].optimizer_args.b1=2"], "less than 1"),
        ([IRIS, "--config.plan[0].regularise=('l2', 0.1, '.*')"], "'l2'"),
        ([IRIS, "--config.plan[0].regularise=((),)",
          "--config.plan[0].optimizer=lbfgs"], "()"),
        ([IRIS, "--config.plan[0].regularise=(('l1', 0.1, '.*'),)",
          "--config.plan[0].optimizer=schedule_free_adamw"], "evaluates an average"),
        ([IRIS, "--config.plan[0].optimizer=schedule_free_adamw",
          "--config.plan[0].optimizer_args.b1=1.5"], "less than 1"),
        ([IRIS, "--config.plan[0].optimizer=sgd",
          "--config.plan[0].optimizer_args.nesterov=True"], "a momentum above 0"),
        ([IRIS, "--config.plan[0].optimizer=adagrad",
          "--config.plan[0].optimizer_args.initial=-1.0"], "initial -1.0"),
        ([IRIS, "--config.plan[0].end_lr_scale=2.0"], "0 to 1 is needed"),
        ([IRIS, "--config.plan[0].steps=None", "--config.plan[0].epochs=1e30",
          "--config.plan[0].warmup_steps=0"], "too many"),
        ([IRIS, "--config.evaluate.ema_decay=1.0"], "less than 1"),
        ([IRIS, "--config.task.metrics=('top_3_accuracy',)"], "always 1"),
        ([IRIS, "--config.plan[0].steps=100000000000000000000"], "at most 2147483647"),
        ([IRIS, "--config.plan[0].peak_lr=1e400"], "finite is needed"),
        ([IRIS, "--config.plan[0].plateau_metric=test/loss"], "cannot choose"),
        ([IRIS, "--config.evaluate.best=test/accuracy"], "cannot choose"),
        ([IRIS, "--config.model.hidden=('a',)"], "config.model.hidden: ('a',)"),
        ([IRIS, "--config.model.hidden=(0,)"], "widths are needed"),
        ([IRIS, "--config.task.label_smoothing=abc"], "label_smoothing: 'abc'"),
        ([HEAD, "--config.data.augment=(1,)", "--config.parallel.devices=1"],
         "1 is not a step"),
        (["--config=pyproject.toml"], "not a Python file"),
        (["--mode=evaluate"], "--workdir: missing"),
        (["--mode=evaluate", "--workdir=none"], "holds no run"),
        (["--config"], "expected one argument"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_message(arguments, message, tmp_path):
    if "--mode=evaluate" not in arguments:
        arguments = [*arguments, f"--workdir={tmp_path / 'run'}"]
    if IRIS in arguments and not any("devices" in a for a in arguments):
        arguments.insert(1, "--config.parallel.devices=1")
    assert message in refused(*arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "[1]", "not a JSON object"),
        ("config.json", "\xff", "cannot be read"),
        ("config.json", '{"a": 1}', "config.a: unknown"),
        ("manifest.json", "[1]", "not a JSON object"),
        ("manifest.json", '{"nproc": "x"}', "nproc is 'x'"),
        ("result.json", "{", "cannot be read"),
        ("result.json", "{}", "not the result of a run"),
    ],
)
def test_a_broken_file_in_a_workdir_is_named(tmp_path, name, text, message):
    workdir = tmp_path / "run"
    workdir.mkdir()
    config = startup.resolved_config(IRIS.partition("=")[2], None, [])
    (workdir / "config.json").write_text(configs.to_json(config))
    (workdir / name).write_bytes(text.encode("latin-1"))
    assert message in refused(IRIS, f"--workdir={workdir}")


def test_a_workdir_that_is_no_folder_or_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/run"):
        message = refused(
            f"{IRIS}:tiny", f"--workdir={tmp_path / place}",
            "--config.parallel.devices=1",
        )  # fmt: skip
        assert "file" in message


def test_mistakes_of_one_kind_are_told_together():
    message = refused(
        IRIS, "--config.sede=1", "--config.data.batch_size=x", "--config.plan[0].step=1"
    )
    for part in ("sede", "'x' is not an integer", "did you mean 'steps'"):
        assert part in message


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "finetune_jax.main", *arguments],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip


def test_the_program_exits_2_without_a_traceback():
    done = command(IRIS, "--config.data.batch_sise=3")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: --config.data.batch_sise: unknown")


def test_a_run_can_be_evaluated_and_is_finished_when_run_again(tmp_path, capsys):
    workdir = tmp_path / "run"
    arguments = [f"{IRIS}:tiny", f"--workdir={workdir}", "--config.parallel.devices=1"]
    assert main.run(arguments) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"workdir {workdir}")
    assert output.rstrip().endswith(f"workdir {workdir}")
    assert main.run(arguments) == 0
    assert "this run is finished" in capsys.readouterr().out
    assert main.run(["--mode=evaluate", f"--workdir={workdir}"]) == 0
    found = json.loads((workdir / "evaluation.json").read_text())
    best = json.loads((workdir / "result.json").read_text())["best"]
    assert {name: found[name] for name in best} == best
    assert "config.seed: 3 here, 0 there" in refused(*arguments, "--config.seed=3")


@pytest.mark.slow
@pytest.mark.bits
def test_a_run_has_its_bits_after_one_in_double_precision(tmp_path):
    def digest_of(name, *more):
        workdir = f"--workdir={tmp_path / name}"
        options = ("--config.parallel.devices=1", "--config.model.head.dropout=0.5")
        assert main.run([f"{IRIS}:tiny", workdir, *options, *more]) == 0
        return json.loads((tmp_path / name / "result.json").read_text())[
            "params_sha256"
        ]

    alone = digest_of("alone")
    assert digest_of("double", "--config.precision=float64") != alone
    assert digest_of("after") == alone


@pytest.mark.parametrize(
    "config", ["resnet_head", "mnist_target", "pretrain_fashion_mnist"]
)
@pytest.mark.fast_runs("resnet_head")
def test_the_plan_needs_no_data_and_compiles_nothing(config, capsys, monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("something was compiled")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    monkeypatch.setattr(jax._src.compiler, "compile_or_get_cached", refuse)
    path = ROOT / "configs" / f"{config}.py"
    fresh = ["--config.init.pretrained=None", "--config.init.fresh=()"]
    fresh = fresh if config == "mnist_target" else []  # Its weights are of a run.
    assert main.run([f"--config={path}", "--mode=plan", *fresh, ONE_DEVICE]) == 0
    output = capsys.readouterr().out
    assert "forward" in output and "optimizer" in output


def test_the_plan_says_what_it_needs_where_the_data_is_not_there():
    message = refused(
        f"--config={ROOT / 'configs' / 'mnist_source.py'}", "--mode=plan",
        "--config.model.classes=None", "--config.data.channels=None",
    )  # fmt: skip
    assert "config.data.channels" in message and "config.model.classes" in message


def test_host_threads_are_those_of_the_manifest(tmp_path, monkeypatch):
    monkeypatch.setenv("NPROC", "7")
    startup.pin_environment(None, False)
    assert os.environ["NPROC"] == "7"
    (tmp_path / "manifest.json").write_text('{"nproc": "3"}')
    startup.pin_environment(tmp_path, False)
    assert os.environ["NPROC"] == "3"
    monkeypatch.delenv("NPROC")
    startup.pin_environment(None, False)
    assert int(os.environ["NPROC"]) == len(os.sched_getaffinity(0))


def test_flags_of_xla_are_those_of_the_manifest_and_deterministic_ones(
    tmp_path, monkeypatch
):
    monkeypatch.delenv("XLA_FLAGS")
    (tmp_path / "manifest.json").write_text('{"xla_flags": "--xla_cpu_foo=1"}')
    startup.pin_environment(tmp_path, False)
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_foo=1"
    startup.pin_environment(tmp_path, True)
    flags = os.environ["XLA_FLAGS"].split()
    assert flags == ["--xla_cpu_foo=1", *startup.DETERMINISTIC]
    startup.pin_environment(tmp_path, True)
    assert os.environ["XLA_FLAGS"].split() == flags


def test_one_process_has_the_cpu_devices_of_all_that_the_run_had(tmp_path, monkeypatch):
    parallel = configs.resolve(configs.default(), [])[0].parallel
    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    about = {
        "backend": "cpu", "device_count": 4,
        "xla_flags": "--xla_force_host_platform_device_count=2 --xla_a=1",
    }  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(about))
    with monkeypatch.context() as several:
        for name, value in (("COORDINATOR_ADDRESS", "h:1"), ("NUM_PROCESSES", "2"),
                            ("PROCESS_ID", "0")):  # fmt: skip
            several.setenv(f"JAX_{name}", value)
        startup.pin_environment(tmp_path, False, parallel)
        assert "JAX_NUM_CPU_DEVICES" not in os.environ
        assert os.environ["XLA_FLAGS"] == "--xla_a=1"
    startup.pin_environment(tmp_path, False, parallel)
    assert os.environ.pop("JAX_NUM_CPU_DEVICES") == "4"


def test_a_reader_that_leaves_ends_the_command_without_a_traceback():
    code = (
        "import time; from finetune_jax.main import ended\n"
        "def run(arguments):\n"
        "    print('first', flush=True); time.sleep(1); print('second', flush=True)\n"
        "ended(run)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "first\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1
