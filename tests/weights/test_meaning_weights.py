"""Odd weight files: the same numbers as the clean one, a line about it, or a refusal."""

import functools
import json
import os
import pickle
import stat
import struct

import jax
import jax.numpy as jnp
import mixtures
import ml_dtypes
import numpy as np
import pytest
import small
import torch_files
from meaning import Odd, by_name, check
from safetensors.numpy import save, save_file
from torch_files import Call, Name, Raw, described, zipped

from finetune_jax import config as configs
from finetune_jax.core.errors import UserError
from finetune_jax.core.pytrees import named
from finetune_jax.models import convnext
from finetune_jax.training.initial.starting_state import told_of
from finetune_jax.training.setup import make_setup
from finetune_jax.weights.addresses import Weights, _of_state, read_weights
from finetune_jax.weights.formats.safetensors_file import save_safetensors
from finetune_jax.weights.layout import layouts
from finetune_jax.weights.merge import load_weights
from finetune_jax.weights.metadata import labels
from finetune_jax.weights.prefixes import without_prefix


@functools.cache
def shapes():
    shape = convnext.Shape((1, 1, 1, 1), (2, 2, 2, 2))
    kinds = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    module = small.of_sizes("convnext_tiny", shape, head={}, classes=3, **kinds)
    x = jnp.zeros((1, 32, 32, 3))
    return jax.eval_shape(lambda: module.init(jax.random.key(0), x, train=False))


@functools.cache
def clean():
    """Returns a model's tensors by timm's names."""
    rng = np.random.default_rng(0)
    leaves = {
        name: rng.standard_normal(leaf.shape, np.float32)
        for name, leaf in named(shapes()).items()
    }
    (timm,) = [one for one in layouts() if one.name == "timm ConvNeXt"]
    return timm.tensors(leaves)


def loaded(weights, **options):
    """Returns the model's numbers, and the lines that a run tells of its weights."""
    merged = named(load_weights(shapes(), weights, **options))
    fitting = without_prefix(weights, named(shapes()))
    return list(merged.values()), [*fitting.notes, *told_of(weights, "float32")]


def read(path, entry=None):
    return loaded(read_weights(f"file:{path}", entry))


def numbers():
    return loaded(Weights(address="file:x", tensors=clean(), sha256={}))[0]


def torch_file(name, **entries):
    """Returns the maker of a torch file: `...` stands for the clean state dict."""

    def make(folder):
        arrays, top = [], {}
        for key, value in entries.items():
            top[key] = value
            if value is ... or isinstance(value, np.ufunc | float):
                top[key] = {}
                for tensor, array in clean().items():
                    array = array if value is ... else np.float32(value) * array
                    top[key][tensor] = described(str(len(arrays)), array)
                    arrays.append(array)
        (folder / name).write_bytes(zipped(top, arrays))
        return folder / name

    return make


def tensors_file(name="w.safetensors", change=lambda name, array: {name: array}):
    """Returns the maker of a file whose tensors are changed ones of the clean file."""

    def make(folder):
        path, tensors = folder / name, {}
        for key, array in clean().items():
            tensors |= change(key, array)
        if ".safetensors" in name.lower() or name.endswith(".dat"):
            save_file(tensors, path)
        elif ".npz" in name.lower():
            with path.open("wb") as file:
                np.savez(file, **tensors)
        else:
            path.write_bytes(torch_files.write_zip(tensors))
        return path

    return make


def file(name, data):
    """Returns the maker of a file with these bytes."""

    def make(folder):
        content = data() if callable(data) else data
        (folder / name).write_bytes(content)
        return folder / name

    return make


def prefixed(prefix, head=None):
    def change(name, array):
        if head is not None and name.startswith("head.fc."):
            return {head + name.rpartition(".")[2]: array}
        return {prefix + name: array}

    return tensors_file(change=change)


def only_first(change):
    first = next(iter(clean()))
    return tensors_file(
        change=lambda name, a: {name: change(a.copy()) if name == first else a}
    )


