"""A model directory to something that runs: weights in the kernels' layout, a cached file, a step plan."""

__all__: list[str] = []
