import io
import pickle
import random
import struct
import tracemalloc
import warnings
import zipfile

import ml_dtypes
import numpy as np
import pytest
from torch_files import (
    Call,
    Name,
    Raw,
    Reference,
    described,
    pickled,
    with_code,
    write_legacy,
    write_zip,
    zipped,
)

from finetune_jax.core.errors import UserError
from finetune_jax.weights.formats import torch_pickle
from finetune_jax.weights.formats.torch_pickle import read_torch_file

WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)
TENSORS = {
    "conv.weight": WEIGHT,
    "bn.num_batches_tracked": np.array(7, np.int64),
    "empty": np.zeros((0, 3), np.float32),
}
FORMATS = {"zip": write_zip, "legacy": write_legacy}
both_formats = pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)


def same(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


def refusal(data):
    """Returns why a file is refused."""
    with pytest.raises(UserError) as found:
        _ = read_torch_file(data, "here").tensors
    message = str(found.value)
    assert message.startswith("here: ") and "state_dict()" in message
    return message


def one(**lies):
    """Returns a file with one tensor that says of itself what is not so."""
    return zipped({"weight": described("0", WEIGHT, **lies)}, [WEIGHT])


@both_formats
def test_every_tensor_arrives_to_the_bit(write):
    same(read_torch_file(write(TENSORS), "here").tensors, TENSORS)


@both_formats
def test_arrays_do_not_hold_on_to_the_file(write):
    arrays = read_torch_file(write(TENSORS), "here").tensors.values()
    for array in arrays:
        assert (
            array.flags.writeable and array.flags.c_contiguous and array.flags.aligned
        )


def test_numbers_and_texts_beside_tensors_are_left_out():
    beside = {"version": 3, "name": "x", "none": None, "list": [1], "pair": (1, "a")}
    tensor = described("0", WEIGHT)
    found = read_torch_file(
        zipped({**beside, "weight": tensor}, [WEIGHT]), "here"
    ).tensors
    same(found, {"weight": WEIGHT})


@pytest.mark.parametrize(
    "name", ["state_dict", "model_state_dict", "model", "net", "x"]
)
def test_a_checkpoint_gives_its_state_dict(name):
    state = {"weight": described("0", WEIGHT)}
    moments = {"state": {0: {"step": described("0", WEIGHT)}}, "param_groups": []}
    file = zipped({"epoch": 3, "optimizer": moments, name: state}, [WEIGHT])
    same(read_torch_file(file, "here").tensors, {"weight": WEIGHT})


def test_the_well_known_name_wins_over_others():
    state, average = described("0", WEIGHT), described("1", WEIGHT + 1)
    checkpoint = {"model_ema": {"weight": average}, "model": {"weight": state}}
    found = read_torch_file(zipped(checkpoint, [WEIGHT, WEIGHT + 1]), "here").tensors
    same(found, {"weight": WEIGHT})


@pytest.mark.parametrize("names", [("net", "model"), ("generator", "critic")])
def test_of_two_state_dicts_none_is_chosen(names):
    state = {"weight": described("0", WEIGHT)}
    message = refusal(zipped({name: state for name in names}, [WEIGHT]))
    assert "several" in message and all(repr(name) in message for name in names)


def test_tensors_beside_an_unknown_dict_of_tensors_are_ambiguous():
    tensor = described("0", WEIGHT)
    message = refusal(zipped({"other": {"a": tensor}, "weight": tensor}, [WEIGHT]))
    assert "several" in message and "'other', 'weight'" in message


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_a_prefix_of_all_names_is_dropped(prefix):
    names = {f"{prefix}{name}": array for name, array in TENSORS.items()}
    same(read_torch_file(write_zip(names), "here").tensors, TENSORS)


def test_a_prefix_of_some_names_stays():
    names = {"module.a": WEIGHT, "b": WEIGHT}
    same(read_torch_file(write_zip(names), "here").tensors, names)


def test_a_view_is_read_by_its_strides_and_offset():
    file = one(offset=1, size=(2, 2), stride=(1, 3))
    same(read_torch_file(file, "here").tensors, {"weight": WEIGHT[:, 1:].T})


def test_tensors_of_one_storage_may_overlap():
    rows = [described("0", WEIGHT, offset=o, size=(3,), stride=(1,)) for o in (0, 2, 3)]
    found = read_torch_file(zipped(dict(zip("abc", rows)), [WEIGHT]), "here").tensors
    flat = WEIGHT.ravel()
    same(found, {"a": flat[:3], "b": flat[2:5], "c": flat[3:]})


def test_names_of_one_tensor_share_one_array(monkeypatch):
    # So many would else be more than the file accounts for.
    monkeypatch.setattr(torch_pickle, "MAX_GROWTH_BYTES", 0)
    large = np.ones(10_000, np.float32)
    tensors = {name: described("0", large) for name in "abcdefghij"}
    found = read_torch_file(zipped(tensors, [large]), "here").tensors
    assert list(found) == list(tensors) and len({*map(id, found.values())}) == 1


def test_big_endian_files_are_turned():
    swapped = [("byteorder", b"big")]
    pickle = {"weight": described("0", WEIGHT)}
    file = zipped(pickle, [WEIGHT.astype(">f4")], extra=swapped)
    same(read_torch_file(file, "here").tensors, {"weight": WEIGHT})


def test_an_unknown_byte_order_is_refused():
    file = zipped({}, extra=[("byteorder", b"middle")])
    assert "b'middle', neither little nor big" in refusal(file)


def test_any_byte_but_zero_is_true():
    reference = Reference(("storage", Name("torch BoolStorage"), "0", "cpu", 3))
    tensor = Call(Name("torch._utils _rebuild_tensor"), (reference, 0, (3,), (1,)))
    file = zipped({"mask": tensor}, [np.array([0, 1, 7], np.uint8)])
    found = read_torch_file(file, "here").tensors
    same(found, {"mask": np.array([False, True, True])})
    assert found["mask"].tobytes() == b"\x00\x01\x01"


def test_a_view_of_a_legacy_storage_begins_where_it_says():
    view = ("storage", Name("torch FloatStorage"), "root", "cpu", 6, ("view", 2, 3))
    tensor = Call(
        Name("torch._utils _rebuild_tensor"), (Reference(view), 1, (2,), (1,))
    )
    parts = (torch_pickle.MAGIC, 1001, {}, {"weight": tensor}, ["root"])
    file = b"".join(map(pickled, parts)) + struct.pack("<q", 6) + WEIGHT.tobytes()
    same(read_torch_file(file, "here").tensors, {"weight": WEIGHT.ravel()[3:5]})


def test_code_in_a_file_is_named_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(with_code())
    assert "'os.mkdir'" in message and "never run" in message
    assert not list(tmp_path.iterdir())
    with zipfile.ZipFile(io.BytesIO(with_code())) as archive:
        pickle.loads(archive.read("archive/data.pkl"))
    assert (tmp_path / "code-was-run").is_dir()


TEXT = b"\x8c\x02os\x8c\x05mkdir"
MALICIOUS = {
    "reduce": (Call(Name("os system"), ("true",)), "'os.system'"),
    "eval": (Call(Name("builtins eval"), ("1",)), "'builtins.eval'"),
    "getattr": (
        Call(Name("builtins getattr"), (Name("os system"), "__call__")),
        "'builtins.getattr'",
    ),
    "namespace": (Name("argparse Namespace"), "'argparse.Namespace'"),
    "numpy": (Name("numpy.core.multiarray scalar"), "'numpy.core.multiarray.scalar'"),
    "load": (Name("torch load"), "'torch.load'"),
    "module": (Name("torch.nn.modules.linear Linear"), "modules.linear.Linear'"),
    "stack_global": (Raw(TEXT + b"\x93)R"), "'os.mkdir'"),
    "inst": (Raw(b"(X\x04\x00\x00\x00trueios\nsystem\n"), "'os.system'"),
    "admitted_inst": (
        Raw(b"(icollections\nOrderedDict\n"),
        "'collections.OrderedDict'",
    ),
    "dotted": (Name("collections OrderedDict.__class__"), "OrderedDict.__class__'"),
    "dotted_module": (Name("torch._utils.os system"), "'torch._utils.os.system'"),
    "of_this_module": (
        Name("finetune_jax.weights.formats.torch_pickle io"),
        "torch_pickle.io'",
    ),
    "obj": (Raw(b"(ccollections\nOrderedDict\no"), "'collections.OrderedDict'"),
    "newobj": (Raw(b"ccollections\nOrderedDict\n)\x81"), "'collections.OrderedDict'"),
    "newobj_ex": (
        Raw(b"ccollections\nOrderedDict\n)}\x92"),
        "'collections.OrderedDict'",
    ),
    "ext1": (Raw(b"\x82\x01"), "its pickle has EXT1"),
    "ext4": (Raw(b"\x84\x01\x00\x00\x00"), "its pickle has EXT4"),
    "persid": (Raw(b"Pstorage\n"), "its pickle has PERSID"),
    "call_of_a_call": (Call(Call(Name("torch Size"), ((),)), ()), "a tuple for a"),
    "call_of_a_dtype": (Call(Name("torch float32"), ("x",)), "KeyError"),
    "call_of_a_text": (Raw(b"\x8c\x02os)R"), "a str for a"),
    "key_of_no_storage": (
        Reference(("module", Name("torch float32"), "a", "b", 1)),
        "no",
    ),
}


@pytest.mark.parametrize("value, told", MALICIOUS.values(), ids=MALICIOUS)
@pytest.mark.parametrize("make", [zipped, pickled], ids=["zip", "bare"])
def test_what_is_no_tensor_is_told_and_not_made(value, told, make):
    assert told in refusal(make({"weight": value}))


def test_attributes_in_a_file_change_nothing():
    # BUILD sets attributes: of a dict, of a function, of a dtype, of a tensor.
    state = {"__defaults__": (1,), "items": 1, "__class__": 2, "_metadata": {}}
    names = ["collections OrderedDict", "torch._utils _rebuild_tensor_v2"]
    built = [Name(name) for name in [*names, "torch float32", "torch FloatStorage"]]
    built += [Call(Name("collections OrderedDict"), ()), described("0", WEIGHT)]
    before = {
        name: vars(function).copy() for name, function in torch_pickle.CALLS.items()
    }
    for value in built:
        body = pickled(value)[2:-1]
        for attributes in (state, (None, state), (1, (9,), Name("torch float32"))):
            changed = Raw(body + pickled(attributes)[2:-1] + b"b")
            tensor = described("0", WEIGHT)
            file = zipped({"odd": [changed], "weight": tensor}, [WEIGHT])
            same(read_torch_file(file, "here").tensors, {"weight": WEIGHT})
    smaller = pickled(described("0", WEIGHT))[2:-1] + pickled({"size": (1, 1)})[2:-1]
    file = zipped({"weight": Raw(smaller + b"b")}, [WEIGHT])
    same(read_torch_file(file, "here").tensors, {"weight": WEIGHT})
    for name, function in torch_pickle.CALLS.items():
        assert vars(function) == before[name] and function.__defaults__ != (1,)


HUGE = 2**62
LEAVES, NO_SIZE = "'weight' of shape", "not a number from 0 to"
LIES = {
    "more_elements": ({"size": (7,), "stride": (1,)}, LEAVES),
    "offset": ({"offset": 1}, LEAVES),
    "far_offset": ({"offset": HUGE}, LEAVES),
    "negative_offset": ({"offset": -1}, NO_SIZE),
    "stride": ({"stride": (4, 1)}, LEAVES),
    "negative_stride": ({"stride": (-3, 1)}, NO_SIZE),
    "huge_stride": ({"stride": (HUGE, HUGE)}, LEAVES),
    "huge_size": ({"size": (HUGE, HUGE)}, LEAVES),
    "negative_size": ({"size": (-2, -3)}, NO_SIZE),
    "bool_size": ({"size": (True, 3)}, NO_SIZE),
    "text_size": ({"size": ("2", 3)}, NO_SIZE),
    "too_few_strides": ({"stride": (1,)}, "2 sizes and 1 strides"),
    "too_many_dimensions": ({"size": (1,) * 65, "stride": (1,) * 65}, "65 sizes"),
    "huge_number": ({"size": (2**2000, 1)}, NO_SIZE),
    "larger_storage": ({"count": 7}, "fewer than it says"),
    "huge_storage": ({"count": HUGE, "size": (HUGE,), "stride": (1,)}, "fewer than"),
    "huge_expansion": ({"size": (2**40,), "stride": (0,)}, "far more bytes"),
    "huge_and_empty": ({"size": (0, HUGE, HUGE), "stride": (1, 1, 1)}, "ValueError"),
}


@pytest.mark.parametrize("lies, told", LIES.values(), ids=LIES)
def test_no_tensor_leaves_its_storage(lies, told):
    assert told in refusal(one(**lies))


def test_the_stride_of_a_single_element_means_nothing():
    file = one(size=(1, 6), stride=(HUGE, 1))
    same(read_torch_file(file, "here").tensors, {"weight": WEIGHT.reshape(1, 6)})


def test_a_storage_that_is_not_in_the_file_is_told_with_its_tensor():
    assert "'weight' are missing" in refusal(zipped({"weight": described("1", WEIGHT)}))
    path = {"weight": described("../../etc/hostname", WEIGHT)}
    assert "'weight' are missing" in refusal(zipped(path))


def test_many_expanded_tensors_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(torch_pickle, "MAX_GROWTH_BYTES", 2**16)
    large = [
        described("0", WEIGHT, offset=o, size=(2**12,), stride=(0,)) for o in range(6)
    ]
    file = zipped(dict(zip("abcdef", large)), [WEIGHT])
    assert "far more bytes than it has" in refusal(file)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_compressed_archives_are_refused(compression):
    zeros = np.zeros(10**6, np.float32)
    pickle = {"weight": described("0", zeros)}
    message = refusal(zipped(pickle, [zeros], compression=compression))
    assert "compressed" in message


def test_the_size_of_an_entry_is_not_believed():
    file = bytearray(write_zip({"weight": WEIGHT}))
    at = file.rindex(b"archive/data/0") - 46
    assert file[at : at + 4] == b"PK\x01\x02"
    file[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)
    assert "'archive/data/0' lies outside the file" in refusal(bytes(file))
    file[at + 20 : at + 24] = struct.pack("<I", 24)
    assert "'archive/data/0' is compressed" in refusal(bytes(file))


@pytest.mark.parametrize("field, value", [(8, 1), (10, zipfile.ZIP_DEFLATED)])
def test_an_entry_that_is_not_stored_as_it_is_is_refused(field, value):
    file = bytearray(write_zip({"weight": WEIGHT}))
    file[file.rindex(b"archive/data/0") - 46 + field] = value
    assert "'archive/data/0' is compressed" in refusal(bytes(file))


def test_a_changed_byte_of_a_tensor_is_noticed():
    file = bytearray(write_zip({"weight": WEIGHT}))
    file[file.index(WEIGHT.tobytes()) + 5] ^= 1
    assert "checksum of its entry 'archive/data/0'" in refusal(bytes(file))


def test_torchscript_archives_are_told_apart():
    for extra in [("code/__torch__.py", b""), ("constants.pkl", pickled(()))]:
        assert "TorchScript" in refusal(zipped({}, extra=[extra]))


def test_other_archives_are_refused():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("word/document.xml", "")
    assert "not one that torch.save wrote" in refusal(file.getvalue())


TOPS = {
    "tensor": (described("0", WEIGHT), "one tensor"),
    "list": ([described("0", WEIGHT)], "one list"),
    "number": (3, "one int"),
    "no_tensors": ({"epoch": 3, "lr": "x"}, "['epoch', 'lr']"),
    "names_that_are_numbers": ({1: described("0", WEIGHT)}, "no dict of tensors"),
}


@pytest.mark.parametrize("top, told", TOPS.values(), ids=TOPS)
def test_what_is_no_dict_of_tensors_is_told(top, told):
    assert told in refusal(zipped(top, [WEIGHT]))


DEEP = 2 * 10**5
BOMBS = {
    "empty": b"",
    "text": b"not a pickle",
    "zip_magic": b"PK\x03\x04",
    "zip_end": b"PK\x05\x06" + bytes(18),
    "stop": b".",
    "no_stop": b"\x80\x02}",
    "plain_pickle": pickle.dumps({"a": 1}),
    "wrong_protocol": pickled(torch_pickle.MAGIC) + pickled(1002),
    "only_magic": pickled(torch_pickle.MAGIC),
    "deep_tuple": b"\x80\x02)" + b"\x85" * DEEP + b".",
    "deep_tuple_as_name": b"\x80\x02})" + b"\x85" * DEEP + b"Ns.",
    "deep_list": b"\x80\x02" + b"]" * DEEP + b"a" * (DEEP - 1) + b".",
    "marks": b"\x80\x02" + b"(" * DEEP + b".",
    "list_in_itself": b"\x80\x02]q\x00h\x00a.",
    "dict_in_itself": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
    "no_memo": b"\x80\x02h\x07.",
    "digits": b"\x80\x02L" + b"9" * 10_000 + b"L\n.",
    "bad_escape": b"\x80\x02S'\\d'\n.",
    "surrogate": b"\x80\x02X\x03\x00\x00\x00\xed\xa0\x80.",
    "bad_utf8": b"\x80\x02X\x01\x00\x00\x00\xff.",
    "append_to_none": b"\x80\x02NNa.",
    "update_list": b"\x80\x02]NNs.",
}


@pytest.mark.parametrize("make", [bytes, zipped], ids=["bare", "zip"])
@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_no_pickle_ends_otherwise_than_in_a_refusal(make, bomb):
    refusal(make(bomb))


PAIRS = pickled([(f"{i:04}", None) for i in range(1000)])[:-1] + b"q\x00"
CALL = b"h\x01h\x00\x85R"
CLAIMS = {
    "memo": b"\x80\x02Nr\xff\xff\xff\x0f.",
    "text_memo": b"\x80\x02Np99999999999999999999\n.",
    "long": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "unicode": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b".",
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**31) + b".",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**31) + b".",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.",
    # A list of a thousand pairs, copied by a call of five bytes again and again.
    "copies": PAIRS + b"ccollections\nOrderedDict\nq\x01" + CALL * 5000 + b".",
}


