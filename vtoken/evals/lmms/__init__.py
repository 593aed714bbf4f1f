"""lmms-eval's tasks and scorers for wrapped models.

manifest.py   tells lmms-eval that there is a model called `vtoken`
model.py      what lmms-eval sees: one chat model for every family
asker.py      what it stands on, without lmms-eval: prompts in, answers and what they cost out
response_cache.py  what lmms-eval's --use_cache knows a model by
prompts.py    chat messages, pictures and videos -> model inputs
records.py    what is known about one request, and about one run: the schema of the files
whole.py      files that are there whole or not at all
suites.py     named lists of tasks
harness.py    lmms-eval's task manager and evaluator, and what must not go wrong there
run.py        pipelines x tasks, the model loaded once
costs.py      FLOPs of a pipeline on a task
regressions.py  what was lost, and pictures of what was kept of it
findings.py   results read back: paired statistics, costs, fronts (pareto.py)
report.py     report.html and table.md
paper.py      published tables beside measured ones
prepare.py    what has to be set before lmms-eval is imported
plan.py       a sweep's YAML file and its points
points.py     a point asked and kept, and points put together as results
sweep.py      points over processes
cluster.py    points over a Ray cluster
tasks/        tasks that need no download
"""
