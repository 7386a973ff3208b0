"""What a run tells: terminal, `metrics.jsonl`, manifest, plots."""
