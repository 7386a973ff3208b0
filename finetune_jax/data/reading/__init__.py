"""Reading of files: which ones there are, separated values, threads."""
