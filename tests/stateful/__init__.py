"""Random histories of the engine's core, in some minutes; no weights."""
