"""The models of a task that has several, as `config.model.members` describes them.

The label of a member is what the names of its parameters begin with. What a member does
not say is what `config.model` says: all of it if it has the same name, otherwise of
classes, head and low-rank updates.
"""

import re
from collections.abc import Mapping
from typing import Any

from finetune_jax.config.schema import Config
from finetune_jax.core.metric_names import RESERVED

# Of an entry, not of its model.
_OWN = ("label", "pretrained", "entry")


def labels_of(model: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the labels of the members, in order; they are names where none is given.

    Args:
        model: The section `config.model`.
    """
    return tuple(
        entry["label"] or entry["name"] or model["name"] for entry in model["members"]
    )


def member_models(model: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns what describes each member, as `config.model` would a model, by label.

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
    """Returns the address of the weights that models begin with, by their prefix.

    Under '' are weights of all models: `config.init.pretrained`.
    """
    if config.init.pretrained is not None:
        return {"": config.init.pretrained}
    labelled = zip(labels_of(config.model), config.model.members)
    return {label: e.pretrained for label, e in labelled if e.pretrained is not None}


def weights_entries(config: Config) -> dict[str, str | None]:
    """Returns the entry that is taken of the weights of models, by their prefix."""
    labelled = zip(labels_of(config.model), config.model.members)
    return {"": config.init.entry, **{label: e.entry for label, e in labelled}}


def member_problems(config: Config, *, learn: bool) -> list[str]:
    """Returns what is wrong with the labels and addresses of the members.

    Args:
        config: Of the run.
        learn: Whether the members do; otherwise they teach.
    """
    problems, seen = [], set()
    for index, label in enumerate(labels_of(config.model)):
        where = f"config.model.members[{index}]"
        if not re.fullmatch("[a-z0-9_]+", label):
            problems.append(
                f"{where}.label: {label!r}; a-z, 0-9 and _ are what it may have"
            )
        elif label in RESERVED:
            problems.append(
                f"{where}.label: {label!r} names other metrics; choose another"
            )
        elif label in seen:
            problems.append(f"{where}.label: {label!r} twice; give each its own label")
        seen.add(label)
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
