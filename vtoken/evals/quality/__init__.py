"""Pipelines x tasks: runs, sweeps, results, and what they say."""
