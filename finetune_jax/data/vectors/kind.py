"""Feature vectors as a kind of data."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from finetune_jax.data.array_inputs import (
    SUFFIXES,
    ArrayReader,
    check_dtype,
    check_numbers,
)
from finetune_jax.data.kind import Kind, Opened, Resources, suffix_rule
from finetune_jax.data.loading import open_arrays
from finetune_jax.data.preprocessing import (
    ArraySpec,
    array_spec,
    arrays_to_json,
    check_preprocessing,
    domain_spec,
)
from finetune_jax.data.source import Source
from finetune_jax.data.spec import DataSpec


class Vectors(Kind):
    """Feature vectors: rows of numbers without names, [F]."""

    keys = ("mix", "shift")
    absent = "{name} has no vectors of numbers"

    def open(self, section: Mapping[str, Any], resources: Resources) -> Opened:
        """Returns the vectors that `config.data` describes."""
        return open_arrays(section)

    def check(self, spec: DataSpec) -> None:
        """Checks that the preprocessing fits the inputs."""
        check_preprocessing(spec)

    def inputs_from_json(self, plain: Mapping[str, Any], section: Mapping) -> ArraySpec:
        """Returns the preprocessing of vectors."""
        return array_spec(section)

    def inputs_to_json(self, spec: DataSpec) -> dict[str, Any]:
        """Returns the preprocessing."""
        return arrays_to_json(spec)

    def domain_spec(
        self, spec: DataSpec, source: Source, given: Mapping[str, Any], where: str
    ) -> DataSpec:
        """Returns the spec of other vectors with as many numbers."""
        return domain_spec(spec, source, given, where)

    def reader(
        self, spec: DataSpec, section: Mapping[str, Any], workdir: pathlib.Path
    ) -> ArrayReader:
        """Returns the reader of arrays [N, F]."""
        more = f"its inputs are {spec.dtype} {spec.shape}."

        def check(array: np.ndarray, name: str, alone: bool) -> np.ndarray:
            check_numbers(array, spec, name, array.shape[1:] == spec.shape)
            if array.dtype != np.uint8:
                array = array.astype(np.float32)
            return check_dtype(array, spec, name)

        files = suffix_rule(SUFFIXES, "arrays", more)
        return ArrayReader(spec=spec, files=files, check=check)

    def describe(self, spec: DataSpec) -> str:
        """Returns the dtype and the number of features."""
        return f"{spec.dtype} {spec.shape[0]}"


KIND = Vectors()
