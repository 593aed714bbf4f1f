"""A model that answers prompts, and lmms-eval's tasks and scorers for it.

manifest.py        tells lmms-eval that there is a model called `vtoken`
model.py           what lmms-eval sees: one chat model for every family
generation.py      the same without lmms-eval: prompts in, answers and what they cost out
prompts.py         chat messages, pictures and videos -> model inputs
records.py         one answered request, and the files that `vtoken eval` writes
response_cache.py  makes lmms-eval's --use_cache tell pipelines apart
prepare.py         what has to be set before lmms-eval is imported
suites.py          named lists of tasks
harness.py         lmms-eval's task manager and evaluator
tasks/             tasks that need no download
"""
