"""The search for pipelines that keep a model's answers.

space.py      what may vary: a strict YAML file, a trial's draw as a pipeline
samples.py    what is asked: the reference set, a JSONL file, or the prompts of lmms-eval's tasks
tasks.py      lmms-eval's tasks: what they ask, what their scorers say
quality.py    how near the answers stay: agreement, accuracy, cosine
marks.py      accuracy by the tasks' own scorers
search.py     trials with Optuna, and the best pipelines as YAML
"""
