"""Files of a sweep's table: CSV, Markdown, LaTeX and JSON."""

import csv
import io
import json
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune_jax.core.files import write_json, write_text
from finetune_jax.core.metric_names import is_of_class
from finetune_jax.report.html import formats
from finetune_jax.report.tables import aligned
from finetune_jax.sweeps import statistics
from finetune_jax.sweeps.comparison import Comparison, costs
from finetune_jax.sweeps.definition import SOURCES
from finetune_jax.sweeps.folder import SweepFolder
from finetune_jax.sweeps.members import as_plain
from finetune_jax.sweeps.schedule import Wanted
from finetune_jax.sweeps.table import Row, Table, metric_names
from finetune_jax.sweeps.tuning import values_text

# Costs that are the same each time that a run is made.
_SAME = ("updates", "trained", "GFLOP")
# Costs in `table.md` and `table.tex`.
_SHORT = ("trained", "GFLOP")
# Costs for people, and their names.
COSTS = {
    "updates": "updates", "trained": "trained parameters", "GFLOP": "GFLOP",
    "train_s": "training time", "memory_mb": "memory (MB)",
    "disk_mb": "checkpoints (MB)",
}  # fmt: skip
_UNKNOWN = "–"
# Rows of a table of tuning in `table.md`.
_MOST_TUNING = 24
# Columns of text, which are aligned on the left.
_TEXTS = ("case", "arm", "trial", "chosen", "values", "chosen by")
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&",
    "#": r"\#", "_": r"\_", "%": r"\%", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "−": "$-$", "±": r"$\pm$",
}  # fmt: skip


def write_tables(root: pathlib.Path, name: str, table: Table) -> list[str]:
    """Writes the table of a sweep as `table.csv`, `table.md`, `table.tex` and JSON.

    `table.csv` and `comparisons.json` have no times, so any workers write the same bytes.

    Args:
        root: Folder of the sweep.
        name: Name of the sweep.
        table: The table.

    Returns:
        Lines for a person.
    """
    write_text(root / "table.csv", as_csv(table), by_many=True)
    write_text(root / "table.md", as_markdown(table, name), by_many=True)
    write_text(root / "table.tex", as_latex(table, name), by_many=True)
    write_json(root / "comparisons.json", as_json(table), by_many=True)
    return as_lines(table)


def as_csv(table: Table) -> str:
    """Returns a table as CSV, without times."""
    others = metric_names(table)[1:]
    metric, text = table.metric, io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["case", "arm", "chosen", "runs", "missing", "failed", "without_value", metric,
         "low_95", "high_95", "std", "difference", "difference_low_95",
         "difference_high_95", "p_value", "p_adjusted", "verdict", "answer",
         *_SAME, *others]
    )  # fmt: skip
    for row in table.rows:
        one, found = row.estimate, row.comparison
        chosen = json.dumps(as_plain(row.chosen)) if row.chosen else ""
        numbers = [None] * 3 if one is None else [one.mean, one.low, one.high]
        values = [v for run in row.runs if (v := run.value(metric)) is not None]
        has_spread = len(values) > 1
        numbers = [*numbers, float(np.std(values, ddof=1)) if has_spread else None]
        compared = [None] * 5
        if found is not None:
            ends = [found.low, found.high]
            compared = [found.difference, *ends, found.p_value, found.adjusted]
        cost, means = costs(row.results), row.means()
        writer.writerow(
            [row.case, row.arm, chosen, len(row.runs), row.missing, row.failed]
            + [len(row.runs) - len(values)]
            + [_digits(value) for value in (*numbers, *compared)]
            + [found.verdict if found else "", answer(table, row)]
            + [_digits(cost[key]) for key in _SAME]
            + [_digits(means.get(key)) for key in others]
        )
    return text.getvalue()


def write_runs(folder: SweepFolder, wanted: Wanted) -> None:
    """Writes `runs.csv`: a row for each run, without times.

    Args:
        folder: Folder of the sweep.
        wanted: Members that are known by now.
    """
    ended = [folder.outcome(member.key) for member in wanted.members]
    bests = [outcome.result.get("best", {}) if outcome else {} for outcome in ended]
    names = [n for n in dict.fromkeys(n for best in bests for n in best)
             if not is_of_class(n)]  # fmt: skip
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["case", "arm", "stage", *SOURCES, "tuned", "state", "best_step", "updates",
         *names, "workdir"]
    )  # fmt: skip
    for member, outcome, best in zip(wanted.members, ended, bests):
        seed, result = dict(member.seed), outcome.result if outcome else {}
        tuned = json.dumps(as_plain(member.tuned)) if member.tuned else ""
        writer.writerow(
            [member.case, member.arm, member.stage]
            + [seed[source] for source in SOURCES]
            + [tuned, outcome.state if outcome else "missing"]
            + [result.get("best_step"), result.get("steps")]
            + [_digits(best.get(name)) for name in names]
            + [member.key]
        )
    write_text(folder.root / "runs.csv", text.getvalue(), by_many=True)


