"""`tokenmill erase`: remove an end user from captured calls and the ledger, and prove it."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tokenmill.cli.arguments import Subparsers, add_command
from tokenmill.cli.database import add_db_flag, format_day, with_store
from tokenmill.cli.output import Output
from tokenmill.core import NotFoundError, UsageError

if TYPE_CHECKING:
    from tokenmill.store import Store
    from tokenmill.workload import Erasure, WorkloadFolder

__all__ = ["add_parser"]

_DESCRIPTION = """\
Erase an end user: the lines of their calls from the captures and from files made of them, and their id from
the ledger, whose counts stay. The proof is printed and kept in erasures.jsonl of the captures, each with the
hash of the one before. The server may run meanwhile.

  tokenmill erase --user u-1234 --project shop --also distil/train.jsonl
  tokenmill erase --verify
"""
_HASH: Final = 12


def add_parser(subparsers: Subparsers) -> None:
    """Add `erase`."""
    parser = add_command(
        subparsers, "erase", _erase, summary="erase an end user, with proof", description=_DESCRIPTION
    )
    parser.add_argument("--user", metavar="ID", help="the id that calls had as `user`")
    parser.add_argument("--project", metavar="P", help="the project of the keys (default: default)")
    parser.add_argument(
        "--folder", type=Path, metavar="FOLDER", help="the captures (default: beside the database)"
    )
    parser.add_argument(
        "--also", type=Path, metavar="FILE", action="append", help="a workload made of captures; repeatable"
    )
    parser.add_argument("--verify", action="store_true", help="check all proofs against the files instead")
    add_db_flag(parser)


def _erase(args: argparse.Namespace, out: Output) -> int:
    from tokenmill.workload import WorkloadFolder

    folder = WorkloadFolder(_folder(args))
    if args.verify:
        if args.user or args.also:
            raise UsageError("--verify checks all proofs", hint="give it without --user and --also")
        return _verify(folder, out)
    if not args.user:
        raise UsageError("nobody is named", hint="give --user ID, or --verify")
    for path in args.also or ():
        if not path.is_file():
            raise NotFoundError(f"there is no file {path}", hint="nothing was erased; check --also")
    erasure = _erased(args, folder)
    document = _document(erasure)
    for file in document["files"]:
        removed, lines = file["num_lines_removed"], file["num_lines_before"]
        hashes = (file["sha256_before"][:_HASH], file["sha256_after"][:_HASH])
        change = " -> ".join(hashes) if removed else "as it was"
        out.text(f"{file['path']}: {removed} of {lines} lines removed, {change}")
    out.text(f"ledger: {erasure.ledger_rows} lines without the id now; their counts stay")
    out.text(f"erasure {erasure.number} of {erasure.end_user}, {format_day(erasure.at)}: {erasure.sha256}")
    out.document(document)
    return 0


def _erased(args: argparse.Namespace, folder: "WorkloadFolder") -> "Erasure":
    """The ledger first, for the proof says in how many lines; what fails is done by asking again."""
    from tokenmill.workload import erase

    project = args.project or "default"

    async def work(store: "Store") -> int:
        return await store.erase_end_user(project, args.user)

    rows = with_store(args, work)
    return erase(folder, project=project, end_user=args.user, also=args.also or (), ledger_rows=rows)


def _verify(folder: "WorkloadFolder", out: Output) -> int:
    from tokenmill.workload import read_erasures, verify_erasures

    if not folder.path.is_dir():
        raise NotFoundError(f"there are no captures at {folder.path}", hint="give --folder")
    wrong, num = verify_erasures(folder), len(read_erasures(folder))
    for each in wrong:
        out.warn(each)
    out.text(f"{num} erasures: " + (f"{len(wrong)} faults" if wrong else "the log and all files hold"))
    out.document({"erasures": num, "faults": wrong})
    return 1 if wrong else 0


def _folder(args: argparse.Namespace) -> Path:
    from tokenmill.models.store.library import default_home
    from tokenmill.server.capture import default_folder

    folder: Path | None = args.folder
    return folder or default_folder(args.db or str(default_home() / "server.db"))


def _document(erasure: "Erasure") -> dict[str, Any]:
    import msgspec

    value: dict[str, Any] = json.loads(msgspec.json.encode(erasure))
    return value
