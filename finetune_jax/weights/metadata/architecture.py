"""Compares a model with the network that the files beside its weights describe.

Names and shapes of tensors do not identify a network: they do not show heads, activations,
epsilons, padding and strides. transformers, timm and runs of this project have these in
`config.json`, exports in `model.json`. The module of each family
in `weights.layouts` reads their fields.
"""

import copy
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from finetune_jax.config import Config
from finetune_jax.config.members import labels_of, member_models
from finetune_jax.core.errors import UserError
from finetune_jax.core.paths import user_path
from finetune_jax.models import constructors
from finetune_jax.weights.fields import Fields, listed, loads, same
from finetune_jax.weights.layout import family_module
from finetune_jax.weights.metadata.files import read_beside

FILES = ("config.json", "model.json")
# Arguments that change the output of a model, but neither names nor shapes of tensors.
VARIANT = (
    "heads", "hidden_activation", "activation", "epsilon", "padding", "stride_in", "pool",
)  # fmt: skip
# Every file of transformers has at least one of these fields.
_OF_TRANSFORMERS = (
    "model_type", "architectures", "hidden_act", "num_attention_heads", "n_heads",
)  # fmt: skip
# Fields of timm's `model_args` without effect on the output, or visible in shapes.
_HARMLESS = (
    "num_classes", "in_chans", "img_size", "embed_dim", "depth", "depths", "dims",
    "patch_size", "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate",
    "attn_drop_rate", "drop_path_rate", "drop_block_rate", "bn_momentum", "weight_init",
    "fix_init", "zero_init_last", "head_init_scale", "dynamic_img_size", "strict_img_size",
    "pretrained", "checkpoint_path", "device", "dtype",
)  # fmt: skip


class Described(NamedTuple):
    """A model with pretrained weights.

    Attributes:
        where: Config key of the model, such as 'config.model'.
        prefix: Label of a member, or ''.
        model: Name and arguments of the model.
        address: Address of the weights.
    """

    where: str
    prefix: str
    model: Mapping[str, Any]
    address: str


def described(config: Config) -> Iterator[Described]:
    """Yields the models of a config that have their own weights."""
    if config.init.pretrained is not None:
        yield Described("config.model", "", config.model, config.init.pretrained)
    models = member_models(config.model)
    for index, label in enumerate(labels_of(config.model)):
        address = config.model.members[index].pretrained
        if address is not None:
            where = f"config.model.members[{index}]"
            yield Described(where, label, models[label], address)


def with_variants(config: Config) -> tuple[Config, list[str]]:
    """Returns the config with the arguments that files beside weights give its models.

    An argument is filled in only if the config does not give it and the constructor has
    another default.

    Args:
        config: Resolved config.

    Returns:
        The config, and lines about arguments that were filled in and unusable fields.

    Raises:
        UserError: Lists every field that the models do not support, or that contradicts
            the config.
    """
    problems, lines, full = [], [], config
    for one, fields, lacking, wrong in _findings(described(config), config.init.fresh):
        problems += _headed(one, wrong)
        lines += fields.notes
        if not lacking:
            continue
        full = copy.deepcopy(config) if full is config else full
        section = _section(full, one.where)
        with section.unlocked():
            section.update(lacking)
        told = ", ".join(f"{key}={value!r}" for key, value in lacking.items())
        lines.append(f"{one.where}: {told}, as {fields.where} says")
    if problems:
        raise _refusal(problems)
    return full, lines


def check(models: Iterable[Described], fresh: tuple[str, ...]) -> None:
    """Checks that models are the networks that the files beside their weights describe.

    Args:
        models: Models with weights, such as those that are `described` in a config.
        fresh: Regexes of parameters that keep their initial value.

    Raises:
        UserError: Lists every field that contradicts a model.
    """
    problems = []
    for one, fields, lacking, wrong in _findings(models, fresh):
        more = [
            f"{fields.where}: {fields.sources[key]}; {one.where}.{key}={value!r} follows it"
            for key, value in lacking.items()
        ]
        problems += _headed(one, wrong + more)
    if problems:
        raise _refusal(problems)


def _findings(
    models: Iterable[Described], fresh: tuple[str, ...]
) -> Iterator[tuple[Described, Fields, dict[str, Any], list[str]]]:
    """Yields models with the fields of their file, arguments they lack, and problems."""
    for one in models:
        if (fields := read(one.model, one.address)) is not None:
            yield one, fields, *_compared(one, fields, fresh)


