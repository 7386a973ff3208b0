"""`--mode=plan`: what it says of data and weights, and how long it waits for the hub."""

import socket
import time

import pytest
from command_line import IRIS, ROOT, refused
from weight_files import empty_hub

from finetune_jax import main
from finetune_jax.weights.addresses import is_reachable, read_headers, read_weights

HEAD = f"--config={ROOT / 'configs' / 'resnet_head.py'}"


def planned(capsys, *arguments):
    assert main.run(["--mode=plan", "--config.parallel.devices=1", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_data_and_weights_that_are_there_are_told(capsys):
    found = planned(capsys, HEAD)
    assert any(line.startswith("data     digits: 1,078 train") for line in found)
    assert found[-1].startswith("weights  zoo:resnet20_fashion_mnist (layout: ")
    assert "95 of 97 arrays taken" in found[-1]


def test_weights_that_do_not_fit_are_listed_in_full():
    message = refused(HEAD, "--mode=plan", "--config.model.name=resnet32")
    assert "60 of the model's leaves are not in the weights" in message
    assert message.count(": not in the weights") == 60 and "more of this" not in message


def test_weights_that_are_not_there_end_a_plan_that_is_printed(capsys):
    message = refused(
        IRIS, "--mode=plan", "--config.init.pretrained=file:none.pth",
        "--config.parallel.devices=1",
    )  # fmt: skip
    assert message == "config.init.pretrained: no file 'none.pth'"
    assert "optimizer state" in capsys.readouterr().out


def test_a_plan_without_data_says_so(tmp_path, capsys):
    found = planned(
        capsys,
        f"--config={ROOT / 'configs' / 'mnist_source.py'}",
        f"--config.data.dir={tmp_path / 'nothing'}",
    )
    assert any(
        line.startswith("data     not there: config.data.dir: ") for line in found
    )
    assert found[-1] == "weights  none: all parameters start at random"


@pytest.mark.slow
def test_a_hub_that_is_not_reached_costs_seconds_and_is_told(
    tmp_path, capsys, monkeypatch
):
    from huggingface_hub import constants

    def silent(*arguments, **options):
        time.sleep(30)
        raise socket.gaierror("no network")

    empty_hub(tmp_path / "hub", monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", silent)
    begin = time.monotonic()
    assert not is_reachable() and not is_reachable()
    assert time.monotonic() - begin < 7  # One attempt of four seconds.
    found = planned(
        capsys, f"{HEAD}:stanford_dogs", f"--config.data.dir={tmp_path / 'nothing'}"
    )
    assert found[-1] == (
        "weights  hf:timm/resnet50.a1_in1k: not downloaded, so not checked; --mode=train "
        "downloads it (the hub was not reached)"
    )


def test_headers_have_names_shapes_and_dtypes_and_no_values():
    address = "zoo:resnet20_fashion_mnist"
    found, whole = read_headers(address), read_weights(address)
    assert found is not None and found.is_header and not found.sha256
    assert {n: (t.shape, t.dtype) for n, t in found.tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in whole.tensors.items()
    }
    assert not any(tensor.any() for tensor in found.tensors.values())
