"""YAML, dict, list, name or stage -> Pipeline."""

from vtoken.config.pipeline import LEAST, POLICIES, POLICY_KEYS, PRESET, Pipeline, PipelineLike, dump, load

__all__ = ["LEAST", "POLICIES", "POLICY_KEYS", "PRESET", "Pipeline", "PipelineLike", "dump", "load"]
