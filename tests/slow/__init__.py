"""Tests that need: time: the long forms."""
