"""A conversation to a prompt, by the model's own template, in a process with bounds."""

__all__: list[str] = []
