"""Several data sets at once: `config.data.domains`, and what an update takes of each.

Every domain has its own source, splits, preprocessing and order. A batch is a dict of the
domains' batches, {'digits': {'inputs': ...}, 'fashion': {'inputs': ...}}: examples of
domains may differ in shape and number. The examples of a domain, their order and their
random keys depend on the seed and the domain's own name alone, not on the other domains.
"""

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from finetune_jax.config.schema import OF_DOMAIN
from finetune_jax.core.errors import (
    Problem,
    UserError,
    collected,
    raise_if,
    under,
)
from finetune_jax.core.metric_names import RESERVED
from finetune_jax.data.batches import LocalRows, loaded, local_part
from finetune_jax.data.dataset import Data, Dataset, make_data
from finetune_jax.data.kind import kind_named, kind_of
from finetune_jax.data.order import Order, training_order

# Other names of metrics and parameters.
_NAMES = (*RESERVED, "loss", "head")


def domain_seed(seed: int, domain: str) -> int:
    """Returns the seed of a domain's examples."""
    return (seed + zlib.crc32(domain.encode())) % 2**32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draw:
    """The part of a domain in an update.

    Attributes:
        examples: Examples in an update that has the domain.
        sampling: 'uniform' or 'balanced'.
        labelled: Whether they come with labels.
    """

    examples: int
    sampling: str
    labelled: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class DomainMixture:
    """The same split of several domains.

    Attributes:
        parts: By domain.
        draws: Part of an update, by domain; domains without one are not trained on.
        takes_turns: Whether an update has one domain only, each in its turn.
    """

    parts: Mapping[str, Dataset]
    draws: Mapping[str, Draw] = dataclasses.field(default_factory=dict)
    takes_turns: bool = False

    def __len__(self) -> int:
        """Returns the number of examples of all domains."""
        return sum(map(len, self.parts.values()))

    @property
    def nbytes(self) -> int:
        """Bytes that keeping all examples in memory takes; 0 if they are there already."""
        return sum(part.nbytes for part in self.parts.values())

    def in_memory(self, *, lazily: bool = False) -> "DomainMixture":
        """Returns the split with all examples decoded.

        Args:
            lazily: As in `Dataset.in_memory`.

        Raises:
            UserError: Lists the examples that cannot be read.
        """
        parts, problems = {}, list[Problem]()
        for name, part in self.parts.items():
            with collected(problems), under(f"domain {name!r}"):
                parts[name] = part.in_memory(lazily=lazily)
        raise_if(problems)
        return dataclasses.replace(self, parts=parts)

    def messages(self) -> dict[str, str]:
        """Returns messages about examples that could not be read so far, by name."""
        return {
            f"{domain}: {name}": message
            for domain, part in self.parts.items()
            for name, message in part.messages().items()
        }

    def orders(self, seed: int) -> dict[str, Order]:
        """Returns the order of training of each domain that is trained on."""
        return {
            name: training_order(
                self.parts[name].label, domain_seed(seed, name), draw.sampling
            )
            for name, draw in self.draws.items()
        }

    def examples_of(self, update: int, orders: Mapping[str, Order]) -> list[str]:
        """Returns the names of an update's examples, each with its domain's."""
        return [
            f"{domain}: {self.parts[domain].name(int(row))}"
            for domain, rows in self._rows(update, orders).items()
            for row in rows
        ]

    def batch(
        self,
        update: int,
        orders: Mapping[str, Order],
        micro_batches: int = 1,
        local_rows: LocalRows = None,
    ) -> dict[str, dict[str, Any]]:
        """Returns the batch of an update, arrays [n, ...] by domain.

        A domain without labels has no 'label'.

        Args:
            update: Counted from the beginning of the run.
            orders: From `orders`.
            micro_batches: Number of micro-batches.
            local_rows: Rows of a micro-batch that this process needs.
        """
        found = {}
        for domain, rows in self._rows(update, orders).items():
            mine = local_part(len(rows), micro_batches, local_rows)
            batch = self.parts[domain].take(rows[mine])
            batch["position"] = np.arange(len(rows), dtype=np.int32)[mine]
            if not self.draws[domain].labelled:
                del batch["label"]
            found[domain] = batch
        return found

    def _rows(self, update: int, orders: Mapping[str, Order]) -> dict[str, np.ndarray]:
        """Returns the positions of an update's examples in the split, by domain."""
        domains, own = list(self.draws), update
        if self.takes_turns:  # Then `own` counts the updates of one domain.
            own, turn = divmod(update, len(domains))
            domains = [domains[turn]]
        found = {}
        for domain in domains:
            size = self.draws[domain].examples
            found[domain] = orders[domain](own * size, (own + 1) * size)
        return found


def mixed_batches(
    mixture: DomainMixture,
    *,
    seed: int,
    micro_batches: int,
    updates: range,
    local_rows: LocalRows = None,
) -> Iterator[dict[str, Any]]:
    """Yields the batches of updates, arrays [k, b, ...] by domain.

    Args:
        mixture: The training split.
        seed: Seed of the order.
        micro_batches: k, by which each domain's part is divided.
        updates: The updates, counted from the beginning of the run.
        local_rows: Rows of a micro-batch that this process needs.
    """
    load = functools.partial(
        mixture.batch,
        orders=mixture.orders(seed),
        micro_batches=micro_batches,
        local_rows=local_rows,
    )
    return loaded(load, updates, micro_batches)