def with_nan(value):
    def change(array):
        array.flat[-1] = value
        return array

    return only_first(change)


def headed(seed):
    """Returns `seed` floats of 8 bits as they stand in a file without the library."""
    arrays = {n: a.astype(ml_dtypes.float8_e4m3fn) for n, a in clean().items()}
    header, data = {}, b""
    for name, array in arrays.items():
        end = len(data) + array.nbytes
        header[name] = {
            "dtype": seed,
            "shape": list(array.shape),
            "data_offsets": [len(data), end],
        }
        data += array.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


NAMESPACE = Raw(b"cargparse\nNamespace\n)\x81}X\x02\x00\x00\x00lrK\x01sb")
SCALAR = Call(Name("numpy._core.multiarray scalar"), (Name("numpy dtype"), "x"))
ENUM = Call(Name("my.project Phase"), (1,))
DEFAULTS = Raw(
    b"ccollections\ndefaultdict\n(cbuiltins\nlist\ntRX\x01\x00\x00\x00aK\x01s"
)
OMEGACONF = Raw(b"comegaconf.dictconfig\nDictConfig\n)\x81}X\x01\x00\x00\x00aK\x01sb")
SIMPLE = Call(Name("types SimpleNamespace"), ())
PATH = Call(Name("pathlib PosixPath"), ("/", "tmp"))
OPTIMIZER = {"state": {"head.fc.bias": {"step": 1}}, "param_groups": []}

