"""Model directories: reading, making, storing and describing them; tokenizer and chat template.

A model directory is the only door between making models and running them. Import from the modules:
`library` (the store), `directory` (one model), `pull` (getting one), `architecture` (shapes and costs),
`weights`, `gguf`, `safetensors`, `tokenizer`, `chat_template`. Nothing is imported here, so that a
command which needs one of them does not pay for the others.
"""

__all__: list[str] = []
