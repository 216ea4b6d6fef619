"""A package index on the loopback interface that misbehaves as a test asks it to."""

import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import ClassVar

WHEEL = "tiny_model-1.0-py3-none-any.whl"
JSON_TYPE = "application/vnd.pypi.simple.v1+json"


@dataclass
class Site:
    """What is served, and every request that came: (path, headers)."""

    body: bytes
    etag: str = '"1"'
    can_range: bool = True
    is_html: bool = False
    listed_sha256: str = ""
    listed_size: bool = True
    link: str = f"/files/{WHEEL}"
    status: int = 0
    """Answered to requests for the file, if set."""
    location: str = ""
    """Where requests for the file are redirected to, if set."""
    send: list[int] = field(default_factory=list)
    """How many bytes the next answers for the file stop after; then the connection is closed."""
    stall: bool = False
    """Whether such an answer keeps the connection open and says nothing more."""
    password: str = ""
    """The Authorization header that the index page needs."""
    extra_headers: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ranges(self) -> list[str]:
        """The Range headers of the requests for the file, in order; empty for none."""
        return [headers.get("Range", "") for path, headers in self.requests if path.endswith(".whl")]

    def page(self) -> tuple[str, bytes]:
        digest = self.listed_sha256 or sha256(self.body).hexdigest()
        if self.is_html:
            other = '<a href="http://example.invalid/tiny_model-0.9.tar.gz">tiny_model-0.9.tar.gz</a>'
            text = f'<html>{other}<a href="../..{self.link}#sha256={digest}">{WHEEL}</a></html>'
            return "text/html; charset=utf-8", text.encode()
        row = {"filename": WHEEL, "url": self.link, "hashes": {"sha256": digest}}
        files = [{"filename": "tiny_model-0.9.tar.gz", "url": "x", "hashes": {}}, row]
        if self.listed_size:
            files[1]["size"] = len(self.body)  # type: ignore[assignment]
        return JSON_TYPE, json.dumps({"meta": {"api-version": "1.1"}, "files": files}).encode()


class Handler(http.server.BaseHTTPRequestHandler):
    site: ClassVar[Site]

    def do_GET(self) -> None:
        path = re.sub(r"^http://[^/]*", "", self.path)
        self.site.requests.append((self.path, dict(self.headers.items())))
        if path.startswith("/simple/"):
            self._index(path)
        elif self.site.location and not path.startswith("/moved"):
            self._answer(302, b"", {"Location": self.site.location})
        elif self.site.status:
            self._answer(self.site.status, b"no", {})
        else:
            self._file()

    def _index(self, path: str) -> None:
        if self.site.password and self.headers.get("Authorization") != self.site.password:
            self._answer(401, b"", {})
        elif path != "/simple/tiny-model/":
            self._answer(404, b"", {})
        else:
            content_type, page = self.site.page()
            self._answer(200, page, {"Content-Type": content_type})

    def _file(self) -> None:
        body, start = self.site.body, 0
        same = self.headers.get("If-Range", self.site.etag) == self.site.etag
        if self.site.can_range and same and (match := re.match(r"bytes=(\d+)-", self.headers["Range"] or "")):
            start = int(match[1])
        if start >= len(body) > 0 and start:
            self._answer(416, b"", {"Content-Range": f"bytes */{len(body)}"})
            return
        headers = {"ETag": self.site.etag, **self.site.extra_headers}
        if start:
            headers = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}", **headers}
        self._answer(206 if start else 200, body[start:], headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        is_file = status in (200, 206) and "ETag" in headers
        if is_file and self.site.send:
            self.wfile.write(body[: self.site.send.pop(0)])
            self.wfile.flush()
            if self.site.stall:
                self.site.closing.wait(30)
        else:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve(site: Site) -> Iterator[Site]:
    """Serve `site` on a free port until the block ends."""
    handler = type("SiteHandler", (Handler,), {"site": site})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    site.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        site.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
