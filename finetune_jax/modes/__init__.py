"""Modes of the command line: one module each, `main(config, options) -> exit status`."""
