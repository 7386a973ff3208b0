"""`--mode=evaluate`: measures the best checkpoint of a run on its held-out splits."""

from finetune_jax.config import Config
from finetune_jax.forgetting import open_domains
from finetune_jax.modes.options import Options
from finetune_jax.run import best_state, data_of_run
from finetune_jax.setup import make_setup
from finetune_jax.workdir import write_json


def main(config: Config, options: Options) -> int:
    """Prints the metrics and writes them to `evaluation.json`; returns the status."""
    workdir = options.workdir
    assert workdir is not None
    setup = make_setup(config, data_of_run(config, workdir))
    evaluator, placed, step = best_state(setup, workdir, open_domains(setup))
    found = evaluator.measure(placed, setup.data.held_out)
    print(f"checkpoint of step {step}")
    for name, value in found.items():
        print(f"{name:24}{value:10.4f}")
    write_json(workdir / "evaluation.json", {"step": step, **found})
    print(f"written to {workdir / 'evaluation.json'}")
    return 0
