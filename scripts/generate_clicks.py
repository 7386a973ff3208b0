"""Writes a click-through table of Criteo's format whose best AUC is known.

    .venv/bin/python scripts/generate_clicks.py --rows=200000 --output=clicks.txt

A click has the log odds of a sum: an effect of each value of some categories, of a few
pairs of categories, and of some numbers. Other columns say nothing. Since the odds are
known, so is the best that any model can reach: the AUC and log loss of the true
probabilities, which are printed, and kept in clicks.txt.probability.npy. `--days=D`
writes D files, day_0.txt and so on, in a folder; from day to day the effects drift, and
new values come up.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Iterator

import numpy as np

CHUNK = 50_000
# Different values of each category; rarer ones are the many.
SIZES = (
    (20, 400, 3000, 2000, 50, 10, 3000, 100, 3, 3000, 2000, 3000, 1000)
    + (20, 2000, 3000, 10, 1000, 500, 4, 3000, 10, 15, 3000, 50, 2000)
)  # fmt: skip
# Categories and numbers that say something, and pairs of categories that do together.
TELLING, NUMBERS = (0, 1, 4, 5, 7, 8, 13, 16, 18, 21), (0, 2, 5, 10)
PAIRS = ((5, 8), (16, 21), (0, 19))
SALT = 2654435761  # So that values look like Criteo's hashes.


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """What decides about clicks on a day.

    Attributes:
        effects: Of each value of the telling categories.
        pairs: Of each pair of values of the telling pairs.
        slopes: Of the telling numbers' logarithms.
        first: The first value of each category that occurs, which drifts.
    """

    effects: dict[int, np.ndarray]
    pairs: dict[tuple[int, int], np.ndarray]
    slopes: np.ndarray
    first: int


def make_world(seed: int, day: int, drift: float) -> World:
    """Returns the world of a day: that of day 0, and as many steps of drift."""
    rng = np.random.default_rng([seed, 0])

    def drifting(*shape: int, scale: float) -> np.ndarray:
        found = rng.normal(size=shape)
        later = np.random.default_rng([seed, 1, *shape])
        for _ in range(day):
            step = later.normal(size=shape)
            found = np.sqrt(1 - drift**2) * found + drift * step
        return scale * found

    return World(
        effects={at: drifting(2 * SIZES[at], scale=0.45) for at in TELLING},
        pairs={(a, b): drifting(SIZES[a], SIZES[b], scale=0.5) for a, b in PAIRS},
        slopes=drifting(len(NUMBERS), scale=0.5),
        first=day,
    )


def chunk_of(world: World, rng: np.random.Generator, rows: int) -> tuple:
    """Returns labels, probabilities, numbers (-1 is missing) and categories (likewise)."""
    categories = np.empty((rows, len(SIZES)), np.int64)
    for at, size in enumerate(SIZES):
        # Few values are frequent, many are rare; day by day some come and some go.
        drawn = (size * rng.random(rows) ** 2.5).astype(np.int64)
        categories[:, at] = drawn + (world.first * size) // 50
    numbers = np.floor(np.exp(rng.normal(1.5, 1.2, (rows, 13)))).astype(np.int64)
    odds = np.full(rows, -1.3)
    for at, effects in world.effects.items():
        odds += effects[categories[:, at] % len(effects)]
    for (a, b), effects in world.pairs.items():
        odds += effects[categories[:, a] % SIZES[a], categories[:, b] % SIZES[b]]
    logs = (np.log1p(numbers[:, list(NUMBERS)]) - 1.7) / 0.9
    odds += logs @ world.slopes
    probability = 1 / (1 + np.exp(-odds))
    label = rng.random(rows) < probability
    # What is missing here has no say in a click.
    silent = [at for at in range(13) if at not in NUMBERS]
    numbers[:, silent] = np.where(
        rng.random((rows, len(silent))) < 0.3, -1, numbers[:, silent]
    )
    quiet = [at for at in (2, 3, 11, 15, 20, 25)]
    categories[:, quiet] = np.where(
        rng.random((rows, len(quiet))) < 0.1, -1, categories[:, quiet]
    )
    return label, probability, numbers, categories


def lines_of(label: np.ndarray, numbers: np.ndarray, categories: np.ndarray) -> str:
    """Returns rows as a file has them."""
    cells = [label.astype(np.int64).astype(str)]
    cells += [np.where(n < 0, "", n.astype(str)) for n in numbers.T]
    for at, column in enumerate(categories.T):
        names = np.array(
            [f"{(v * 26 + at + 1) * SALT % 2**32:08x}" for v in range(column.max() + 1)]
        )
        cells.append(np.where(column < 0, "", names[column]))
    return "".join("\t".join(row) + "\n" for row in zip(*(c.tolist() for c in cells)))


def write(
    path: pathlib.Path, world: World, rng: np.random.Generator, rows: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Writes a file and yields labels and probabilities, chunk by chunk."""
    with path.open("w") as file:
        for begin in range(0, rows, CHUNK):
            count = min(CHUNK, rows - begin)
            label, probability, *cells = chunk_of(world, rng, count)
            file.write(lines_of(label, *cells))
            yield label, probability


def best_of(parts: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Returns AUC and log loss of the true probabilities, and the share of clicks."""
    from sklearn.metrics import log_loss, roc_auc_score

    label, probability = (np.concatenate(part) for part in zip(*parts))
    return {
        "rows": len(label),
        "best_roc_auc": float(roc_auc_score(label, probability)),
        "best_loss": float(log_loss(label, probability)),
        "clicks": float(label.mean()),
    }


def main() -> None:
    """Writes the table, and beside it what is best, as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--days", type=int, default=0)
    parser.add_argument("--drift", type=float, default=0.15)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng, output = np.random.default_rng([arguments.seed, 2]), arguments.output
    if not arguments.days:
        world = make_world(arguments.seed, 0, 0.0)
        parts = list(write(output, world, rng, arguments.rows))
        found = best_of(parts)
        everything = np.concatenate([probability for _, probability in parts])
        np.save(output.with_name(f"{output.name}.probability.npy"), everything)
    else:
        output.mkdir(parents=True, exist_ok=True)
        found, rows = {}, arguments.rows // arguments.days
        for day in range(arguments.days):
            world = make_world(arguments.seed, day, arguments.drift)
            path = output / f"day_{day}.txt"
            found[path.stem] = best_of(list(write(path, world, rng, rows)))
    text = json.dumps(found, indent=2)
    output.with_name(f"{output.name}.best.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
