"""The answer of a comparison, in numbers and in words."""

import dataclasses
import math
from typing import Literal

from finetune_jax.core.metric_names import higher_is_better, is_bounded
from finetune_jax.sweeps import statistics

Verdict = Literal["better", "worse", "open", "too few"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """The difference between two groups of runs in one metric.

    Attributes:
        metric: Name of the metric.
        ours: Mean of our runs, over the pairs.
        theirs: Mean of their runs.
        estimate: Difference, ours minus theirs, with its interval.
        improvement: Probability that one of our runs is better than theirs with the same
            seed, on these examples; None for one pair.
        seed_p_value: p-value of the sign-flip test over seeds, which assumes no
            distribution; it cannot be below `statistics.smallest_p_value(pairs)`.
        level: Coverage of intervals.
        same_seed: Whether pairs have the same seed; two single runs may differ in it.
        adjusted: p-value that is adjusted for the number of comparisons; None for one.
        more_seeds: Number of further seeds with which a difference of this size is found
            with a probability of 80 %; None if unknown or if no number is enough.
        more_examples: Number of further test examples, likewise.
        detectable: Smallest difference that is found with a probability of 80 %.
        notes: Lines about what limits the comparison.
    """

    metric: str
    ours: float
    theirs: float
    estimate: statistics.Estimate
    improvement: statistics.Improvement | None
    seed_p_value: float
    level: float
    same_seed: bool = True
    adjusted: float | None = None
    more_seeds: int | None = None
    more_examples: int | None = None
    detectable: float = math.nan
    notes: tuple[str, ...] = ()

    @property
    def difference(self) -> float:
        """Ours minus theirs."""
        return self.estimate.mean

    @property
    def low(self) -> float:
        """Lower end of the interval of the difference."""
        return self.estimate.low

    @property
    def high(self) -> float:
        """Upper end of the interval of the difference."""
        return self.estimate.high

    @property
    def p_value(self) -> float:
        """Two-sided p-value of the difference being 0, not adjusted."""
        return self.estimate.p_value

    @property
    def pairs(self) -> int:
        """Number of pairs of runs."""
        return self.estimate.seeds

    @property
    def examples(self) -> int:
        """Number of test examples; 1 if the metric is compared over seeds alone."""
        return self.estimate.examples

    @property
    def verdict(self) -> Verdict:
        """Whether ours is better or worse, or that is open, or there are too few seeds."""
        p_value = self.p_value if self.adjusted is None else self.adjusted
        if math.isnan(p_value):
            return "too few"
        if p_value > 1 - self.level:
            return "open"
        is_better = (self.difference > 0) == higher_is_better(self.metric)
        return "better" if is_better else "worse"

    def sentence(self, names: tuple[str, str]) -> str:
        """Returns the answer in words.

        Args:
            names: Names of ours and of theirs.
        """
        ours, theirs = names
        verdict = self.verdict
        seeds = f"{self.pairs} seed{'s' if self.pairs > 1 else ''}"
        over = f"{seeds}, {self.examples:,} examples" if self.examples > 1 else seeds
        if verdict == "too few":
            return self._no_test(f"{ours} and {theirs}")
        size = self._interval()
        p_value = self.p_value if self.adjusted is None else self.adjusted
        told = f"p {_p(p_value)}" + (" adjusted" if self.adjusted is not None else "")
        if verdict == "open":
            if self.p_value <= 1 - self.level:
                told += ", the interval is not"
            answer = f"{ours} and {theirs} are not told apart: {size} [{over}, {told}]"
            return "; ".join((answer, *self._what_would()))
        answer = f"{ours} is {verdict} than {theirs} by {size} [{over}, {told}]"
        if self.pairs > 1:
            return answer
        also = "" if self.same_seed else ", whose seeds differ too"
        return (
            f"{answer}; this holds for these two trained models on these examples, not "
            f"for their settings{also}"
        )

    def _no_test(self, both: str) -> str:
        """Returns the sentence of a comparison without a p-value.

        Args:
            both: Names of ours and of theirs.
        """
        size = self.number(abs(self.difference))
        if self.pairs > 1:
            return (
                f"no test is possible: {both} differ by {size} in each of {self.pairs} "
                "seeds, so the spread of the differences is unknown"
            )
        return (
            f"too few seeds for a test: {both} differ by {size} in 1 seed, and "
            f"{self.metric} is compared without its spread over examples; 2 seeds are "
            "the least, 5 are better"
        )

    def _interval(self) -> str:
        """Returns the size of the difference with its interval."""
        mean, low, high = self.difference, self.low, self.high
        which = "better" if (mean >= 0) == higher_is_better(self.metric) else "worse"
        if mean < 0:
            mean, low, high = -mean, -high, -low
        unit = " points" if self.in_points else ""
        told = f" {which}" if self.verdict == "open" else ""
        numbers = [self.number(value, unit="") for value in (mean, low, high)]
        return f"{numbers[0]}{unit}{told} ({numbers[1]} to {numbers[2]})"

    @property
    def in_points(self) -> bool:
        """Whether the metric is a share, whose differences are told in hundredths."""
        return is_bounded(self.metric)

    def number(self, value: float, unit: str | None = None) -> str:
        """Returns a difference as text, with as many digits as its interval justifies.

        Args:
            value: The difference, or an end of its interval.
            unit: Text after the number; None is that of the metric.
        """
        scale = 100 if self.in_points else 1
        width = (self.high - self.low) * scale
        if not width or not math.isfinite(width):
            width = abs(value) * scale or 1.0
        least = 1 if self.in_points else 0
        digits = max(least, 1 - math.floor(math.log10(1.25 * width)))
        text = f"{round(value * scale, digits) + 0.0:.{digits}f}".replace("-", "−")
        return text + (" points" if self.in_points and unit is None else unit or "")

    def _what_would(self) -> list[str]:
        """Returns how many seeds or examples would tell this difference from 0."""
        true = "if the true difference is this one, about"
        if self.more_seeds:
            s = "s" if self.more_seeds > 1 else ""
            first = (
                f"{true} {self.more_seeds:,} more seed{s} would find it 4 times in 5"
            )
        elif self.pairs == 1:
            first = "more seeds are needed to know how much training varies"
        elif self.more_examples:
            first = "no number of seeds would tell on these test examples"
        elif self.examples == 1:
            first = f"not even {statistics.MAX_SEEDS:,} seeds would tell"
        else:
            first = "neither more seeds alone nor more test examples alone would tell"
        found = [first]
        if self.more_examples and not self.more_seeds:
            found.append(
                f"{true} {self.more_examples:,} more test examples would find it 4 "
                "times in 5"
            )
        if self.in_points and self.detectable > 1:
            lacking = "seeds" if self.pairs > 1 else "examples"
            found.append(f"too few {lacking} to tell any difference")
        elif not math.isnan(self.detectable):
            found.append(
                f"differences from {self.number(self.detectable)} are found 4 times in 5"
            )
        return found


def _p(p_value: float) -> str:
    """Returns a p-value with two digits and its relation."""
    return "< 0.0001" if p_value < 1e-4 else f"= {p_value:.2g}"
