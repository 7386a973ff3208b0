"""Word vectors: word2vec's text and binary files, and GloVe's text.

A text file has one word and its numbers in each line. word2vec's files begin with the
number of words and the length of a vector. Only the requested words are kept in memory.
"""

import gzip
from collections.abc import Collection, Iterator
from typing import IO, Any

import numpy as np

from finetune_jax.core.errors import UserError
from finetune_jax.core.paths import user_path
from finetune_jax.weights.formats.mapped import sha256_of


def read_vectors(
    address: str, wanted: Collection[str]
) -> tuple[dict[str, np.ndarray], int, dict[str, str]]:
    """Returns the vectors of words that the file has, their width, and its digest.

    Args:
        address: file:PATH of a plain file, or of one compressed with gzip (`.gz`).
        wanted: Requested words.

    Raises:
        UserError: The file is missing, or has no word vectors.
    """
    kind, _, place = address.partition(":")
    path = user_path(place, "config.init.embeddings")
    where = f"config.init.embeddings: {address!r}"
    if kind != "file" or not path.is_file():
        raise UserError(f"{where}: no such file; write file:PATH of word vectors")
    words = {word.encode() for word in wanted}
    found: dict[str, np.ndarray] = {}
    width = 0
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            for word, vector in _vectors(file):
                width = width or len(vector)
                if len(vector) != width:
                    raise ValueError(
                        f"{word!r} has {len(vector)} numbers, others {width}"
                    )
                if word in words:
                    found[word.decode()] = vector
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{where}: not a file of word vectors: {error}") from error
    if not width:
        raise UserError(f"{where}: no word vectors in it")
    return found, width, {str(path): sha256_of(path)}


def _vectors(file: IO[bytes]) -> Iterator[tuple[bytes, np.ndarray]]:
    """Yields words and vectors of a file in any of the three formats."""
    first = file.readline()
    parts = first.split()
    if len(parts) != 2 or not all(part.isdigit() for part in parts):  # GloVe.
        width = len(parts) - 1
        if width < 1:
            return
        yield _of_line(first, width)
        yield from (_of_line(line, width) for line in file if line.strip())
        return
    count, width = map(int, parts)
    begin = file.tell()
    line = file.readline()
    file.seek(begin)
    try:
        _of_line(line, width)
    except ValueError:
        yield from _binary(file, count, width)
        return
    yield from (_of_line(line, width) for line in file if line.strip())


def _of_line(line: bytes, width: int) -> tuple[bytes, np.ndarray]:
    # Words of GloVe can contain blanks.
    parts = line.rstrip(b"\r\n ").rsplit(b" ", width)
    if len(parts) != width + 1:
        raise ValueError(f"{line[:40]!r} is not a word and {width} numbers")
    return parts[0], np.array(parts[1:], np.float64).astype(np.float32)


def _binary(
    file: IO[bytes], count: int, width: int
) -> Iterator[tuple[bytes, np.ndarray]]:
    for _ in range(count):
        word = bytearray()
        while (letter := file.read(1)) != b" ":
            if not letter or len(word) > 1000:
                raise ValueError("it ends within a word")
            if letter != b"\n":  # Some programs write one after each vector.
                word += letter
        content = file.read(4 * width)
        if len(content) != 4 * width:
            raise ValueError(f"it ends within the vector of {bytes(word)!r}")
        yield bytes(word), np.frombuffer(content, "<f4")
