"""Small tables that tests write."""

import numpy as np

NUMBERS = [f"I{i + 1}" for i in range(13)]
CATEGORIES = [f"C{i + 1}" for i in range(26)]


def rows(count, seed=0):
    """Returns rows of Criteo's format, each a list of texts."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        numbers = [
            "" if rng.random() < 0.2 else str(n) for n in rng.integers(-1, 99, 13)
        ]
        values = rng.integers(0, 5, 26)
        texts = ["" if rng.random() < 0.1 else f"{v:08x}" for v in values]
        found.append([str(index % 2), *numbers, *texts])
    return found


def write(path, lines, header=None, delimiter="\t"):
    """Writes rows and returns the file."""
    everything = [header, *lines] if header else lines
    path.write_text("".join(delimiter.join(line) + "\n" for line in everything))
    return path
