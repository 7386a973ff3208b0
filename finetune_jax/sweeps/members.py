"""Members of a sweep: resolved configs, and the hashes that name their workdirs."""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from finetune_jax.config import Config, flat, resolve, seeds, to_json
from finetune_jax.config.fields import plain
from finetune_jax.config.schema import NO_RESULT_DEPENDS_ON
from finetune_jax.core.errors import Problem, UserError
from finetune_jax.core.paths import user_path
from finetune_jax.core.registry import closest
from finetune_jax.plans.phase import Phase, as_config, plan_problems
from finetune_jax.report.tables import short_labels
from finetune_jax.sweeps.definition import Arm, Seed, Source, Sweep, base_of

# Beginning of the value of a config key that stands for the workdir of another member.
REFERENCE = "sweep:"
_KEY_LENGTH = 12
# A part of a key such as `plan[0].peak_lr`.
_PART = r"[^.\[\]]+|\[(?:\d+|\*)\]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """A run of a sweep.

    Attributes:
        key: Hash of its resolved config, the name of its workdir.
        config: Resolved config; references to other members are `sweep:KEY`.
        stage: 'source', 'tune', 'final' or 'trial'.
        arm: Name of its arm, or of the source.
        case: Name of its case.
        seed: Seed of each source of randomness.
        overrides: Values that differ from the base config, without the seed.
        tuned: Those of the keys that are tuned.
        needs: Keys of the members that must be finished before.
        trial: Number of its trial in a search.
    """

    key: str
    config: Config
    stage: str
    arm: str
    case: str
    seed: Seed
    overrides: Mapping[str, Any]
    tuned: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    needs: tuple[str, ...] = ()
    trial: int | None = None

    def runnable(self, root: pathlib.Path) -> Config:
        """Returns its config with the addresses of other members' workdirs.

        Args:
            root: Folder of the sweep.
        """
        if not self.needs:
            return self.config
        plain_config = json.loads(to_json(self.config))
        root = root.absolute()
        found, problems = resolve(
            _replaced(plain_config, lambda name: f"orbax:{root / name}")
        )
        assert not problems, problems
        return found

    @property
    def label(self) -> str:
        """Text that names it for a person."""
        numbers = sorted(set(dict(self.seed).values()))
        same = len(numbers) == 1
        by_source = ", ".join(f"{key} {value}" for key, value in self.seed)
        seed = f"seed {numbers[0]}" if same else f"seeds {by_source}"
        where = [self.case, self.arm] if self.trial is None else [f"trial {self.trial}"]
        if self.stage == "tune":
            labels = short_labels(list(self.tuned))
            where += [f"{k}={v!r}" for k, v in zip(labels, self.tuned.values())]
        stage = {"tune": "tuning ", "source": "source "}.get(self.stage, "")
        return f"{stage}{', '.join(filter(None, where))}, {seed}"

    def to_json(self) -> dict[str, Any]:
        """Returns what `result.json` and `sweep.json` say of it."""
        return {
            "stage": self.stage, "arm": self.arm, "case": self.case,
            "seed": dict(self.seed), "overrides": as_plain(self.overrides),
            "tuned": dict(self.tuned),
        } | ({} if self.trial is None else {"trial": self.trial})  # fmt: skip


def as_plain(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Returns overrides with dicts for phases and sections."""
    return {key: plain(_as_config(value)) for key, value in overrides.items()}


def member_key(config: Config) -> str:
    """Returns the hash of all values that a result depends on."""
    values = {
        key: value
        for key, value in flat({**config.to_dict(), "seed": seeds(config)}).items()
        if not any(key == k or key.startswith(f"{k}.") for k in NO_RESULT_DEPENDS_ON)
    }
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_KEY_LENGTH]


