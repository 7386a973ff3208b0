import hashlib
import json

import numpy as np
import pytest
import small
from safetensors.numpy import load_file, save_file

from finetune_jax.core.errors import UserError
from finetune_jax.core.pytrees import digest, named
from finetune_jax.training.setup import make_setup
from finetune_jax.weights.addresses import ZOO, read_weights
from finetune_jax.weights.formats.mapped import copied
from finetune_jax.weights.merge import load_weights


def variables(channels=1, **arguments):
    task = small.task(
        "cnn", (8, 8, channels), convolutions=(4, 4), dense=(8,), **arguments
    )
    import jax

    params, batch_stats = task.init(jax.random.key(0))
    return jax.tree.map(np.asarray, {"params": params, "batch_stats": batch_stats})


def saved(path, tensors):
    save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, path)
    return read_weights(f"file:{path}")


def source(seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=leaf.shape).astype(np.float32)
        for name, leaf in named(variables()).items()
    }


def test_every_tensor_arrives_to_the_bit(tmp_path):
    tensors = source()
    weights = saved(tmp_path / "w.safetensors", tensors)
    merged = named(load_weights(variables(), weights))
    assert digest(merged) == digest(tensors)
    data = (tmp_path / "w.safetensors").read_bytes()
    assert list(weights.sha256.values()) == [hashlib.sha256(data).hexdigest()]


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 300), (2, 3, 4, 259)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_copies_are_right_in_every_order_and_lie_as_jax_reads_them(shape, dtype):
    array = np.asarray(np.random.default_rng(0).normal(size=shape), np.float32)
    views = [array]
    if shape:
        views += [array.T, array[::2], np.moveaxis(array, -1, 0)]
    for view in views:
        copy = copied(view, np.dtype(dtype))
        assert copy.flags.c_contiguous and copy.dtype == dtype
        assert not np.shares_memory(copy, view)
        assert copy.ctypes.data % 64 == 0 or not copy.size
        np.testing.assert_array_equal(copy, view.astype(dtype))


def test_all_misfits_are_told_at_once(tmp_path):
    tensors = source()
    tensors["params/stage1/conv/kernal"] = tensors.pop("params/stage1/conv/kernel")
    tensors["params/head/logits/bias"] = np.zeros(5, np.float32)
    weights = saved(tmp_path / "w.safetensors", tensors)
    with pytest.raises(UserError) as found:
        load_weights(variables(), weights, fresh=("heat/.*",))
    for part in (
        "params/stage1/conv/kernel: not in the weights; did you mean "
        "'params/stage1/conv/kernal'?",
        "params/head/logits/bias: model (10,), weights (5,)",
        "params/stage1/conv/kernal: in the weights, but not in the model",
        "config.init.fresh: 'heat/.*' matches nothing",
    ):
        assert part in str(found.value)


def test_a_fresh_head_keeps_its_initial_value(tmp_path):
    tensors = source()
    tensors["params/head/logits/bias"] = np.zeros(5, np.float32)
    weights = saved(tmp_path / "w.safetensors", tensors)
    start = variables()
    merged = load_weights(start, weights, fresh=("head/.*",))
    assert digest(merged["params"]["head"]) == digest(start["params"]["head"])
    kernel = merged["params"]["stage1"]["conv"]["kernel"]
    assert (kernel == tensors["params/stage1/conv/kernel"]).all()


def test_a_stem_is_adapted_so_that_grey_images_give_what_they_gave(tmp_path):
    weights = saved(tmp_path / "w.safetensors", source())
    with pytest.raises(UserError, match="input_channels='adapt'"):
        load_weights(variables(3), weights)
    merged = load_weights(variables(3), weights, adapt_stem="stage1")
    kernel = merged["params"]["stage1"]["conv"]["kernel"]
    assert kernel.shape[2] == 3
    one = weights.tensors["params/stage1/conv/kernel"]
    np.testing.assert_allclose(kernel.sum(axis=2), one[:, :, 0], rtol=1e-6)
    other = saved(tmp_path / "c.safetensors", named(merged))
    back = load_weights(variables(1), other, adapt_stem="stage1")
    np.testing.assert_allclose(
        back["params"]["stage1"]["conv"]["kernel"], one, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("resnet20", "not an address"),
        ("zoo:", "not an address"),
        ("zoo:resnet20_fashion_mnis", "did you mean 'resnet20_fashion_mnist'"),
        ("zo:resnet20", "did you mean 'zoo'"),
        ("file:none.safetensors", "no file"),
        ("orbax:none", "no folder"),
    ],
)
def test_an_address_that_leads_nowhere_is_refused(address, message):
    with pytest.raises(UserError, match=message):
        read_weights(address)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    saved(path, source())
    whole = path.read_bytes()
    for data in (whole[:-1], whole[: len(whole) // 2], whole[:5], b"", b"x" * 99):
        path.write_bytes(data)
        with pytest.raises(UserError, match="cannot be read as safetensors"):
            read_weights(f"file:{path}")
    (tmp_path / "w.h5").write_bytes(b"x" * 99)
    with pytest.raises(UserError, match="w.h5: it is of Keras .* .safetensors, .npz"):
        read_weights(f"file:{tmp_path / 'w.h5'}")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="not an orbax checkpoint"):
        read_weights(f"orbax:{tmp_path / 'folder'}")


def test_weights_of_another_architecture_are_refused():
    config = small.config(
        model="resnet32",
        overrides=[("init.pretrained", "zoo:resnet20_fashion_mnist")],
    )
    with pytest.raises(UserError, match="does not fit the model") as found:
        make_setup(config).start()
    assert "stage1/block4/bn1/mean: not in the weights" in str(found.value)
    assert "and 50 more of this kind (--mode=plan lists all)" in str(found.value)


def test_the_zoo_fits_its_card():
    cards = sorted(ZOO.glob("*.json"))
    assert [card.stem for card in cards] == [
        p.stem for p in sorted(ZOO.glob("*.safe*"))
    ]
    for card in cards:
        path, told = card.with_suffix(".safetensors"), json.loads(card.read_text())
        data = path.read_bytes()
        assert hashlib.sha256(data).hexdigest() == told["sha256"]
        assert len(data) <= 1.5e6
        tensors = load_file(path)
        params = {
            n.removeprefix("params/"): t for n, t in tensors.items() if "params/" in n
        }
        assert digest(params) == told["params_sha256"]
        assert told["test/accuracy"] >= 0.925


@pytest.mark.slow
def test_the_zoo_reaches_what_its_card_says(testdata, tmp_path):
    """On the ten thousand test images, by the mode that users call."""
    from finetune_jax import config as configs
    from finetune_jax.training.assembly import make_evaluator

    card = json.loads((ZOO / "resnet20_fashion_mnist.json").read_text())
    given = configs.load("configs/pretrain_fashion_mnist.py")
    config, problems = configs.resolve(given, [
        ("data.dir", f"{testdata}/fashion_mnist"), ("parallel.devices", "1"),
        ("init.pretrained", "zoo:resnet20_fashion_mnist"),
    ])  # fmt: skip
    assert not problems
    setup = make_setup(config)
    state, _ = setup.start()
    evaluator = make_evaluator(setup, state)
    found = evaluator.measure(
        setup.devices.place(state), setup.data.held_out, prefix=None
    )
    assert found["test/accuracy"] == pytest.approx(card["test/accuracy"], abs=2e-4)