TOOK = "w.pth: took 'state_dict'"
ODD = (
    # The entry of a checkpoint.
    Odd(
        name="averaged",
        make=torch_file("w.pth", state_dict=..., state_dict_ema=2.0),
        same=True,
        warns=r"it also has 'state_dict_ema': config.init.entry='state_dict_ema' takes",
    ),
    Odd(
        name="model-and-ema",
        make=torch_file("w.pth", model_ema=2.0, model=..., epoch=3),
        same=True,
        warns="took 'model'; it also has 'model_ema'",
    ),
    Odd(
        name="swa",
        make=torch_file("w.pth", swa_model=2.0, network=...),
        same=True,
        warns="took 'network'; it also has 'swa_model': config.init.entry='swa_model'",
    ),
    Odd(
        name="only-averaged",
        make=torch_file("w.pth", ema=..., optimizer=OPTIMIZER),
        same=True,
        warns="took 'ema', the averaged weights: it has no others",
    ),
    Odd(
        name="dino",
        make=torch_file("w.pth", student=2.0, teacher=...),
        refuses="several dicts .*config.init.entry='student' or .*entry='teacher'",
    ),
    Odd(
        name="deeper",
        make=torch_file("w.pth", run={"ema": {}, "net": {"a": 1}}, checkpoint=...),
        same=True,
        warns="took 'checkpoint'",
    ),
    Odd(
        name="optimizer",
        make=torch_file("w.pth", state={"x": {"a": 1}}, param_groups=[]),
        refuses="it is the state of an optimizer",
    ),
    # Objects beside tensors.
    *(
        Odd(
            name=f"beside-{kind}",
            make=torch_file("w.pth", state_dict=..., args=value),
            same=True,
            warns=rf"left out 1 object other than tensors: 'args' \({kind}\)",
        )
        for kind, value in {
            "argparse.Namespace": NAMESPACE,
            "numpy._core.multiarray.scalar": SCALAR,
            "my.project.Phase": ENUM,
            "omegaconf.dictconfig.DictConfig": OMEGACONF,
            "types.SimpleNamespace": SIMPLE,
            "pathlib.PosixPath": PATH,
            "torch.device": Call(Name("torch device"), ("cpu",)),
        }.items()
    ),
    Odd(
        name="beside-defaultdict",
        make=torch_file("w.pth", state_dict=..., history=DEFAULTS),
        same=True,
        warns=TOOK,
    ),
    Odd(
        name="inside-a-dict",
        make=torch_file("w.pth", state_dict=..., cfg={"a": 1, "b": NAMESPACE}),
        same=True,
        warns=r"1 object other than tensors: 'cfg' \(argparse.Namespace\)",
    ),
    Odd(
        name="whole-model",
        make=torch_file("w.pth", model=Call(Name("my.nets Net"), ())),
        refuses="no dict of tensors.*'model' is an object of 'my.nets.Net'.*state_dict",
    ),
    Odd(
        name="sparse",
        make=torch_file(
            "w.pth",
            model={"w": Call(Name("torch._utils _rebuild_sparse_tensor"), ())},
        ),
        refuses="'w' is a sparse tensor",
    ),
    Odd(
        name="quantised-torch",
        make=torch_file(
            "w.pth", **{"w": Call(Name("torch._utils _rebuild_qtensor"), ())}
        ),
        refuses="'w' is a quantised tensor",
    ),
    # Number types.
    Odd(
        name="half",
        make=tensors_file(change=lambda n, a: {n: a.astype(np.float16)}),
        warns="56 of 56 tensors are float16; they become float32",
    ),
    Odd(
        name="double",
        make=tensors_file("w.npz", lambda n, a: {n: a.astype(np.float64)}),
        same=True,
        warns="tensors are float64; they become float32, and lose digits",
    ),
    Odd(
        name="int8",
        make=tensors_file(
            change=lambda n, a: {n: (a * 100).astype(np.int8) if a.ndim > 1 else a}
        ),
        refuses=r"tensors are int8, .*quantised.*config.init.accept=\('integer',\)",
    ),
    Odd(
        name="uint8-in-torch",
        make=tensors_file("w.npz", lambda n, a: {n: (a * 9).astype(np.uint8)}),
        refuses="56 of 56 tensors are uint8",
    ),
    Odd(
        name="bool",
        make=only_first(lambda a: a > 0),
        refuses="1 of 56 tensors are bool",
    ),
    Odd(
        name="fp8",
        make=file("w.safetensors", lambda: headed("F8_E4M3")),
        refuses=r"56 of 56 tensors are float8_e4m3fn.*accept=\('float8',\)",
    ),
    Odd(
        name="fp8-e5m2",
        make=file("w.safetensors", lambda: headed("F8_E5M2")),
        refuses="tensors are float8_e5m2",
    ),
    Odd(
        name="fp4",
        make=file("w.safetensors", lambda: headed("F4")),
        refuses=r"has unknown numbers \(F4\)",
    ),
    Odd(
        name="complex",
        make=tensors_file("w.npz", lambda n, a: {n: a.astype(np.complex64)}),
        refuses="have complex numbers",
    ),
    Odd(
        name="complex-safetensors",
        make=file("w.safetensors", lambda: headed("C64")),
        refuses="has complex numbers",
    ),
    Odd(
        name="count-of-batches",
        make=tensors_file(
            change=lambda n, a: {n: a, f"{n}.num_batches_tracked": np.array(3)}
        ),
        same=True,
    ),
    Odd(name="nan", make=with_nan(np.nan), refuses="NaN or .*accept=.'nan',."),
    Odd(name="inf", make=with_nan(-np.inf), refuses="1 of 56 tensors have NaN or"),
    Odd(
        name="too-large-for-float32",
        make=tensors_file("w.npz", lambda n, a: {n: a.astype(np.float64) * 1e300}),
        refuses="have NaN or infinite",
    ),
    # Prefixes of all names.
    *(
        Odd(
            name=f"prefix-{prefix}",
            make=prefixed(prefix),
            same=True,
            warns=rf"w.safetensors: left out the prefix '{prefix}' of all names",
        )
        for prefix in (
            "model.",
            "backbone.",
            "module.",
            "_orig_mod.",
            "encoder.",
            "net.",
            "module.model.backbone.",
            "model._orig_mod.",
            "student/",
        )
    ),
    *(
        Odd(
            name=f"head-{head}",
            make=prefixed(prefix, head),
            same=True,
            warns=rf"prefix '{prefix}' of 54 of 56 names",
        )
        for prefix, head in (
            ("backbone.", "head.fc."),
            ("model.backbone.", "model.classifier."),
            ("encoder.", "linear."),
        )
    ),
    Odd(
        name="averaged-in-names",
        make=tensors_file(
            change=lambda n, a: {f"ema_model.{n}": a * 2, f"model.{n}": a}
        ),
        same=True,
        warns="left out 56 averaged tensors, which config.init.entry='ema_model' takes",
    ),
    Odd(
        name="three-models",
        make=tensors_file(
            "w.npz",
            lambda n, a: {f"q.{n}": a, f"k.{n}": a * 2, f"p.{n}": a, "queue": a},
        ),
        refuses="config.init.entry='q' takes these alone",
    ),
    Odd(
        name="two-models",
        make=tensors_file(
            change=lambda n, a: {f"student.{n}": a, f"teacher.{n}": a * 2}
        ),
        refuses="config.init.entry='student' takes these alone",
    ),
    # Names and contents of files.
    *(
        Odd(name=name, make=tensors_file(name), same=True)
        for name in ("w.PTH", "w.Safetensors", "w.CKPT", "w.NPZ", "w.ckpt", "w.pth.tar")
    ),
    Odd(
        name="unknown-suffix",
        make=tensors_file("w.dat"),
        same=True,
        warns="w.dat: read as a file of safetensors, by its content",
    ),
    Odd(
        name="torch-as-bin",
        make=tensors_file("weights"),
        same=True,
        warns="read as a file of torch.save, by its content",
    ),
    Odd(
        name="safetensors-as-pth",
        make=file("w.pth", lambda: save(clean())),
        same=True,
        warns="w.pth: is a file of safetensors in spite of its name",
    ),
    Odd(
        name="page",
        make=file("w.pth", b"\n<!DOCTYPE html><html>Sign in"),
        refuses="it is a web page",
    ),
    Odd(
        name="lfs",
        make=file("w.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
        refuses="a Git LFS pointer",
    ),
    Odd(name="empty", make=file("w.pth", b""), refuses="it is empty"),
    Odd(name="zeros", make=file("w.pth", bytes(5000)), refuses="full of zeros"),
    Odd(
        name="cut-off",
        make=file("w.safetensors", lambda: save(clean())[:-10]),
        refuses="so 10 are missing",
    ),
    Odd(name="gguf", make=file("w.gguf", b"GGUF\3\0\0\0"), refuses="a GGUF file"),
    Odd(name="hdf5", make=file("w.ckpt", b"\x89HDF\r\n\x1a\n"), refuses="an HDF5"),
    Odd(
        name="onnx",
        make=file("w.pt", b"\x08\x08\x12\x07pytorch\x1a"),
        refuses="an ONNX model",
    ),
    Odd(name="gzip", make=file("w.pth", b"\x1f\x8b\x08\0\0\0"), refuses="with gzip"),
    Odd(
        name="pickle",
        make=file("w.pkl", pickle.dumps({"a": 1})),
        refuses="w.pkl: its content is unknown",
    ),
    Odd(
        name="pickle-as-pth",
        make=file("w.pth", b"\x80\x02cmy.nets\nNet\n)\x81."),
        refuses="a pickle of 'my.nets.Net', but not one that torch.save wrote",
    ),
)


@by_name(ODD)
def test_no_weight_file_changes_its_meaning_in_silence(odd, tmp_path):
    check(odd, read, numbers(), tmp_path)


ENTRIES = (
    (torch_file("w.pth", model=2.0, model_ema=...), "model_ema"),
    (torch_file("w.pth", student=2.0, teacher=...), "teacher"),
    (torch_file("w.pth", ema={"module": {}}, model=2.0, copy=...), "copy"),
    (
        tensors_file(change=lambda n, a: {f"ema.{n}": a, f"raw.{n}": a * 2}),
        "ema",
    ),
    (
        tensors_file(
            "w.pth", lambda n, a: {f"module.q.{n}": a, f"module.k.{n}": a * 2}
        ),
        "q",
    ),
    (
        tensors_file("w.pth", lambda n, a: {f"m.q.{n}": a, f"m.k.{n}": a * 2}),
        "m.q",
    ),
    (
        tensors_file("w.npz", lambda n, a: {f"a/b/{n}": a, f"a/c/{n}": a * 2}),
        "a/b",
    ),
)


@pytest.mark.parametrize("make, entry", ENTRIES, ids=[entry for _, entry in ENTRIES])
def test_an_entry_is_taken_by_its_name(make, entry, tmp_path):
    found, lines = read(make(tmp_path), entry)
    for one, wanted in zip(found, numbers(), strict=True):
        np.testing.assert_array_equal(one, wanted)
    assert f"took '{entry}', as config.init.entry says" in lines[0]


def test_an_entry_inside_an_entry_is_taken(tmp_path):
    tensor = {f"backbone.{name}": array for name, array in clean().items()}
    calls = {n: described(str(i), a) for i, (n, a) in enumerate(tensor.items())}
    queue = described(str(len(calls)), np.ones(3, np.float32))
    top = {"teacher": {**calls, "queue": queue}, "student": {"a": queue}}
    file = zipped(top, [*tensor.values(), np.ones(3, np.float32)])
    (tmp_path / "w.pth").write_bytes(file)
    found, _ = read(tmp_path / "w.pth", "teacher.backbone")
    for one, wanted in zip(found, numbers(), strict=True):
        np.testing.assert_array_equal(one, wanted)


@pytest.mark.parametrize(
    "make",
    [
        torch_file("w.pth", model=2.0, model_ema=...),
        tensors_file(change=lambda n, a: {f"model.{n}": a, f"model_ema.{n}": a}),
        tensors_file("w.npz", lambda n, a: {f"model.{n}": a, f"model_ema.{n}": a}),
    ],
    ids=["pth", "safetensors", "npz"],
)
def test_an_entry_that_is_not_there_is_answered_with_the_closest(make, tmp_path):
    with pytest.raises(UserError, match="config.init.entry: 'model_em'.*'model_ema'"):
        read(make(tmp_path), "model_em")


def test_averaged_weights_of_torch_have_a_count_that_is_no_tensor(tmp_path):
    tensors = {"n_averaged": np.array(3), **clean()}
    names = {n if n == "n_averaged" else f"module.{n}": a for n, a in tensors.items()}
    (tmp_path / "w.pth").write_bytes(torch_files.write_zip(names))
    found, lines = read(tmp_path / "w.pth")
    np.testing.assert_array_equal(found[0], numbers()[0])
    assert "left out the prefix 'module.' of all names" in lines[0]


def test_averaged_weights_of_a_run_are_taken_by_their_name():
    tree = {
        "params": {"head": {"bias": np.zeros(2)}, "stem": {"bias": np.ones(1)}},
        "ema": {"head/bias": np.ones(2)},
    }
    raw, (told,) = _of_state(tree, None, "run")
    assert raw["params/head/bias"].tolist() == [0, 0] and "entry='ema' takes" in told
    averaged, (told,) = _of_state(tree, "ema", "run")
    assert averaged["params/head/bias"].tolist() == [1, 1] and "took 'ema'" in told
    assert averaged["params/stem/bias"].tolist() == [1]
    with pytest.raises(UserError, match="'emma' is not in run; did you mean 'ema'"):
        _of_state(tree, "emma", "run")


def test_no_object_of_a_file_is_made_or_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('imported', 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    for call in (
        Call(Name("os mkdir"), ("made",)),
        Raw(b"cevil\nThing\n)\x81}b"),
        Raw(b"(X\x04\x00\x00\x00madeios\nmkdir\n"),
        Raw(b"cos\nmkdir\n(X\x04\x00\x00\x00madet}\x92"),
        Raw(b"(cos\nmkdir\nX\x04\x00\x00\x00madeo"),
    ):
        path = torch_file("w.pth", state_dict=..., args=call)(tmp_path)
        found, lines = read(path)
        assert "left out 1 object" in "\n".join(lines)
        np.testing.assert_array_equal(found[0], numbers()[0])
    assert {p.name for p in tmp_path.iterdir()} == {"evil.py", "w.pth"}


def test_a_tensor_inside_an_object_is_no_state_dict(tmp_path):
    tensor = described("0", np.ones(3, np.float32))
    inside = [
        Raw(torch_files.pickled(one)[2:-1])
        for one in (Call(Name("my Net"), ()), {"weight": tensor})
    ]
    model = Raw(inside[0].instructions + inside[1].instructions + b"b")
    (tmp_path / "w.pth").write_bytes(zipped({"model": model}, [np.ones(3, np.float32)]))
    with pytest.raises(UserError, match="'model' is an object of 'my.Net'"):
        read(tmp_path / "w.pth")


@pytest.mark.parametrize("kind", ["integer", "float8", "nan"])
def test_the_key_takes_numbers_as_they_are(kind, tmp_path):
    make = {
        "integer": tensors_file(change=lambda n, a: {n: (a * 9).astype(np.int16)}),
        "float8": file("w.safetensors", lambda: headed("F8_E4M3")),
        "nan": with_nan(np.nan),
    }[kind]
    weights = read_weights(f"file:{make(tmp_path)}")
    found, _ = loaded(weights, accept=(kind,))
    assert all(leaf.dtype == np.float32 for leaf in found)


def test_scales_of_a_quantised_file_are_told(tmp_path):
    def change(name, array):
        if array.ndim < 2:
            return {name: array}
        return {name: array.astype(np.int8), f"{name}.absmax": np.ones(1, np.float32)}

    with pytest.raises(UserError, match="these weights are quantised"):
        read(tensors_file(change=change)(tmp_path))


def test_notes_of_every_shard_are_told(tmp_path):
    tensors_file(change=lambda n, a: {n: a.astype(np.float16)})(tmp_path)
    names = {name: "w.PTH" for name in clean()}
    (tmp_path / "w.safetensors").rename(tmp_path / "w.PTH")
    index = {"weight_map": names}
    (tmp_path / "w.safetensors.index.json").write_text(json.dumps(index))
    _, lines = read(tmp_path / "w.safetensors.index.json")
    assert "w.PTH: is a file of safetensors in spite of its name" in lines[0]


# A head that is kept


NAMES = ("cat", "dog", "red fox")
HEAD = {"params": {"head": {"logits": {"kernel": np.eye(3), "bias": np.arange(3)}}}}


def beside(**values):
    """Returns the maker of weights with a `config.json` of these values."""

    def make(folder):
        (folder / "config.json").write_text(json.dumps(values))
        return f"file:{folder}/model.safetensors"

    return make


def of_run(place="", **data):
    """Returns the maker of a run's workdir, and the address of it or of a checkpoint."""

    def make(folder):
        (folder / "checkpoints" / "7" / "state").mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"data": data}))
        return f"orbax:{folder}{place}"

    return make


