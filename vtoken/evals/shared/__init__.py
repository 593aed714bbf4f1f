"""What the rooms of evals share: models, configs and prompts by name, pictures from disk, files, options, tables."""
