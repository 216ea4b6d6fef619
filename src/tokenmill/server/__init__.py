"""Two thin HTTP adapters over one call, with limits, exact accounts and operations."""

__all__: list[str] = []
