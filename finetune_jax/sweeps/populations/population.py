"""Populations: runs of one model on the same data, with other rates, decays and seeds.

On CPU the members train in turn in one process; each has the bits of a single run. On an
accelerator as many as fit train side by side, one vmapped call making an update of each,
and metrics agree with single runs up to rounding. Members share data, cached features,
initialisation and compiled programs, so they cost little more than their updates. Only the
best member's states are written to the disk.
"""

import dataclasses
import functools
import json
import math
import pathlib
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_jax import config as configs
from finetune_jax.config import Config, plugins
from finetune_jax.core.errors import (
    NotFinite,
    TrainingError,
    UserError,
    raise_if,
)
from finetune_jax.core.files import write_json, write_text
from finetune_jax.core.metric_names import is_better
from finetune_jax.core.pytrees import digest
from finetune_jax.data.dataset import Data
from finetune_jax.data.kind import weight_keys
from finetune_jax.evaluation import per_example
from finetune_jax.evaluation.diagnostics import open_domains
from finetune_jax.evaluation.other_domains import Domain
from finetune_jax.features.cache import FeatureStore
from finetune_jax.parallel import processes
from finetune_jax.parallel.executor import DeviceExecutor, Executor
from finetune_jax.plans.phase import plan_problems
from finetune_jax.report.tables import short_labels
from finetune_jax.report.terminal import Terminal
from finetune_jax.report.workdir import (
    check_same_run,
    locked,
    make_folder,
    read_json,
    read_manifest,
)
from finetune_jax.sweeps.populations.summary import write_population_report
from finetune_jax.sweeps.populations.table import as_csv, table
from finetune_jax.sweeps.populations.vectorised import (
    VectorisedExecutor,
    members_at_once,
)
from finetune_jax.tasks.objectives.metrics import loss_beside
from finetune_jax.training.assembly import (
    make_evaluator,
    make_fixed,
    make_loop,
    make_store,
)
from finetune_jax.training.checkpoints.checkpoint import Checkpoints
from finetune_jax.training.checkpoints.held import HeldCheckpoints
from finetune_jax.training.initial.starting_state import run_data
from finetune_jax.training.loop import Preempted
from finetune_jax.training.preemption import Stop
from finetune_jax.training.progress import Progress
from finetune_jax.training.restore import best_state
from finetune_jax.training.run import (
    check_processes,
    data_of_run,
    inputs_of,
    make_result,
    record,
    tell,
)
from finetune_jax.training.setup import Setup, check_before_data, make_setup
from finetune_jax.training.summary import write_report
from finetune_jax.weights.metadata.preprocessing import with_weight_defaults

# Keys that members may override: all others decide the data, the model or the metrics.
ALLOWED = (
    r"seed(\.\w+)?|plan\[\d+\]\.\w+(\.\w+)?|init\.(schemes|fresh)"
    r"|task\.label_smoothing"
)


def member_configs(config: Config) -> list[Config]:
    """Returns the config of each member as a run of its own.

    Raises:
        UserError: Lists everything that is wrong with the population.
    """
    found, problems, seen = [], list[str](), {}
    wrong_by_text: dict[str, list[int]] = {}
    if config.evaluate.best is None:
        problems.append(
            "config.evaluate.best: None; name the metric that chooses the best member"
        )
    plain = {**json.loads(configs.to_json(config)), "population": ()}
    for index, overrides in enumerate(config.population):
        where = f"config.population[{index}]"
        if not _are_pairs(overrides):
            problems.append(f"{where}: {overrides!r}; pairs (key, value) are needed")
            continue
        problems += [
            f"{where}: {key!r}; members can differ in seed, plan[i].KEY, init.schemes, "
            "init.fresh and task.label_smoothing"
            for key, _ in overrides
            if not re.fullmatch(ALLOWED, key)
        ]
        texts = [(k, v if isinstance(v, str) else repr(v)) for k, v in overrides]
        member, wrong = configs.resolve(plain, texts)
        wrong = wrong or plan_problems(member.plan)
        for text in map(str, wrong):
            wrong_by_text.setdefault(text, []).append(index)
        same = seen.setdefault(configs.to_json(member), index)
        if same != index and not wrong:
            problems.append(f"{where}: the same as config.population[{same}]")
        found.append(member)
    problems += _by_member(wrong_by_text)
    raise_if(problems)
    return found


