"""Where a model is: the URL as people write it, whose API it speaks, the model's name, the key's variable."""

import os
import re
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import SplitResult, urlsplit

from tokenmill.core import UsageError
from tokenmill.wire import Api

__all__ = ["Endpoint", "Timeouts", "is_url", "parse_endpoint"]

_KEY_NAMES: Final[dict[Api, str]] = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}
_TAILS: Final = ("/chat/completions", "/completions", "/messages", "/models")
_VERSION: Final = re.compile(r"/v\d+[a-z0-9]*$")
_OPENAI_HOST: Final = "api.openai.com"
_ANTHROPIC_HOST: Final = "api.anthropic.com"
_ANTHROPIC_VERSION: Final = "2023-06-01"


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """Seconds: to connect; from then to the first byte of an answer; for a whole attempt."""

    connect_s: float = 10.0
    first_byte_s: float = 300.0
    total_s: float = 900.0

    def __post_init__(self) -> None:
        for name in ("connect_s", "first_byte_s", "total_s"):
            if not 0.0 < getattr(self, name) <= 86400.0:
                raise UsageError(f"{name} is {getattr(self, name)}", hint="use seconds, up to a day")


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A model behind a URL. `key` is in no message and no representation; `key_name` is its variable."""

    scheme: str
    host: str
    port: int
    path: str
    """What comes before `/chat/completions` or `/messages`."""

    model: str
    api: Api = "openai"
    key: str = field(default="", repr=False)
    key_name: str = ""
    timeouts: Timeouts = field(default_factory=Timeouts)
    with_sampling: bool = True
    """Whether to send temperature and `top_p`, which models that reason often refuse."""

    @property
    def origin(self) -> str:
        """Scheme, host and port, as messages name the endpoint."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        usual = {"http": 80, "https": 443}[self.scheme]
        return f"{self.scheme}://{host}" + ("" if self.port == usual else f":{self.port}")

    @property
    def url(self) -> str:
        """The base URL."""
        return self.origin + self.path

    @property
    def max_tokens_field(self) -> str:
        """What the limit of an answer is called: OpenAI's own newer models take only the newer name."""
        return "max_completion_tokens" if self.host == _OPENAI_HOST else "max_tokens"

    @property
    def headers(self) -> dict[str, str]:
        """The headers that every request needs."""
        headers = {"Content-Type": "application/json", "User-Agent": "tokenmill"}
        if self.api == "anthropic":
            headers["anthropic-version"] = _ANTHROPIC_VERSION
            return headers | ({"x-api-key": self.key} if self.key else {})
        return headers | ({"Authorization": f"Bearer {self.key}"} if self.key else {})

    def redact(self, text: bytes) -> bytes:
        """The text without the key."""
        return text.replace(self.key.encode(), b"[key]") if self.key else text


def is_url(name: str) -> bool:
    """Whether the name of a model is the URL of an endpoint."""
    return name.lower().startswith(("http://", "https://"))


def parse_endpoint(
    url: str, model: str, *, api: Api | None = None, key_env: str = "", timeouts: Timeouts | None = None
) -> Endpoint:
    """The endpoint of a URL: with `/v1` or without, or with the whole path of a request.

    An empty `model` is for what `served_models` finds. The key is in the variable `key_env`, which must be
    set then; else in OPENAI_API_KEY or ANTHROPIC_API_KEY, which go to the hosts of these two firms and to no
    other. `api` is by the host if it is not given. Raises UsageError.
    """
    parts = _split(url)
    host = (parts.hostname or "").lower()
    path = parts.path.rstrip("/")
    if api is None:
        api = "anthropic" if host == _ANTHROPIC_HOST or path.endswith("/messages") else "openai"
    for tail in _TAILS:
        path = path.removesuffix(tail)
    if not _VERSION.search(path):
        path += "/v1"
    port = parts.port or (443 if parts.scheme == "https" else 80)
    key, key_name = _key(api, host, key_env)
    return Endpoint(
        scheme=parts.scheme,
        host=host,
        port=port,
        path=path,
        model=model,
        api=api,
        key=key,
        key_name=key_name,
        timeouts=timeouts or Timeouts(),
    )


def _split(url: str) -> SplitResult:
    hint = "give http://HOST:PORT/v1"
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0
    except ValueError:
        is_good = False
    if not is_good or not url.isascii() or not url.isprintable() or " " in url:
        raise UsageError("the URL of an endpoint cannot be read", hint=hint)
    if parts.username is not None or parts.password is not None:
        raise UsageError("the URL has a password", hint="put the key in an environment variable (--key-env)")
    if parts.query or parts.fragment:
        raise UsageError("the URL has a query or a fragment", hint=hint)
    return parts


def _key(api: Api, host: str, key_env: str) -> tuple[str, str]:
    """The key, which may be empty, and the variable that has it."""
    name = key_env or (_KEY_NAMES[api] if host in (_OPENAI_HOST, _ANTHROPIC_HOST) else "")
    key = os.environ.get(name, "").strip() if name else ""
    if name and not key:
        raise UsageError(
            f"the variable {name} is not set", hint=f"put the endpoint's key there: export {name}=..."
        )
    if not key.isascii() or not key.isprintable():
        raise UsageError(f"the key in {name} has characters that no header can hold", hint="copy it again")
    return key, name
