"""A config that remembers which of its values were read."""

import ml_collections

from finetune_jax.config.schema import ENTRIES


class Recording:
    """Reads through to a ConfigDict and remembers the key of every value read.

    With `keys` and `[]`, `**config.model` and `dict(config.model)` count as reading.
    """

    def __init__(self, config, path="", read=None):
        self._config, self._path = config, path
        self.read = set() if read is None else read

    def __getitem__(self, key):
        value, path = self._config[key], f"{self._path}{key}"
        if isinstance(value, ml_collections.ConfigDict):
            return Recording(value, f"{path}.", self.read)
        if path in ENTRIES:
            return tuple(
                Recording(entry, f"{path}[{index}].", self.read)
                for index, entry in enumerate(value)
            )
        self.read.add(path)
        return value

    def __getattr__(self, key):
        return self[key]

    def __iter__(self):
        return iter(self._config)

    def keys(self):
        return self._config.keys()

    def items(self):
        return [(key, self[key]) for key in self.keys()]

    def to_dict(self):
        """Writing the config down is not reading it."""
        return self._config.to_dict()
