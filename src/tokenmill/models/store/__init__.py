"""The model store: what comes in is checked and placed at once, what goes out is what was asked for."""

__all__: list[str] = []