def numbered(names):
    return {str(place): name for place, name in enumerate(names)}


SWAPPED = ("dog", "cat", "red fox")
OTHER = "has the labels .* those of the data are others:(.|\n)*config.init.fresh"
HEADS = (
    Odd(name="same", make=beside(id2label=numbered(NAMES)), same=True),
    Odd(name="same-run", make=of_run(class_names=NAMES), same=True),
    *(
        Odd(name=f"written-{n}", make=make, same=True, warns="differ in writing alone")
        for n, make in enumerate(
            (
                beside(id2label=numbered(("CAT", "Dog", "red_fox"))),
                beside(label_names=("cat ", "dog", "Red-Fox")),
                of_run(class_names=("Cat", "DOG", "red  fox")),
            )
        )
    ),
    *(
        Odd(name=f"order-{n}", make=make, same=True, warns="put into the order")
        for n, make in enumerate(
            (
                beside(id2label=numbered(SWAPPED)),
                beside(pretrained_cfg={"label_names": SWAPPED}),
                beside(id2label=numbered(("DOG", "Cat", "red_fox"))),
                of_run(class_names=SWAPPED),
                of_run("/checkpoints", class_names=SWAPPED),
                of_run("/checkpoints/7", class_names=SWAPPED),
                of_run("/checkpoints/7/state", class_names=SWAPPED),
                of_run(class_names=(), targets=SWAPPED),
                of_run(class_names=(), pixel_classes=SWAPPED),
            )
        )
    ),
    *(
        Odd(name=f"other-{n}", make=make, refuses=OTHER)
        for n, make in enumerate(
            (
                of_run(class_names=("blue", "green", "red")),
                of_run(class_names=("cat", "dog", "wolf")),
                of_run(class_names=("cat", "dog")),
                beside(id2label=numbered(("cat", "dog", "wolf"))),
                beside(id2label=numbered(("x", "y", "z"))),
                of_run("/checkpoints/7", class_names=("0", "1", "2")),
            )
        )
    ),
    *(
        Odd(name=f"unknown-{n}", make=make, same=True, warns="nothing says what its")
        for n, make in enumerate(
            (
                beside(model_type="bert"),
                beside(id2label=numbered(("LABEL_0", "LABEL_1", "LABEL_2"))),
                of_run(),
                lambda folder: "zoo:resnet20_fashion_mnist",
            )
        )
    ),
)


