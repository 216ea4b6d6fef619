"""Reading and changing what a model computes at named points, and statistics made of it."""

from tokenmill.engine.taps.tap import Recording, Tap, TapRows, ablate, replace_values, steer

__all__ = ["Recording", "Tap", "TapRows", "ablate", "replace_values", "steer"]
