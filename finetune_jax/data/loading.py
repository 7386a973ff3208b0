"""From `config.data` to a source: pictures and arrays, texts, or a table."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from finetune_jax.core import registry
from finetune_jax.core.errors import UserError
from finetune_jax.data import sources
from finetune_jax.data.shifts import shifted
from finetune_jax.data.source import Source, check_no_classes
from finetune_jax.data.tables.encoding import Fitted
from finetune_jax.data.tables.schema import table_options_of
from finetune_jax.data.tables.source import Table, format_of, load_table
from finetune_jax.data.text.files import load_texts
from finetune_jax.data.text.tokens import TextSpec, options_of


def load_source(name: str, directory: str | None) -> Source:
    """Returns the source that `config.data.name` names.

    Raises:
        UserError: No such source, or its data cannot be read.
    """
    module, _, argument = name.partition(":")
    found = registry.module(sources, module, "config.data.name")
    if not hasattr(found, "load"):
        raise UserError(
            f"config.data.name: {name!r} holds tables, which cannot stand here, or texts; "
            "name their columns in config.data.text, such as ('sentence',)"
        )
    source = found.load(directory, argument or None)
    # It may read all of the data.
    once = functools.cache(source.fingerprint)
    return dataclasses.replace(source, fingerprint=once)


def opened(
    config: Mapping[str, Any], tokenizer: str | None, fitted: Fitted | None = None
) -> tuple[Source, TextSpec | None, Table | None]:
    """Returns the source, and what is known of its texts or its columns, if any.

    Args:
        config: The section `config.data`.
        tokenizer: What a tokenizer.json holds, for texts.
        fitted: What a run has kept of a table; None infers its columns.

    Raises:
        UserError: No such source, its data cannot be read, or more is asked of it than
            it has.
    """
    kind = None if config["text"] else format_of(config["name"])
    options, text, table = options_of(config, table=kind is not None), None, None
    columns = table_options_of(config, kind)
    if options.text:
        source, text = load_texts(config["name"], config["dir"], options, tokenizer)
    elif kind is not None:
        table = load_table(
            config["name"], config["dir"], kind, columns, config["cache_dir"], fitted
        )
        source = table.source
    else:
        source = load_source(config["name"], config["dir"])
    if config["shift"]:
        source = shifted(source, config["shift"])
    if not source.class_names or options.labels == "tags":
        check_no_classes(source, config)
    return source, text, table
