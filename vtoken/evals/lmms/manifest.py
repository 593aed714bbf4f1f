"""The entry point `lmms_eval.models`. lmms-eval imports this at every start, so it imports nothing heavy."""

from lmms_eval.models.registry_v2 import ModelManifest


def manifests() -> ModelManifest:
    """`lmms-eval --model vtoken`."""
    return ModelManifest(model_id="vtoken", chat_class_path="vtoken.evals.lmms.model.VtokenModel")