@pytest.mark.parametrize("make", [bytes, zipped], ids=["bare", "zip"])
@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_what_a_pickle_claims_takes_no_memory(make, claim, monkeypatch):
    monkeypatch.setattr(torch_pickle, "MAX_INSTRUCTIONS", 100_000)
    tracemalloc.start()
    try:
        refusal(make(claim))
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_the_instructions_of_a_pickle_are_limited(monkeypatch):
    monkeypatch.setattr(torch_pickle, "MAX_INSTRUCTIONS", 100)
    assert "more than 100 instructions" in refusal(pickled([1] * 101))


def test_what_a_call_goes_through_counts_as_instructions(monkeypatch):
    monkeypatch.setattr(torch_pickle, "MAX_INSTRUCTIONS", 100)
    # Four instructions each, and one more when the call takes them.
    for pairs, told in ((15, "one list"), (20, "more than 100 instructions")):
        call = Call(Name("collections OrderedDict"), ([("a", None)] * pairs,))
        assert told in refusal(zipped([call]))


@pytest.mark.parametrize("count", [-1, -(2**62), 7, 2**62])
def test_the_count_of_a_legacy_storage_is_not_believed(count):
    file = write_legacy({"weight": WEIGHT})
    cut = len(file) - WEIGHT.nbytes
    changed = file[: cut - 8] + struct.pack("<q", count) + file[cut:]
    assert "ends before its storage '94000' does" in refusal(changed)


