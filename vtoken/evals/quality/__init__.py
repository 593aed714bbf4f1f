"""Pipelines x tasks: points are asked (points.py, by run.py or sweep.py), put together as results (results.py), read
back (analysis.py) and shown (report.py)."""
