"""Run folders: work that takes long, is killed, and goes on where it was."""

from tokenmill.runs.folder import RunFolder, content_hash

__all__ = ["RunFolder", "content_hash"]
