"""Tests that need: no weights, no network, quick."""
