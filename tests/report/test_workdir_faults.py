"""Two processes on one workdir, a full disk, examples that cannot be read."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pictures
import pytest
import small
from checkpoints import saved
from small import lines

from finetune_jax import config as configs
from finetune_jax.core.errors import UserError
from finetune_jax.core.pytrees import digest
from finetune_jax.plans.phase import Phase, as_config
from finetune_jax.report.workdir import locked
from finetune_jax.training.progress import Progress
from finetune_jax.training.run import run
from finetune_jax.training.setup import make_setup

ROOT = pathlib.Path(__file__).parents[2]
SHORT = (Phase(name="all", steps=2, optimizer="sgd", peak_lr=0.1),)


@pytest.mark.slow
def test_a_second_process_is_refused_and_a_stale_lock_is_not_in_the_way(tmp_path):
    config = small.config(model="mlp", plan=SHORT, hidden=(4,))
    workdir = tmp_path / "run"
    workdir.mkdir()
    with locked(workdir), pytest.raises(UserError, match="process .* runs in"):
        run(config, workdir)
    assert not (workdir / "config.json").exists()
    assert (workdir / "lock").exists()
    assert run(config, workdir)["steps"] == 2


FULL = """
import os, pathlib, resource, sys
sys.path[:0] = ['tests']
import checkpoints as tests
from finetune_jax.core.errors import TrainingError
from finetune_jax.training.progress import Progress
setup, checkpoints, states = tests.saved(pathlib.Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
try:
    checkpoints.save(states[1], Progress(phase=1))
except TrainingError as error:
    print(error, flush=True)
    os._exit(1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("bytes_left", [512, 64_000])
@pytest.mark.ci_runs("64000")
def test_a_full_disk_is_told_and_leaves_the_checkpoint_before_it_whole(
    tmp_path, bytes_left
):
    """No file may become larger than there is room for: metadata, arrays."""
    command = [sys.executable, "-c", FULL, str(tmp_path), str(bytes_left)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "checkpoint 2 cannot be saved" in done.stdout and "make room" in done.stdout
    setup, checkpoints, states = saved(tmp_path)
    assert checkpoints.steps() == [1]
    warned = []
    state, progress = checkpoints.newest(setup.target, warned.append)
    assert progress.phase == 0 and digest(state) == digest(states[0]) and not warned
    checkpoints.save(states[1], Progress(phase=1))
    assert checkpoints.steps() == [1, 2]
    checkpoints.close()
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert sorted(names) == ["1", "2"]


def photos_config(folder, **data):
    given = configs.default()
    given.data.update(
        name="folder", dir=str(folder), validation="validation", batch_size=6,
        image_size=16, **data,
    )  # fmt: skip
    given.model.name = "mlp"
    given.model.hidden = (4,)
    given.plan = as_config((Phase(name="all", steps=6, optimizer="sgd", peak_lr=0.1),))
    given.report.every_steps = 1
    given.parallel.devices = 1
    resolved, problems = configs.resolve(given)
    assert not problems, problems
    return resolved


@pytest.mark.slow
@pytest.mark.parametrize("memory_gb", [4.0, 0.0])
@pytest.mark.ci_runs("0.0")
def test_what_cannot_be_read_has_weight_0_and_is_listed(tmp_path, memory_gb):
    folder = pictures.make_folder(tmp_path / "photos")
    whole = make_setup(photos_config(folder))
    places = {
        "train": whole.data.train.name(0),
        "validation": whole.data.held_out["validation"].name(1),
    }
    for name in places.values():
        with open(name, "wb") as file:
            file.write(b"no image")
    with pytest.raises(UserError, match="config.data.on_error=skip"):
        run(photos_config(folder), tmp_path / "stop")
    config = photos_config(folder, on_error="skip", memory_gb=memory_gb)
    run(config, tmp_path / "run")
    found = json.loads((tmp_path / "run" / "unreadable.json").read_text())
    assert sorted(found) == sorted(places.values())
    assert all("not an image" in message for message in found.values())
    setup = make_setup(config)
    train, held_out = setup.data.train, setup.data.held_out["validation"]
    batch = train.take(np.arange(len(train)))
    assert batch["weight"].tolist() == [0.0] + [1.0] * (len(train) - 1)
    assert not batch["inputs"][0].any() and batch["inputs"][1].any()
    held_out.take(np.arange(len(held_out)))
    assert len(held_out.kept()) == len(held_out) - 1
    # As many as could be read: an accuracy is a share of those.
    last = lines(tmp_path / "run")[-1]["validation/accuracy"] * (len(held_out) - 1)
    assert last == pytest.approx(round(last), abs=1e-6)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_that_would_fill_the_memory_is_refused(tmp_path):
    from PIL import Image

    from finetune_jax.data.images.decoding import read_image

    path = tmp_path / "bomb.png"
    Image.new("1", (20_000, 5_000)).save(path)  # Some kilobytes, 100 million pixels.
    with pytest.raises(UserError, match="20000x5000 pixels, more than"):
        read_image(path)


@pytest.mark.slow
def test_file_names_may_be_in_any_encoding(tmp_path):
    folder = pictures.make_folder(tmp_path / "photos")
    place = sorted(path for path in folder.rglob("*.*") if path.is_file())[0]
    odd = os.path.join(os.fsencode(place.parent), b"caf\xe9 \xff\n.png")
    os.rename(os.fsencode(place), odd)
    config = photos_config(folder, test="test")
    run(config, tmp_path / "run")
    assert (tmp_path / "run" / "report" / "index.html").is_file()
    with open(odd, "wb") as file:
        file.write(b"no image")
    run(photos_config(folder, test="test", on_error="skip"), tmp_path / "skip")
    (name,) = json.loads((tmp_path / "skip" / "unreadable.json").read_text())
    assert os.fsencode(name) == odd
