"""`tokenmill serve`: models of this machine and endpoints elsewhere behind the OpenAI and Anthropic APIs."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tokenmill.cli.arguments import (
    Subparsers,
    add_command,
    add_speculation_flags,
    llm_config,
    open_model,
)
from tokenmill.cli.output import Output
from tokenmill.core import UsageError

if TYPE_CHECKING:
    from tokenmill.server.config import Deployment

__all__ = ["add_parser"]

_DESCRIPTION = """\
Serve a model, or what a deployment file names, behind the APIs that OpenAI's and Anthropic's clients speak.

On 127.0.0.1 no key is needed, and a page of the web cannot ask. Elsewhere every request needs a key of
`tokenmill keys create`. SIGTERM and Ctrl-C let what has begun be answered; a second one ends it at once.

  tokenmill serve smollm2-135m
  tokenmill serve deployment.yaml --check
"""
_SUFFIXES: Final = (".yaml", ".yml")


def add_parser(subparsers: Subparsers) -> None:
    """Add `serve`."""
    parser = add_command(
        subparsers, "serve", _serve, summary="serve the OpenAI and Anthropic APIs", description=_DESCRIPTION
    )
    parser.add_argument(
        "what", metavar="MODEL|FILE", help="a model of `tokenmill models`, or a deployment file (.yaml)"
    )
    parser.add_argument("--host", metavar="HOST", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, metavar="PORT", help="port; 0 is any free one (default: 8000)")
    parser.add_argument("--store", metavar="URL", help="file of keys and ledger, or postgresql://...")
    parser.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info", help="(default: info)"
    )
    parser.add_argument("--check", action="store_true", help="say what would be served, and serve nothing")
    add_speculation_flags(parser)


def _serve(args: argparse.Namespace, out: Output) -> int:
    import asyncio  # not at the top: it would be read for every command

    from tokenmill.server.deploy import check_deployment, serve
    from tokenmill.server.logs import set_up_logs

    deployment = _deployment(args)
    lines = check_deployment(deployment)
    http = deployment.http
    if args.check:
        for line in lines:
            out.text(line)
        out.text(f"on {http.host}:{http.port}, {'with keys' if http.asks_for_keys else 'without keys'}")
        out.document({"serves": lines, "host": http.host, "port": http.port, "keys": http.asks_for_keys})
        return 0

    def ready(url: str) -> None:
        for line in lines:
            out.note(line)
        keys = "with keys" if http.asks_for_keys else "without keys, for this machine only"
        out.note(f"listening on {url}, {keys}; Ctrl-C ends it")
        if out.as_json:
            out.document({"url": url, "serves": lines})

    set_up_logs(args.log_level)
    asyncio.run(serve(deployment, on_ready=ready))
    return 0


def _deployment(args: argparse.Namespace) -> "Deployment":
    """What the file says, or a deployment of one model, with the flags over it."""
    from tokenmill.server.config import Deployment, ModelConfig, read_deployment

    if args.what.endswith(_SUFFIXES):
        if args.weights or args.kv or args.threads or args.draft or args.speculation:
            raise UsageError("engine flags are for a model, not a file", hint="write them into the file")
        deployment = read_deployment(Path(args.what))
    else:
        directory = open_model(args.what)
        name = args.what if "/" not in args.what else directory.name
        model = ModelConfig(
            name=name, model=str(directory.path), draft=args.draft or "", engine=llm_config(args)
        )
        deployment = Deployment(models=(model,))
    http: dict[str, Any] = {name: getattr(args, name) for name in ("host", "port")}
    given = {name: value for name, value in http.items() if value is not None}
    deployment = dataclasses.replace(deployment, http=dataclasses.replace(deployment.http, **given))
    return dataclasses.replace(deployment, store=args.store) if args.store else deployment
