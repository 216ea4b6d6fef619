"""`deployment.yaml`: what a server serves, where, to whom and at which price; read strictly.

    models:
      - name: support                 # what clients ask for
        model: smollm2-135m           # a name of `tokenmill models`, or a folder
        price: {standard: {input_usd: 0.02, output_usd: 0.08}, batch: {input_usd: 0.01, output_usd: 0.04}}
    machine: {usd_per_hour: 0.0884, source: "a cloud's price list, 2026-11-01"}

Every key has a default but the models; what is not known is an error that names its place. Relative paths
are meant from the file's folder. Keys of upstreams are never in it, only the names of their variables.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import yaml

from tokenmill.core import NotFoundError, StorageError, Tier, UsageError
from tokenmill.engine import LLMConfig
from tokenmill.engine.mock import MockScript
from tokenmill.router.cascade import CascadeConfig
from tokenmill.router.classifier import ClassifierConfig
from tokenmill.router.config import Price, RouteConfig, UpstreamConfig
from tokenmill.router.labels import LabelConfig
from tokenmill.router.prompted import PromptedConfig
from tokenmill.server.batches import BatchConfig
from tokenmill.server.capture import CaptureConfig
from tokenmill.server.edge import is_loopback
from tokenmill.server.observer import ObserverConfig
from tokenmill.server.protocol import HttpLimits

__all__ = ["Deployment", "HttpConfig", "MachineConfig", "ModelConfig", "read_deployment"]

_MAX_BYTES: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class HttpConfig:
    """Where to listen, and bounds of all calls together.

    `port` 0 is any that is free. `hosts` are names by which clients may call this server, beside those of
    loopback. With `keyless` everybody who reaches it may ask, which only loopback can have. At the end calls
    have `drain_s` seconds to be answered; by tier, a call may take `fast_s`, `standard_s` and `batch_s`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    hosts: tuple[str, ...] = ()
    keyless: bool | None = None
    drain_s: float = 30.0
    keep_alive_s: int = 75
    backlog: int = 4096
    limits: HttpLimits = field(default_factory=HttpLimits)
    max_calls: int = 1024
    fast_s: float = 120.0
    standard_s: float = 600.0
    batch_s: float = 86400.0

    def __post_init__(self) -> None:
        _check("port", self.port, 0, 65535)
        _check("max_calls", self.max_calls, 1, 1 << 20)
        _check("backlog", self.backlog, 1, 1 << 16)
        for name in ("drain_s", "keep_alive_s", "fast_s", "standard_s", "batch_s"):
            _check(name, getattr(self, name), 0, 7 * 86400)
        if self.keyless and not self.is_loopback:
            raise UsageError(
                f"host is {self.host} without keys: everybody who reaches this machine could ask",
                hint="make a key (tokenmill keys create) and leave keyless out, or listen on 127.0.0.1",
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return is_loopback(self.host)

    @property
    def asks_for_keys(self) -> bool:
        """Whether inference needs a key: everywhere but on loopback, unless the file says so."""
        return not (self.is_loopback if self.keyless is None else self.keyless)


@dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """What an hour of this machine costs in USD, and who says so: measured costs rest on it."""

    usd_per_hour: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        _check("usd_per_hour", self.usd_per_hour, 0, 1e5)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model on this machine: `name` is what clients ask for, `model` a name of the store or a folder.

    `price` by tier; a tier without one has that of standard, and what has none is free. A `mock` has no
    weights and answers at the speed that it is told: for tests of clients and of the server itself.
    """

    model: str = ""
    name: str = ""
    draft: str = ""
    mock: MockScript | None = None
    engine: LLMConfig = field(default_factory=LLMConfig)
    price: Mapping[Tier, Price] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(self.model) == (self.mock is not None):
            raise UsageError("a model has a model or a mock", hint="give one of the two")
        if self.mock is not None and not self.name:
            raise UsageError("a mock has no name", hint="give it one (name:)")

    @property
    def served_name(self) -> str:
        """The name in requests and answers."""
        return self.name or self.model


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """Everything that a server is told. `store` is the path of a file, or postgresql://...

    `classifiers` answer with a label, `scored` with the likeliest one of a model; `prompted` tell a
    deployment more before it answers; `cascades` ask one deployment first and another where it is not sure.
    `prices` are what keys pay for routes and upstreams, by name and tier; an upstream's own price otherwise.
    """

    models: tuple[ModelConfig, ...] = ()
    upstreams: tuple[UpstreamConfig, ...] = ()
    classifiers: tuple[ClassifierConfig, ...] = ()
    scored: tuple[LabelConfig, ...] = ()
    prompted: tuple[PromptedConfig, ...] = ()
    cascades: tuple[CascadeConfig, ...] = ()
    routes: tuple[RouteConfig, ...] = ()
    http: HttpConfig = field(default_factory=HttpConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    prices: Mapping[str, Mapping[Tier, Price]] = field(default_factory=dict)
    observe: ObserverConfig = field(default_factory=ObserverConfig)
    batches: BatchConfig = field(default_factory=BatchConfig)
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    store: str = ""

    def __post_init__(self) -> None:
        if not any((self.models, self.upstreams, self.classifiers, self.scored)):
            raise UsageError("nothing is served", hint="name a model (models:) or an endpoint (upstreams:)")
        names = [each.served_name for each in self.models] + [each.name for each in self.upstreams]
        names += [each.name for each in self.classifiers] + [each.name for each in self.scored]
        names += [each.name for each in self.prompted] + [each.name for each in self.cascades]
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"two deployments are called {name!r}", hint="give each a name of its own")


def read_deployment(path: Path) -> Deployment:
    """The deployment in a file.

    Raises NotFoundError without it, StorageError if it cannot be read, UsageError that names file and place
    for what it says.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {path}", hint="give a model, or a deployment file") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror})", hint="check it") from None
    if len(data) > _MAX_BYTES:
        raise UsageError(f"{path} has {len(data)} bytes", hint=f"at most {_MAX_BYTES}")
    try:
        value = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise UsageError(f"{path} is no YAML ({said[:200]})", hint="mend it") from None
    try:
        _check_keys(value, Deployment, "")
        found = msgspec.convert(value, Deployment, strict=True, dec_hook=_read_path)
    except msgspec.ValidationError as error:
        raise UsageError(f"{path}: {error}", hint="see docs/serving.md") from None
    except UsageError as error:
        raise UsageError(f"{path}: {error.message}", hint=error.hint) from None
    folder = found.capture.folder
    return dataclasses.replace(
        found,
        classifiers=tuple(
            dataclasses.replace(each, folder=_from(path.parent, each.folder)) for each in found.classifiers
        ),
        scored=tuple(
            dataclasses.replace(each, model=_from(path.parent, each.model)) for each in found.scored
        ),
        capture=dataclasses.replace(found.capture, folder=_from(path.parent, folder) if folder else ""),
        store=_from(path.parent, found.store) if found.store else "",
        models=tuple(
            dataclasses.replace(each, model=_from(path.parent, each.model)) for each in found.models
        ),
    )


