"""The search for pipelines that keep a model's answers.

space.py           what may vary: a strict YAML file, and a trial's draw as a pipeline
samples.py         what is asked: the reference set, a JSONL file, or the prompts of lmms-eval's tasks
tasks.py           lmms-eval's tasks: what they ask, what their scorers say
quality.py         how near the answers stay: agreement, accuracy, cosine
relative_score.py  accuracy by the tasks' own scorers, as a share of dense
cost.py            FLOPs or time to first token, as a share of dense
search.py          trials with Optuna, and the best pipelines as YAML
"""