def variant(model: Mapping[str, Any], address: str) -> tuple[dict[str, Any], list[str]]:
    """Returns the arguments that turn a model into the network of weights, and lines.

    Args:
        model: Name and arguments of the model.
        address: Address of the weights.

    Raises:
        UserError: Lists every field that the model does not support.
    """
    one = Described("--model", "", model, address)
    for _, fields, lacking, wrong in _findings([one], ()):
        if wrong:
            raise _refusal(_headed(one, wrong))
        told = [
            f"{key}={value!r}, as {fields.where} says" for key, value in lacking.items()
        ]
        return lacking, [*fields.notes, *told]
    return {}, []


def assumed(one: Described, layout: str) -> list[str]:
    """Returns a line about the assumed variant; none if a file describes it.

    Args:
        one: Model with its weights.
        layout: Name of the layout of the weights.
    """
    ambiguous = getattr(_family(one.model["name"]), "ambiguous", None)
    known = effective(one.model)
    if ambiguous is None or known is None:
        return []
    keys, why = ambiguous(layout, one.model["name"])
    fields = read(one.model, one.address)
    if fields is not None and list(fields):
        keys = [key for key in keys if key in fields.unsaid]
        missing = listed([fields.unsaid[key] for key in keys]) if keys else ""
        why = f"{fields.where} does not say {missing}" if keys else ""
    chosen = [key for key in keys if key not in one.model]
    if not why or (keys and not chosen):
        return []
    line = f"{one.address}: {why}; assumed: "
    if not keys:
        return [line + one.model["name"]]
    told = ", ".join(f"{key}={known[key]!r}" for key in chosen)
    return [
        f"{line}{told}; {listed([f'{one.where}.{k}' for k in chosen])} choose others"
    ]


def named(one: Described, arch: str, fresh: tuple[str, ...]) -> list[str] | None:
    """Returns lines about a network that is named in a checkpoint.

    Args:
        one: Model with its weights.
        arch: Name that a training program of timm or torchvision wrote, or ''.
        fresh: Regexes of parameters that keep their initial value.

    Returns:
        Lines; None if there is no name, or a file beside the weights describes the network.

    Raises:
        UserError: The model needs other arguments to be this network.
    """
    family = _family(one.model["name"])
    if not arch or not hasattr(family, "read_timm") or read(one.model, one.address):
        return None
    fields = Fields({"architecture": arch}, "the checkpoint")
    family.read_timm(
        fields, fields.within("model_args"), arch.split(".")[0], one.model["name"]
    )
    lacking, wrong = _compared(one, fields, fresh)
    if lacking:
        told = " and ".join(f"{one.where}.{key}={v!r}" for key, v in lacking.items())
        raise UserError(f"{one.address}: the checkpoint says arch={arch!r}; set {told}")
    if not wrong:
        return []
    name = one.model["name"]
    return [
        f"{one.address}: the checkpoint says arch={arch!r}, which is not known to be "
        f"{name}; it is taken for {name}"
    ]


def read(model: Mapping[str, Any], address: str) -> Fields | None:
    """Returns the fields of the first file beside weights that describes a network.

    Args:
        model: Name and arguments of our model.
        address: Address of the weights.

    Returns:
        The fields, with notes about unreadable files; None if no file describes a network.
    """
    notes: list[str] = []
    found = None
    for where, values in _files(address, notes):
        found = _read(model, values, where)
        if found is not None:
            break
    if found is None and notes:
        found = Fields({}, FILES[0])
    if found is not None:
        found.notes[:0] = notes
        found.notes += _pooling_notes(model, address)
    return found