def test_a_legacy_storage_without_tensor_is_refused():
    parts = (torch_pickle.MAGIC, 1001, {}, {"weight": None}, ["root"])
    message = refusal(b"".join(map(pickled, parts)) + struct.pack("<q", 0))
    assert "a storage that no tensor has" in message


def test_an_archive_with_a_name_twice_is_refused():
    file = write_zip({"weight": WEIGHT, "other": WEIGHT})
    message = refusal(file.replace(b"archive/data/1", b"archive/data/0"))
    assert "not one that torch.save wrote" in message


@both_formats
def test_a_file_cut_anywhere_is_refused(write):
    file = write({"a": np.arange(300, dtype=np.float32), **TENSORS})
    for end in range(0, len(file), 97):
        refusal(file[:end])


@both_formats
def test_a_flipped_bit_gives_a_refusal_or_a_result(write):
    file = write(TENSORS)
    choice = random.Random(0)
    for _ in range(3000):
        changed = bytearray(file)
        changed[choice.randrange(len(file))] ^= 1 << choice.randrange(8)
        try:
            _ = read_torch_file(bytes(changed), "here").tensors
        except UserError as error:
            assert str(error).startswith("here: ")


def test_random_bytes_are_refused():
    choice = random.Random(0)
    for start in (b"", b"\x80\x02", b"PK\x03\x04", pickled(torch_pickle.MAGIC)):
        for _ in range(200):
            refusal(start + choice.randbytes(choice.randrange(200)))


