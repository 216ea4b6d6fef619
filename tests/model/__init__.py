"""Tests that need: the pulled default model."""
