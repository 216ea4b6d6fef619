"""The tests, in one folder for each thing that they need; see `markers` in pyproject.toml."""
