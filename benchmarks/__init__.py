"""Measurements that need more than tokenmill: other systems beside it."""