def choice_warning(members: Sequence[Config]) -> str | None:
    """Returns a warning if the members are chosen by losses that cannot be compared."""
    best = members[0].evaluate.best or ""
    smoothing = {member.task.get("label_smoothing", 0.0) for member in members}
    if len(smoothing) == 1 or not best.endswith("loss"):
        return None
    return (
        f"config.evaluate.best: {best!r} chooses among members with different "
        "task.label_smoothing, which changes the loss itself; better choose "
        "'validation/cross_entropy', with 'cross_entropy' in config.task.metrics"
    )


def _by_member(problems: Mapping[str, Sequence[int]]) -> list[str]:
    """Returns a line for each problem, with the members that have it.

    >>> _by_member({"config.plan[0].steps: 0": [0, 1, 2]})
    ['config.population[0]: config.plan[0].steps: 0 (3 members)']
    """
    return [
        f"config.population[{members[0]}]: {text}"
        + (f" ({len(members)} members)" if len(members) > 1 else "")
        for text, members in problems.items()
    ]


def _are_pairs(overrides: Any) -> bool:
    return isinstance(overrides, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)
        for pair in overrides
    )


def run_population(
    config: Config, workdir: pathlib.Path, stop: Stop | None = None
) -> dict[str, Any]:
    """Trains all unfinished members, and returns the content of `result.json`.

    Args:
        config: Resolved.
        workdir: Workdir of the population; its finished members are not trained again.
        stop: Whether to stop, asked after every call; None never stops.

    Raises:
        UserError: The population cannot be run, or the workdir holds another run.
        TrainingError: No member could be trained to its end.
        Preempted: The population was asked to stop; finished members stay finished.
    """
    begin, terminal = time.perf_counter(), Terminal()
    plugins.ready(config.plugins, workdir)
    check_before_data(config)
    config, notes = with_weight_defaults(config, weight_keys(config.data))
    check_same_run(workdir, config)
    members = member_configs(config)
    setup = make_setup(config, data_of_run(config, workdir))
    domains = open_domains(setup.config, setup.data)
    setups = member_setups(setup, members)
    start, loaded = setup.start(measure=False)
    told = tell(setup, domains, loaded, notes, terminal)
    if text := choice_warning(members):
        terminal.warn(text)
    inputs = inputs_of(setup, domains, loaded)
    check_processes(setup, inputs, start)
    processes.agreed("the workdir", lambda: make_folder(workdir))
    with locked(workdir):
        record(workdir, setup, inputs, told)
        population = _Population(
            config=config, setups=setups, workdir=workdir, domains=domains,
            stop=stop or Stop(), terminal=terminal, store=make_store(setup, terminal),
            executor=DeviceExecutor(devices=setup.devices),
        )  # fmt: skip
        results = population.run()
        best = population.best(results)
        if best is None:
            raise TrainingError(
                f"All members failed, the first: {results[0]['failed']}"
            )
        population.report(best, results[best])
        rows = table(config.population, results, config.evaluate.best or "")
        seconds = time.perf_counter() - begin
        result = results[best] | {
            "member": best, "population": rows, "wall_s": seconds
        }  # fmt: skip
        if processes.is_first():
            write_text(workdir / "table.csv", as_csv(rows))
            write_population_report(setup, results, result, workdir)
            write_json(workdir / "result.json", result)
    return result


