"""Texts that users read: `--help`, `--mode=plan` and the commonest errors.

`.venv/bin/python tests/modes/test_golden.py` writes them anew. That is right after a
change that is meant to change a text; read the difference before committing it.
"""

import contextlib
import io
import os
import pathlib
import sys

import pytest

if __name__ == "__main__":  # As conftest.py has it.
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    import conftest  # noqa: F401

from finetune_jax import main
from finetune_jax.core.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = pathlib.Path(__file__).parent / "golden"
IRIS, HEAD = "--config=configs/iris_mlp.py", "--config=configs/resnet_head.py"
ADAPT = "--config=configs/adapt_digits.py"
PLANS = {"plan_iris_mlp": IRIS, "plan_resnet_head": HEAD}
# Each with the config that it is a mistake in.
MISTAKES = [
    [],
    ["--config=configs/resnet_hed.py"],
    [IRIS, "--mode=trian"],
    [IRIS, "--wrokdir=x"],
    ["--mode=evaluate"],
    ["--mode=predict", IRIS, "--workdir=x"],
    [IRIS, "--inputs=a.png"],
    [IRIS, "--config.data.batch_sise=3"],
    [IRIS, "--config.data.batch_size=many", "--config.plan[0].step=3"],
    [IRIS, "--config.data.batch_size=0"],
    [IRIS, "--config.precision=float16"],
    [IRIS, "--config.plan[0].accumulate_steps=7"],
    [IRIS, "--config.plan[0].rules=(('haed/.*', 1.0), ('.*', 0.0))"],
    [IRIS, "--config.plan[0].optimizer=adamm"],
    [IRIS, "--config.plan[0].optimizer_args.b1=2.0"],
    [
        IRIS,
        "--config.plan[0].schedule=step",
        "--config.plan[0].schedule_args.factor=3.0",
    ],
    [IRIS, "--config.plan[0].steps=5", "--config.plan[0].epochs=1"],
    [IRIS, "--config.plan[0].regularise=(('l2', 0.1, 'heed/.*'),)"],
    [IRIS, "--config.evaluate.best=validation/acuracy"],
    [IRIS, "--config.model.nmae=mlp"],
    [IRIS, "--config.task.name=clasify"],
    [IRIS, "--config.data.name=irsi"],
    [IRIS, "--config.data.train=train[:2]"],
    [HEAD, "--config.evaluate.cka=1"],
    [HEAD, "--config.data.augment=(('filp',),)"],
    [HEAD, "--config.init.schemes=(('head/.*', 'normal', -1.0),)"],
    [ADAPT, "--config.data.batch_size=6", "--config.plan[0].accumulate_steps=2"],
]


def message(arguments):
    devices = ["--config.parallel.devices=1"] if arguments[:1] else []
    devices = [] if "predict" in "".join(arguments) else devices
    mode = [] if any("--mode" in a for a in arguments) else ["--mode=plan"]
    mode = [] if any("--inputs" in a for a in arguments) else mode
    try:
        main.run([*arguments, *devices, *mode])
    except UserError as error:
        return str(error)
    raise AssertionError(f"{arguments} are accepted")


def errors():
    return "\n\n".join(f"$ {' '.join(a)}\n{message(a)}" for a in MISTAKES) + "\n"


def printed(arguments):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main.run(arguments)
    return out.getvalue()


def texts():
    """Yields (file, function to its text)."""
    yield "help", lambda: printed(["--help"])
    for name, config in PLANS.items():
        arguments = [config, "--mode=plan", "--config.parallel.devices=1"]
        yield name, lambda arguments=arguments: printed(arguments)
    yield "errors", errors


@pytest.mark.parametrize("name", [name for name, _ in texts()])
def test_a_text_is_the_golden_one(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(ROOT)
    assert dict(texts())[name]() == (GOLDEN / f"{name}.txt").read_text()


if __name__ == "__main__":
    os.environ["COLUMNS"] = "100"
    os.chdir(ROOT)
    for name, text in texts():
        (GOLDEN / f"{name}.txt").write_text(text())
