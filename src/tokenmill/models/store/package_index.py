"""Asking the package index that pip is configured with where a package's file is.

Sources: the Simple API as HTML and JSON (PEP 503, 629, 691, 700). Whatever is not an ordinary web index
(a folder, links, a mirror without hashes, settings that only pip understands) is NotUsable: pip does it.
"""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from http.client import HTTPResponse
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urljoin, urlsplit

from tokenmill.models.store.catalog import CatalogEntry
from tokenmill.models.store.transfer import RemoteFile
from tokenmill.models.store.web import Broken, NotUsable, Web, follow, read_some

__all__ = ["find_file"]

_ACCEPT: Final = "application/vnd.pypi.simple.v1+json, text/html;q=0.1"
_MAX_PAGE_BYTES: Final = 16 << 20
_MAX_TIMEOUT_SECONDS: Final = 60.0
_SECTIONS: Final = ("global", "download", ":env:")
_DEFAULT_INDEX: Final = re.compile(r"default\s+(https://\S+?)\)")
_SETTING: Final = re.compile(r"^(global|download|:env:)\.([\w-]+)=(.+)$", flags=re.MULTILINE)
_LEFT_TO_PIP: Final = frozenset(
    {
        "client-cert",
        "no-index",
        "no-proxy-env",
        "pypi-url",
        "trusted-host",
        "uploaded-prior-to",
        "use-deprecated",
    }
)


def find_file(entry: CatalogEntry) -> tuple[RemoteFile, Web]:
    """The entry's wheel, and what to read it with. Raises NotUsable if pip has to find it."""
    settings = _pip_settings()
    indexes = [settings.get("index-url") or _default_index(), *settings.get("extra-index-url", "").split()]
    places = [*indexes, *settings.get("find-links", "").split()]
    if settings.keys() & _LEFT_TO_PIP or any(_has_copy(place, entry) for place in places):
        raise NotUsable("pip's settings")
    remote = [url for url in indexes if urlsplit(url).scheme in ("http", "https")]
    try:
        web = Web(remote, _ca_bundle(settings), settings.get("proxy", ""), _timeout_seconds(settings))
    except (OSError, ValueError) as error:
        raise NotUsable(str(error)) from error
    for index in remote:
        try:
            page = f"{index.rstrip('/')}/{_normal(entry.package)}/"
            with web.open(follow(page, ""), {"Accept": _ACCEPT}) as response:
                return _listed(response, entry), web
        except (Broken, NotUsable):
            continue
    raise NotUsable("no index lists the file with its hash")


def _pip_settings() -> dict[str, str]:
    """What pip's files and environment say about downloading, the stronger over the weaker."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    environment = {**os.environ, "PIP_QUIET": "0"}
    found: dict[str, dict[str, str]] = {section: {} for section in _SECTIONS}
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, timeout=60
        )
        for section, key, text in _SETTING.findall(result.stdout):
            value = str(ast.literal_eval(text))
            # Some versions list every file's value, not in the order of their strength.
            if found[section].setdefault(key.lower().replace("_", "-"), value) != value:
                raise NotUsable(f"several values of {key}")
    except (OSError, subprocess.SubprocessError, ValueError, SyntaxError) as error:
        raise NotUsable("pip's settings cannot be read") from error
    if result.returncode != 0:
        raise NotUsable("pip's settings cannot be read")
    return {key: value for section in _SECTIONS for key, value in found[section].items() if value}


def _default_index() -> str:
    """The index that pip uses where none is configured, as its own help names it."""
    command = [sys.executable, "-m", "pip", "download", "--help"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise NotUsable("pip cannot be asked for its index") from error
    found = _DEFAULT_INDEX.search(result.stdout)
    if found is None:
        raise NotUsable("pip names no default index")
    return found[1]


def _ca_bundle(settings: Mapping[str, str]) -> str:
    environment = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE", "")
    return os.path.expanduser(settings.get("cert", environment))


def _timeout_seconds(settings: Mapping[str, str]) -> float:
    seconds = float(settings.get("timeout", settings.get("default-timeout", "15")))
    return min(seconds, _MAX_TIMEOUT_SECONDS) if seconds > 0 else _MAX_TIMEOUT_SECONDS


def _has_copy(place: str, entry: CatalogEntry) -> bool:
    """Whether a folder (`file:` URL or path) that pip looks in has the package already."""
    parts = urlsplit(place)
    if parts.scheme not in ("", "file"):
        return False
    folder = Path(unquote(parts.path)).expanduser()
    return (folder / _normal(entry.package)).exists() or any(
        _is_wheel(path.name, entry) for path in folder.glob("*.whl")
    )


def _is_wheel(name: str, entry: CatalogEntry) -> bool:
    package, version, *tags = f"{name}-".split("-")
    same = (_normal(package), version) == (_normal(entry.package), entry.version)
    return same and tags in (["py3", "none", "any.whl", ""], ["py2.py3", "none", "any.whl", ""])


def _normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def _listed(response: HTTPResponse, entry: CatalogEntry) -> RemoteFile:
    """The entry's wheel on an index page. Raises Broken, NotUsable if it is not there with its hash."""
    if response.status != 200 or response.headers.get("Content-Encoding", "identity") != "identity":
        raise NotUsable(f"HTTP status {response.status}")
    page = bytearray()
    while chunk := read_some(response, 1 << 16):
        page += chunk
        if len(page) > _MAX_PAGE_BYTES:
            raise NotUsable("the index page is too large")
    text = page.decode("utf-8", errors="replace")
    is_json = response.headers.get_content_type() == "application/vnd.pypi.simple.v1+json"
    try:
        for name, link, sha256, num_bytes in _json_rows(text) if is_json else _html_rows(text):
            if _is_wheel(name, entry) and re.fullmatch(r"[0-9a-f]{64}", sha256):
                url = follow(response.geturl(), link)
                return RemoteFile(name=name, url=url, sha256=sha256, num_bytes=max(0, num_bytes))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise NotUsable("the index page is malformed") from error
    raise NotUsable("the index does not list the file with its hash")


def _json_rows(text: str) -> Iterator[tuple[str, str, str, int]]:
    for file in json.loads(text)["files"]:
        yield file["filename"], file["url"], file["hashes"].get("sha256", ""), int(file.get("size") or 0)


def _html_rows(text: str) -> Iterator[tuple[str, str, str, int]]:
    links = _Links()
    links.feed(text)
    for link in links.found:
        parts = urlsplit(urljoin(links.base, link))
        name = unquote(parts.path.rpartition("/")[2])
        yield name, parts.geturl(), parts.fragment.removeprefix("sha256="), 0


class _Links(HTMLParser):
    """Collects the links of a page, and the base that they are relative to."""

    def __init__(self) -> None:
        super().__init__()
        self.base = ""
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href") or ""
        if tag == "a":
            self.found.append(href)
        elif tag == "base":
            self.base = self.base or href
