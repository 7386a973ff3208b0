"""What the program does: one module a mode, `main(config, options) -> exit status`."""