def make_mixture(config: Mapping[str, Any], *, seed: int) -> Data:
    """Returns the splits of the domains that `config.data` describes.

    Args:
        config: The section `config.data`.
        seed: Seed of the run; draws the examples of `per_class`.

    Raises:
        UserError: Lists the problems of all domains.
    """
    shared = {key: config[key] for key in config if key != "domains"}
    entries = [dict(entry) for entry in config["domains"]]
    raise_if(_entry_problems(entries, shared))
    found, problems = {}, list[Problem]()
    for index, entry in enumerate(entries):
        domain, where = entry["domain"], f"config.data.domains[{index}]"
        own = {key: entry[key] for key in OF_DOMAIN if entry[key] is not None}
        section = {**shared, **own}
        with collected(problems), under(where, instead_of="config.data"):
            if not kind_named(kind := kind_of(section)).can_mix:
                text = f"data of kind {kind!r} has no domains"
                raise UserError(Problem("config.data.name", text))
            found[domain] = make_data(
                section,
                seed=domain_seed(seed, domain),
                labelled=entry["labelled"],
            )
    raise_if(problems)
    return _mixed(found, entries, shared)


def _mixed(found: Mapping[str, Data], entries: list, shared: Mapping) -> Data:
    """Returns the data of all domains as one."""
    counts = [len(data.train) for data in found.values()]
    weights = [entry["weight"] for entry in entries]
    if shared["mixing"] == "size":
        weights = [count ** (1 / shared["mixing_temperature"]) for count in counts]
    takes_turns = shared["mixing"] == "round_robin"
    examples = [shared["batch_size"]] * len(counts)
    if not takes_turns:
        examples = shares(weights, shared["batch_size"])
    if starved := [n for n, w, e in zip(found, weights, examples) if w and not e]:
        raise UserError(
            f"config.data.domains: of {', '.join(starved)} an update of "
            f"{shared['batch_size']} would have no example; raise data.batch_size, the "
            "domain's weight or data.mixing_temperature"
        )
    draws = {
        entry["domain"]: Draw(
            examples=share,
            sampling=entry["sampling"] or shared["sampling"],
            labelled=entry["labelled"],
        )
        for entry, share in zip(entries, examples)
        if share
    }
    parts = {name: data.train for name, data in found.items()}
    specs = {
        name: dataclasses.replace(data.spec, share=share)
        for (name, data), share in zip(found.items(), examples)
    }
    first = next(iter(specs.values()))
    fingerprints = {name: data.fingerprint for name, data in found.items()}
    return Data(
        spec=dataclasses.replace(
            first, domains=specs, train_counts=(sum(counts),), augment=(), mix=()
        ),
        train=DomainMixture(parts=parts, draws=draws, takes_turns=takes_turns),
        held_out={
            split: DomainMixture(parts={n: d.held_out[split] for n, d in found.items()})
            for split in next(iter(found.values())).held_out
        },
        fingerprint=lambda: "; ".join(f"{n}: {f()}" for n, f in fingerprints.items()),
        warnings=tuple(f"{n}: {text}" for n, d in found.items() for text in d.warnings),
        not_used=tuple(f"{n}: {text}" for n, d in found.items() for text in d.not_used),
    )


def shares(weights: list[float], examples: int) -> list[int]:
    """Returns how many of the examples each weight gets, by largest remainders.

    >>> shares([1.0, 1.0, 2.0], 8), shares([1.0, 2.0], 4)
    ([2, 2, 4], [1, 3])
    """
    exact = [weight * examples / sum(weights) for weight in weights]
    found = [math.floor(share) for share in exact]
    behind = sorted(range(len(exact)), key=lambda i: (found[i] - exact[i], i))
    for index in behind[: examples - sum(found)]:
        found[index] += 1
    return found


def _entry_problems(entries: list[dict], shared: Mapping[str, Any]) -> list[str]:
    """Returns the problems of the domains that show before data is opened."""
    problems, seen = [], set()
    for index, entry in enumerate(entries):
        where, domain = f"config.data.domains[{index}].", entry["domain"]
        if not re.fullmatch("[a-z][a-z0-9_]*", domain):
            problems.append(
                f"{where}domain: {domain!r}; a name of a-z, 0-9, _ is needed"
            )
        elif domain in _NAMES:
            problems.append(
                f"{where}domain: {domain!r} names other things; choose another"
            )
        elif domain in seen:
            problems.append(f"{where}domain: {domain!r} twice; give each its own")
        seen.add(domain)
        if not entry["labelled"]:
            problems += _label_problems(entry, shared, where)
    for split in ("validation", "test"):
        without = [e["domain"] for e in entries if (e[split] or shared[split]) is None]
        if 0 < len(without) < len(entries):
            problems.append(
                f"config.data.domains: {', '.join(without)} without {split}, which others "
                f"have; name it in all or in config.data.{split}"
            )
    if shared["mixing"] == "weights" and not any(e["weight"] > 0 for e in entries):
        problems.append("config.data.domains: all weights are 0; one at least counts")
    if shared["cache_views"] is not None:
        problems.append("config.data.cache_views: features of domains are not kept")
    return problems


def _label_problems(entry: Mapping, shared: Mapping, where: str) -> list[str]:
    """Returns the options that need labels of a domain without them in training."""
    asked = {
        key: shared[key] if entry[key] is None else entry[key] for key in OF_DOMAIN
    }
    problems = []
    if asked["sampling"] == "balanced":
        problems.append(f"{where}sampling: 'balanced', but labelled=False")
    if asked["per_class"] is not None:
        problems.append(
            f"{where}per_class: {asked['per_class']}, but labelled=False; train takes "
            "a part of a split as in 'train[:100]'"
        )
    if shared["mixing"] == "round_robin":
        problems.append(
            f"{where}labelled: False, but with data.mixing='round_robin' no update has "
            "examples of this domain beside others"
        )
    if asked["mix"]:
        problems.append(f"{where}mix: it mixes labels, but labelled=False")
    return problems
