"""`tokenmill keys`: make, list, change, revoke and rotate the keys of a server."""

import argparse
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any, Final

from tokenmill.cli.arguments import Handler, Parser, Subparsers, add_command, add_shared_flags, positive
from tokenmill.cli.database import add_db_flag, duration_s, format_day, format_usd, with_store
from tokenmill.cli.output import Output
from tokenmill.core import NotFoundError, UsageError

if TYPE_CHECKING:
    from tokenmill.store import Budget, BudgetPeriod, Key, Store

__all__ = ["add_parser"]

_DESCRIPTION = """\
The keys of a server: who may ask, for what, how often, and for how much money. A secret is shown once, when
it is made; only its SHA-256 is kept. The server may run meanwhile: it sees a change within a second.

  tokenmill keys create ci --expires 30d --budget "10 USD/month"
  tokenmill keys list
  tokenmill keys revoke ci
"""
_CREATE = """\
A new key. The secret is the only line on standard output, so that KEY=$(tokenmill keys create ci) works;
what is for people goes to standard error.
"""
_SCOPES: Final = ("inference", "admin", "metrics")
_TIERS: Final = ("fast", "standard", "batch")
_BUDGET: Final = re.compile(
    r"\$?\s*(\d{1,10}(?:\.\d{1,20})?)\s*(?:USD)?\s*(?:(?:/|per)\s*(day|month)|total)?",
    flags=re.ASCII | re.IGNORECASE,
)
_WORD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", flags=re.ASCII)


def add_parser(subparsers: Subparsers) -> None:
    """Add `keys` and its actions."""
    keys = add_command(
        subparsers, "keys", _no_action, summary="who may ask a server", description=_DESCRIPTION
    )
    actions = keys.add_subparsers(
        title="actions", metavar="ACTION", dest="action", parser_class=Parser, help="what to do"
    )
    create = _add(actions, "create", _create, "a new key; its secret is shown once", _CREATE)
    create.add_argument("name", metavar="NAME", help="what people call it; no two valid keys have the same")
    _add_fields(create)
    _add(actions, "list", _list, "all keys, without their secrets", "")
    change = _add(actions, "change", _change, "change what a key may do", "")
    change.add_argument("key", metavar="KEY", help="its id or its name")
    _add_fields(change)
    revoke = _add(actions, "revoke", _revoke, "end a key for good", "")
    revoke.add_argument("key", metavar="KEY", help="its id or its name")
    rotate = _add(actions, "rotate", _rotate, "a new secret in the place of the old one", "")
    rotate.add_argument("key", metavar="KEY", help="its id or its name")
    for action in actions.choices.values():
        add_db_flag(action)
        add_shared_flags(action)


def _add(actions: Subparsers, name: str, handler: Handler, summary: str, description: str) -> Parser:
    return add_command(actions, name, handler, summary=summary, description=description)


def _add_fields(parser: Parser) -> None:
    parser.add_argument("--project", type=_word, metavar="P", help="whose it is; a new key's is `default`")
    parser.add_argument(
        "--scopes",
        type=_words(_SCOPES),
        metavar="S,..",
        help=f"what it may do: {', '.join(_SCOPES)} (a new key: inference)",
    )
    parser.add_argument(
        "--tiers",
        type=_words(_TIERS),
        metavar="T,..",
        help=f"what it may ask for, the first by itself: {', '.join(_TIERS)} (a new key: standard,batch)",
    )
    parser.add_argument("--tags", type=_words(()), metavar="T,..", help="words of your own to it")
    parser.add_argument("--expires", type=_duration, metavar="TIME", help="from now: 12h, 30d, 1y, or never")
    parser.add_argument(
        "--budget", type=_budget, metavar="USD", help='such as "10 USD/month", "0.5 USD/day", "100 USD", none'
    )
    parser.add_argument("--requests-per-minute", type=positive, metavar="N", help="how often it may ask")
    parser.add_argument("--tokens-per-minute", type=positive, metavar="N", help="tokens in and out")
    parser.add_argument("--concurrency", type=positive, metavar="N", help="calls at a time")
    parser.add_argument(
        "--capture", choices=("on", "off"), help="keep its calls as a workload (a new key: off)"
    )


def _no_action(args: argparse.Namespace, out: Output) -> int:
    raise UsageError("no action", hint="see `tokenmill keys --help`")


def _create(args: argparse.Namespace, out: Output) -> int:
    from tokenmill.store import Key, new_key_id, new_secret

    if not args.name.isprintable() or not 1 <= len(args.name) <= 100:
        raise UsageError("a key's name has 1 to 100 printable characters")
    secret = new_secret()
    plain = Key(id=new_key_id(), name=args.name, project="default", created_s=time.time())
    key = _changed(plain, args)

    async def work(store: "Store") -> None:
        for other in await store.keys():
            if other.name == key.name and other.is_valid(time.time()):
                hint = f"give another name, or `tokenmill keys rotate {other.id}`"
                raise UsageError(f"{other.id} is called {key.name} already", hint=hint)
        await store.add_key(key, secret.secret_hash)

    with_store(args, work, creates=True)
    _show_secret(out, key, secret.secret)
    return 0


def _list(args: argparse.Namespace, out: Output) -> int:
    from tokenmill.store import SteadyClock, period_of

    now_s = SteadyClock().now_s()

    async def work(store: "Store") -> "list[tuple[Key, int]]":
        found = []
        for key in await store.keys():
            period = period_of("total" if key.budget is None else key.budget.period, now_s)
            found.append((key, await store.spent(key.id, *period)))
        return found

    found = with_store(args, work)
    header = ("id", "name", "project", "scopes", "tiers", "budget", "spent, USD", "expires", "state")
    out.table(header, [_cells(key, spent, now_s) for key, spent in found])
    out.document(
        {
            "keys": [
                _fields(key) | {"spent_nano_usd": spent, "state": _state(key, now_s)} for key, spent in found
            ]
        }
    )
    return 0


