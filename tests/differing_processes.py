"""Runs a config with one argument for each process: WORKDIR OF_PROCESS_0 OF_PROCESS_1."""

import os
import sys

import process_configs

from finetune_jax import main

workdir, *of_each = sys.argv[1:]
own = of_each[int(os.environ["JAX_PROCESS_ID"])]
sys.argv[1:] = [
    f"--config={process_configs.PATH}:phases", f"--workdir={workdir}", own
]  # fmt: skip
main.main()
