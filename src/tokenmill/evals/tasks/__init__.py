"""The tasks, a module a family; each lists its own as `TASKS`."""

__all__: list[str] = []
