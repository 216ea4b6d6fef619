"""Everything that a run leaves for people and programs, written into its folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from tokenmill.core import StorageError
from tokenmill.models.files import atomic_file
from tokenmill.optimize.deployment import DEPLOYMENT, deployment_text
from tokenmill.optimize.documents import CERTIFICATE, REPORT, certificate, report
from tokenmill.optimize.junit import junit_text
from tokenmill.optimize.page import report_page
from tokenmill.optimize.run import Outcome
from tokenmill.workload import WorkloadConfig

__all__ = ["JUNIT", "PAGE", "WORKLOAD", "workload_fields", "write_outcome"]

JUNIT: Final = "junit.xml"
PAGE: Final = "report.html"
WORKLOAD: Final = "workload"


def write_outcome(outcome: Outcome, folder: Path, machine: Mapping[str, Any]) -> dict[str, Any]:
    """Write report.json, report.html, certificate.json, deployment.yaml, junit.xml and workload.json.

    Gives the report. Raises StorageError.
    """
    document = report(outcome, machine)
    _write_json(folder / f"{WORKLOAD}.json", workload_fields(outcome.problem.config))
    _write_json(folder / f"{REPORT}.json", document)
    _write_json(folder / f"{CERTIFICATE}.json", certificate(outcome, folder, document))
    _write(folder / PAGE, report_page(document))
    _write(folder / DEPLOYMENT, deployment_text(outcome, folder))
    _write(folder / JUNIT, junit_text(outcome))
    return document


def workload_fields(config: WorkloadConfig) -> dict[str, Any]:
    """The workload's file as it was read, with the log's whole path."""
    fields = msgspec.to_builtins(config, enc_hook=str)
    assert isinstance(fields, dict)
    return {**fields, "log": str(config.log.resolve())}


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    data = msgspec.json.format(msgspec.json.encode(document), indent=1)
    _write(path, data.decode() + "\n")


def _write(path: Path, text: str) -> None:
    try:
        with atomic_file(path) as file:
            file.write(text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}", hint="check the disk") from error
