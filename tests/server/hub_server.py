"""A model hub on the loopback interface, with a second origin for large files; it misbehaves as asked."""

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar
from urllib.parse import unquote

COMMIT, NEXT_COMMIT = "a" * 40, "b" * 40
LARGE_BYTES = 4096


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class HubSite:
    """One repository, `owner/name`: its commits, the newest last, and every request that came."""

    commits: dict[str, dict[str, bytes]]
    extra_rows: list[dict[str, Any]] = field(default_factory=list)
    card: dict[str, Any] = field(default_factory=lambda: {"license": "apache-2.0"})
    token: str = ""
    """The token without which nothing is answered."""
    gated: bool = False
    """Whether files (not the list) need the token, as with models that ask for consent."""
    cut: list[int] = field(default_factory=list)
    """How many bytes the next answers of large files stop after; then the connection is closed."""
    busy: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    """Status and headers of the next answers, whatever is asked for."""
    swapped: dict[str, bytes] = field(default_factory=dict)
    """Contents that are served in place of a commit's."""
    on_file: Callable[[str], None] = lambda _: None
    answer_commit: str = ""
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    """(which origin, path, headers)"""
    port: int = 0
    store_port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def row(self, name: str, data: bytes) -> dict[str, Any]:
        row: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob_id(data)}
        if len(data) >= LARGE_BYTES:
            row["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return row

    def listing(self, commit: str) -> bytes:
        rows = [self.row(name, data) for name, data in self.commits[commit].items()]
        answer = {"id": "owner/name", "sha": self.answer_commit or commit, "cardData": self.card}
        return json.dumps({**answer, "siblings": rows + self.extra_rows}).encode()

    def paths(self, origin: str = "") -> list[str]:
        return [path for where, path, _ in self.requests if origin in ("", where)]


class _Handler(http.server.BaseHTTPRequestHandler):
    site: ClassVar[HubSite]
    origin: ClassVar[str]

    def do_GET(self) -> None:
        site, path = self.site, unquote(self.path.partition("?")[0])
        site.requests.append((self.origin, self.path, dict(self.headers.items())))
        if site.busy:
            status, headers = site.busy.pop(0)
            self._answer(status, b"", headers)
        elif self.origin == "store":
            self._store(path)
        elif match := re.fullmatch(r"/api/models/owner/name/revision/(\w+)", path):
            self._list(list(site.commits)[-1] if match[1] == "main" else match[1])
        elif match := re.fullmatch(r"/owner/name/resolve/(\w+)/(.+)", path):
            self._resolve(match[1], match[2])
        else:
            self._answer(401, b"", {"X-Error-Code": "RepoNotFound"})

    def _may_read(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.site.token}"

    def _list(self, commit: str) -> None:
        if self.site.token and not self.site.gated and not self._may_read():
            self._answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        elif commit not in self.site.commits:
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            self._answer(200, self.site.listing(commit), {"Content-Type": "application/json"})

    def _resolve(self, commit: str, name: str) -> None:
        site = self.site
        site.on_file(name)
        data = site.commits.get(commit, {}).get(name)
        if site.token and not self._may_read():
            code = "GatedRepo" if site.gated else "RepoNotFound"
            self._answer(403 if "Authorization" in self.headers else 401, b"", {"X-Error-Code": code})
        elif data is None:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif len(data) < LARGE_BYTES:
            self._answer(
                200, site.swapped.get(name, data), {"ETag": f'"{blob_id(data)}"', "X-Repo-Commit": commit}
            )
        else:
            place = f"http://127.0.0.1:{site.store_port}/{commit}/{name}?signature=x"
            linked = {
                "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Linked-Size": str(len(data)),
            }
            self._answer(302, b"", {"Location": place, "X-Repo-Commit": commit, **linked})

    def _store(self, path: str) -> None:
        _, commit, name = path.split("/", 2)
        data = self.site.swapped.get(name, self.site.commits[commit][name])
        etag = f'"{hashlib.md5(data).hexdigest()}"'
        start = 0
        if self.headers.get("If-Range", etag) == etag:
            match = re.match(r"bytes=(\d+)-", self.headers["Range"] or "")
            start = int(match[1]) if match else 0
        headers = {"ETag": etag, "Content-Length": str(len(data) - start)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        self._answer(206 if start else 200, body[: self.site.cut.pop(0)] if self.site.cut else body, headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve_hub(site: HubSite) -> Iterator[HubSite]:
    """Serve `site` on two free ports, the hub's and the store's, until the block ends."""
    servers = []
    for origin in ("hub", "store"):
        handler = type("SiteHandler", (_Handler,), {"site": site, "origin": origin})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        servers.append((server, thread))
    site.port, site.store_port = (server.server_port for server, _ in servers)
    try:
        yield site
    finally:
        for server, thread in servers:
            server.shutdown()
            server.server_close()
            thread.join()