def head_of(address, names=NAMES, known=()):
    """Returns the head's numbers in the order of the weights, and lines about it."""
    kept = labels.check_labels(address, names, known)
    logits = kept.placed(HEAD, "head")["params"]["head"]["logits"]
    # Each class of the data gets the logits that it had: the clean order once more.
    if kept.order is not None:
        back = np.argsort(kept.order)
        logits = {k: v[..., back] for k, v in logits.items()}
        assert list(kept.order) == [1, 0, 2]
    return [logits["kernel"], logits["bias"]], [kept.told] if kept.told else []


@by_name(HEADS)
def test_a_kept_head_has_the_classes_of_its_past(odd, tmp_path):
    check(odd, head_of, [np.eye(3), np.arange(3)], tmp_path)


def test_logits_are_moved_with_their_low_rank_updates_and_no_others():
    kept = labels.KeptHead(order=(2, 0))
    leaves = {
        "head/logits/kernel": np.arange(8).reshape(2, 4),
        "head/logits/lora_a": np.arange(4).reshape(4, 1),
        "head/logits/lora_b": np.arange(4).reshape(1, 4),
        "head/logits_stage3/kernel": np.arange(4).reshape(1, 1, 1, 4),
        "head/hidden1/bias": np.arange(4),
        "body/logits/bias": np.arange(4),
    }
    moved = {f"params/{name}" for name in leaves if "logits" in name}
    moved -= {"params/head/logits/lora_a", "params/body/logits/bias"}
    given = {"params": {}}
    for name, leaf in leaves.items():
        inner = given["params"]
        *path, last = name.split("/")
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = leaf
    for name, leaf in named(kept.placed(given, "head")).items():
        wanted = named(given)[name]
        np.testing.assert_array_equal(
            leaf, wanted[..., [2, 0, 1, 3]] if name in moved else wanted
        )