def _digits(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.6g}"


def answer(table: Table, row: Row) -> str:
    """Returns what is known of a row, in a sentence."""
    if row.comparison is not None:
        return row.comparison.sentence((row.arm, table.baseline or ""))
    if row.problem:
        return row.problem
    if row.pruned:
        return "ended early"
    return "baseline" if row.arm == table.baseline else ""


def chosen_text(row: Row) -> str:
    """Returns the chosen values of a row as text."""
    return values_text(as_plain(row.chosen))


def mean_text(metric: str, estimate: statistics.Estimate | None) -> str:
    """Returns a mean and its interval as text."""
    if estimate is None:
        return "–"
    mean, low, high = _texts(metric, estimate.mean, estimate.low, estimate.high)
    of = ", over examples only" if estimate.seeds == 1 else ""
    return mean if math.isnan(estimate.low) else f"{mean} ({low} to {high}{of})"


def _texts(metric: str, mean: float, low: float, high: float) -> list[str]:
    """Returns a mean and the ends of its interval, with digits that fit its width."""
    if formats.is_share(metric):
        width = 100 * (high - low)
        digits = 1 if not width or math.isnan(width) else -math.floor(math.log10(width))
        digits = max(1, digits)
        first, *ends = (f"{100 * value:.{digits}f}" for value in (mean, low, high))
        return [f"{first} %", *ends]
    texts = [formats.metric_text(metric, value) for value in (mean, low, high)]
    return [re.sub(r"^-", "−", text) for text in texts]


def difference_text(found: Comparison | None) -> str:
    """Returns a difference and its interval as text."""
    if found is None or math.isnan(found.difference):
        return ""
    mean = found.number(found.difference, None if found.in_points else "")
    mean = mean if mean.startswith("−") else f"+{mean}"
    if not math.isnan(found.low):
        low, high = found.number(found.low, ""), found.number(found.high, "")
        mean += f" ({low} to {high})"
    return mean


def _counts(row: Row) -> str:
    """Returns the number of runs, and of those that failed or are missing."""
    found = [str(len(row.runs))]
    found += [f"{row.failed} failed"] if row.failed else []
    found += [f"{row.missing} missing"] if row.missing else []
    absent = len(row.runs) - (row.estimate.seeds if row.estimate else 0)
    found += [f"{absent} without a value"] if absent and not row.pruned else []
    return ", ".join(found)


def _columns(table: Table) -> tuple[list[str], list[list[str]]]:
    """Returns the heading and the cells of a table for people."""
    has_cases = any(row.case for row in table.rows)
    has_chosen = any(row.chosen for row in table.rows)
    has_baseline = len(table.rows) > len(table.cases) and table.baseline is not None
    known = [costs(row.results) for row in table.rows]
    texts = {key: [cost_text(key, cost[key]) for cost in known] for key in _SHORT}
    # Those that all rows have in common tell nothing.
    own = {key: of for key, of in texts.items() if len({*of} - {_UNKNOWN}) > 1}
    heading = [
        *(["case"] if has_cases else []),
        "trial" if table.baseline is None else "arm",
        *(["chosen"] if has_chosen else []),
        "runs",
        f"{table.metric} (95 % interval)",
        *([f"difference from {table.baseline}"] if has_baseline else []),
        *(COSTS[key] for key in own),
    ]
    rows = []
    for place, row in enumerate(table.rows):
        cells = [row.case] if has_cases else []
        cells.append(
            row.arm.removeprefix("trial ") if table.baseline is None else row.arm
        )
        cells += [chosen_text(row)] if has_chosen else []
        cells += [_counts(row), "ended early" if row.pruned else ""]
        cells[-1] = cells[-1] or mean_text(table.metric, row.estimate)
        if has_baseline:
            is_baseline = row.arm == table.baseline
            cells.append("baseline" if is_baseline else difference_text(row.comparison))
        cells += [of[place] for of in own.values()]
        rows.append(cells)
    return heading, rows


def cost_text(name: str, value: float | None) -> str:
    """Returns a cost as text.

    Args:
        name: Name of the cost, one of `COSTS`.
        value: The cost; None if unknown.
    """
    if value is None:
        return _UNKNOWN
    if name == "train_s":
        return formats.time_text(value).replace(formats.SPACE, " ")
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def answers(table: Table) -> list[str]:
    """Returns a sentence for each comparison."""
    return [
        f"{_where(table, row)}{answer(table, row)}"
        for row in table.rows
        if row.comparison is not None
    ]


