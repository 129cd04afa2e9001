"""Command lines: words to settings, nothing else."""
