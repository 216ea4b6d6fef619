"""A PostgreSQL server of the tests' own: made in a folder, on a Unix socket, gone afterwards."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_PLACES = "/usr/lib/postgresql"


def programs() -> Path | None:
    """The folder with `initdb` and `postgres`: the newest of Debian's, or that of the PATH."""
    found = sorted(Path(_PLACES).glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("postgres")
    return None if on_path is None else Path(on_path).resolve().parent


@contextmanager
def postgres_server() -> Iterator[str]:
    """The URL of a fresh server; skips the test where PostgreSQL is not installed."""
    folder = programs()
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install tokenmill[postgres]")
    if folder is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    # A short path, for that of a socket has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="tm-pg-", dir="/tmp") as made:
        data = Path(made) / "data"
        data.mkdir(mode=0o700)
        settings = _as_somebody(Path(made))
        run = {"stdout": subprocess.DEVNULL, "cwd": made, **settings}
        subprocess.run([folder / "initdb", "-D", data, "-U", "mill", "-A", "trust", "-N"], check=True, **run)
        options = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={made}"]
        with open(Path(made) / "log", "wb") as log:
            run |= {"stdout": log, "stderr": log}
            server = subprocess.Popen([folder / "postgres", "-D", data, *options], **run)
            try:
                _wait(folder, made, server)
                yield f"postgresql://mill@/postgres?host={made}"
            finally:
                server.terminate()
                try:
                    server.wait(20)
                except subprocess.TimeoutExpired:
                    server.kill()
                    server.wait()


def _as_somebody(folder: Path) -> dict[str, Any]:
    """PostgreSQL does not run as root: then it is the user `postgres`, or `nobody`."""
    if os.getuid() != 0:
        return {}
    users = {each.pw_name: each for each in pwd.getpwall()}
    user = users.get("postgres") or users["nobody"]
    for path in (folder, *folder.iterdir()):
        os.chown(path, user.pw_uid, user.pw_gid)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _wait(folder: Path, made: str, server: "subprocess.Popen[bytes]") -> None:
    ask = [str(folder / "pg_isready"), "-q", "-h", made, "-t", "1"]
    for _ in range(100):
        if subprocess.run(ask, check=False).returncode == 0:
            return
        try:
            server.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError((Path(made) / "log").read_text())
    raise AssertionError("PostgreSQL does not come up")