class Members:
    """Resolves the members of a sweep, each once."""

    def __init__(self, sweep: Sweep):
        """Takes the sweep."""
        self.sweep = sweep
        self._bases: dict[int, Any] = {}
        self._found: dict[Any, tuple[Member | None, list[Problem]]] = {}
        # Sources that are being resolved, each needed by the one before.
        self._open: list[str] = []

    def final(
        self, arm: str, case: str, seed: Seed, tuned: Mapping[str, Any], stage: str
    ) -> Member:
        """Returns the member of an arm.

        Args:
            arm: Name of the arm.
            case: Name of the case.
            seed: Seed of each source of randomness.
            tuned: Values of the keys that are tuned, or their names.
            stage: 'tune' or 'final'.
        """
        one = self.sweep.all_arms[arm]
        names = {"stage": stage, "arm": arm, "case": case, "tuned": tuned}
        identity = stage, arm, case, seed, repr(tuned)
        if identity in self._found:  # A worker asks for all of them after each run.
            return self._member(identity, None, {}, seed, names)
        named = tune_of(self.sweep, arm)
        values = {
            key: named[key][value] if isinstance(named.get(key), Mapping) else value
            for key, value in tuned.items()
        }
        overrides = {
            f"case {case!r}": self.sweep.cases[case],
            f"arm {arm!r}": one.overrides,
            "tune": values,
        }
        return self._member(identity, one.base, overrides, seed, names)

    def trial(self, number: int, seed: Seed, overrides: Mapping[str, Any]) -> Member:
        """Returns the member of a search's trial."""
        names: dict[str, Any] = {"stage": "trial", "arm": f"trial {number}", "case": ""}
        names |= {"trial": number}
        of_space = {"search.space": overrides}
        return self._member((number, seed), None, of_space, seed, names)

    def example(self, seed: Seed, overrides: Mapping[str, Any]) -> Member:
        """Returns a member with values of a search's space, to check its config."""
        names = {"stage": "trial", "arm": "search.space", "case": ""}
        identity, of_space = ("space", repr(overrides)), {"search.space": overrides}
        return self._member(identity, None, of_space, seed, names)

    def source(self, name: str, seed: Seed) -> Member:
        """Returns the member that is a source of weights for runs with a seed.

        Raises:
            UserError: The source needs itself, or its config is invalid.
        """
        if name in self._open:
            chain = " -> ".join([*self._open[self._open.index(name) :], name])
            text = f"{chain}: a source cannot start from itself"
            raise UserError(Problem("Sweep.sources", text))
        source: Source = self.sweep.sources[name]
        if not source.by_seed:
            seed = self.sweep.all_seeds[0]
        names = {"stage": "source", "arm": name, "case": ""}
        identity = "source", name, seed
        self._open.append(name)
        try:
            overrides = {f"source {name!r}": source.overrides}
            return self._member(identity, source.base, overrides, seed, names)
        finally:
            self._open.pop()

    def _member(
        self,
        identity: tuple,
        base: Any,
        overrides: Mapping[str, Mapping[str, Any]],
        seed: Seed,
        names: dict[str, Any],
    ) -> Member:
        """Returns a member, which is resolved once.

        Args:
            identity: Identity of the member in the cache.
            base: Its base config; None is that of the sweep.
            overrides: Overrides by where they are from, in the order of application.
            seed: Seed of each source of randomness.
            names: Further attributes of the member.

        Raises:
            UserError: Lists what is wrong with its config.
        """
        if identity not in self._found:
            self._found[identity] = self._made(base, overrides, seed, names)
        member, problems = self._found[identity]
        if member is None:
            case = names["case"] and f", case {names['case']!r}"
            header = f"{names['stage']} {names['arm']!r}{case}:"
            raise UserError(*problems, header=header)
        return member

    def _made(
        self,
        base: Any,
        overrides: Mapping[str, Mapping[str, Any]],
        seed: Seed,
        names: dict[str, Any],
    ) -> tuple[Member | None, list[Problem]]:
        given = self.sweep.base if base is None else base
        if id(given) not in self._bases:  # A file is executed once.
            self._bases[id(given)] = base_of(given)
        tree = _mutable(plain(self._bases[id(given)]))
        problems = _lost(overrides)
        merged = {k: v for part in overrides.values() for k, v in part.items()}
        for key, value in merged.items():
            if re.match(r"seed\b", key):
                text = f"{value!r}; `seeds` of the sweep gives each run its seed"
                problems.append(Problem(f"config.{key}", text))
                continue
            _set(tree, key, _mutable(plain(_as_config(value))), problems)
        values = dict(seed)
        is_one = len(set(values.values())) == 1
        tree["seed"] = next(iter(values.values())) if is_one else values
        needs: list[str] = []

        def key_of(name: str) -> str:
            if name not in self.sweep.sources:
                text = f"no source {name!r}{closest(name, self.sweep.sources)}"
                problems.append(Problem("Sweep.sources", text))
                return REFERENCE + name
            needs.append(self.source(name, seed).key)
            return REFERENCE + needs[-1]

        config, wrong = resolve(_replaced(tree, key_of))
        problems += wrong or plan_problems(config.plan)
        if config.population:
            text = "a member is one run; give its members as arms of the sweep"
            problems.append(Problem("config.population", text))
        if problems:
            return None, problems
        found = Member(
            key=member_key(config), config=config, seed=seed, overrides=merged,
            needs=tuple(needs), **names,
        )  # fmt: skip
        return found, []


def missing_data(members: Sequence[Member]) -> list[Problem]:
    """Returns folders and files of data that do not exist on this machine."""
    found: dict[Problem, str] = {}
    for member in members:
        data, also = member.config.data, member.config.evaluate.also
        places = {"config.data.dir": data.dir}
        places |= {
            f"config.data.domains[{k}].dir": d.dir for k, d in enumerate(data.domains)
        }
        places |= {f"config.evaluate.also[{k}].dir": a.dir for k, a in enumerate(also)}
        for key, place in places.items():
            if place is not None and not user_path(place, key).exists():
                problem = Problem(key, f"{place!r} does not exist on this machine")
                found.setdefault(problem, member.label)
    return [
        Problem(problem.key, f"{problem.text} ({label})")
        for problem, label in found.items()
    ]