@pytest.mark.parametrize(
    "beside_model",
    [
        {"meta": {"CLASSES": ("dog", "cat", "red fox")}},
        {"meta": {"dataset_meta": {"classes": ["dog", "cat", "red fox"]}}},
        {"class_to_idx": {"cat": 1, "red fox": 2, "dog": 0}},
        {"classes": ["dog", "cat", "red fox"]},
    ],
    ids=lambda value: next(iter(value)),
)
def test_class_names_in_a_checkpoint_are_those_of_its_head(beside_model, tmp_path):
    path = torch_file("w.pth", state_dict=..., **beside_model)(tmp_path)
    weights = read_weights(f"file:{path}")
    kept = labels.check_labels(weights.address, NAMES, weights.class_names)
    assert kept.order == (1, 0, 2)


def test_numbers_for_names_are_told_with_the_classes_of_the_head(tmp_path):
    address = beside(id2label=numbered(("NEGATIVE", "POSITIVE")))(tmp_path)
    kept = labels.check_labels(address, ("0", "1"))
    assert kept.order is None and "0 is 'NEGATIVE', 1 is 'POSITIVE'" in kept.told


def test_the_key_keeps_a_head_of_other_classes(tmp_path):
    address = of_run(class_names=("x", "y", "z"))(tmp_path)
    kept = labels.check_labels(address, NAMES, accept=("classes",))
    assert kept.order is None and "for other classes: it has x, y, z" in kept.told


