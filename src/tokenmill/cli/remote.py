"""Models named by URL: the flags that say which model of an endpoint, whose API, and where its key is."""

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from tokenmill.cli.arguments import Parser, positive
from tokenmill.core import UsageError

if TYPE_CHECKING:
    from tokenmill.remote import Endpoint, RemoteModel

__all__ = ["APIS", "add_endpoint_flags", "open_endpoint", "open_remote_model"]

APIS: Final = ("openai", "anthropic")


def add_endpoint_flags(parser: Parser) -> None:
    """`--endpoint-model`, `--api`, `--key-env`, `--no-sampling`, `--concurrency`."""
    group = parser.add_argument_group("endpoint, where the model is a URL")
    group.add_argument(
        "--endpoint-model",
        metavar="NAME",
        help="what the endpoint calls the model (default: the only one that it serves)",
    )
    group.add_argument("--api", choices=APIS, help="whose API it speaks (default: by the URL, else openai)")
    group.add_argument("--key-env", metavar="VAR", help="the environment variable that has its key")
    group.add_argument(
        "--no-sampling", action="store_true", help="send no temperature: some models refuse it"
    )
    group.add_argument("--concurrency", type=positive, metavar="N", help="requests at a time (default: 16)")


def open_endpoint(url: str, args: argparse.Namespace) -> "Endpoint":
    """The endpoint of a URL, as the flags say. Asks it which model it serves if none is named."""
    from tokenmill.remote import parse_endpoint, served_models

    endpoint = parse_endpoint(url, args.endpoint_model or "", api=args.api, key_env=args.key_env or "")
    endpoint = replace(endpoint, with_sampling=not args.no_sampling)
    if endpoint.model:
        return endpoint
    names = served_models(endpoint)
    if len(names) != 1:
        listed = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
        raise UsageError(
            f"{endpoint.url} serves {len(names)} models", hint=f"name one: {listed or 'none is there'}"
        )
    return replace(endpoint, model=names[0])


def open_remote_model(url: str, args: argparse.Namespace) -> "RemoteModel":
    """The model behind a URL, as the flags say: a generator, and a scorer where the endpoint allows it."""
    from tokenmill.remote import RemoteConfig, RemoteModel

    config = RemoteConfig(concurrency=args.concurrency) if args.concurrency else None
    return RemoteModel(open_endpoint(url, args), config)