def tune_of(sweep: Sweep, arm: str) -> Mapping[str, Any]:
    """Returns the values of the keys that are tuned for an arm; a mapping names them."""
    one: Arm = sweep.all_arms[arm]
    return sweep.tune if one.tune is None else one.tune


def _lost(overrides: Mapping[str, Mapping[str, Any]]) -> list[Problem]:
    """Returns overrides that later ones would replace without a word.

    Args:
        overrides: Overrides by where they are from, in the order of application.
    """
    given = [(what, key) for what, part in overrides.items() for key in _keys_of(part)]
    return [
        Problem(
            f"config.{key}", f"is also set by {what} ({other}); leave one of them out"
        )
        for place, (first, key) in enumerate(given)
        for what, other in given[place + 1 :]
        if _replaces(other, key, is_part=what != first)
    ]


def _replaces(key: str, earlier: str, *, is_part: bool) -> bool:
    """Returns whether setting a key replaces the value of an earlier one.

    >>> _replaces("plan[*].peak_lr", "plan[0].peak_lr", is_part=False)
    True
    >>> _replaces("plan[0].peak_lr", "plan[*].peak_lr", is_part=False)
    False

    Args:
        key: Key that is set.
        earlier: Key that was set before.
        is_part: Whether to count a value that is replaced in one phase of all.
    """
    own, others = (re.findall(_PART, one) for one in (key, earlier))
    return len(own) <= len(others) and all(
        one == other
        or (
            one[0] == other[0] == "[" and (one == "[*]" or (is_part and other == "[*]"))
        )
        for one, other in zip(own, others)
    )


def _keys_of(overrides: Mapping[str, Any]) -> list[str]:
    """Returns the keys that overrides set, those of a section one by one."""
    found = []
    for key, value in as_plain(overrides).items():
        if isinstance(value, dict):
            found += [f"{key}.{name}" for name in _keys_of(value)]
        else:
            found.append(key)
    return found


def _as_config(value: Any) -> Any:
    """Returns a plan as a config file has it, if a value is a plan of phases."""
    phases = (value,) if isinstance(value, Phase) else value
    is_plan = isinstance(phases, tuple | list) and len(phases) > 0
    if is_plan and all(isinstance(phase, Phase) for phase in phases):
        return as_config(phases)
    return value


def _mutable(value: Any) -> Any:
    """Returns a copy whose dicts, and tuples of dicts, can be changed."""
    if isinstance(value, dict):
        return {key: _mutable(item) for key, item in value.items()}
    if isinstance(value, tuple | list) and any(isinstance(v, dict) for v in value):
        return [_mutable(item) for item in value]
    return value


def _set(tree: dict[str, Any], key: str, value: Any, problems: list[Problem]) -> None:
    """Sets the value of a key such as `plan[0].peak_lr`; a dict changes keys.

    `plan[*].peak_lr` is the key of every phase.
    """
    if isinstance(value, dict):
        for name, item in value.items():
            _set(tree, f"{key}.{name}", item, problems)
        return
    *parts, last = re.findall(_PART, key) or [""]
    node: Any = tree
    for place, part in enumerate(parts):
        if part == "[*]" and isinstance(node, list):
            before, _, rest = key.partition(part)
            for index in range(len(node)):
                _set(tree, f"{before}[{index}]{rest}", value, problems)
            return
        if part.startswith("["):
            index = part[1:-1]
            size = len(node) if isinstance(node, list) else 0
            if not index.isdigit() or int(index) >= size:
                before = "".join(parts[:place])
                text = f"no entry {index}; config.{before} has {size or 'no'} entries"
                problems.append(Problem(f"config.{key}", text))
                return
            node = node[int(index)]
        else:
            # Sections that the base does not name have their defaults.
            if isinstance(node, dict) and node.get(part) is None:
                node[part] = {}
            node = node[part] if isinstance(node, dict) else None
        if not isinstance(node, dict | list):
            text = f"{'.'.join(parts[: place + 1])} is no section"
            problems.append(Problem(f"config.{key}", text))
            return
    if last.startswith("[") or not isinstance(node, dict):
        problems.append(Problem(f"config.{key}", "names no key"))
        return
    node[last] = value


def _replaced(value: Any, name: Callable[[str], str]) -> Any:
    """Returns a tree whose references `sweep:NAME` are replaced by `name(NAME)`."""
    if isinstance(value, dict):
        return {key: _replaced(item, name) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_replaced(item, name) for item in value)
    if isinstance(value, str) and value.startswith(REFERENCE):
        return name(value.removeprefix(REFERENCE))
    return value
