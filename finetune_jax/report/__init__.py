"""Output of a run: workdir, manifest, metrics log, trackers, terminal, page."""