# With torch, which wrote the files that matter.


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch is only here to compare with")


@pytest.fixture(params=FORMATS)
def save(request, torch):
    def save(value, **options):
        file = io.BytesIO()
        is_zip = request.param == "zip"
        torch.save(value, file, _use_new_zipfile_serialization=is_zip, **options)
        return file.getvalue()

    return save


@both_formats
def test_torch_reads_what_the_tests_write(torch, write):
    found = torch.load(io.BytesIO(write(TENSORS)), weights_only=True)
    same({name: tensor.numpy() for name, tensor in found.items()}, TENSORS)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_module_arrives_as_torch_has_it(torch, save, protocol):
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    state = module.state_dict()
    found = read_torch_file(save(state, pickle_protocol=protocol), "here").tensors
    same(found, {name: tensor.numpy() for name, tensor in state.items()})


@pytest.mark.parametrize(
    "name", [name.removeprefix("torch.") for name in torch_pickle.DTYPES]
)
def test_every_dtype_arrives_to_the_bit(torch, save, name):
    dtype = getattr(torch, name)
    tensor = torch.tensor([0, 1, 3, 1]).to(dtype)
    found = read_torch_file(save({"a": tensor, "b": tensor[1:]}), "here").tensors
    expected = np.array([0, 1, 3, 1]).astype(getattr(ml_dtypes, name, name))
    same(found, {"a": expected, "b": expected[1:]})


