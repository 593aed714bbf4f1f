"""What pipelines cost and save, measured: latency, memory, break-even."""