def _from(folder: Path, name: str) -> str:
    """A relative path (one with a slash in front of nothing but dots) as seen from the file's folder."""
    return str((folder / name).resolve()) if name.startswith(("./", "../")) else name


def _check_keys(value: object, kind: Any, place: str) -> None:
    """Refuse keys that no field has, anywhere below."""
    kind = _without_none(kind)
    if value is not None and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UsageError(f"{place or 'the file'} is no mapping", hint="see docs/serving.md")
        hints = typing.get_type_hints(kind)
        known = [each.name for each in dataclasses.fields(kind)]
        for key, inner in value.items():
            where = f"{place}.{key}" if place else str(key)
            if key not in known:
                raise UsageError(f"{where} is not known", hint=f"use {', '.join(known)}")
            _check_keys(inner, hints[key], where)
    elif isinstance(value, dict):
        inner_kind = typing.get_args(kind)[1:] or (object,)
        for key, inner in value.items():
            _check_keys(inner, inner_kind[0], f"{place}.{key}")
    elif isinstance(value, list):
        for at, inner in enumerate(value):
            _check_keys(inner, _item_kind(kind), f"{place}[{at}]")


def _item_kind(kind: Any) -> Any:
    """What a sequence of this kind holds."""
    args: Sequence[Any] = typing.get_args(kind)
    return args[0] if args else object


def _without_none(kind: Any) -> Any:
    """`T` for `T | None`."""
    if isinstance(kind, types.UnionType):
        kinds = [each for each in typing.get_args(kind) if each is not type(None)]
        return kinds[0] if len(kinds) == 1 else object
    return kind


def _read_path(kind: type, value: object) -> Path:
    if kind is Path and isinstance(value, str):
        return Path(value).expanduser()
    raise ValueError(f"no {kind.__name__}")


def _check(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not low <= value <= high:
        raise UsageError(f"{name} is {value}", hint=f"use a value from {low:g} to {high:g}")
