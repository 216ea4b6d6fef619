"""Tests that need: torch."""
