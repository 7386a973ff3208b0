"""`--mode=evaluate`: measures the best checkpoint of a run on its held-out splits."""

from finetune_jax.checkpoint import Checkpoints
from finetune_jax.config import Config
from finetune_jax.errors import UserError
from finetune_jax.modes.options import Options
from finetune_jax.run import make_evaluator, restore
from finetune_jax.setup import make_setup
from finetune_jax.state import Progress
from finetune_jax.workdir import write_json


def main(config: Config, options: Options) -> int:
    """Prints the metrics and writes them to `evaluation.json`; returns the status."""
    workdir = options.workdir
    assert workdir is not None
    setup = make_setup(config)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
    steps = checkpoints.steps()
    if not steps:
        checkpoints.close()
        raise UserError(f"--workdir: {workdir} has no checkpoint yet")
    best = checkpoints.progress(steps[-1]).best_step
    step = steps[-1] if best is None else best
    state = restore(setup, checkpoints, step)
    start = checkpoints.restore(0, setup.target(Progress()))
    checkpoints.close()
    evaluator = make_evaluator(setup, start)
    found = evaluator.measure(setup.devices.place(state), setup.data.held_out)
    print(f"checkpoint of step {step}")
    for name, value in found.items():
        print(f"{name:24}{value:10.4f}")
    write_json(workdir / "evaluation.json", {"step": step, **found})
    print(f"written to {workdir / 'evaluation.json'}")
    return 0
