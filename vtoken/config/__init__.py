"""YAML, dict, list, name or stage -> Pipeline."""

from vtoken.config.pipeline import Pipeline, PipelineLike, dump, load
from vtoken.config.policies import LEAST, POLICIES, POLICY_KEYS, PRESET

__all__ = ["LEAST", "POLICIES", "POLICY_KEYS", "PRESET", "Pipeline", "PipelineLike", "dump", "load"]
