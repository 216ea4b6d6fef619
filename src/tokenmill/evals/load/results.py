"""Results as files: one JSON document of figures, and the raw samples as JSON lines.

`requests.jsonl` has every sample with the times of its pieces. `profile_export.jsonl` has the same requests
with the names and units of AIPerf's file, for tools that read that.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenmill.core import StorageError, UsageError
from tokenmill.evals.load.samples import Sample
from tokenmill.evals.load.summary import Summary
from tokenmill.evals.load.sweep import LevelResult

__all__ = ["SCHEMA", "aiperf_record", "level_document", "make_folder", "save", "summary_document"]

SCHEMA = 1

_FILES = ("load.json", "requests.jsonl", "profile_export.jsonl")


def summary_document(summary: Summary) -> dict[str, Any]:
    """A summary as JSON can hold it; milliseconds, seconds and tokens as its names say."""
    return {
        **asdict(summary),
        "client": {**asdict(summary.client), "is_saturated": summary.client.is_saturated},
    }


def level_document(result: LevelResult) -> dict[str, Any]:
    """A level with its figures."""
    level = result.level
    return {
        "level": {"kind": level.kind, "value": level.value, "arrivals": level.arrivals, "text": str(level)},
        "started_at": result.run.started_at,
        **summary_document(result.summary),
    }


def make_folder(folder: Path) -> None:
    """Make the folder for `save`, before time is spent. Raises StorageError; UsageError if it has a run."""
    with _storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if any((folder / name).exists() for name in _FILES):
            raise UsageError(f"{folder} holds another run", hint="give an empty folder, or remove it")
        for name in _FILES:
            (folder / name).touch()
            (folder / name).unlink()


def save(folder: Path, document: Mapping[str, Any], results: Sequence[LevelResult]) -> None:
    """Write `load.json`, `requests.jsonl` and `profile_export.jsonl`, all or none. Raises StorageError."""
    with _storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        exported = (aiperf_record(s, result.run.started_at) for result in results for s in result.run.samples)
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
        partial = [folder / f"{name}.partial" for name in _FILES]
        try:
            partial[0].write_text(f"{text}\n", encoding="utf-8")
            _write_lines(partial[1], _samples(results))
            _write_lines(partial[2], exported)
            for path in partial:
                path.replace(path.with_suffix(""))
        finally:
            for path in partial:
                path.unlink(missing_ok=True)


@contextmanager
def _storage_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = "check --save and the space on its disk"
        raise StorageError(f"{folder}: cannot be written ({error.strerror or error})", hint=hint) from error


def aiperf_record(sample: Sample, started_at: float) -> dict[str, Any]:
    """A sample in the shape of AIPerf's `profile_export.jsonl`; latencies from sending, as AIPerf counts
    them.
    """
    values: dict[str, tuple[float | Sequence[float] | None, str]] = {
        "request_latency": (1e3 * sample.e2e_s("sent"), "ms"),
        "time_to_first_token": (_ms(sample.ttft_s("sent")), "ms"),
        "inter_token_latency": (_ms(sample.tpot_s), "ms"),
        "inter_chunk_latency": ([1e3 * gap for gap in sample.gaps_s] or None, "ms"),
        "input_sequence_length": (sample.num_input_tokens, "tokens"),
        "output_sequence_length": (sample.num_output_tokens, "tokens"),
    }
    is_ok = sample.status == "ok"
    metrics = {name: {"value": v, "unit": unit} for name, (v, unit) in values.items() if v is not None}
    return {
        "metadata": {
            "x_request_id": sample.id,
            "request_start_ns": round(1e9 * (started_at + sample.sent_s)),
            "request_end_ns": round(1e9 * (started_at + sample.end_s)),
            "benchmark_phase": "warmup" if sample.is_warmup else "profiling",
            "was_cancelled": sample.status == "cancelled",
        },
        "metrics": metrics if is_ok else {},
        "error": None if is_ok else {"message": sample.error or sample.status},
    }


def _samples(results: Sequence[LevelResult]) -> Iterator[dict[str, Any]]:
    for result in results:
        for sample in result.run.samples:
            derived = {"ttft_s": sample.ttft_s(), "tpot_s": sample.tpot_s, "e2e_s": sample.e2e_s()}
            yield {"level": str(result.level), **asdict(sample), **derived}


def _write_lines(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds
