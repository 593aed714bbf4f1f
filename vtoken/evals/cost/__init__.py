"""What pipelines cost and save, counted: FLOPs, KV bytes, tokens alive per layer, decisions, and which stage runs
where."""
