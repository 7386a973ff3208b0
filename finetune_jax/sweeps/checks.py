"""Checks of all members of a sweep before anything runs."""

from collections.abc import Sequence

from finetune_jax.config import Config
from finetune_jax.config.short import needed_devices
from finetune_jax.core.errors import Problem, collected
from finetune_jax.core.registry import closest
from finetune_jax.report.tables import first_of
from finetune_jax.sweeps.definition import Sweep
from finetune_jax.sweeps.members import Member
from finetune_jax.sweeps.schedule import tune_metric
from finetune_jax.training.setup import check_before_data, metric_names


def config_problems(
    sweep: Sweep, members: Sequence[Member], *, is_elsewhere: bool = False
) -> list[Problem]:
    """Returns what is wrong with configs as far as that needs no data, and with metrics.

    Args:
        sweep: The sweep.
        members: Members, each arm with its first seed.
        is_elsewhere: Whether members run on other devices than those of this process.
    """
    found: dict[str, list[str]] = {}
    for member in members:
        config = member.config
        if is_elsewhere:
            config = config.replaced(parallel={"devices": needed_devices(config)})
        wrong: list[Problem] = []
        with collected(wrong):
            check_before_data(config)
        if member.stage != "source":
            with collected(wrong):
                wrong += _metric_problems(sweep, member)
        texts = [str(problem) for problem in dict.fromkeys(wrong)]
        for text in texts:
            found.setdefault(text, []).append(member.label)
    return [
        Problem.of(f"{text} ({first_of(labels, most=1)})")
        for text, labels in found.items()
    ]


def _metric_problems(sweep: Sweep, member: Member) -> list[Problem]:
    """Returns metrics of the sweep that a member does not have."""
    wanted = {}
    if sweep.search is not None:
        wanted["search.metric"] = sweep.search.metric
    elif member.stage == "tune":
        wanted["tune_by"] = tune_metric(sweep, member)
    if sweep.search is None:
        wanted["metric"] = sweep.metric_of(member.arm)
    found = []
    for key, name in wanted.items():
        known = known_metrics(member.config, may_choose=key != "metric")
        if name not in known and not name.startswith(("distance/", "cka/")):
            text = (
                f"no run has {name!r}{closest(name, known)} There are "
                f"{', '.join(known) or 'none'}."
            )
            found.append(Problem(f"Sweep.{key}", text))
    return found


def known_metrics(config: Config, *, may_choose: bool) -> list[str]:
    """Returns the metrics that a run of a config measures, without those of classes.

    Args:
        config: Config of the run.
        may_choose: Whether to leave out metrics that must choose nothing: those of a
            domain without labels.
    """
    splits = [s for s in ("validation", "test") if config.data[s] is not None]
    domains = [domain.domain for domain in config.data.domains]
    for domain in config.data.domains:
        own = [s for s in ("validation", "test") if domain[s] is not None]
        splits += [s for s in own if s not in splits]
    names = metric_names(config)
    bare = [name for name in names if "/" not in name]
    if domains and not bare and not may_choose:
        bare = [*dict.fromkeys(name.rpartition("/")[2] for name in names)]
    found = [f"{split}/{name}" for split in splits for name in names]
    found += [
        f"{split}/{domain}/{name}"
        for split in splits
        for domain in domains
        for name in bare
    ]
    found += [f"{also.label}/{name}" for also in config.evaluate.also for name in bare]
    return list(dict.fromkeys(found))
