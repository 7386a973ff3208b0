"""The harness that kills runs at random."""

import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "fault_injection.py"


@pytest.mark.exhaustive
def test_runs_that_are_killed_end_in_the_same_bits(tmp_path):
    command = [sys.executable, str(SCRIPT), "--kills=100", f"--workdir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DIFFERENT" not in done.stdout and "killed after steps" in done.stdout
