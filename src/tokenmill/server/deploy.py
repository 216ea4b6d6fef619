"""A deployment as a running server: store, accounts, engines, upstreams, routes, application, in this order.

Whatever is opened here is closed here, in the reverse order and also if a later part fails.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from starlette.routing import Route

from tokenmill.core import Tier, UsageError
from tokenmill.costs.prices import load_prices
from tokenmill.engine.mock import MockModel
from tokenmill.engine.serving.messages import EngineSpec
from tokenmill.engine.serving.supervisor import SupervisorConfig
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.store.library import Library
from tokenmill.router import Backend, Price, Router, UpstreamBackend
from tokenmill.router.cascade import CascadeBackend
from tokenmill.router.classifier import ClassifierBackend
from tokenmill.router.labels import LabelBackend
from tokenmill.router.local import LocalBackend, LocalConfig
from tokenmill.router.prompted import PromptedBackend
from tokenmill.server.anthropic_batches import AnthropicBatches
from tokenmill.server.app import api_routes, create_app
from tokenmill.server.batch_room import BatchRoom, endpoints_of
from tokenmill.server.capture import Capture, Provenance, default_folder
from tokenmill.server.config import Deployment, ModelConfig
from tokenmill.server.dashboard import Ledger
from tokenmill.server.edge import EdgeConfig, check_exposure
from tokenmill.server.erasing import EraseApi
from tokenmill.server.gateway import Gateway, GatewayConfig
from tokenmill.server.keys import KeyCache
from tokenmill.server.observer import Observer
from tokenmill.server.openai_batches import OpenAIBatches
from tokenmill.server.pricing import PriceList
from tokenmill.server.run import bind, serve_until_told
from tokenmill.store import Accounts, SqliteStore, Store, open_store
from tokenmill.workload import Origin

__all__ = ["check_deployment", "serve"]

_LOG: Final = logging.getLogger(__name__)
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
_SUPERVISOR: Final = SupervisorConfig(silence_s=4.0, hang_s=3.0)
"""So that an engine that is stopped or hangs is known within 5 s, on a busy machine too."""
_MOCK_TEMPLATE: Final = (
    "{% if tools %}<tools>{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<call>{{ call | tojson }}{% endfor %}{% endfor %}<assistant>"
)
"""How a mock is shown a conversation: it has no template of its own."""


async def serve(deployment: Deployment, *, on_ready: Callable[[str], None] = lambda _: None) -> None:
    """Serve until a signal comes; `on_ready` is told the URL.

    Raises UsageError if the address or what is to be served cannot be had, and what opening a model or the
    store raises.
    """
    http = deployment.http
    edge = EdgeConfig(
        keyless=not http.asks_for_keys,
        hosts=(*_LOOPBACK, *http.hosts) if http.hosts or http.is_loopback else (),
    )
    listener = bind(http)
    with contextlib.closing(listener):
        check_exposure(listener.getsockname()[0], edge)
        observer = Observer(deployment.observe, prices=load_prices())
        async with _opened(deployment, observer) as (gateway, store, room, capture), observer.looking():
            routes = [*observer.routes, *EraseApi(store, capture.folder).routes()]
            routes += [] if room is None else _batch_routes(room)
            app = observer.wrap(create_app(gateway, edge, KeyCache(store), routes))
            stop = None if room is None else room.stop
            await serve_until_told(app, gateway, http, listener, on_ready=on_ready, before_drain=stop)


@asynccontextmanager
async def _opened(
    deployment: Deployment, observer: Observer
) -> AsyncIterator[tuple[Gateway, Store, BatchRoom | None, Capture]]:
    """The gateway of a deployment with everything behind it, watched; batches where the store has them."""
    async with contextlib.AsyncExitStack() as stack:
        url = deployment.store or str(Library().home / "server.db")
        store = open_store(url)
        stack.push_async_callback(store.close)
        accounts = Accounts(store)
        await accounts.start()
        backends = await _backends(deployment, stack)
        folder = deployment.capture.folder
        place = Path(folder).expanduser() if folder else default_folder(url)
        capture = Capture(deployment.capture, place, _origins(deployment), accounts.settle)
        stack.push_async_callback(capture.close)
        router = Router(backends, deployment.routes, on_event=observer.routed, on_pair=capture.pair)
        http = deployment.http
        config = GatewayConfig(
            max_calls=http.max_calls, fast_s=http.fast_s, standard_s=http.standard_s, batch_s=http.batch_s
        )
        gateway = Gateway(
            router, accounts, _prices(deployment), config, on_settled=observer.settled, copies=capture
        )
        ledger = Ledger(store, accounts.remaining)
        observer.watch(gateway, backends, ledger, store)
        observer.metrics.watch(capture.gauges())
        room = None
        if isinstance(store, SqliteStore):
            room = BatchRoom(
                store,
                accounts,
                Path(f"{url}.files").expanduser(),
                endpoints_of(api_routes(gateway)),
                lambda: gateway.num_calls,
                config=deployment.batches,
            )
            observer.watch_batches(room.objects)
            await room.start()
            stack.push_async_callback(room.stop)
        yield gateway, store, room, capture


def _batch_routes(room: BatchRoom) -> list[Route]:
    return [*OpenAIBatches(room).routes(), *AnthropicBatches(room).routes()]


async def _backends(deployment: Deployment, stack: contextlib.AsyncExitStack) -> list[Backend]:
    """Engines and upstreams, closed by the stack."""
    backends: list[Backend] = []
    for model in deployment.models:
        backend = await _local(model, deployment)
        stack.push_async_callback(backend.close)
        backends.append(backend)
    for upstream in deployment.upstreams:
        endpoint = UpstreamBackend(upstream)
        stack.push_async_callback(endpoint.close)
        backends.append(endpoint)
    hour = deployment.machine.usd_per_hour
    for classifier in deployment.classifiers:
        backends.append(await asyncio.to_thread(ClassifierBackend.open, classifier, usd_per_hour=hour))
    for scored in deployment.scored:
        labels = await asyncio.to_thread(LabelBackend.open, scored, usd_per_hour=hour)
        stack.push_async_callback(labels.close)
        backends.append(labels)
    for prompted in deployment.prompted:
        backends.append(PromptedBackend(prompted, _named(backends, prompted.backend, prompted.name)))
    for cascade in deployment.cascades:
        parts = [_named(backends, each, cascade.name) for each in (cascade.first, cascade.second)]
        backends.append(CascadeBackend(cascade, *parts))
    return backends


def _named(backends: list[Backend], name: str, asker: str) -> Backend:
    """The deployment of this name. Raises UsageError if there is none before the one that asks for it."""
    for backend in backends:
        if backend.name == name:
            return backend
    known = ", ".join(each.name for each in backends)
    raise UsageError(f"{asker} names the deployment {name}, which is not there", hint=f"known: {known}")


def check_deployment(deployment: Deployment) -> list[str]:
    """What would be served, a line each, without starting an engine. Raises what is wrong."""
    lines = []
    for model in deployment.models:
        directory = _directory(model)
        what = "a mock" if model.mock else f"{directory.path}, {model.engine.weights}"
        lines.append(f"{model.served_name}: {what}")
    lines += [f"{each.name}: {each.model} at {each.url}" for each in deployment.upstreams]
    lines += [f"{each.name}: a classifier in {each.folder}" for each in deployment.classifiers]
    lines += [f"{each.name}: {len(each.labels)} labels scored by {each.model}" for each in deployment.scored]
    lines += [f"{each.name}: {each.backend} with more told to it" for each in deployment.prompted]
    lines += [f"{each.name}: {each.first}, then {each.second}" for each in deployment.cascades]
    return lines


def _origins(deployment: Deployment) -> dict[str, Provenance]:
    """Which model each deployment runs, and its licences or terms."""
    origins = {
        each.name: Provenance(origin=Origin(model=each.model, source=each.url), terms=each.terms)
        for each in deployment.upstreams
    }
    for model in deployment.models:
        directory = _directory(model)
        manifest = directory.manifest
        source = "mock" if model.mock else manifest.source if manifest else str(directory.path)
        origins[model.served_name] = Provenance(
            origin=Origin(model=directory.name, source=source, digest=manifest.digest if manifest else ""),
            terms=manifest.licences if manifest else (),
        )
    for each in deployment.classifiers:
        origins[each.name] = Provenance(origin=Origin(model=each.name, source=each.folder))
    origins |= {each.name: origins[each.backend] for each in deployment.prompted if each.backend in origins}
    return origins


def _prices(deployment: Deployment) -> PriceList:
    """What keys pay by the name that they ask for; an upstream without a price of ours at its own."""
    prices: dict[str, Mapping[Tier, Price]] = {
        each.name: {"standard": each.price} for each in deployment.upstreams
    }
    prices |= {each.served_name: each.price for each in deployment.models}
    return PriceList(prices=prices | dict(deployment.prices))


async def _local(model: ModelConfig, deployment: Deployment) -> LocalBackend:
    directory = _directory(model)
    name = model.served_name
    config = LocalConfig(
        name=name,
        model=name,
        usd_per_hour=deployment.machine.usd_per_hour,
        max_requests=min(deployment.http.max_calls * 8, 1 << 20),
    )
    draft = str(Library().find(model.draft).path) if model.draft else ""
    spec = EngineSpec(
        model="" if model.mock else str(directory.path),
        mock=model.mock,
        draft=draft,
        config=model.engine,
        drain_s=deployment.http.drain_s,
    )
    begun_s = time.monotonic()
    backend = await LocalBackend.open(config, directory, spec, _SUPERVISOR)
    _LOG.info("%s is open after %.1f s", name, time.monotonic() - begun_s)
    return backend


def _directory(model: ModelConfig) -> ModelDirectory:
    return (
        Library().find(model.model)
        if model.mock is None
        else MockModel(model.mock, template=model.mock.template or _MOCK_TEMPLATE)
    )
