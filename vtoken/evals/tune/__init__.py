"""The search for pipelines that keep a model's answers: search.py draws them from a space (space.py), and takes their
quality (quality.py) and their cost (cost.py) as shares of dense's."""
