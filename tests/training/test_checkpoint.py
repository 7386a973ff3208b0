import json

import jax
import numpy as np
import pytest
import small
from checkpoints import PLAN, opened, some_state

from finetune_jax.core.errors import UserError
from finetune_jax.core.files import bytes_below
from finetune_jax.core.pytrees import digest
from finetune_jax.training.checkpoints import checkpoint
from finetune_jax.training.checkpoints.checkpoint import (
    Checkpoints,
    DamagedCheckpoint,
    DamagedStart,
)
from finetune_jax.training.progress import Progress
from finetune_jax.training.setup import make_setup


@pytest.fixture(scope="module")
def setup():
    return make_setup(small.config(
        model="cnn", convolutions=(4, 4), dense=(8,), plan=PLAN
    ))  # fmt: skip


def test_a_state_comes_back_to_the_bit(setup, tmp_path):
    state = some_state(setup, 1)
    state.params["head"]["logits"]["bias"][:4] = [-0.0, 1e-45, np.inf, np.nan]
    checkpoints = opened(tmp_path)
    progress = Progress(phase=1, ends=[1], best=0.5, best_step=2, log_lines=7)
    checkpoints.save(state, progress)
    checkpoints.close()
    again = opened(tmp_path)
    assert again.progress(2) == progress
    restored = again.restore(2, setup.target(progress))
    assert digest(restored) == digest(state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)


def test_the_state_of_each_phase_is_refused_in_every_other(setup, tmp_path):
    checkpoints = opened(tmp_path)
    for phase in range(-1, len(PLAN)):
        state = some_state(setup, phase)
        checkpoints.save(state, Progress(phase=phase))
        for other in range(-1, len(PLAN)):
            target = setup.target(Progress(phase=other))
            if other == phase:
                assert digest(checkpoints.restore(phase + 1, target)) == digest(state)
            else:
                with pytest.raises(UserError, match="was saved in another phase"):
                    checkpoints.restore(phase + 1, target)


def test_the_first_the_best_and_the_newest_stay(setup, tmp_path):
    checkpoints = opened(tmp_path, keep=2)
    state = some_state(setup, -1)
    for step in range(6):
        at_step = state.replace(step=np.asarray(step, np.int32))
        checkpoints.save(at_step, Progress(best_step=min(step, 2)))
    assert checkpoints.steps() == [0, 2, 4, 5]


# A restore that fails leaves tasks of orbax behind, whose event loop is then closed.
NOISE = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def flipped(path, position):
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << (position % 8)
    path.write_bytes(bytes(data))


@NOISE
@pytest.mark.slow
@pytest.mark.parametrize("each", [6, 80])
@pytest.mark.ci_runs("6")
def test_a_flipped_bit_is_found_or_harmless(setup, tmp_path, each):
    """Every file of a checkpoint, some places each; more than a thousand in all."""
    state, progress = some_state(setup, 0), Progress(phase=0)
    checkpoints = opened(tmp_path)
    checkpoints.save(state, progress)
    target, found, tried = setup.target(progress), 0, 0
    folder = checkpoints.folder / "1"
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
    for path in files:
        whole = path.read_bytes()
        for position in np.random.default_rng(0).integers(0, len(whole), each):
            flipped(path, int(position))
            tried += 1
            try:
                assert checkpoints.progress(1) == progress
                assert digest(checkpoints.restore(1, target)) == digest(state)
            except DamagedCheckpoint:
                found += 1
            path.write_bytes(whole)
    print(f"{tried} bits in {len(files)} files: {found} found, the rest harmless")
    assert tried > (1000 if each > 6 else 40) and found > tried / 4
    assert digest(checkpoints.restore(1, target)) == digest(state)


@NOISE
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_used(
    setup, tmp_path
):
    checkpoints = opened(tmp_path)
    for phase in (0, 1, 2):
        checkpoints.save(some_state(setup, phase), Progress(phase=phase))
    data = next((checkpoints.folder / "3" / "state").rglob("d/*"))
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    (checkpoints.folder / "2" / "meta" / "metadata").write_text("{}")
    checkpoints.close()
    told, checkpoints = [], opened(tmp_path)
    state, progress = checkpoints.newest(setup.target, told.append)
    assert progress.phase == 0 and digest(state) == digest(some_state(setup, 0))
    assert len(told) == 2 and "checkpoint 3" in told[0]
    assert sorted(p.name for p in (tmp_path / "damaged").iterdir()) == ["2", "3"]
    checkpoints.save(some_state(setup, 1), Progress(phase=1))
    assert checkpoints.steps() == [1, 2]


@NOISE
def test_metadata_is_part_of_what_is_checked(setup, tmp_path):
    checkpoints = opened(tmp_path)
    checkpoints.save(some_state(setup, 0), Progress(phase=0))
    path = checkpoints.folder / "1" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["progress"]["best_step"] = 5
    path.write_text(json.dumps(meta))
    with pytest.raises(DamagedCheckpoint, match="metadata has changed"):
        checkpoints.progress(1)


def test_an_empty_folder_has_no_newest(setup, tmp_path):
    assert opened(tmp_path).newest(setup.target, print) is None


def with_head(setup, seed):
    """Returns a state of phase 'head' that differs from the start in the head only."""
    start = some_state(setup, -1)
    state = some_state(setup, 0, seed)
    params = start.params | {"head": state.params["head"]}
    return start, state.replace(params=params, batch_stats=start.batch_stats)


def stored(checkpoints, step):
    return bytes_below(checkpoints.folder / str(step))


def test_values_of_the_start_are_stored_once(tmp_path, monkeypatch):
    setup = make_setup(small.config(model="mlp", hidden=(512,), plan=PLAN[:1]))
    start, state = with_head(setup, 3)
    shared, whole = opened(tmp_path), Checkpoints(tmp_path / "whole", keep=9)
    for checkpoints in (shared, whole):
        least = checkpoint.LEAST_SHARED if checkpoints is shared else 2
        monkeypatch.setattr(checkpoint, "LEAST_SHARED", least)
        checkpoints.save(start, Progress())
        checkpoints.save(state, Progress(phase=0))
        found = checkpoints.restore(1, setup.target(Progress(phase=0)))
        assert digest(found) == digest(state)
        assert jax.tree.structure(found) == jax.tree.structure(state)
    assert stored(shared, 1) < stored(whole, 1) / 4


def test_a_damaged_start_is_told_and_nothing_is_moved(tmp_path):
    setup = make_setup(small.config(model="mlp", hidden=(64,), plan=PLAN[:1]))
    checkpoints = opened(tmp_path)
    for state, phase in zip(with_head(setup, 3), (-1, 0)):
        checkpoints.save(state, Progress(phase=phase))
    (checkpoints.folder / "0" / "meta" / "metadata").write_text("{}")
    with pytest.raises(DamagedStart, match="checkpoint 1 shares .* checkpoint 0"):
        checkpoints.newest(setup.target, print)
    assert checkpoints.steps() == [0, 1]
