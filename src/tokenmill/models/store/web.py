"""Reading a web server under the rules of a download: https never becomes http, and waits and redirects
are bounded.

Proxies, certificates and passwords are what the caller says. A password or token goes to the origin it is
for (scheme, host and port) and to no other, whatever a redirect says. Keyrings, client certificates, cookies
and caches are not covered.
"""

import base64
import ipaddress
import re
import ssl
import time
from collections.abc import Iterable, Mapping
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse
from typing import Any, Final
from urllib.parse import unquote, urldefrag, urljoin, urlsplit
from urllib.request import HTTPErrorProcessor, HTTPSHandler, ProxyHandler, Request, build_opener

from tokenmill.core.errors import DownloadError

__all__ = ["Broken", "NotUsable", "Web", "check_passing", "follow", "read_some"]

_MAX_REDIRECTS: Final = 5
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_PASSING: Final = (408, 425, 429, 500, 502, 503, 504)


class Broken(DownloadError):
    """The network or the server failed in a way that may pass, after `wait_seconds` if the server says so."""

    def __init__(self, message: str, *, wait_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.wait_seconds = wait_seconds


class NotUsable(DownloadError):
    """The server does not serve this in the way it is asked for; `status` is its HTTP status, or 0."""

    def __init__(self, message: str, *, status: int = 0, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class _EveryStatus(HTTPErrorProcessor):
    """Hands out every response, so that redirects and errors are decided here."""

    def http_response(self, request: Request, response: Any) -> Any:
        return response

    https_response = http_response


class Web:
    """Opens URLs; a password in one of `known_urls`, or the `token` of the first, goes to that origin only.

    `ca_bundle` (file) and `proxy` (URL) may be empty for the system's. Raises OSError for a bad bundle.
    """

    def __init__(
        self,
        known_urls: Iterable[str],
        ca_bundle: str = "",
        proxy: str = "",
        timeout_seconds: float = 15.0,
        token: str = "",
    ) -> None:
        context = ssl.create_default_context(cafile=ca_bundle or None)
        proxies = {"http": proxy, "https": proxy} if proxy else None
        self._opener = build_opener(_EveryStatus(), HTTPSHandler(context=context), ProxyHandler(proxies))
        self._timeout_seconds = timeout_seconds
        urls = list(known_urls)
        self._passwords = {_origin(url): basic for url in urls if (basic := _basic(url))}
        if token:
            self._passwords[_origin(urls[0])] = f"Bearer {token}"

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


def check_passing(response: HTTPResponse) -> None:
    """Raise Broken for a status that may pass: too many requests, overload, a fault of the server."""
    if response.status not in _PASSING:
        return
    wait = response.headers.get("Retry-After", "")
    seconds = 0.0
    if re.fullmatch(r"\d{1,9}", wait):
        seconds = float(wait)
    elif wait:
        try:
            seconds = max(0.0, parsedate_to_datetime(wait).timestamp() - time.time())
        except ValueError:
            seconds = 0.0
    raise Broken(f"HTTP status {response.status}", wait_seconds=seconds)


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
