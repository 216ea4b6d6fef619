"""The project's scales: tasks as data, scorers, statistics and the load generator.

A model is seen only through `core.Generator` and `core.Scorer`, so the local engine, the torch twin, the mock
and any endpoint are measured by the same code.
"""

__all__: list[str] = []