def effective(model: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the arguments of `VARIANT` that a model has; None for an unknown model.

    Args:
        model: Name and arguments of the model.
    """
    known = constructors()
    if not isinstance(model["name"], str) or model["name"] not in known:
        return None
    parameters = inspect.signature(known[model["name"]][1]).parameters
    return {
        key: model[key] if key in model else parameters[key].default
        for key in VARIANT
        if key in parameters
    }


def _files(address: str, notes: list[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the JSON objects beside weights, with the names of their files."""
    for place in _places(address):
        for name in FILES:
            try:
                text = read_beside(place, name)
            except UserError as error:
                if not place.startswith("hf:"):  # The repository may not have it.
                    notes.append(f"{name}: {error}; it is not used")
                continue
            if text is None:
                continue
            try:
                values = loads(text)
            except ValueError as error:
                notes.append(f"{name}: cannot be read as JSON: {error}; it is not used")
                continue
            if isinstance(values, Mapping):
                yield name, values
            else:
                kind = type(values).__name__
                notes.append(f"{name}: a JSON {kind}, not an object; it is not used")


def _pooling_notes(model: Mapping[str, Any], address: str) -> list[str]:
    """Returns a line if the model pools tokens differently from sentence-transformers."""
    name, known = "1_Pooling/config.json", effective(model) or {}
    try:
        values = loads(read_beside(address, name) or "null")
    except (UserError, ValueError):
        return []
    if not isinstance(values, Mapping) or known.get("pool", "none") == "none":
        return []
    modes = [key for key, is_chosen in values.items() if is_chosen is True]
    modes = [key for key in modes if key.startswith("pooling_mode")]
    if not modes or (modes == ["pooling_mode_mean_tokens"] and known["pool"] == "mean"):
        return []
    return [f"{name}: {listed(modes)}, but config.model.pool is {known['pool']!r}"]


def _places(address: str) -> list[str]:
    """Returns the address, and for a checkpoint of a run also that of the run."""
    kind, _, place = address.partition(":")
    if kind != "orbax" or not place:
        return [address]
    folders = [user_path(place, "config.init.pretrained").absolute()]
    while folders[-1].name in ("state", "checkpoints") or folders[-1].name.isdigit():
        folders.append(folders[-1].parent)
    return [f"orbax:{folder}" for folder in folders]


def _read(
    model: Mapping[str, Any], values: Mapping[str, Any], where: str
) -> Fields | None:
    fields, name = Fields(values, where), model["name"]
    family = _family(name)
    inner = values.get("model")
    if isinstance(inner, Mapping) and isinstance(inner.get("name"), str):
        _of_ours(fields, model, inner)
        return fields
    timm = fields if values.get("architecture") is not None else None
    if timm is None and isinstance(values.get("pretrained_cfg"), Mapping):
        inner_fields = fields.within("pretrained_cfg")
        timm = inner_fields if inner_fields.get("architecture") is not None else None
    if timm is not None and hasattr(family, "read_timm"):
        if (architecture := timm.text("architecture")) is not None:
            arguments = fields.within("model_args")
            # Such as 'hf-hub:timm/resnet50.a1_in1k'.
            base = re.split("[:/]", architecture)[-1].split(".")[0]
            followed = family.read_timm(timm, arguments, base, name)
            _others(arguments, (*_HARMLESS, *followed))
        return fields
    of_transformers = set(_OF_TRANSFORMERS) & set(values)
    if of_transformers and hasattr(family, "TRANSFORMERS"):
        kind = _model_type(fields, family.TRANSFORMERS, name)
        if kind is not None:
            _common(fields)
            family.read_transformers(fields, kind, name)
        return fields
    return None


def _of_ours(
    fields: Fields, model: Mapping[str, Any], saved: Mapping[str, Any]
) -> None:
    """Reads the model of a run or an export of this project."""
    known = constructors()
    theirs, ours = effective(saved), effective(model)
    name = saved["name"]
    if theirs is None or ours is None or known[name][0] != known[model["name"]][0]:
        return
    for key, value in theirs.items():
        source = f"model.{key}={value!r} of {name}"
        if not isinstance(value, str | int | float):
            fields.notes.append(f"{fields.where}: {source} is no value; it is not used")
        elif key != "heads" or name == model["name"]:
            fields.take(key, value, key, source)


def _model_type(fields: Fields, known: Mapping[str, str], name: str) -> str | None:
    """Returns the kind of model in transformers, or records a refusal.

    Args:
        fields: Fields of the file.
        known: Prefix of transformers' class names, by the supported kinds.
        name: Name of our model.
    """
    kind, classes = fields.text("model_type"), fields.get("architectures")
    first = classes[0] if isinstance(classes, list) and classes else None
    first = re.sub(r"^(TF|Flax)", "", first) if isinstance(first, str) else None
    follows = f"{name} follows {listed(list(known))}"
    if kind is None and first is not None:
        # The longest prefix decides.
        fits = [k for k, p in known.items() if re.match(rf"{p}(For|Model|LM)", first)]
        if not fits:
            fields.refuse("architectures", follows)
            return None
        return fits[0]
    if kind is None:  # Files of older versions have no kind.
        older = "distilbert" if fields.get("n_heads") is not None else ""
        return older if older in known else next(iter(known))
    if kind not in known:
        fields.refuse("model_type", follows)
        return None
    if first is not None and not first.startswith(known[kind]):
        fields.notes.append(
            f"{fields.where}: {fields.said('architectures')} is no class of transformers' "
            f"{kind}; the weights are taken as those of {kind}"
        )
    return kind


def _common(fields: Fields) -> None:
    """Refuses fields of transformers that no model here supports."""
    fields.must("is_decoder", False, why="attention here has no causal mask")
    fields.must("add_cross_attention", False, why="there is no cross-attention")
    fields.must("quantization_config", why="quantised tensors are not read")
    fields.must("pruned_heads", {}, [], why="pruned heads are not followed")
    code = fields.get("auto_map")
    if isinstance(code, Mapping) and any(
        isinstance(key, str) and key.startswith("AutoModel") for key in code
    ):
        fields.refuse("auto_map", "code of its own computes this network")


def _others(arguments: Fields, followed: tuple[str, ...]) -> None:
    """Refuses every unsupported field of timm's `model_args`."""
    for key in arguments:
        if key not in followed and arguments.get(key) is not None:
            arguments.refuse(key, "this argument of timm is not followed")


def _compared(
    one: Described, fields: Fields, fresh: tuple[str, ...]
) -> tuple[dict[str, Any], list[str]]:
    """Returns the arguments that a model lacks, and lines about contradictions.

    Args:
        one: Model with its weights.
        fields: Fields of the file beside its weights.
        fresh: Regexes of parameters that keep their initial value.
    """
    known = constructors().get(one.model["name"])
    if known is None:
        return {}, []
    parameters = inspect.signature(known[1]).parameters
    lacking, wrong = {}, list(fields.refusals)
    for key, value in fields.arguments.items():
        given = key in one.model
        # 'mean_norm' has another name for its LayerNorm, so it must be known in any case.
        named = value == "mean_norm" and not given
        if key not in parameters or (_is_free(key, one, fresh) and not named):
            continue
        if same(one.model[key] if given else parameters[key].default, value):
            continue
        if given:
            wrong.append(
                f"{one.where}.{key}: {one.model[key]!r}, but {fields.where} says "
                f"{fields.sources[key]}; give {value!r}, or leave it out"
            )
        else:
            lacking[key] = value
    return lacking, wrong


def _is_free(argument: str, one: Described, fresh: tuple[str, ...]) -> bool:
    """Returns whether an argument only affects layers without loaded weights."""
    pools = (effective(one.model) or {}).get("pool", "cls")
    if argument == "activation" and pools != "cls":
        return True
    layer = {"pool": "head/logits/kernel", "activation": "pool/dense/kernel"}
    name = "/".join(filter(None, (one.prefix, layer.get(argument))))
    return argument in layer and any(re.fullmatch(p, name) for p in fresh)


def _headed(one: Described, wrong: list[str]) -> list[str]:
    """Returns lines under a line that names the model and its weights."""
    head = f"{one.where}.name: {one.model['name']!r}, with weights of {one.address}:"
    return [head, *(f"  {line}" for line in wrong)] if wrong else []


def _refusal(problems: list[str]) -> UserError:
    return UserError(
        *problems,
        header="config.model is another network than the one that the weights were "
        "trained for:",
        advice="Choose the model that the file describes. If the file belongs to other "
        "weights, put the weights into a folder of their own.",
    )


def _section(config: Config, where: str) -> Any:
    """Returns the section of a config with a key such as 'config.model.members[0]'."""
    _, _, index = where.rstrip("]").partition("[")
    return config.model.members[int(index)] if index else config.model


def _family(name: Any) -> Any:
    """Returns the module in `layouts` of the family of a model; None if it has none."""
    known = constructors().get(name) if isinstance(name, str) else None
    return family_module(known[0]) if known else None