def test_views_arrive_as_torch_sees_them(torch, save):
    base = torch.arange(24.0).reshape(2, 3, 4)
    views = {
        "transposed": base.permute(2, 0, 1),
        "sliced": base[:, ::2, 1:3],
        "expanded": base[:1, :1].expand(5, 3, 4),
        "scalar": base[1, 2, 3],
        "empty": base[:0],
        "whole": base,
    }
    found = read_torch_file(save(views), "here").tensors
    same(found, {name: view.numpy() for name, view in views.items()})


def test_parameters_arrive_as_tensors(torch, save):
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    marked = torch.nn.Parameter(torch.zeros(2))
    marked.owner = "head"
    found = read_torch_file(save({"a": parameter, "b": marked}), "here").tensors
    same(found, {"a": np.ones((2, 3), np.float32), "b": np.zeros(2, np.float32)})


def test_a_checkpoint_of_training_gives_the_model(torch, save):
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    names = {f"module.{n}": tensor for n, tensor in module.state_dict().items()}
    checkpoint = {"epoch": 3, "optimizer": optimizer.state_dict(), "state_dict": names}
    state = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    same(read_torch_file(save(checkpoint), "here").tensors, state)


def test_a_pickled_module_is_refused(torch, save):
    assert "'torch.nn.modules.linear.Linear'" in refusal(save(torch.nn.Linear(3, 2)))


def test_tensors_that_are_not_plain_are_refused(torch, save):
    for tensor in (torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.complex64)):
        assert "other than plain tensors" in refusal(save({"a": tensor}))
    negated = torch.ones(2, dtype=torch.complex64).conj().imag
    assert "stored negated" in refusal(save({"a": negated}))


def test_programs_of_torchscript_are_refused(torch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of torch, that this is deprecated.
        program = torch.jit.trace(torch.nn.Linear(3, 2), torch.ones(1, 3))
        file = io.BytesIO()
        torch.jit.save(program, file)
    assert "TorchScript" in refusal(file.getvalue())
