"""tokenmill: the cheapest token that still passes your tests.

The rooms and the arrows between them are in `docs/architecture.md`. This file holds only the version,
so that importing the package costs nothing.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
