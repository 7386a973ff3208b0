"""Type-checked fields of a JSON file that describes a network."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

# Our activations with their names in transformers; exports write the first.
ACTIVATIONS = {
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": (
        "gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate",
        "gelu_python_tanh", "gelu_tanh",
    ),
    "quick_gelu": ("quick_gelu",),
    "relu": ("relu",),
    "silu": ("silu", "swish"),
    "tanh": ("tanh",),
}  # fmt: skip
# Names in timm of the mean over all places, and of a model without a head.
MEAN_POOLS = ("avg", "fast", "fastavg", "")
_LONGEST = 80


class Fields:
    """Values of a JSON file, and the model arguments that a family reads from them.

    Attributes:
        where: Name of the file, for messages.
        arguments: Arguments of our constructor, by name.
        sources: Field and value that each argument comes from.
        refusals: Lines about fields that our models do not support.
        unsaid: Missing fields, by the argument that they would give.
        notes: Lines about unusable fields.
    """

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = ""):
        """Takes the values of a file.

        Args:
            values: The JSON object.
            where: Name of the file.
            prefix: Names of the enclosing objects, such as 'model_args.'.
        """
        self.where = where
        self.arguments: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.refusals: list[str] = []
        self.unsaid: dict[str, str] = {}
        self.notes: list[str] = []
        self._values, self._prefix = values, prefix

    def within(self, key: str) -> "Fields":
        """Returns the fields of an inner object, which share the results of this one."""
        inner = self.get(key)
        if inner is not None and not isinstance(inner, Mapping):
            self.useless(key, "an object")
        inner = inner if isinstance(inner, Mapping) else {}
        found = Fields(inner, self.where, f"{self._prefix}{key}.")
        for name in ("arguments", "sources", "refusals", "unsaid", "notes"):
            setattr(found, name, getattr(self, name))
        return found

    def get(self, key: str) -> Any:
        """Returns a value of any type; None if it is missing."""
        return self._values.get(key)

    def __iter__(self):
        """Iterates over the names of the fields."""
        return iter(self._values)

    def said(self, key: str) -> str:
        """Returns a field and its value, for messages."""
        text = repr(self.get(key))
        short = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
        return f"{self._prefix}{key}={short}"

    def text(self, key: str) -> str | None:
        """Returns a string; None if it is missing or not a string."""
        value = self.get(key)
        if value is None or isinstance(value, str):
            return value
        self.useless(key, "a string")
        return None

    def useless(self, key: str, wanted: str, argument: str | None = None) -> None:
        """Notes that a field has the wrong type.

        Args:
            key: Name of the field.
            wanted: The right type.
            argument: Argument that the field would give, if any.
        """
        if argument is not None:
            self.unsaid[argument] = f"{self._prefix}{key}"
        self.notes.append(
            f"{self.where}: {self.said(key)} is not {wanted}; it is not used"
        )

    def refuse(self, key: str, why: str) -> None:
        """Records that our models do not support a field."""
        self.refusals.append(f"{self.where}: {self.said(key)}; {why}")

    def is_model(self, architecture: str, name: str) -> bool:
        """Returns whether timm's name is our name of a model; records a refusal if not."""
        if architecture != name:
            why = f"{name} follows no other model of timm than {name}"
            self.refuse("architecture", why)
        return architecture == name

    def must(self, key: str, *allowed: Any, why: str = "") -> None:
        """Refuses a field whose value is not among those allowed.

        Args:
            key: Name of the field, which may be missing.
            *allowed: Allowed values.
            why: Reason; by default, the first allowed value.
        """
        value = self.get(key)
        if isinstance(value, list):
            value = value[0] if value and all(v == value[0] for v in value) else value
        if value is not None and value not in allowed:
            self.refuse(key, why or f"the model here has {allowed[0]!r}")

    def musts(self, allowed: Mapping[str, tuple]) -> tuple[str, ...]:
        """Refuses fields whose values are not allowed, and returns the names of all."""
        for key, values in allowed.items():
            self.must(key, *values)
        return tuple(allowed)

    def take(self, argument: str, value: Any, key: str, source: str = "") -> None:
        """Records an argument of our constructor.

        Args:
            argument: Name of the argument.
            value: Value of the argument.
            key: Field that it comes from.
            source: Field and value, for messages; by default those of `key`.
        """
        self.arguments[argument] = value
        self.sources[argument] = source or self.said(key)

    def whole(self, argument: str, key: str) -> None:
        """Takes an argument from a field that is a positive integer."""
        value = self._known(argument, key)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is int and 0 < value < 2**31:
            self.take(argument, value, key)
        elif value is not None:
            self.useless(key, "a positive integer", argument)

    def positive(self, argument: str, key: str) -> None:
        """Takes an argument from a field that is a positive number."""
        value = self._known(argument, key)
        if type(value) in (int, float) and 0 < value < 1e30:
            self.take(argument, float(value), key)
        elif value is not None:
            self.useless(key, "a positive number", argument)

    def activation(self, argument: str, key: str) -> None:
        """Takes an argument from a field that names an activation as transformers does."""
        value = self._known(argument, key)
        if value is None:
            return
        for ours, theirs in ACTIVATIONS.items():
            if isinstance(value, str) and value.lower() in theirs:
                self.take(argument, ours, key)
                return
        known = ", ".join(name for names in ACTIVATIONS.values() for name in names)
        self.refuse(key, f"the activations that can be followed are {known}")

    def _known(self, argument: str, key: str) -> Any:
        value = self.get(key)
        if value is None:
            self.unsaid[argument] = f"{self._prefix}{key}"
        return value


def same(ours: Any, theirs: Any) -> bool:
    """Returns whether two values of an argument are the same number or name.

    >>> same(1e-12, 1.0000000000000002e-12), same("gelu", "relu"), same(1, True)
    (True, False, False)
    """
    numbers = all(type(value) in (int, float) for value in (ours, theirs))
    if numbers:
        return math.isclose(ours, theirs, rel_tol=1e-5)
    return type(ours) is type(theirs) and ours == theirs


def loads(text: str) -> Any:
    """Returns the value of a JSON text, which may begin with a byte order mark.

    Raises:
        ValueError: The text is not JSON, or nested too deep.
    """
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def listed(names: Sequence[str]) -> str:
    """Returns names joined for a sentence.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
