"""How good, how fast: FLOPs account, latency bench, reference VLMs, reports."""
