"""The tokenizer of texts: it lies beside the weights that were trained with it."""

import json
import pathlib
from collections.abc import Mapping

from finetune_jax.core import registry
from finetune_jax.core.errors import UserError
from finetune_jax.core.text_lines import lines_of
from finetune_jax.weights.addresses import READERS
from finetune_jax.weights.formats.shards import INDEX
from finetune_jax.weights.metadata.files import read_beside

FILE = "tokenizer.json"
CONFIG = "tokenizer_config.json"
# What transformers and other programs have besides.
BESIDE = (
    CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json",
    "merges.txt",
)  # fmt: skip
_KEY = "config.data.tokenizer"


def find_tokenizer(address: str | None, weights: str | None) -> str | None:
    """Returns what the tokenizer.json of a run's texts holds; None if there is none.

    Where there is a vocab.txt only, as of older BERTs, it is made of that.

    Args:
        address: `config.data.tokenizer`: of the file, or of a folder that has it.
        weights: `config.init.pretrained`, beside which it is looked for.

    Raises:
        UserError: Nothing is at the address, or nothing that can be read.
    """
    given = weights if address is None else address
    if given is None:
        return None
    kind, _, place = given.partition(":")
    if address is None and (kind not in READERS or not place):
        return None  # What is wrong with it is said where weights are read.
    registry.choose(READERS, kind, _KEY)
    error = None
    try:
        name = FILE
        if kind != "hf" and place.endswith(".json") and not place.endswith(INDEX):
            name = pathlib.PurePath(place).name  # The file itself.
        if (found := read_beside(given, name)) is not None:
            return found
    except UserError as missing:
        error = missing  # Of the hub, which may have a vocabulary.
    beside = files_beside(address, weights)
    if "vocab.txt" in beside:
        return _made_of(beside["vocab.txt"], beside.get(CONFIG, "{}"))
    if address is None and error is None:
        return None
    raise error or UserError(f"{_KEY}: {address!r}: no {FILE} there")


def files_beside(address: str | None, weights: str | None) -> dict[str, str]:
    """Returns what the other files of a tokenizer hold, by name; those that are there.

    Args:
        address: As `find_tokenizer` takes it.
        weights: Likewise.
    """
    given, found = weights if address is None else address, {}
    for name in BESIDE if given else ():
        try:
            text = read_beside(str(given), name)
        except UserError:  # No such file in a repository.
            continue
        if text is not None:
            found[name] = text
    return found


def kept_files(folder: pathlib.Path) -> dict[str, str]:
    """Returns the texts of a tokenizer's files in a workdir, by name; {} without one."""
    if not (folder / FILE).is_file():
        return {}
    address = f"file:{folder}"
    found = find_tokenizer(address, None)
    assert found is not None
    return {FILE: found, **files_beside(address, None)}


def _made_of(vocabulary: str, config: str) -> str:
    """Returns the tokenizer.json of a BERT that has one token a line."""
    from tokenizers import BertWordPieceTokenizer

    try:
        found: Mapping = json.loads(config)
        lowercase = bool(found.get("do_lower_case", True))
        tokens = lines_of(vocabulary, "vocab.txt")
        made = BertWordPieceTokenizer(
            {token: place for place, token in enumerate(tokens)},
            lowercase=lowercase,
            strip_accents=found.get("strip_accents"),
            handle_chinese_chars=bool(found.get("tokenize_chinese_chars", True)),
        )
        return made.to_str()
    except Exception as error:  # The library raises plain exceptions.
        raise UserError(f"{_KEY}: vocab.txt is no vocabulary: {error}") from error