def _change(args: argparse.Namespace, out: Output) -> int:
    def change(key: "Key") -> "Key":
        changed = _changed(key, args)
        if changed == key:
            raise UsageError("nothing to change", hint="see `tokenmill keys change --help`")
        return changed

    key = _update(args, change)
    out.text(f"{key.id} ({key.name}) is changed")
    out.document({"key": _fields(key)})
    return 0


def _revoke(args: argparse.Namespace, out: Output) -> int:
    key = _update(args, lambda key: replace(key, revoked_s=key.revoked_s or time.time()), valid_only=False)
    out.text(f"{key.id} ({key.name}) opens nothing any more")
    out.document({"key": _fields(key)})
    return 0


def _rotate(args: argparse.Namespace, out: Output) -> int:
    from tokenmill.store import new_secret

    secret = new_secret()
    key = _update(args, lambda key: key, secret_hash=secret.secret_hash)
    _show_secret(out, key, secret.secret)
    return 0


def _update(
    args: argparse.Namespace,
    change: "Callable[[Key], Key]",
    *,
    secret_hash: bytes | None = None,
    valid_only: bool = True,
) -> "Key":
    """Change the key that is named. Raises NotFoundError, or UsageError if that is not one valid key."""

    async def work(store: "Store") -> "Key":
        key = _find(await store.keys(), args.key)
        if valid_only and not key.is_valid(time.time()):
            hint = "there are new ones with `tokenmill keys create`"
            raise UsageError(f"{key.id} ({key.name}) is {_state(key, time.time())}", hint=hint)
        changed = change(key)
        await store.update_key(changed, secret_hash)
        return changed

    return with_store(args, work)


def _find(keys: "Sequence[Key]", name: str) -> "Key":
    found = [key for key in keys if key.id == name]
    found = found or [key for key in keys if key.name == name and key.is_valid(time.time())]
    found = found or [key for key in keys if key.name == name]
    if not found:
        raise NotFoundError(f"there is no key {name}", hint="see `tokenmill keys list`")
    if len(found) > 1:
        raise UsageError(f"{len(found)} keys are called {name}", hint=f"give an id, such as {found[-1].id}")
    return found[0]


def _changed(key: "Key", args: argparse.Namespace) -> "Key":
    """The key with what the flags say; what is not given stays."""
    limits = {
        name: getattr(args, name) for name in ("requests_per_minute", "tokens_per_minute", "concurrency")
    }
    given: dict[str, Any] = {name: getattr(args, name) for name in ("project", "scopes", "tiers", "tags")}
    fields = {name: value for name, value in given.items() if value is not None}
    if args.expires is not None:
        fields["expires_s"] = time.time() + args.expires if args.expires else None
    if args.budget is not None:
        fields["budget"] = args.budget[0] if args.budget else None
    if args.capture is not None:
        fields["capture"] = args.capture == "on"
    kept = {name: value for name, value in limits.items() if value is not None}
    return replace(key, limits=replace(key.limits, **kept), **fields)


def _show_secret(out: Output, key: "Key", secret: str) -> None:
    out.text(secret)
    out.note(f"{key.id} ({key.name}, project {key.project}): the secret is shown this once; keep it safe")
    out.document({"secret": secret, "key": _fields(key)})


def _fields(key: "Key") -> dict[str, Any]:
    return asdict(key)


def _cells(key: "Key", spent: int, now_s: float) -> list[str]:
    budget = "-" if key.budget is None else _budget_text(key.budget)
    words = [",".join(key.scopes), ",".join(key.tiers), budget, format_usd(spent)]
    return [key.id, key.name, key.project, *words, format_day(key.expires_s), _state(key, now_s)]


def _budget_text(budget: "Budget") -> str:
    period = "" if budget.period == "total" else f"/{budget.period}"
    return f"{format_usd(budget.nano_usd)} USD{period}"


def _state(key: "Key", now_s: float) -> str:
    if key.revoked_s is not None:
        return "revoked"
    return "valid" if key.is_valid(now_s) else "expired"


def _word(text: str) -> str:
    if not _WORD.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no word of letters, digits, dots and dashes")
    return text


def _words(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Words with commas between, each one of `known` if there are any, none twice."""

    def read(text: str) -> tuple[str, ...]:
        words = tuple(word.strip() for word in text.split(",") if word.strip())
        for word in words:
            if known and word not in known:
                raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(known)}")
            _word(word)
        if len(set(words)) < len(words) or (known and not words):
            raise argparse.ArgumentTypeError(f"{text!r} names nothing, or something twice")
        return words

    return read


def _duration(text: str) -> float:
    """Seconds from now; 0 for never."""
    if text == "never":
        return 0.0
    seconds = duration_s(text)
    if not seconds:
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 12h, 30d, 1y, never")
    return seconds


def _budget(text: str) -> "tuple[Budget, ...]":
    """A budget; empty for none."""
    from tokenmill.store import Budget

    if text == "none":
        return ()
    match = _BUDGET.fullmatch(text.strip())
    try:
        nano_usd = Decimal(match[1]).scaleb(9) if match else Decimal("NaN")
        if not match or nano_usd != int(nano_usd):
            raise InvalidOperation
        periods: dict[str, BudgetPeriod] = {"day": "day", "month": "month"}
        return (Budget(nano_usd=int(nano_usd), period=periods.get((match[2] or "").lower(), "total")),)
    except (InvalidOperation, ValueError, UsageError):
        raise argparse.ArgumentTypeError(
            f'{text!r} is no budget such as "10 USD/month", "0.5 USD/day", "100 USD", none'
        ) from None
