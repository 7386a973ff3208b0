"""The description of data that the rest of the program works with."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_jax.core.errors import listed, raise_if
from finetune_jax.data.kind import kind_named
from finetune_jax.data.labels import class_name

# Kinds of labels with names: the field of the names, and a noun for messages.
NAMES = {
    "classes": ("class_names", "classes"),
    "numbers": ("targets", "targets"),
    "masks": ("pixel_classes", "classes of pixels"),
}
# Most names in a line.
_SHOWN = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Shape, labels and preprocessing of the examples.

    Attributes:
        kind: Name of the kind of data, a folder in `data/`.
        shape: Shape of one example's inputs as the model takes them.
        train_shape: Shape of a training example before augmentation.
        dtype: 'uint8', 'int32' or 'float32'.
        inputs: The kind's own part, such as a `TextSpec`.
        class_names: Names of the classes, in the order of the labels.
        targets: Names of the numbers to predict, where there are no classes.
        pixel_classes: Names of the classes of a mask's pixels, where images have masks.
        train_counts: Training examples of each class, one number where there are no
            classes; empty where it is unknown.
        augment: Steps of augmentation in training.
        mix: Ways of mixing examples in training.
        labelled: Whether updates get labels.
        share: Examples of a domain in one update, where there are several domains.
        domains: Spec of each domain by its name; empty where there is one data set.
            All other fields then are those of the first domain, but `train_counts`, one
            number, and `augment` and `mix`, which are empty.
    """

    kind: str
    shape: tuple[int, ...]
    train_shape: tuple[int, ...]
    dtype: str
    inputs: Any
    class_names: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    pixel_classes: tuple[str, ...] = ()
    train_counts: tuple[int, ...] = ()
    augment: tuple = ()
    mix: tuple = ()
    labelled: bool = True
    share: int = 0
    domains: "Mapping[str, DataSpec]" = dataclasses.field(default_factory=dict)

    @property
    def labels(self) -> str:
        """Kind of the labels: 'classes', 'numbers', 'masks', or one of the data's own."""
        return getattr(self.inputs, "labels", None) or (
            "numbers" if self.targets else "masks" if self.pixel_classes else "classes"
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes, of the numbers to predict, or of the pixels' classes."""
        return self.class_names or self.targets or self.pixel_classes

    @property
    def outputs(self) -> str:
        """Number and kind of what is predicted, for messages, such as '10 classes'."""
        return f"{len(self.names)} {NAMES.get(self.labels, NAMES['classes'])[1]}"

    def describe_labels(self, counts: Sequence[int]) -> str:
        """Returns the classes with their counts, or what else is predicted.

        Args:
            counts: Training examples of each class; may be of another length if unknown.
        """
        if self.labels == "numbers":
            return f"predicted numbers: {listed(self.targets, _SHOWN)}"
        if not self.class_names and not self.pixel_classes:
            return f"predicted: {self.inputs.predicted}"
        shown = list(self.names)
        are_known = len(counts) == len(shown) and bool(self.class_names)
        if are_known:
            shown = [f"{name} ({n:,})" for name, n in zip(shown, counts)]
        line = f"{self.outputs}: {listed(shown, _SHOWN)}"
        if len(shown) > _SHOWN and are_known:
            line += f", {min(counts):,} to {max(counts):,} examples each"
        return line

    @property
    def train_examples(self) -> int:
        """Examples in the training split."""
        return sum(self.train_counts)

    def why_not_repeated(self, views: int | None) -> str | None:
        """Returns why inputs differ in every update; None if an update may repeat them.

        Args:
            views: Augmented versions of each example; None augments in every update.
        """
        if self.mix:
            return "config.data.mix makes others in every update"
        if self.augment and views is None:
            return (
                "config.data.augment makes others in every update; "
                "config.data.cache_views=K keeps K versions of each"
            )
        return None

    def to_json(self) -> dict[str, Any]:
        """Returns the description for a manifest."""
        fields = {field.name for field in dataclasses.fields(self)} - {"inputs"}
        plain = {name: getattr(self, name) for name in sorted(fields)}
        plain["domains"] = {name: of.to_json() for name, of in self.domains.items()}
        return plain | kind_named(self.kind).inputs_to_json(self)


def spec_from_json(plain: Mapping[str, Any], section: Mapping[str, Any]) -> DataSpec:
    """Returns the spec that `to_json` wrote.

    Args:
        plain: Entry 'data' of a manifest.
        section: `config.data` of the run, which counts for the keys that it has.

    Raises:
        ValueError, TypeError, KeyError: `plain` is damaged.
    """
    fields = {field.name for field in dataclasses.fields(DataSpec)} - {"inputs"}
    known: dict[str, Any] = {k: as_tuples(plain[k]) for k in fields & plain.keys()}
    # The preprocessing of domains is in their own entries.
    known["domains"] = {
        name: spec_from_json(domain, {**section, **domain})
        for name, domain in plain.get("domains", {}).items()
    }
    known["kind"] = kind = plain.get("kind") or _former_kind(plain)
    known |= {key: as_tuples(section[key]) for key in ("augment", "mix")}
    spec = DataSpec(**known, inputs=kind_named(kind).inputs_from_json(plain, section))
    shapes = (*spec.shape, *spec.train_shape)
    if not (
        all(type(size) is int and size > 0 for size in shapes)
        and len(spec.shape) == len(spec.train_shape)
        and len(spec.shape) in (1, 2, 3)
        and spec.dtype in ("uint8", "float32", "int32")
        and all(
            isinstance(names, tuple) and all(isinstance(name, str) for name in names)
            for names in (spec.class_names, spec.targets, spec.pixel_classes)
        )
        and all(type(count) is int for count in spec.train_counts)
    ):
        raise ValueError("not the description of data")
    return spec


def _former_kind(plain: Mapping[str, Any]) -> str:
    """Returns the kind of data of a manifest that does not name it, as former ones."""
    if plain.get("text") is not None:
        return "text"
    if plain.get("table") is not None:
        return "tables"
    return "images" if len(plain["shape"]) == 3 else "vectors"


def check_reads_alike(spec: DataSpec, plain: Mapping[str, Any], where: str) -> None:
    """Checks that data are read as a run has read them.

    Args:
        spec: Description of the data today.
        plain: The former description, as `to_json` wrote it.
        where: Start of the message.

    Raises:
        UserError: Classes, their order, or the values of images are read otherwise.
    """
    problems = _read_otherwise(spec, plain)
    for name, own in spec.domains.items():
        then = plain.get("domains", {}).get(name, {})
        problems += [f"domain {name!r}: {text}" for text in _read_otherwise(own, then)]
    raise_if(
        problems,
        f"{where}: the data are not read as the run has read them:",
        "Bring the data back, or train again.",
    )


def _read_otherwise(spec: DataSpec, plain: Mapping[str, Any]) -> list[str]:
    problems = []
    for key, _ in NAMES.values():
        then, now = plain.get(key), getattr(spec, key)
        # Former versions did not strip names, nor write 1.0 as 1.
        if then is not None and [*map(class_name, then)] != [*map(class_name, now)]:
            problems.append(
                f"{key}: {', '.join(now)[:200]}; {', '.join(then)[:200]} then"
            )
    dtype = plain.get("dtype", spec.dtype)
    scale = (plain.get("pixels") or {}).get("scale")
    pixels = getattr(spec.inputs, "pixels", None)
    now = pixels and pixels.scale
    # Former versions did not write the scale, and took floats as they are.
    is_other = scale != now if scale else now == "255" and "dtype" in plain
    if dtype != spec.dtype or is_other:
        told = f" ({now})" if now else ""
        problems.append(f"images: {spec.dtype}{told}; {dtype} then")
    return problems


def as_tuples(value: Any) -> Any:
    """Returns a value of JSON with tuples for its lists."""
    return tuple(map(as_tuples, value)) if isinstance(value, list | tuple) else value
