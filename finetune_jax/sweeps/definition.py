"""The definition of a sweep: a base config, arms, cases, seeds, and what decides.

A sweep is a file with `get_sweep(arg="")`. It is read before jax starts, so nothing here
imports jax.
"""

import dataclasses
import functools
import pathlib
import re
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_jax.config import loading, plugins
from finetune_jax.config.fields import keys_of
from finetune_jax.config.schema import Seeds
from finetune_jax.core.errors import Problem, UserError, raise_if
from finetune_jax.core.paths import user_path
from finetune_jax.core.registry import closest
from finetune_jax.report.tables import short_labels
from finetune_jax.sweeps.field_types import type_problems
from finetune_jax.sweeps.search.proposals import Search

SOURCES = tuple(keys_of(Seeds))
# A seed of each source of randomness: the identity by which runs are paired.
Seed = tuple[tuple[str, int], ...]
KEEP = ("all", "best", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """Runs that differ only in their seed.

    Attributes:
        overrides: Values of config keys, such as {"plan[0].peak_lr": 0.1}; `plan[*]` is
            every phase, a dict changes keys of a section, and a plan may be given as
            phases.
        base: Config instead of that of the sweep: a file's address or a ConfigDict.
        tune: Values of keys that are chosen for this arm, a dict if they have names, such
            as {"plan": {"slow": ..., "fast": ...}}; None is `Sweep.tune`.
        metric: Name that its runs have for the metric of the sweep, such as
            'test/digits/accuracy' of runs on several domains; None is the same name.
    """

    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    base: Any = None
    tune: Mapping[str, Sequence[Any] | Mapping[str, Any]] | None = None
    metric: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A run whose weights other runs start from, as `init.pretrained="sweep:NAME"`.

    Attributes:
        overrides: As those of an arm.
        base: As that of an arm.
        by_seed: Whether there is a run for each seed; otherwise all start from one.
    """

    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    base: Any = None
    by_seed: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """A set of runs that are compared.

    Attributes:
        base: Config that all arms share: a file's address or a ConfigDict.
        arms: Overrides or `Arm`, by name; a sequence, such as that of `grid`, names the
            arms by their values.
        cases: Overrides of the data sets or settings in which arms are compared, by name.
        seeds: Number of seeds, or a sequence of them: an integer for all sources of
            randomness, or a dict with a seed of some sources; see `by_source`.
        metric: Metric that decides, such as 'test/accuracy'.
        baseline: Arm that all others are compared with; None is the first.
        tune: Values of keys from which each arm's best combination is chosen; {} tunes
            nothing.
        tune_by: Metric that chooses it; None is `evaluate.best`, or the same metric as
            `metric` on the validation split.
        tune_seeds: Number of seeds with which each combination runs.
        tune_case: Case in which all arms are tuned; None tunes them in every case.
        sources: Runs whose weights other runs start from, by name.
        search: Search of a space of values instead of arms.
        keep: Runs whose checkpoints stay: 'all', the 'best' by `tune_by`, or 'none'.
        pages: Whether each run gets a report page of its own.
        attempts: Number of times that a failing member is run.
        threads: CPU threads of a worker (NPROC), on which the last bits depend; None is
            what the first worker of the sweep has.
        claim_timeout_s: Seconds without a sign of life after which another worker takes
            over a member.
        slurm: Options of sbatch, such as {"partition": "gpu", "time": "04:00:00"}.
        command: Template of the command that starts a worker, for --launcher=command.
        processes: Processes of a worker.
    """

    base: Any
    arms: Any = dataclasses.field(default_factory=lambda: {"base": {}})
    cases: Mapping[str, Mapping[str, Any]] = dataclasses.field(
        default_factory=lambda: {"": {}}
    )
    seeds: Any = 3
    metric: str = "test/accuracy"
    baseline: str | None = None
    tune: Mapping[str, Sequence[Any] | Mapping[str, Any]] = dataclasses.field(
        default_factory=dict
    )
    tune_by: str | None = None
    tune_seeds: int = 1
    tune_case: str | None = None
    sources: Mapping[str, Source] = dataclasses.field(default_factory=dict)
    search: Search | None = None
    keep: str = "all"
    pages: bool = True
    attempts: int = 2
    threads: int | None = None
    claim_timeout_s: float = 120.0
    slurm: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    command: str | None = None
    processes: int = 1

    @functools.cached_property
    def all_seeds(self) -> list[Seed]:
        """The seed of each source of randomness, for each run of an arm."""
        is_count = type(self.seeds) is int
        given: Sequence[Any] = range(self.seeds) if is_count else self.seeds
        return [_seed(one) for one in given]

    @functools.cached_property
    def all_arms(self) -> dict[str, Arm]:
        """The arms by name."""
        if isinstance(self.arms, Mapping):
            return {name: _as_arm(arm) for name, arm in self.arms.items()}
        found: list[dict[str, Any]] = [dict(overrides) for overrides in self.arms]
        keys = list(dict.fromkeys(key for overrides in found for key in overrides))
        label = dict(zip(keys, short_labels(keys), strict=True))
        return {
            ", ".join(f"{label[k]}={v!r}" for k, v in one.items()) or "base": Arm(
                overrides=one
            )
            for one in found
        }

    @property
    def the_baseline(self) -> str:
        """The arm that all others are compared with."""
        return next(iter(self.all_arms)) if self.baseline is None else self.baseline

    def metric_of(self, arm: str) -> str:
        """Returns the name of the metric that decides in the runs of an arm."""
        found = self.all_arms.get(arm)
        return self.metric if found is None else found.metric or self.metric


def by_source(count: int, sources: Sequence[str] = SOURCES) -> list[dict[str, int]]:
    """Returns seeds that vary one source of randomness at a time.

    The variance of each source can be told from them: Bouthillier et al. 2021, Accounting
    for Variance in Machine Learning Benchmarks.

    >>> by_source(2, ("init", "order"))
    [{'init': 0, 'order': 0}, {'init': 1, 'order': 0}, {'init': 0, 'order': 1}]

    Args:
        count: Number of seeds of each source, the first of which is 0.
        sources: Sources of randomness: init, order, augmentation, dropout.
    """
    zeros = dict.fromkeys(sources, 0)
    others = [zeros | {source: i} for source in sources for i in range(1, count)]
    return [zeros, *others]


def _seed(given: Any) -> Seed:
    if isinstance(given, Mapping):
        return tuple((source, given.get(source, 0)) for source in SOURCES)
    return tuple((source, given) for source in SOURCES)


def _as_arm(given: Any) -> Arm:
    if isinstance(given, Arm):
        return given
    # A ConfigDict is a whole config, a dict has overrides.
    return Arm(base=given) if hasattr(given, "to_dict") else Arm(overrides=dict(given))


def definition_problems(sweep: Sweep) -> list[Problem]:
    """Returns what is wrong with a sweep, without its configs."""
    problems = form_problems(sweep)
    if problems:
        return problems
    arms, cases = sweep.all_arms, list(sweep.cases)

    def add(key: str, text: str) -> None:
        problems.append(Problem(f"Sweep.{key}", text))

    if not isinstance(sweep.arms, Mapping) and len(arms) < len(sweep.arms):
        add("arms", "two have the same overrides; leave one of them out")
    if sweep.search is None and sweep.the_baseline not in arms:
        near = closest(sweep.the_baseline, arms)
        add("baseline", f"no arm {sweep.baseline!r}{near}")
    problems += _name_problems(
        [("arm", name) for name in arms] + [("source", name) for name in sweep.sources]
    )
    problems += _name_problems([("case", name) for name in cases])
    problems += _tune_problems(sweep)
    seeds = sweep.all_seeds
    if not seeds:
        add("seeds", f"{sweep.seeds!r}; give a number of seeds, or some")
    for seed in sorted({s for s in seeds if seeds.count(s) > 1}):
        add("seeds", f"{dict(seed)} twice")
    if sweep.keep not in KEEP:
        add("keep", f"{sweep.keep!r}; {', '.join(KEEP)} are possible")
    for key in ("attempts", "processes", "claim_timeout_s"):
        if getattr(sweep, key) <= 0:
            add(key, f"{getattr(sweep, key)}; more than 0 is needed")
    if sweep.threads is not None and sweep.threads < 1:
        add("threads", f"{sweep.threads}; at least 1 is needed")
    if sweep.search is not None:
        if arms != {"base": Arm()} or cases != [""] or sweep.tune:
            add("search", "a search has no arms, cases and tune; leave them out")
        problems += sweep.search.problems()
    return problems


def _tune_problems(sweep: Sweep) -> list[Problem]:
    """Returns what is wrong with the fields about tuning."""
    problems = []

    def add(key: str, text: str) -> None:
        problems.append(Problem(f"Sweep.{key}", text))

    grids = {
        name: sweep.tune if arm.tune is None else arm.tune
        for name, arm in sweep.all_arms.items()
    }
    for name, grid in grids.items():
        for key, values in grid.items():
            if not values:
                add("tune", f"{key}, arm {name!r}: {values!r}; give a tuple of values")
    if sweep.tune_by is not None:
        if not sweep.tune_by.startswith("validation/"):
            why = "values are chosen on the validation split, as validation/accuracy"
            add("tune_by", f"{sweep.tune_by!r}; {why}")
        if not any(grids.values()) and sweep.keep != "best":
            add("tune_by", f"{sweep.tune_by!r}, but nothing is tuned; leave it out")
    if sweep.tune_case is not None and sweep.tune_case not in sweep.cases:
        near = closest(sweep.tune_case, sweep.cases)
        add("tune_case", f"no case {sweep.tune_case!r}{near}")
    most = max(len(sweep.all_seeds), 1)
    if not 1 <= sweep.tune_seeds <= most:
        add("tune_seeds", f"{sweep.tune_seeds}; between 1 and {most} are possible")
    return problems


def folder_name(text: str) -> str:
    """Returns the folder name of an arm or a case below `by_arm/`.

    >>> folder_name("lora (rank 4)"), folder_name("..")
    ('lora (rank 4)', '__')
    """
    name = re.sub(r"[^\w .,=()+-]", "_", text)
    return "_" * len(name) if set(name) <= {"."} else name


def _name_problems(names: Sequence[tuple[str, str]]) -> list[Problem]:
    """Returns names that cannot be printed, or would have one folder below `by_arm/`.

    Args:
        names: What has the name, such as 'arm', and the name.
    """
    problems, found = [], dict[str, list[str]]()
    for kind, name in names:
        if not name.isprintable():
            text = f"{kind} {name!r}: a name is one line of printable text"
            problems.append(Problem(f"Sweep.{kind}s", text))
        found.setdefault(folder_name(name), []).append(f"{kind} {name!r}")
    return problems + [
        Problem(
            f"Sweep.{same[-1].partition(' ')[0]}s",
            f"{' and '.join(same)} would share the folder {folder!r}; rename one of them",
        )
        for folder, same in found.items()
        if len(same) > 1
    ]


def form_problems(sweep: Sweep) -> list[Problem]:
    """Returns fields of another type, which cannot be checked further."""
    problems = list(type_problems(sweep, "Sweep"))

    def check(key: str, is_right: bool, form: str) -> None:
        if not is_right:
            found = getattr(sweep, key)
            problems.append(Problem(f"Sweep.{key}", f"{found!r}; {form} is needed"))

    arms: Any = sweep.arms
    named = arms if isinstance(arms, Mapping) else {}
    is_right = bool(arms) and (
        all(isinstance(name, str) and _is_arm(arm) for name, arm in arms.items())
        if isinstance(arms, Mapping)
        else isinstance(arms, Sequence) and all(map(_are_overrides, arms))
    )
    form = "a dict of names and overrides, or a sequence of overrides"
    check("arms", is_right, form)
    for name, arm in named.items():
        if isinstance(arm, Arm):
            problems += type_problems(arm, f"Sweep.arms[{name!r}]")
    check("cases", bool(sweep.cases), "a dict of names and overrides")
    check(
        "seeds",
        _are_seeds(sweep.seeds),
        f"a number, or a sequence of numbers or dicts of {', '.join(SOURCES)}",
    )
    return problems


def _is_arm(given: Any) -> bool:
    is_config = hasattr(given, "to_dict")
    return isinstance(given, Arm) or is_config or _are_overrides(given)


def _are_seeds(given: Any) -> bool:
    if type(given) is int:
        return given >= 0
    is_sequence = isinstance(given, Sequence | range) and not isinstance(given, str)
    return is_sequence and all(_is_seed(given[i]) for i in range(len(given)))


def _are_overrides(given: Any) -> bool:
    try:
        return all(isinstance(key, str) for key in dict(given))
    except (TypeError, ValueError):
        return False


def _is_seed(given: Any) -> bool:
    if isinstance(given, Mapping):
        return set(given) <= set(SOURCES) and all(map(_is_seed, given.values()))
    return type(given) is int and given >= 0


def load(address: str) -> tuple[Sweep, str]:
    """Returns the sweep of a file FILE[:ARG], and its name.

    The name is that of the folder of a file `sweep.py`, of any other file its own; the
    argument follows.

    Raises:
        UserError: No such file, or one that fails or returns no sweep.
    """
    path, _, argument = address.partition(":")
    file = user_path(path, "--sweep")
    if not file.is_file():
        near = [str(p) for p in sorted(file.parent.glob("*.py"))]
        raise UserError(
            f"--sweep: no file {path!r}{closest(path, near)} "
            "A sweep is a Python file with get_sweep()."
        )
    try:
        found = plugins.execute(f"sweep_{file.stem}", file)
        if not hasattr(found, "get_sweep"):
            raise UserError(
                f"--sweep={path}: the file has no function get_sweep(); it returns the "
                "sweep, as in docs/ablations.md"
            )
        sweep = found.get_sweep(*([argument] if argument else []))
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        kind, where = type(error).__name__, _line_of(error, file)
        if argument and isinstance(error, ValueError):  # The file refuses the argument.
            raise UserError(f"--sweep={address}: {error}{where}") from error
        text = f"--sweep={address}: the file fails with {kind}: {error}{where}"
        raise UserError(text) from error
    if not isinstance(sweep, Sweep):
        raise UserError(f"--sweep={path}: get_sweep() returned a {type(sweep)}")
    raise_if(form_problems(sweep), f"--sweep={address}:")
    name = file.absolute().parent.name if file.stem == "sweep" else file.stem
    return sweep, "-".join(filter(None, (name, argument.replace("/", "_"))))


def _line_of(error: BaseException, file: pathlib.Path) -> str:
    """Returns the last line of a file that an error has passed, as text."""
    if isinstance(error, SyntaxError):
        return ""  # Its message has the line.
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(file)]
    return f" ({file}, line {lines[-1]})" if lines else ""


def base_of(given: Any) -> Any:
    """Returns the ConfigDict of a base config: a file's address, or the config itself.

    Raises:
        UserError: It is neither.
    """
    if isinstance(given, str | pathlib.PurePath):
        return loading.load(str(given))
    if not hasattr(given, "to_dict"):
        raise UserError(
            f"Sweep.base: {given!r}; give the address of a config file, or a ConfigDict"
        )
    return given
