"""A config that remembers which of its values were read."""

from finetune_jax.config.loading import TABLES


class Recording:
    """Reads through to a config and remembers the key of every value read.

    With `keys` and `[]`, `**config.model` and `dict(config.model)` count as reading.
    """

    def __init__(self, config, path="", read=None):
        self._config, self._path = config, path
        self.read = set() if read is None else read

    def __getitem__(self, key):
        value, path = self._config[key], f"{self._path}{key}"
        if hasattr(value, "keys"):
            return Recording(value, f"{path}.", self.read)
        if path in TABLES:
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

    def replaced(self, **sections):
        return self._config.replaced(**sections)

    def to_dict(self):
        """Writing the config down is not reading it."""
        return self._config.to_dict()
