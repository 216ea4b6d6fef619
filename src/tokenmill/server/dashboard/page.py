"""The dashboard's routes: a page made on the server, its style and script, and its figures as JSON.

The page itself holds no figures unless who asks may see them; a browser cannot show a key when it opens an
address, so on a server with keys the page comes empty, asks for a key, and fetches the figures with it.
Nothing is loaded from elsewhere, and its policy (CSP) forbids it.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Final

import jinja2
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tokenmill.core import NotFoundError
from tokenmill.costs.prices import Price, find_price
from tokenmill.server.caller import Caller
from tokenmill.server.dashboard.figures import CHART_HEIGHT, CHART_WIDTH
from tokenmill.server.dashboard.view import EMPTY, View

__all__ = ["DashboardPages", "PageConfig"]

_PACKAGE: Final = "tokenmill.server.dashboard"
_CSP: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = {
    "content-security-policy": _CSP,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
_CHARTS: Final = (
    ("output", "Output tokens a second"),
    ("calls", "Calls a second"),
    ("ttft", "To the first token, p50"),
    ("tpot", "Each token after it, p50"),
    ("kv", "KV cache in use"),
    ("queue", "Waiting for a first token"),
)


@dataclass(frozen=True, kw_only=True)
class PageConfig:
    """`version` is shown; `prices` are what savings can be reckoned against, at first `compare_with`."""

    version: str
    prices: Sequence[Price] = ()
    compare_with: str = ""


class DashboardPages:
    """Answers the routes. `look` makes the view at a price; `models` are the names that a call may give."""

    def __init__(
        self,
        config: PageConfig,
        look: Callable[[Price | None], Awaitable[View]],
        models: Callable[[], Sequence[str]],
    ) -> None:
        self._config = config
        self._look = look
        self._models = models
        self._prices = _newest(config.prices)
        self._template = _template()
        self._style = _text("static/style.css")
        self._script = _text("static/app.js")

    def routes(self) -> list[Route]:
        """The routes."""
        return [
            Route("/", self.page, methods=["GET"]),
            Route("/dashboard/data.json", self.data, methods=["GET"]),
            Route("/dashboard/style.css", self.style, methods=["GET"]),
            Route("/dashboard/app.js", self.script, methods=["GET"]),
        ]

    async def page(self, request: Request) -> Response:
        """GET /."""
        caller: Caller = request.scope["tokenmill.caller"]
        may_see = caller.may("metrics")
        name = self._name("")
        view = await self._look(self._prices.get(name)) if may_see else EMPTY
        html = self._template.render(
            view=view,
            charts=_CHARTS,
            width=CHART_WIDTH,
            height=CHART_HEIGHT,
            models=self._models() if caller.may("inference") else (),
            prices=sorted(self._prices),
            price=name,
            may_see=may_see,
            version=self._config.version,
        )
        return Response(html, media_type="text/html", headers=_HEADERS)

    async def data(self, request: Request) -> Response:
        """GET /dashboard/data.json, with `?price=PROVIDER/MODEL` to reckon savings against another price."""
        name = self._name(request.query_params.get("price", ""))
        view = await self._look(self._prices.get(name))
        return JSONResponse({**view._asdict(), "price": name}, headers=_HEADERS)

    async def style(self, request: Request) -> Response:
        """GET /dashboard/style.css."""
        return Response(self._style, media_type="text/css", headers=_HEADERS)

    async def script(self, request: Request) -> Response:
        """GET /dashboard/app.js."""
        return Response(self._script, media_type="text/javascript", headers=_HEADERS)

    def _name(self, asked: str) -> str:
        """The name of a price that is known: the one that was asked for, else the usual one, else any."""
        known = (asked, self._config.compare_with, *sorted(self._prices))
        return next((name for name in known if name in self._prices), "")


def _newest(prices: Sequence[Price]) -> dict[str, Price]:
    """`PROVIDER/MODEL[:TIER]` to its newest price."""
    found = {}
    for price in prices:
        name = f"{price.provider}/{price.model}" + ("" if price.tier == "standard" else f":{price.tier}")
        try:
            found[name] = find_price(prices, name)
        except NotFoundError:  # a model whose name has a colon
            found[name] = price
    return found


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_text("templates/page.html"))


def _text(name: str) -> str:
    return resources.files(_PACKAGE).joinpath(name).read_text(encoding="utf-8")
