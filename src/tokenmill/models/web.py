"""Reading a web server under the rules of a download: https never becomes http, and waits and redirects
are bounded.

Proxies, certificates and passwords are those that pip is configured with. Keyrings, client certificates,
cookies and caches are not covered: whoever needs one is served by pip itself.
"""

import base64
import ipaddress
import re
import ssl
from collections.abc import Iterable, Mapping
from http.client import HTTPException, HTTPResponse
from typing import Any, Final
from urllib.parse import unquote, urldefrag, urljoin, urlsplit
from urllib.request import HTTPErrorProcessor, HTTPSHandler, ProxyHandler, Request, build_opener

from tokenmill.core.errors import DownloadError

__all__ = ["Broken", "NotUsable", "Web", "follow", "read_some"]

_MAX_REDIRECTS: Final = 5
_REDIRECTS: Final = (301, 302, 303, 307, 308)


class Broken(DownloadError):
    """The network or the server failed in a way that may pass."""


class NotUsable(DownloadError):
    """Downloading without pip is not possible here; pip has to do it."""


class _EveryStatus(HTTPErrorProcessor):
    """Hands out every response, so that redirects and errors are decided here."""

    def http_response(self, request: Request, response: Any) -> Any:
        return response

    https_response = http_response


class Web:
    """Opens URLs; a password in one of `known_urls` is sent to that origin only.

    `ca_bundle` (file) and `proxy` (URL) may be empty for the system's. Raises OSError for a bad bundle.
    """

    def __init__(self, known_urls: Iterable[str], ca_bundle: str, proxy: str, timeout_seconds: float) -> None:
        context = ssl.create_default_context(cafile=ca_bundle or None)
        proxies = {"http": proxy, "https": proxy} if proxy else None
        self._opener = build_opener(_EveryStatus(), HTTPSHandler(context=context), ProxyHandler(proxies))
        self._timeout_seconds = timeout_seconds
        self._passwords = {_origin(url): basic for url in known_urls if (basic := _basic(url))}

    def open(self, url: str, headers: Mapping[str, str]) -> HTTPResponse:
        """The response to a GET, whatever its status, after redirects. Raises Broken, NotUsable."""
        try:
            for _ in range(_MAX_REDIRECTS + 1):
                response: HTTPResponse = self._opener.open(
                    self._request(url, headers), timeout=self._timeout_seconds
                )
                location = response.headers.get("Location", "")
                if response.status not in _REDIRECTS or not location:
                    return response
                response.close()
                url = follow(url, location)
        except ValueError as error:
            raise NotUsable(str(error)) from error
        except (OSError, HTTPException) as error:
            raise Broken(_reason(error)) from error
        raise NotUsable("too many redirects")

    def _request(self, url: str, headers: Mapping[str, str]) -> Request:
        parts = urlsplit(url)
        bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        request = Request(bare, headers={"User-Agent": "tokenmill", **headers})
        if basic := self._passwords.get(_origin(url)):
            request.add_header("Authorization", basic)
        return request


def follow(base: str, location: str) -> str:
    """The absolute URL of a link in `base`. Raises NotUsable unless https, or http on this machine alone."""
    url = urldefrag(urljoin(base, location)).url
    schemes = urlsplit(base).scheme, urlsplit(url).scheme
    if schemes[1] == "https" or (schemes == ("http", "http") and _is_loopback(url)):
        return url
    raise NotUsable(f"a link leads to {schemes[1] or 'no'} scheme, https is needed")


def read_some(response: HTTPResponse, limit: int) -> bytes:
    """What has arrived, at most `limit` bytes; empty at the end. Raises Broken."""
    try:
        return response.read1(limit)
    except (OSError, HTTPException, ValueError) as error:
        raise Broken(_reason(error)) from error


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def _basic(url: str) -> str:
    """The header of RFC 7617 for the user and password in a URL; empty if there is none."""
    parts = urlsplit(url)
    pair = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    return "" if pair == ":" else f"Basic {base64.b64encode(pair.encode()).decode()}"


def _reason(error: Exception) -> str:
    text = re.sub(r"[^ -~]", "", str(error) or type(error).__name__)
    return text.removeprefix("<urlopen error ").removesuffix(">")[:200]
