"""The end of a child process that serves over its standard streams."""

import contextlib
import subprocess

__all__ = ["end_child"]


def end_child(child: "subprocess.Popen[bytes]") -> None:
    """Kill a child, close its streams and wait for it."""
    child.kill()
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):  # bytes that the dead child will not read
                stream.close()
    child.wait()