def _where(table: Table, row: Row) -> str:
    return f"{row.case}: " if len(table.cases) > 1 else ""


def remarks(table: Table) -> list[str]:
    """Returns lines about the best arms, rows without a comparison, and limits."""
    found = [
        (f"{case}: " if len(table.cases) > 1 else "") + best.sentence()
        for case, best in table.best.items()
    ]
    if found:
        found.append(
            "comparisons with the best mean are adjusted for their own number (Holm); the "
            "best of several means tends to be too good"
        )
    found += [
        f"{_where(table, row)}{row.arm}: {row.problem}"
        for row in table.rows
        if row.problem and row.comparison is None
    ]
    counts = [
        sum(row.comparison is not None for row in rows) for rows in table.cases.values()
    ]
    if (count := max(counts, default=0)) > 1:
        each = " of each case" if len(table.cases) > 1 else ""
        found.append(
            f"p-values are adjusted for the {count} comparisons{each} (Holm), intervals "
            "are not"
        )
    return found + [f"note: {note}" for note in table.notes]


def as_lines(table: Table) -> list[str]:
    """Returns a table as lines for a terminal, and the answers."""
    heading, rows = _columns(table)
    columns = []
    for name, *cells in zip(heading, *rows, strict=True):
        if name in _TEXTS:
            width = max(map(len, (name, *cells)))
            name, *cells = (cell.ljust(width) for cell in (name, *cells))
        columns.append((name, *cells))
    told = [*answers(table), *remarks(table)]
    return [*aligned(list(zip(*columns))), *([""] if told else []), *told]


def as_markdown(table: Table, name: str) -> str:
    """Returns a table as Markdown, the answers as a list, and what tuning tried."""
    heading, rows = _columns(table)
    lines = [f"Sweep {name}, the best first", "", *_markdown([heading, *rows])]
    told = [*answers(table), *remarks(table)]
    lines += ["", *(f"- {text}" for text in told)] if told else []
    if 0 < len(table.tuning) <= _MOST_TUNING:
        lines += ["", "Values that were tried", "", *_markdown(table.tuning)]
    return "\n".join(lines) + "\n"


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table whose first row is the heading."""
    rule = [":--" if text in _TEXTS else "--:" for text in rows[0]]
    lines = [
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"
        for cells in rows
    ]
    return [lines[0], f"| {' | '.join(rule)} |", *lines[1:]]


def as_latex(table: Table, name: str) -> str:
    """Returns a table as LaTeX for the package booktabs, the answers as comments."""
    heading, rows = _columns(table)
    left = sum(text in _TEXTS for text in heading)
    lines = [f"% Sweep {name}; needs \\usepackage{{booktabs}}."]
    lines += [f"% {text}" for text in (*answers(table), *remarks(table))]
    lines += [
        rf"\begin{{tabular}}{{{'l' * left}{'r' * (len(heading) - left)}}}",
        r"\toprule",
        _latex(heading),
        r"\midrule",
    ]
    case = None
    for row, cells in zip(table.rows, rows):
        if case is not None and row.case != case:
            lines.append(r"\addlinespace")
        case = row.case
        lines.append(_latex(cells))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _latex(cells: Sequence[str]) -> str:
    escaped = ("".join(_LATEX.get(letter, letter) for letter in cell) for cell in cells)
    return rf"{' & '.join(escaped)} \\"


def as_json(table: Table) -> dict[str, Any]:
    """Returns the comparisons of a table for programs."""
    found = []
    for row in table.rows:
        one = row.comparison
        if one is None:
            continue
        chance, is_open = one.improvement, one.verdict == "open"
        found.append(
            {
                "case": row.case,
                "arm": row.arm,
                "baseline": table.baseline,
                "difference": one.difference,
                "interval": [one.low, one.high],
                "level": one.level,
                "p_value": one.p_value,
                "p_adjusted": one.adjusted,
                "seed_p_value": one.seed_p_value,
                "probability_of_improvement": chance and chance.probability,
                "probability_interval": chance and [chance.low, chance.high],
                "pairs": one.pairs,
                "examples": one.examples,
                "more_seeds": one.more_seeds if is_open else None,
                "verdict": one.verdict,
                "answer": answer(table, row),
            }
        )
    return {
        "metric": table.metric,
        "comparisons": _without_nan(found),
        "best": [
            {
                "case": case,
                "arm": best.name,
                "not_told_apart": best.rivals,
                "not_compared": list(best.problems),
            }
            for case, best in table.best.items()
        ],
        "notes": list(table.notes),
    }


def _without_nan(value: Any) -> Any:
    """Returns values with None instead of numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    is_number = isinstance(value, float)
    return None if is_number and not math.isfinite(value) else value
