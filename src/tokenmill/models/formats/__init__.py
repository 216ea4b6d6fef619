"""Weights and metadata in files: GGUF and safetensors, read with suspicion, written whole or not at all."""

__all__: list[str] = []
