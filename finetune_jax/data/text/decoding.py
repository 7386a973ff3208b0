"""From tokens back to texts, for the report."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from finetune_jax.data.dataset import Dataset
from finetune_jax.data.kind import Example
from finetune_jax.data.text.tags import NONE
from finetune_jax.data.text.tokens import TextOptions


def decoded(
    encoder: Any, options: TextOptions, dataset: Dataset, positions: np.ndarray
) -> list[Example]:
    """Returns examples of a split as texts.

    Args:
        encoder: From `make_encoder`.
        options: Options of the data.
        dataset: The split.
        positions: Places of the examples in the split.
    """
    special = encoder.encode("").ids  # Those that it adds to every text.
    inputs = dataset.take(positions)["inputs"]
    notes: Any = dataset.on_host().get("note")
    found = []
    for position, (ids, sentences) in zip(positions, inputs):
        texts = [
            encoder.decode(_without(special, ids[sentences == number]))
            for number in range(1, len(options.text) + 1)
        ]
        if notes is not None:  # A passage is longer than its window.
            texts[-1] = notes[position].question.passage.text
        label = dataset.label[position]
        words = ()
        if options.labels == "tags":
            words = tuple(_words(encoder, ids[sentences > 0], label, special))
        pairs = () if words else tuple(zip(options.text, texts))
        found.append(Example(texts=pairs, words=words))
    return found


def _without(special: list[int], ids: np.ndarray) -> list[int]:
    return [token for token in ids.tolist() if token not in special]


def _words(
    encoder: Any, ids: np.ndarray, label: np.ndarray, special: list[int]
) -> Iterator[str]:
    """Yields the words of a text; the first token of a word is the one with a label."""
    begins = np.flatnonzero(label[: len(ids)] != NONE)
    for begin, end in zip(begins, [*begins[1:], len(ids)]):
        yield encoder.decode(_without(special, ids[begin:end]))
