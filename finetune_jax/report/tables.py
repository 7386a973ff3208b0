"""Result tables for a person: plain text with aligned columns."""

from collections.abc import Mapping, Sequence
from typing import Any

from finetune_jax.core.metric_names import is_of_class


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns a line for each row; the first column is left-aligned, the others right.

    >>> aligned([("", "final"), ("test/loss", "0.1")])
    ['           final', 'test/loss    0.1']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def result_lines(result: Mapping[str, Any]) -> list[str]:
    """Returns the final metrics of a run, and those of its best state if one was chosen.

    Args:
        result: Content of `result.json`.
    """
    final, best, step = result["final"], result["best"], result["best_step"]
    columns = [final] if step is None else [final, best]
    rows = [("", "final", "best")[: len(columns) + 1]]
    rows += [(name, *(f"{of[name]:.4f}" for of in columns)) for name in final]
    lines = aligned(rows)
    if step is not None:
        lines.append(f"best at step {step} of {result['steps']}")
    if step == 0 and result["steps"]:
        lines.append(
            "warning: the best checkpoint is the untrained model of step 0, which "
            "evaluate, predict and export use: no later evaluation was better. A lower "
            "learning rate, more updates or another config.evaluate.best may help."
        )
    return lines


def checkpoint_line(step: int) -> str:
    """Returns a line about the checkpoint that is used."""
    told = ", the untrained model: no later evaluation was better" if not step else ""
    return f"checkpoint of step {step}{told}"


def population_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the table of a population: a row for members that differ in seeds only.

    Args:
        rows: The rows of `result.json`, the best first.
    """
    keys = list(dict.fromkeys(key for row in rows for key in row["settings"]))
    names = [name for name in rows[0]["mean"] if not is_of_class(name)]
    some_failed = any(row["failed"] for row in rows)
    heading = [*short_labels(keys), "members", *(["failed"] if some_failed else [])]
    table = [("", *heading, *names)]
    for place, row in enumerate(rows):
        settings = [str(row["settings"].get(key, "")) for key in keys]
        counts = [str(len(row["members"]))]
        counts += [str(len(row["failed"]))] if some_failed else []
        values = [
            _value(row["mean"].get(name), row["interval_95"].get(name))
            for name in names
        ]
        table.append((str(place + 1), *settings, *counts, *values))
    return ["means over seeds ± half their 95 % interval, the best first:"] + [
        line.rstrip() for line in aligned(table)
    ]


def _value(mean: float | None, half: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.4f}" + ("" if half is None else f" ± {half:.4f}")


def short_labels(keys: Sequence[str]) -> list[str]:
    """Returns the last part of each key, or all of it where two would be the same.

    >>> short_labels(["plan[0].peak_lr", "plan[0].weight_decay"])
    ['peak_lr', 'weight_decay']
    >>> short_labels(["plan[0].peak_lr", "plan[1].peak_lr"])
    ['plan[0].peak_lr', 'plan[1].peak_lr']
    """
    last = [key.rpartition(".")[2] for key in keys]
    return [
        short if last.count(short) == 1 else key
        for short, key in zip(last, keys, strict=True)
    ]


def first_of(texts: Sequence[str], most: int = 3, separator: str = ", ") -> str:
    """Returns the first texts, and the number of the others.

    >>> first_of(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + more
