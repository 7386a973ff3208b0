"""Starts the processes of one run on this machine.

.venv/bin/python scripts/launch_local.py -n 2 [--devices 1] -- --config=FILE [...]

The arguments after `--` are those of `finetune_jax.main`. Lines of processes
other than 0 begin with their index, as in `[1] `. SIGTERM, SIGINT and SIGUSR1 are
forwarded to all processes. If one fails, all end. The exit status is 0 if all have
finished, 75 if they were stopped and have saved, and else that of the process that failed
first.
"""

import argparse
import sys

from finetune_jax.parallel import launch


def main() -> int:
    """Runs the processes and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", type=int, default=2, help="number of processes")
    parser.add_argument(
        "--devices", type=int,
        help="virtual CPU devices of each process; default: process i has GPU i",
    )  # fmt: skip
    parser.add_argument("arguments", nargs="*", metavar="-- ARGUMENTS")
    given = parser.parse_args()
    for name, count in (("-n", given.n), ("--devices", given.devices)):
        if count is not None and count < 1:
            parser.error(f"{name}: {count}; at least 1 is needed")
    return launch.run(given.arguments, processes=given.n, devices=given.devices)


if __name__ == "__main__":
    sys.exit(main())
