"""Counts of tokens that tell whether a tokenizer and its texts fit each other."""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

# Share of unknown tokens above which a line tells them.
_LARGE = 0.2


@dataclasses.dataclass(kw_only=True)
class TokenCounts:
    """Counts of the tokens of encoded texts.

    Attributes:
        longest: `config.data.max_tokens`, for messages.
        unknown_id: Id of all unknown tokens; -1 if the tokenizer has none.
        texts: Number of texts.
        cut: Number of texts that were cut.
        empty: Number of texts without tokens besides special ones.
        tokens: Number of tokens besides special ones.
        unknown: Number of unknown tokens.
    """

    longest: int
    unknown_id: int
    texts: int = 0
    cut: int = 0
    empty: int = 0
    tokens: int = 0
    unknown: int = 0

    def add(self, encodings: Iterable[Any]) -> None:
        """Adds encoded texts."""
        for one in encodings:
            tokens = len(one.ids) - sum(one.special_tokens_mask)
            self.texts += 1
            # `overflowing` copies the tokens cut off, so only long texts are asked.
            self.cut += len(one.ids) >= self.longest and len(one.overflowing) > 0
            self.empty += not tokens
            self.tokens += tokens
            self.unknown += one.ids.count(self.unknown_id)

    def add_windows(self, ids: Iterable[np.ndarray]) -> None:
        """Adds the ids of windows of passages, which are cut by intention."""
        for one in ids:
            self.tokens += len(one)
            self.unknown += int(np.sum(one == self.unknown_id))

    def lines(self) -> list[str]:
        """Returns a line about texts that were cut, and lines about unknown tokens."""
        found = []
        if self.cut:
            found.append(
                f"{self.cut:,} of {self.texts:,} texts are cut to {self.longest} tokens "
                "(config.data.max_tokens)"
            )
        if self.unknown > _LARGE * self.tokens:
            found.append(
                f"config.data.tokenizer: {self.unknown / self.tokens:.0%} of the tokens "
                "are unknown to the tokenizer; look whether it is of the texts' language "
                "and of the weights"
            )
        if self.empty:
            found.append(
                f"config.data.tokenizer: {self.empty:,} of {self.texts:,} texts have no "
                "tokens, as the tokenizer leaves out all of their characters"
            )
        return found


def counts_for(encoder: Any, longest: int) -> TokenCounts:
    """Returns counts of no texts.

    Args:
        encoder: From `texts.make_encoder`.
        longest: `config.data.max_tokens`.
    """
    if hasattr(encoder.model, "unk_token"):
        token = encoder.model.unk_token
        found = None if token is None else encoder.token_to_id(token)
    else:  # Unigram has an id, of which Python knows nothing.
        found = json.loads(encoder.to_str())["model"].get("unk_id")
    return TokenCounts(longest=longest, unknown_id=-1 if found is None else found)
