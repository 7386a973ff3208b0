"""The locks of CUDA wheels fit the locks of the environment that they are added to."""

import re

import pages
import pytest

FOLDER = pages.ROOT / "requirements"


def versions(name):
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (FOLDER / name).read_text(), re.M))


@pytest.mark.parametrize("cuda", ["12", "13"])
@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_a_lock_of_cuda_wheels_adds_to_the_environment(cuda, python):
    name = f"cuda{cuda}-py{python}.txt"
    added, there = versions(name), versions(f"py{python}.txt")
    assert {k: v for k, v in added.items() if k in there}.items() <= there.items()
    assert added[f"jax-cuda{cuda}-plugin"] == there["jax"] == added["jax"]
    text = (FOLDER / name).read_text()
    assert text.count("==") <= text.count("--hash=sha256:") and "http" not in text
