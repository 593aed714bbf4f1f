"""YAML, dict, list, name or stage -> Pipeline."""

from vtoken.config.pipeline import Contrast, Pipeline, PipelineLike, dump, load
from vtoken.config.policies import LEAST, POLICIES, POLICY_KEYS, PRESET

__all__ = ["LEAST", "POLICIES", "POLICY_KEYS", "PRESET", "Contrast", "Pipeline", "PipelineLike", "dump", "load"]