# A run's own start

DIGITS = tuple(map(str, range(10)))
MEMBERS = tuple(
    {"label": label, "name": "mlp", "hidden": (4,)} for label in ("one", "two")
)


def start(weights, task, **init):
    """Returns the heads' kernels before the first update, and the lines that are told."""
    if task == "joint":
        config = mixtures.config(
            {"domain": "digits", "name": "digits"}, mixtures.INVERTED
        )
    else:
        config = small.config(model="mlp", hidden=(4,))
    config = small.editable(config)
    config.model.hidden = (4,)
    if task == "mutual":
        config.task = {"name": "mutual"}
        config.model.members = tuple(
            {**entry, "pretrained": weights} for entry in MEMBERS
        )
    elif task == "of_all":
        config.task = {"name": "mutual"}
        config.model.members = MEMBERS
    init = {"pretrained": None if task == "mutual" else weights, **init}
    overrides = [(f"init.{key}", str(value)) for key, value in init.items()]
    config, problems = configs.resolve(config, overrides)
    assert not problems, problems
    state, found = make_setup(config).start()
    leaves = named(state.params)
    kernels = [leaves[n] for n in leaves if n.endswith("head/logits/kernel")]
    return kernels, "\n".join(found.lines)


def weights_of(state, folder, names, prefixes=("",)):
    leaves = {
        f"params/{prefix}{name.removeprefix('params/')}": np.asarray(leaf)
        for name, leaf in state.items()
        for prefix in prefixes
    }
    save_file(leaves, folder / "model.safetensors")
    (folder / "model.json").write_text(json.dumps({"labels": names}))
    return f"file:{folder}/model.safetensors"


