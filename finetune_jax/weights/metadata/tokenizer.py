"""Tokenizers beside the weights that were trained with them."""

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
# Further files of tokenizers of transformers and other programs.
BESIDE = (
    CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json",
    "merges.txt",
)  # fmt: skip
_KEY = "config.data.tokenizer"


def find_tokenizer(address: str | None, weights: str | None) -> str | None:
    """Returns the text of the tokenizer.json of a run; None if there is none.

    If there is only a vocab.txt, as for older BERTs, the tokenizer is made from it.

    Args:
        address: `config.data.tokenizer`, the address of the file or of its folder; None
            looks beside the weights.
        weights: `config.init.pretrained`.

    Raises:
        UserError: The file does not exist or cannot be read.
    """
    given = weights if address is None else address
    if given is None:
        return None
    kind, _, place = given.partition(":")
    if address is None and (kind not in READERS or not place):
        return None  # The error is reported when weights are read.
    registry.choose(READERS, kind, _KEY)
    error = None
    try:
        name = FILE
        if kind != "hf" and place.endswith(".json") and not place.endswith(INDEX):
            name = pathlib.PurePath(place).name  # The address of the file itself.
        if (found := read_beside(given, name)) is not None:
            return found
    except UserError as missing:
        error = missing  # The repository may have a vocabulary.
    beside = files_beside(address, weights)
    if "vocab.txt" in beside:
        return _made_of(beside["vocab.txt"], beside.get(CONFIG, "{}"))
    if address is None and error is None:
        return None
    raise error or UserError(f"{_KEY}: {address!r}: no {FILE} there")


def files_beside(address: str | None, weights: str | None) -> dict[str, str]:
    """Returns the texts of the other files of a tokenizer, by name.

    Args:
        address: `config.data.tokenizer`; None looks beside the weights.
        weights: `config.init.pretrained`.
    """
    given, found = weights if address is None else address, {}
    for name in BESIDE if given else ():
        try:
            text = read_beside(str(given), name)
        except UserError:  # The repository does not have it.
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
    """Returns a tokenizer.json made from a BERT vocabulary with one token in each line."""
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
