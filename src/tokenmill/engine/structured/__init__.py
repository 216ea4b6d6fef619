"""Text that must match a grammar: compiled in a process that may be killed, followed token by token."""

__all__: list[str] = []
