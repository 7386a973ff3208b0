"""Texts as a kind of data."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from finetune_jax.core.errors import UserError, raise_if
from finetune_jax.core.paths import printable
from finetune_jax.data.array_inputs import shown
from finetune_jax.data.dataset import Data, Dataset
from finetune_jax.data.kind import (
    Example,
    FileRule,
    Kind,
    Opened,
    Prepared,
    Resources,
    suffix_rule,
)
from finetune_jax.data.reading.threads import attempts
from finetune_jax.data.spec import DataSpec, as_tuples
from finetune_jax.data.text.decoding import decoded
from finetune_jax.data.text.files import inputs_of, load_texts, read_texts
from finetune_jax.data.text.source import check_texts, text_inputs
from finetune_jax.data.text.tokens import (
    Rows,
    TextLengths,
    TextOptions,
    TextSpec,
    make_encoder,
    options_of,
)

# In the workdir.
TOKENIZER = "tokenizer.json"


class Text(Kind):
    """Texts of one or two sentences: ids and sentence numbers, int32 [2, T]."""

    keys = (
        "label",
        "labels",
        "header",
        "max_tokens",
        "overlap",
        "buckets",
        "tokenizer",
    )
    absent = "config.data.text names no columns"
    can_mix = False
    weight_keys = ()

    def claims(self, section: Mapping[str, Any]) -> bool:
        """Returns whether columns of texts are named."""
        return bool(section["text"])

    def open(self, section: Mapping[str, Any], resources: Resources) -> Opened:
        """Returns the texts that `config.data` describes, as tokens."""
        options, tokenizer = options_of(section), resources.tokenizer()
        source, spec = load_texts(section["name"], section["dir"], options, tokenizer)
        shape = next(iter(source.splits.values())).shape
        assert shape is not None and tokenizer is not None

        def prepare(train: np.ndarray) -> Prepared:
            return Prepared(
                source=source,
                shape=shape,
                train_shape=shape,
                inputs=spec,
                files=lambda: {TOKENIZER: tokenizer, **resources.tokenizer_files()},
            )

        return Opened(kind="text", source=source, prepare=prepare)

    def inputs_from_json(self, plain: Mapping[str, Any], section: Mapping) -> TextSpec:
        """Returns the options and the vocabulary."""
        text = plain["text"]
        options = {key: as_tuples(value) for key, value in text["options"].items()}
        return TextSpec(**{**text, "options": TextOptions(**options)})

    def inputs_to_json(self, spec: DataSpec) -> dict[str, Any]:
        """Returns the options and the vocabulary."""
        return {"text": dataclasses.asdict(spec.inputs)}

    def reader(
        self, spec: DataSpec, section: Mapping[str, Any], workdir: pathlib.Path
    ) -> "TextReader":
        """Returns the reader of texts with the run's tokenizer."""
        path = workdir / TOKENIZER
        try:
            tokenizer = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--workdir: {path}, the tokenizer of the run, cannot be read: {error}"
            ) from error
        return TextReader(spec=spec, tokenizer=tokenizer)

    def describe(self, spec: DataSpec) -> str:
        """Returns the length of the texts."""
        return f"texts of at most {spec.shape[-1]} tokens"

    def examples(
        self, data: Data, dataset: Dataset, positions: np.ndarray
    ) -> list[Example] | None:
        """Returns texts as the tokenizer decodes them, passages as they were read."""
        texts = data.files().get(TOKENIZER)
        if texts is None:
            return None
        encoder = make_encoder(texts, data.spec.inputs.options.max_tokens)
        return decoded(encoder, data.spec.inputs.options, dataset, positions)

    def lengths(self, spec: DataSpec) -> TextLengths:
        """Returns how batches are cut to their longest text."""
        return TextLengths(options=spec.inputs.options)

    def serving_spec(self, spec: DataSpec) -> DataSpec:
        """Returns the spec of texts of `max_tokens`, longer than the run may have had."""
        shape = (spec.shape[0], spec.inputs.options.max_tokens)
        return dataclasses.replace(spec, shape=shape, train_shape=shape)

    def serving_shape(self, spec: DataSpec) -> tuple[int | str, ...]:
        """Returns the shape of texts of any length."""
        return spec.shape[0], "t"

    def serving_inputs(self, spec: DataSpec) -> dict[str, Any]:
        """Returns how many sentences and tokens a text has."""
        options = spec.inputs.options
        return {
            "text": {
                "sentences": len(options.text),
                "max_tokens": options.max_tokens,
                "tokenizer": TOKENIZER,
            }
        }

    def random_inputs(self, spec: DataSpec, count: int) -> np.ndarray:
        """Returns ids of tokens, all of the first sentence."""
        ids = super().random_inputs(spec, count)[:, 0] % spec.inputs.vocabulary
        return np.stack([ids, np.ones_like(ids)], 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextReader:
    """Reader of texts to predict.

    Attributes:
        spec: Description of the run's data.
        tokenizer: Text of the run's tokenizer.json.
    """

    spec: DataSpec
    tokenizer: str

    @property
    def options(self) -> TextOptions:
        """Options of the run's texts."""
        return self.spec.inputs.options

    @property
    def files(self) -> FileRule:
        """Files of texts."""
        return suffix_rule(inputs_of(self.options), "texts")

    @functools.cached_property
    def encoder(self) -> Any:
        """The tokenizer."""
        return make_encoder(self.tokenizer, self.options.max_tokens)

    def read(
        self, paths: Sequence[pathlib.Path], errors: list[UserError | None]
    ) -> Iterator[tuple[list[str], Dataset]]:
        """Yields the names of texts and the texts, file by file."""
        for path in paths:
            (found, error), *_ = attempts(self._read, [path])
            errors.append(error)
            if error is None:
                rows, dataset = found
                yield [f"{path}#{line}" for line in rows.lines], dataset

    def _read(self, path: pathlib.Path) -> tuple[Rows, Dataset]:
        rows = read_texts(path, self.options)
        dataset, lines = text_inputs(rows, self.spec, self.encoder)
        for line in lines:
            print(f"warning: {printable(f'{path}: {line}')}")
        return rows, dataset

    def convert(self, given: Any) -> tuple[bool, list[tuple[Sequence[int], Dataset]]]:
        """Returns whether `given` is a single text, and texts with their positions."""
        alone, columns = isinstance(given, str | Mapping), self.options.text
        texts = [given] if alone else list(given)
        types = (str, Mapping) if len(columns) == 1 else (Mapping,)
        problems = [
            f"input {place}: {shown(item)}"
            for place, item in enumerate(texts)
            if not isinstance(item, types)
        ]
        takes = "texts, or dicts with" if str in types else "dicts with"
        named = " and ".join(map(repr, columns))
        raise_if(problems, f"The model takes {takes} {named}:")
        rows = Rows(
            where="inputs",
            columns=columns,
            cells=[{columns[0]: t} if isinstance(t, str) else t for t in texts],
            lines=range(len(texts)),
            unit="number",
        )
        check_texts(rows, self.options)
        dataset, _ = text_inputs(rows, self.spec, self.encoder)
        return alone, [(range(len(texts)), dataset)]


KIND = Text()
