"""Tests that need servers on loopback and child processes, no weights."""
