"""Readers refuse damaged files with the project's own errors."""

import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "fuzz_readers.py"


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [1_000, 100_000])
@pytest.mark.ci_runs("1000")
def test_a_damaged_file_is_read_or_refused(inputs):
    command = [sys.executable, str(SCRIPT), f"--inputs={inputs}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