def member_setups(
    setup: Setup, members: list[Config], *, decode: bool = True
) -> list[Setup]:
    """Returns the setup of each member; members share the data.

    Args:
        setup: Setup of the population.
        members: Config of each member.
        decode: Whether to decode examples into memory, as `data.memory_gb` allows.

    Raises:
        UserError: Lists overrides that do not fit the model or the data.
    """
    drawn: dict[int | None, Data] = {}
    setups, problems = [], dict[str, list[int]]()
    for index, member in enumerate(members):
        # The seed of the order draws the examples of `per_class` too.
        few = member.data.per_class is not None
        seed = configs.seeds(member)["order"] if few else None
        if seed not in drawn:
            data = setup.data
            if seed not in (None, configs.seeds(setup.config)["order"]):
                data = run_data(member)
            limit = member.data.memory_gb * 1e9
            drawn[seed] = data.in_memory(limit) if decode else data
        try:
            setups.append(make_setup(member, drawn[seed], like=setup))
        except UserError as error:
            for problem in error.problems:
                problems.setdefault(str(problem), []).append(index)
    raise_if(_by_member(problems))
    return setups


@dataclasses.dataclass(kw_only=True)
class _Population:
    """Members in training.

    Attributes:
        config: Config of the population.
        setups: Setup of each member.
        workdir: Workdir of the population.
        domains: Other domains, on which members are measured too.
        stop: Whether to stop.
        terminal: Terminal that a person reads.
        store: Cache of features.
        executor: Runs the programs of all members; made for the members that are left.
    """

    config: Config
    setups: list[Setup]
    workdir: pathlib.Path
    domains: tuple[Domain, ...]
    stop: Stop
    terminal: Terminal
    store: FeatureStore | None
    executor: Executor

    def run(self) -> list[dict[str, Any]]:
        """Returns the result of each member, trained before or now.

        If a member's loss was not finite, its result has only 'failed', the message.

        Raises:
            TrainingError: A member cannot go on for another reason.
            Preempted: The population was asked to stop.
        """
        found: list[dict[str, Any] | None] = processes.agreed(
            "finished members",
            lambda: [read_json(self._folder(n) / "result.json") for n in self._numbers],
        )
        done = sum(result is not None for result in found)
        if done:
            self.terminal.say(f"{done} of {len(found)} members are finished")
        self._keep_best(found)  # A kill may have left states of others.
        left = [number for number in self._numbers if found[number] is None]
        for chunk in self._chunks(left):
            works = [functools.partial(self._finish, number, found) for number in chunk]
            if isinstance(self.executor, VectorisedExecutor):
                self.executor.run(works)
                continue
            for work in works:
                work()
        return [result for result in found if result is not None]

    def _chunks(self, left: list[int]) -> list[list[int]]:
        """Returns the groups of members that train side by side, and sets the executor."""
        most = members_at_once([self.setups[number] for number in left]) if left else 1
        if most == 1 or len(left) == 1:
            return [left]
        size = -(-len(left) // -(-len(left) // most))  # All about as large.
        self.executor = VectorisedExecutor(size, self.setups[0].devices)
        self.setups = [
            dataclasses.replace(setup, devices=self.executor.devices)
            for setup in self.setups
        ]
        self.terminal.say(f"{size} members train side by side")
        return [left[begin : begin + size] for begin in range(0, len(left), size)]

    def _finish(self, number: int, results: list[dict[str, Any] | None]) -> None:
        """Trains a member, and adds its result to the others."""
        results[number] = self._train(number, results)
        self._tell(number, results)
        self._keep_best(results)

    def _keep_best(self, results: Sequence[Mapping[str, Any] | None]) -> None:
        """Removes the states of all finished members but the best."""
        if not processes.is_first():
            return
        best = self.best(results)
        for other in self._numbers:
            if other != best and results[other] is not None:
                folder = self._folder(other) / "checkpoints"
                shutil.rmtree(folder, ignore_errors=True)

    @property
    def _numbers(self) -> range:
        return range(len(self.setups))

    def _folder(self, number: int) -> pathlib.Path:
        return self.workdir / "members" / f"{number:03d}"

    @property
    def _metric(self) -> str:
        assert self.config.evaluate.best is not None
        return self.config.evaluate.best

    def best(self, results: Sequence[Mapping[str, Any] | None]) -> int | None:
        """Returns the number of the best finished member.

        Ties go to the lower loss, then to the lower number.
        """
        best, highest, lowest = None, None, math.inf
        for number, result in enumerate(results):
            if result is None or "failed" in result:
                continue
            value = result["best"][self._metric]
            loss = result["best"].get(loss_beside(self._metric), math.inf)
            wins_tie = value == highest and loss < lowest
            if best is None or wins_tie or is_better(self._metric, value, highest):
                best, highest, lowest = number, value, loss
        return best

    def _tell(self, number: int, results: Sequence[Mapping[str, Any] | None]) -> None:
        result = results[number]
        assert result is not None
        done = sum(other is not None for other in results)
        overrides = dict(self.config.population[number])
        labels, values = short_labels(list(overrides)), overrides.values()
        if "failed" in result:
            found = "failed"
        else:
            best = " (best so far)" if self.best(results) == number else ""
            found = f"{self._metric} {result['best'][self._metric]:.4f}{best}"
        self.terminal.say(
            f"member {number:03d}, {done} of {len(results)} finished  {found}  "
            + "  ".join(
                f"{label}={value!r}"
                for label, value in zip(labels, values, strict=True)
            )
        )

    def _terminal_of(self, number: int) -> Terminal:
        """Returns the terminal of a member, which shows progress alone."""
        return Terminal(quiet=True, label=f"member {number:03d}", parent=self.terminal)

    def _train(
        self, number: int, results: Sequence[Mapping[str, Any] | None]
    ) -> dict[str, Any]:
        """Returns the result of a member, and writes its folder, the result last."""
        begin, setup = time.perf_counter(), self.setups[number]
        if self.stop.agreed():
            raise Preempted(f"stopped before member {number:03d}")
        folder = self._folder(number)
        processes.agreed(f"member {number:03d}", lambda: self._renew(number))
        start, _ = setup.start()
        if processes.count() > 1:  # Some schemes run the model in each process.
            values = {"initial state": digest(start)}
            name = f"member {number:03d}"
            raise_if(processes.differing(name, values), "The processes differ:")
        evaluator = make_evaluator(
            setup, start, self.domains, executor=self.executor, store=self.store
        )
        held = HeldCheckpoints(keep=setup.config.checkpoint.keep)
        loop = make_loop(
            setup, evaluator, make_fixed(setup, start, self.domains), held,
            (setup.with_ema(start), Progress()),
            workdir=folder, terminal=self._terminal_of(number), stop=self.stop,
        )  # fmt: skip
        try:
            state = loop.run()
            if isinstance(self.executor, VectorisedExecutor):
                urgent = dataclasses.replace(evaluator, executor=self.executor.urgent())
                loop.evaluator = urgent
            result, _, scores = make_result(loop, state, begin)
            if processes.is_first():
                per_example.write(folder, scores)
        except Preempted as error:
            raise Preempted(f"stopped in member {number:03d}") from error
        except NotFinite as error:
            result = {"failed": str(error)}
        finally:
            loop.log.close()
        results = [*results[:number], result, *results[number + 1 :]]
        if self.best(results) == number:
            held.write(folder / "checkpoints")
        if processes.is_first():
            write_json(folder / "result.json", result)
        return result

    def _renew(self, number: int) -> None:
        """Makes the folder of a member, without an unfinished attempt."""
        folder = self._folder(number)
        shutil.rmtree(folder, ignore_errors=True)
        make_folder(folder)
        self._record(folder, self.setups[number].config)

    def report(self, number: int, result: Mapping[str, Any]) -> None:
        """Writes the report of a member whose states are on the disk."""
        setup, folder = self.setups[number], self._folder(number)
        best, _ = best_state(setup, folder, self.domains)
        checkpoints = Checkpoints(folder / "checkpoints", keep=1, read_only=True)
        progress = checkpoints.progress(checkpoints.steps()[-1])
        checkpoints.close()
        write_report(setup, best, progress, result, folder)

    def _record(self, folder: pathlib.Path, config: Config) -> None:
        """Writes config and manifest of a member, as for a single run."""
        plain = json.loads(configs.to_json(config))
        seed = plain.pop("seed")
        manifest = read_manifest(self.workdir) or {}
        write_json(
            folder / "manifest.json", {**manifest, "config": plain, "seed": seed}
        )
        plugins.hand_over(self.workdir, folder)
        write_text(folder / "config.json", configs.to_json(config))
