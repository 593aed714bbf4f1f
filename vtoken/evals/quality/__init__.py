"""Pipelines x tasks: runs, sweeps, and what their results say.

run.py          pipelines x tasks, the model loaded once
costs.py        FLOPs of a pipeline on a task
regressions.py  documents that pruning lost, and pictures of what was kept of them
analysis.py     results read back: paired statistics, costs, Pareto fronts (pareto.py)
report.py       report.html and table.md
paper.py        published tables beside measured ones
plan.py         a sweep's YAML file and its points
points.py       one point asked and kept, and points put together as results
sweep.py        points over processes
cluster.py      points over a Ray cluster
"""
