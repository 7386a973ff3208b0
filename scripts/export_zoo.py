"""Writes the final parameters of a run into the zoo, with a card.

.venv/bin/python scripts/export_zoo.py WORKDIR NAME
"""

import argparse
import hashlib
import json
import pathlib

import numpy as np
from safetensors.numpy import save

from finetune_jax.core.pytrees import digest, named
from finetune_jax.report.workdir import read_config, read_manifest
from finetune_jax.training.checkpoints.checkpoint import Checkpoints
from finetune_jax.training.restore import restore
from finetune_jax.training.setup import make_setup
from finetune_jax.weights.addresses import ZOO


def main() -> None:
    """Reads a finished run and writes NAME.safetensors and NAME.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("name")
    arguments = parser.parse_args()
    config = read_config(arguments.workdir)
    manifest = read_manifest(arguments.workdir) or {}
    result = json.loads((arguments.workdir / "result.json").read_text())
    setup = make_setup(config)
    checkpoints = Checkpoints(arguments.workdir / "checkpoints", keep=1)
    state = restore(setup, checkpoints, checkpoints.steps()[-1])
    checkpoints.close()
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    data = save({n: np.ascontiguousarray(leaf) for n, leaf in named(variables).items()})
    card = {
        "model": config.model.name,
        "data": "Fashion-MNIST (Xiao et al. 2017), all 60,000 training images",
        "command": "python -m finetune_jax.main "
        "--config=configs/pretrain_fashion_mnist.py --config.data.dir=DIR",
        "config": "configs/pretrain_fashion_mnist.py",
        "seed": config.seed,
        "steps": result["steps"],
        "test/accuracy": result["test/accuracy"],
        "test/loss": result["test/loss"],
        "inputs": "28x28, one channel, bytes / 255, mean 0.286, deviation 0.353",
        "packages": manifest.get("packages"),
        "device_kind": manifest.get("device_kind"),
        "nproc": manifest.get("nproc"),
        "params_sha256": digest(state.params),
        "sha256": hashlib.sha256(data).hexdigest(),
        "license": "Apache-2.0; the data is under the MIT licence",
    }
    assert card["params_sha256"] == result["params_sha256"]
    (ZOO / f"{arguments.name}.safetensors").write_bytes(data)
    (ZOO / f"{arguments.name}.json").write_text(json.dumps(card, indent=2) + "\n")
    print(f"{len(data):,} bytes, accuracy {card['test/accuracy']:.4f}")


if __name__ == "__main__":
    main()
