import atexit
import os
import shutil
import socket
import tempfile

# Before jax starts: eight devices for the tests of parallel training, and one number of
# host threads, which decides how reductions are divided.
os.environ["XLA_FLAGS"] = " ".join(
    ("--xla_force_host_platform_device_count=8", os.environ.get("TEST_XLA_FLAGS", ""))
)
os.environ.setdefault("NPROC", "2")
# A worker for each core is enough: threads of oracles would wait for one another's cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Tests that compile the same program share it; workers inherit the folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], True)

# Tables of features of tests are nobody else's.
if "FINETUNE_JAX_CACHE" not in os.environ:
    os.environ["FINETUNE_JAX_CACHE"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ["FINETUNE_JAX_CACHE"], True)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.devices()  # A plan for other numbers of devices would start with those.


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Marks the cases that `fast_runs` and `ci_runs` leave out."""
    is_whole = not any("::" in argument for argument in config.args)
    for name, left_out in (("fast_runs", "slow"), ("ci_runs", "exhaustive")):
        cases = {}
        for item in items:
            if item.get_closest_marker(name):
                cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
        for test, found in cases.items():
            marker = found[0].get_closest_marker(name)
            ids = [item.callspec.id for item in found]
            chosen = set(marker.args or ids[:: marker.kwargs["every"]])
            if is_whole and not chosen <= set(ids):
                raise pytest.UsageError(f"{test}: {name} has no {chosen - set(ids)}")
            for item in found:
                if item.callspec.id not in chosen:
                    item.add_marker(left_out)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(self, address):
        if self.family != socket.AF_UNIX:
            raise AssertionError(f"a test connects to {address}")
        return connect(self, address)

    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True)
def precision_of_jax():
    yield
    # Of a run in double precision by its command, which others would find in its process.
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def no_pictures(monkeypatch):
    """Has runs draw nothing, where nobody looks."""
    monkeypatch.setattr("finetune_jax.training.run.write_report", lambda *_: None)


@pytest.fixture(scope="session")
def testdata():
    folder = os.environ.get("FINETUNE_JAX_TESTDATA")
    if not folder:
        pytest.skip("FINETUNE_JAX_TESTDATA, the folder of real data, is not set")
    return folder
