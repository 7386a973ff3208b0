"""The models of a task that has several, as `config.model.members` describes them.

The label of a member is the prefix of its parameter names. Keys that a member does not
give are those of `config.model`: all of them if it has the same name, otherwise classes,
head and low-rank updates.
"""

from collections.abc import Mapping
from typing import Any

from finetune_jax.config.schema import Config
from finetune_jax.core.metric_names import label_problem

# Keys of an entry that are no arguments of its model.
_OWN = ("label", "pretrained", "entry")


def labels_of(model: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the labels of the members, in order; the default is the name.

    Args:
        model: The section `config.model`.
    """
    return tuple(
        entry["label"] or entry["name"] or model["name"] for entry in model["members"]
    )


def member_models(model: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the section `model` of each member, by label.

    Args:
        model: The section `config.model`.
    """
    common = {key: model[key] for key in model if key != "members"}
    of_all = {k: v for k, v in common.items() if k in ("classes", "head")}
    of_all |= {k: v for k, v in common.items() if k.startswith("lora_")}
    found = {}
    for label, entry in zip(labels_of(model), model["members"]):
        given = {k: entry[k] for k in entry if k not in _OWN and entry[k] is not None}
        name = given.get("name", model["name"])
        inherited = common if name == model["name"] else of_all
        head = {**dict(common["head"]), **dict(given.get("head", {}))}
        found[label] = {**inherited, **given, "name": name, "head": head}
    return found


def weights_addresses(config: Config) -> dict[str, str]:
    """Returns the addresses of pretrained weights, by the prefix of the models.

    The prefix '' stands for all models: `config.init.pretrained`.
    """
    if config.init.pretrained is not None:
        return {"": config.init.pretrained}
    labelled = zip(labels_of(config.model), config.model.members)
    return {label: e.pretrained for label, e in labelled if e.pretrained is not None}


def weights_entries(config: Config) -> dict[str, str | None]:
    """Returns the entries of pretrained weights, by the prefix of the models."""
    labelled = zip(labels_of(config.model), config.model.members)
    return {"": config.init.entry, **{label: e.entry for label, e in labelled}}


def member_problems(config: Config, *, learn: bool) -> list[str]:
    """Returns wrong labels and addresses of the members.

    Args:
        config: Config of the run.
        learn: Whether the members are trained; otherwise they are teachers.
    """
    problems, labels = [], labels_of(config.model)
    for index, label in enumerate(labels):
        where = f"config.model.members[{index}]"
        if text := label_problem(label, labels[:index]):
            problems.append(f"{where}.label: {text}")
        both = config.model.members[index].pretrained, config.init.pretrained
        if both[0] is None and not learn:
            problems.append(
                f"{where}.pretrained: None; a teacher needs the address of its weights, "
                "or 'start', which is the model as the run begins with it"
            )
        if None not in both and learn:
            problems.append(
                f"{where}.pretrained: {both[0]!r}, and config.init.pretrained, from which "
                f"all members begin, {both[1]!r}; give one or the other"
            )
    return problems
