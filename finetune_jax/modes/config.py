"""`--mode=config`: prints the resolved config, with every key."""

from finetune_jax.config import Config
from finetune_jax.config.document import assignments
from finetune_jax.modes.options import Options


def main(config: Config, options: Options) -> int:
    """Prints each key as a line of Python; returns the exit status."""
    where = options.workdir if options.config == "run" else options.config
    print(
        f"# {where}, with the overrides of the command line. A comment has the default."
    )
    for line in assignments(config):
        print(line)
    return 0
