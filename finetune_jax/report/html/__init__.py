"""The pages of runs and populations: HTML files that load and run nothing."""