@pytest.mark.parametrize(
    "task",
    ["classify", "mutual", "of_all", pytest.param("joint", marks=pytest.mark.slow)],
)
def test_a_run_begins_with_the_classes_of_its_data(task, tmp_path):
    rng = np.random.default_rng(0)
    pixels = 64 if task == "joint" else 144
    layers = {"stage1/dense": (pixels, 4), "head/logits": (4, 10)}
    leaves = {}
    for name, shape in layers.items():
        leaves[f"params/{name}/kernel"] = rng.standard_normal(shape, np.float32)
        leaves[f"params/{name}/bias"] = rng.standard_normal(shape[1:], np.float32)
    prefixes = ("one/", "two/") if task == "of_all" else ("",)
    address = weights_of(leaves, tmp_path, DIGITS[::-1], prefixes)
    kernels, told = start(address, task)
    assert len(kernels) == (1 if task == "classify" else 2)
    for kernel in kernels:
        wanted = leaves["params/head/logits/kernel"][:, ::-1]
        np.testing.assert_array_equal(kernel, wanted)
    assert "put into the order of the data's: 0, 1, 2" in told
    address = weights_of(leaves, tmp_path, [str(n + 3) for n in range(10)], prefixes)
    with pytest.raises(UserError, match="has the labels 3, 4, 5"):
        start(address, task)
    kernels, told = start(address, task, accept=("classes",))
    assert "for other classes" in told
    np.testing.assert_array_equal(kernels[0], leaves["params/head/logits/kernel"])


# What is written


def test_files_get_the_permissions_of_any_other_file(tmp_path):
    path, before = tmp_path / "w.safetensors", os.umask(0o027)
    try:
        save_safetensors({"a": np.ones(2, np.float32)}, path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert read_weights(f"file:{path}").tensors["a"].tolist() == [1, 1]
