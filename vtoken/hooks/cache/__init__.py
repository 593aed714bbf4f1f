"""What a prefill leaves in the KV cache."""
