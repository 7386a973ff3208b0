"""Other people's implementations, which some tests compare with; skips without them."""

import functools
import importlib.util
import pathlib
import re
import sys
import warnings

import pytest

_LIBRARIES = []  # An operator lives as long as its library.


class Torch:
    """The module torch, which its first use imports; skips the test without it."""

    def __getattr__(self, name):
        return getattr(pytest.importorskip("torch"), name)


torch = Torch()


@functools.cache
def import_torchvision():
    """Returns the module; skips the test where torch or torchvision is not installed.

    torchvision's operators from PyPI are linked against CUDA and do not load beside a
    torch for CPUs, where the import fails. Then they are declared here, without an
    implementation: models and transforms run, operators such as `nms` do not.
    """
    pytest.importorskip("torch")
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        pytest.skip("torchvision is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module("torchvision")
        except RuntimeError as error:
            if "operator torchvision::" not in str(error):
                raise
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declare_operators(pathlib.Path(found.origin).parent)
        return importlib.import_module("torchvision")


def _declare_operators(folder):
    import torch

    library = torch.library.Library("torchvision", "DEF")
    _LIBRARIES.append(library)
    source = (folder / "_meta_registrations.py").read_text()
    pattern = r'register_(?:fake|meta)\("(?:torchvision::)?(\w+)"'
    for name in sorted(set(re.findall(pattern, source))):
        library.define(f"{name}(Tensor a) -> Tensor")


@functools.cache
def import_timm():
    """Returns the module; skips the test where it or torchvision is not installed."""
    import_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("timm")


@functools.cache
def import_transformers():
    """Returns the module; skips the test where it or torch is not installed."""
    pytest.importorskip("torch")
    if importlib.util.find_spec("torchvision"):  # It imports it where it is there.
        import_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers")
