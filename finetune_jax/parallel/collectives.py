"""Communication between devices in a compiled program, read from its HLO text."""

import dataclasses
import re
from collections import Counter, defaultdict

# Pairs of start and done are counted by the latter, whose type is the result alone.
_KINDS = (
    "all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all"
    "|collective-permute|collective-broadcast"
)
_COLLECTIVE = re.compile(rf" = (.+?) ({_KINDS})(-done)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(
    r"(?:to_apply|calls|body|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """The collectives of one kind in one run of a program.

    Attributes:
        count: Number of them.
        nbytes: Bytes of their results on one device.
    """

    count: int
    nbytes: float


def collectives(text: str) -> dict[str, Traffic]:
    """Returns the collectives of a compiled program by kind.

    Those in a loop are counted once for each iteration, if the compiler knows their number.

    Args:
        text: HLO text of the compiled program.
    """
    counts: Counter[str] = Counter()
    sizes: defaultdict[str, float] = defaultdict(float)
    computations, entry = _computations(text)

    def add(name: str, times: int) -> None:
        for line in computations.get(name, ()):
            if found := _COLLECTIVE.search(line):
                counts[found[2]] += times
                sizes[found[2]] += times * _bytes(found[1])
            trips = _TRIPS.search(line)
            for called in _called(line):
                add(called, times * (int(trips[1]) if trips else 1))

    add(entry, 1)
    return {
        kind: Traffic(count=counts[kind], nbytes=sizes[kind]) for kind in sorted(counts)
    }


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of each computation, and the name of the entry."""
    found: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name = header[2]
            found[name] = []
            entry = name if header[1] else entry
        elif name:
            found[name].append(line)
    return found, entry


def _called(line: str) -> list[str]:
    """Returns the computations that an instruction runs; reductions have no collectives."""
    names = _CALLED.findall(line)
    for branches in _BRANCHES.findall(line):
        names += re.findall(r"[\w.\-]+", branches)
    return names


def _bytes(shape: str) -> float:
    """Returns the bytes of an array or of a tuple of arrays.

    >>> _bytes("(f32[2,3]{1,0}, bf16[], /*index=2*/pred[5])")
    31.0
    """
    total = 0.0
    for kind, sizes in _ARRAY.findall(shape):
        width = re.search(r"\d+", kind)
        values = 1
        for size in filter(None, sizes.split(",")):
            values *= int(size)
        total += values * (int(width[0]) / 8 if width else 1)
    return total
