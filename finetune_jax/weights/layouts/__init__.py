"""Name tables: where a layout keeps each parameter. One family a file, with `LAYOUTS`."""
