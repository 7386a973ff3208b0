"""The order of training examples: a function of (seed, place) alone."""

import functools
from collections.abc import Callable

import grain
import numpy as np

# Rounds of Simon's block cipher, which permutes an epoch.
_ROUNDS = 4
_SMALLEST_BLOCK = 16


# An endless order of the examples of a split: a function of two places that returns the
# positions in the split from the first place to before the second, int64.
Order = Callable[[int, int], np.ndarray]


def training_order(label: np.ndarray, seed: int, sampling: str = "uniform") -> Order:
    """Returns the endless order of training.

    Update s of batch size B takes places s * B to (s + 1) * B, so nothing is dropped,
    repeated or padded at the end of an epoch.

    Args:
        label: Class index of each training example.
        seed: Seed of the run.
        sampling: 'uniform': each epoch is a new shuffle of all examples. 'balanced': the
            classes take turns, and each goes through its own examples in such epochs.
    """
    if sampling == "uniform":
        return functools.partial(_uniform, len(label), seed)
    members = [np.flatnonzero(label == value) for value in np.unique(label)]
    classes = [
        grain.MapDataset.source(positions.tolist()).seed(seed).shuffle().repeat()
        for positions in members
    ]
    order = grain.MapDataset.mix(classes)
    return lambda start, stop: np.array(
        [order[i] for i in range(start, stop)], np.int64
    )


def _uniform(count: int, seed: int, start: int, stop: int) -> np.ndarray:
    """Returns positions in epochs that are shuffled as by `grain.MapDataset.shuffle`."""
    found = []
    while start < stop:
        epoch, first = divmod(start, count)
        last = min(count, first + stop - start)
        found.append(permutation(count, (seed + epoch) % 2**32)[first:last])
        start += last - first
    return np.concatenate(found, dtype=np.int64)


def permutation(count: int, seed: int) -> np.ndarray:
    """Returns the numbers below `count` as `grain.experimental.index_shuffle` has them.

    All at once, in a hundredth of its time. Where count - 1 is a power of two, grain's
    block is a bit too small, and leaves one out; this does not.

    Args:
        count: How many there are.
        seed: Below 2**32.

    Source: Beaulieu et al. 2013, the Simon cipher, with the keys and blocks of
    grain/_src/python/experimental/index_shuffle/index_shuffle.cc.
    """
    bits = (count - 1).bit_length()
    if bits <= _SMALLEST_BLOCK:
        return _permutation_in_small_block(count, seed)
    return _permutation_in_block(count, seed, (bits + 1) // 2)


@functools.lru_cache(maxsize=256)
def _permutation_in_small_block(count: int, seed: int) -> np.ndarray:
    word = _SMALLEST_BLOCK // 2
    # The successor of every number in the block, computed at once.
    block = np.arange(2**_SMALLEST_BLOCK)
    follows = _encrypted(block, seed, word).astype(np.uint16)
    found = follows[:count]
    while (outside := found >= count).any():
        found = np.where(outside, follows[found], found)
        follows = np.where(follows >= count, follows[follows], follows)
    return found


@functools.lru_cache(maxsize=2)
def _permutation_in_block(count: int, seed: int, word: int) -> np.ndarray:
    found = _encrypted(np.arange(count), seed, word)
    while len(outside := np.flatnonzero(found >= count)):
        found[outside] = _encrypted(found[outside], seed, word)
    return found


def _encrypted(numbers: np.ndarray, seed: int, word: int) -> np.ndarray:
    """Returns numbers of two words of so many bits, encrypted."""
    mask = (1 << word) - 1
    keys = [key & mask for key in _seed_sequence(seed, _ROUNDS)]

    def rotated(x, bits):
        return (x << bits | x >> (word - bits)) & mask

    left, right = numbers >> word, numbers & mask
    for key in keys:
        mixed = rotated(right, 1) & rotated(right, 8) ^ rotated(right, 2)
        left, right = right, left ^ mixed ^ key
    # The words have changed places after every round; an even number of rounds.
    return left << word | right


def _seed_sequence(seed: int, count: int) -> list[int]:
    """Returns the integers of 32 bits that `std::seed_seq{seed}` generates.

    Args:
        seed: Below 2**32.
        count: At least 2, below 7.

    Source: ISO C++, [rand.util.seedseq].
    """
    size = 2**32
    near = (count - (count - 1) // 2) // 2
    far = near + (count - 1) // 2
    x = [0x8B8B8B8B] * count

    def scrambled(value, factor):
        return factor * (value ^ value >> 27) % size

    for k in range(count):
        here, there, over = k % count, (k + near) % count, (k + far) % count
        one = scrambled(x[here] ^ x[there] ^ x[(k - 1) % count], 1664525)
        # The number of seeds, and then the only one.
        other = one + here + {0: 1, 1: seed}.get(k, 0)
        x[there] = (x[there] + one) % size
        x[over] = (x[over] + other) % size
        x[here] = other % size
    for k in range(count, 2 * count):
        here, there, over = k % count, (k + near) % count, (k + far) % count
        total = (x[here] + x[there] + x[(k - 1) % count]) % size
        one = scrambled(total, 1566083941)
        other = (one - here) % size
        x[there] ^= one
        x[over] ^= other
        x[here] = other
    return x
