"""Where things are in each model family: one small file per `model_type`."""
