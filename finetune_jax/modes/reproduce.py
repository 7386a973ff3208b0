"""`--mode=reproduce`: runs a finished run again, and says whether it is the same."""

import functools
import itertools
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetune_jax.config import Config, plugins
from finetune_jax.core.errors import UserError
from finetune_jax.core.files import write_json
from finetune_jax.modes.options import Options
from finetune_jax.report.metrics_log import read_metrics
from finetune_jax.report.workdir import check_same_run, read_json, read_manifest
from finetune_jax.training.loop import Preempted
from finetune_jax.training.preemption import EXIT_STATUS, stop_on_signals
from finetune_jax.training.restore import check_is_one_run
from finetune_jax.training.run import run

DIFFERENT_STATUS = 3
# Numbers are the same within this if they differ by at most it, or by this share.
TOLERANCE = 1e-3
DIGESTS = ("params_sha256", "state_sha256", "frozen_sha256")
# Entries of the manifests of two runs that have no influence on the bits.
_NO_CAUSE = ("began", "command", "config", "seed")


def main(config: Config, options: Options) -> int:
    """Runs it again in a folder inside, prints the verdict and returns the status."""
    workdir = options.workdir
    assert workdir is not None
    check_is_one_run(config, workdir)
    then = read_json(workdir / "result.json")
    if then is None:
        raise UserError(f"--workdir: {workdir} is not finished (no result.json in it)")
    again = _folder(workdir, config)
    print(f"workdir {again}", flush=True)
    plugins.hand_over(workdir, again)
    # Features that another run has cached would prove nothing.
    config = config.replaced(data={"cache_dir": str(again / "features")})
    advice = functools.partial(options.advice, again)
    with stop_on_signals(config.checkpoint.grace_s, advice) as stop:
        try:
            now = run(config, again, stop)
        except Preempted as message:
            print(f"{message}; go on with:\n  {options.command(workdir)}")
            return EXIT_STATUS
    lines = [read_metrics(folder / "metrics.jsonl") for folder in (workdir, again)]
    found = verdict(lines[0], lines[1], then, now)
    found["environment"] = causes(
        read_manifest(workdir) or {}, read_manifest(again) or {}
    )
    write_json(again / "verdict.json", found)
    _show(found)
    print(f"workdir {again}", flush=True)
    return DIFFERENT_STATUS if found["verdict"] == "different" else 0


def _folder(workdir: pathlib.Path, config: Config) -> pathlib.Path:
    """Returns `reproduce`, `reproduce-2`, ...: new, or with this rerun unfinished."""
    count = 1
    while True:
        place = workdir / ("reproduce" if count == 1 else f"reproduce-{count}")
        if not (place / "config.json").exists():
            return place
        try:
            unfinished = not (place / "result.json").exists()
            if unfinished and check_same_run(place, config):
                return place
        except UserError:
            pass  # With another config.
        count += 1


def verdict(
    lines: Sequence[Mapping[str, Any]],
    others: Sequence[Mapping[str, Any]],
    result: Mapping[str, Any],
    other: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns whether two runs are the same, and where they first differ.

    Args:
        lines: Of `metrics.jsonl` of one run.
        others: Metric lines of the other run.
        result: `result.json` of the one run.
        other: `result.json` of the other run.
    """
    pairs = list(differences(lines, others))
    digests = [key for key in DIGESTS if result.get(key) != other.get(key)]
    found: dict[str, Any] = {"verdict": "same bits", "tolerance": TOLERANCE}
    if not pairs and not digests:
        return found
    within = all(is_close(*values) for _, _, *values in pairs)
    found["verdict"] = "same within the tolerance" if within else "different"
    found["digests_that_differ"] = digests
    if pairs:
        keys = "step", "metric", "then", "now"
        found["first"] = dict(zip(keys, pairs[0]))
        found["numbers_that_differ"] = len(pairs)
        if beyond := [pair for pair in pairs if not is_close(*pair[2:])]:
            found["first_beyond"] = dict(zip(keys, beyond[0]))
    then, now = result.get("final", {}), other.get("final", {})
    found["final"] = {
        name: {"then": then.get(name), "now": now.get(name)}
        for name in sorted(then.keys() | now.keys())
    }
    return found


def differences(
    lines: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[int | None, str, Any, Any]]:
    """Yields (step, metric, then, now) for all that differs, but for `time/`."""
    for one, other in itertools.zip_longest(lines, others, fillvalue={}):
        for name in dict.fromkeys((*one, *other)):
            if name.startswith("time/") or one.get(name) == other.get(name):
                continue
            step = one.get("step", other.get("step"))
            yield step, name, one.get(name), other.get(name)


def is_close(one: Any, other: Any) -> bool:
    """Returns whether two values of a log are the same within the tolerance."""
    if not all(isinstance(v, int | float) for v in (one, other)):
        return one == other
    return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def causes(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what of the environment differs, and so might explain other bits."""
    found = {}
    for key in sorted(then.keys() | now.keys()):
        one, other = then.get(key), now.get(key)
        if key in _NO_CAUSE or one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            for inner, value in causes(one, other).items():
                found[f"{key}.{inner}"] = value
        else:
            found[key] = {"then": one, "now": other}
    return found


def _show(found: Mapping[str, Any]) -> None:
    print(found["verdict"])
    for key, text in (
        ("first", "first"),
        ("first_beyond", f"first beyond {TOLERANCE}"),
    ):
        if where := found.get(key):
            print(
                f"{text} difference: step {where['step']}, {where['metric']}: "
                f"{where['then']} then, {where['now']} now"
            )
    if digests := found.get("digests_that_differ"):
        print(f"digests that differ: {', '.join(digests)}")
    for name, values in found.get("final", {}).items():
        print(f"{name:24} {values['then']} then, {values['now']} now")
    if found["environment"]:
        print("what differs in the environment:")
        for key, value in found["environment"].items():
            print(f"  {key}: {value['then']!r} then, {value['now']!r} now")
