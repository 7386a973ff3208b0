"""A SLURM cluster on this machine, for the tests of this folder."""

import os
import pathlib
import subprocess

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Returns the environment of a job, in a cluster of two nodes of one CPU each."""
    # Sockets have short paths; those of pytest are long.
    folder = tmp_path_factory.mktemp("slurm")
    begun = subprocess.run(
        [HERE / "start_slurm.sh", folder, "2", "1"], capture_output=True, text=True
    )
    try:
        assert begun.returncode == 0, begun.stderr
        found = dict(os.environ) | {
            "SLURM_CONF": begun.stdout.strip(),
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
        }
        del found["XLA_FLAGS"]  # The eight devices of the tests.
        yield found
    finally:
        subprocess.run([HERE / "stop_slurm.sh", folder], check=True)
