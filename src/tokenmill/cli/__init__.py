"""The command line: one module a verb, each with `add_parser` and a handler. Import from the modules."""

__all__: list[str] = []
