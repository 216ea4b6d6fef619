"""Traffic drawn from ServeGen's statistics of production clients (arXiv 2505.09999).

A folder holds two files a client: `chunk-N-trace.csv` (window start in s, requests a second, coefficient of
variation, family, two parameters) and `chunk-N-dataset.json` (window start in s, then histograms of
lengths). Each client is a renewal process of its own, so bursts of one client stay bursts; lengths are
drawn from its own histograms, input and output apart from each other, as the source gives only those.

The shape of the gaps is the table's (Gamma or Weibull). Their scale is set so that the mean is 1 / rate,
because the table's own scale is of the gaps within bursts where a client rarely calls.
"""

import ast
import csv
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from tokenmill.core import NotFoundError, UsageError
from tokenmill.evals.data import read_lines, read_text
from tokenmill.evals.load.traces import Call

__all__ = ["Client", "Window", "draw_calls", "read_clients"]

_TRACE = re.compile(r"chunk-(\d+)-trace\.csv(\.gz)?")
_MAX_HISTOGRAM_CHARS = 1 << 22
_MAX_CALLS = 1 << 20

_Histogram: TypeAlias = Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class Window:
    """A client's arrivals from `start_s` on: `family` is Gamma or Weibull with this shape."""

    start_s: float
    rate: float
    family: str
    shape: float


@dataclass(frozen=True, kw_only=True)
class Client:
    """One client: windows of arrivals, and by start of a window the texts of two histograms of lengths.

    The texts, of input and output, are from `file`; they are long, so they are read where they are used.
    """

    name: str
    windows: tuple[Window, ...]
    lengths: tuple[tuple[float, str, str], ...]
    file: Path


def read_clients(folder: Path) -> tuple[Client, ...]:
    """All clients of a folder, by number. Raises NotFoundError, and UsageError with file and line."""
    if not folder.is_dir():
        raise NotFoundError(f"{folder} is no folder", hint="give a folder of ServeGen's clients")
    found = sorted((int(m[1]), p) for p in folder.iterdir() if (m := _TRACE.fullmatch(p.name)))
    if not found:
        raise NotFoundError(f"{folder} has no chunk-N-trace.csv", hint="give a folder of ServeGen's clients")
    return tuple(_client(path) for _, path in found)


def draw_calls(clients: tuple[Client, ...], *, start_s: float, num_calls: int, seed: int) -> tuple[Call, ...]:
    """`num_calls` calls of the window at `start_s` of the statistics, in order, at the clients' own rates.

    Raises UsageError if no client calls then.
    """
    if not 1 <= num_calls <= _MAX_CALLS:
        raise UsageError(f"{num_calls} calls", hint=f"use a value from 1 to {_MAX_CALLS}")
    found = [(client, _window_at(client, start_s)) for client in clients]
    active = [(client, window) for client, window in found if window is not None]
    if not active:
        raise UsageError(f"no client calls at {start_s:g} s", hint="give another start of the window")
    total = math.fsum(window.rate for _, window in active)
    horizon_s = 1.1 * num_calls / total
    arrivals: list[tuple[float, int]] = []
    while len(arrivals) < num_calls:  # bursts may leave the expected time short of calls
        arrivals = [
            (at_s, index)
            for index, (_, window) in enumerate(active)
            for at_s in _arrival_times(window, horizon_s, seed, index)
        ]
        horizon_s *= 2
    rng = np.random.default_rng([seed, 0x5E67])
    dice = [_Dice(_histograms(client, start_s), rng) for client, _ in active]
    return tuple(dice[index].call(at_s) for at_s, index in sorted(arrivals)[:num_calls])


def _client(path: Path) -> Client:
    windows = []
    for place, line in read_lines(path):
        if not line:
            continue
        try:
            start, rate, _, family, shape, _ = next(csv.reader([line]))
            window = Window(start_s=float(start), rate=float(rate), family=family, shape=float(shape))
            if window.rate and (window.family not in ("Gamma", "Weibull") or window.shape <= 0):
                raise ValueError(f"family {family!r} with shape {shape}")
        except (ValueError, csv.Error) as error:
            place.refuse(str(error), "get the file again")
        windows.append(window)
    data = path.with_name(path.name.replace("-trace.csv", "-dataset.json"))
    name = path.name.split("-trace")[0]
    return Client(name=name, windows=tuple(windows), lengths=_lengths(data), file=data)


def _lengths(path: Path) -> tuple[tuple[float, str, str], ...]:
    try:
        windows = json.loads(read_text(path))
        found = [
            (float(start), str(window["input_tokens"]), str(window["output_tokens"]))
            for start, window in windows.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path}: no histograms of lengths ({error})", hint="get the file again") from None
    return tuple(sorted(found))


def _histograms(client: Client, start_s: float) -> tuple[_Histogram, _Histogram]:
    """Input and output of the window; empty where the client did not call. Raises UsageError."""
    known = [window for window in client.lengths if window[0] <= start_s]
    if not known:
        return {}, {}
    start, *texts = known[-1]
    try:
        inputs, outputs = (_histogram(text) for text in texts)
    except (ValueError, SyntaxError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        raise UsageError(
            f"{client.file}, window {start:g}: no histogram of lengths ({error})", hint="get the file again"
        ) from None
    return inputs, outputs


def _histogram(text: str) -> _Histogram:
    if len(text) > _MAX_HISTOGRAM_CHARS:
        raise ValueError("it is too long")
    histogram = {int(length): float(share) for length, share in ast.literal_eval(text).items()}
    if histogram and not (min(histogram.values()) >= 0 and 0 < math.fsum(histogram.values()) < math.inf):
        raise ValueError("its shares are none")
    return histogram


def _window_at(client: Client, start_s: float) -> Window | None:
    """The client's window at a time; None if it does not call then, or its lengths are not known."""
    windows = [window for window in client.windows if window.start_s <= start_s]
    if not windows or windows[-1].rate <= 0 or not all(_histograms(client, start_s)):
        return None
    return windows[-1]


def _arrival_times(window: Window, horizon_s: float, seed: int, client: int) -> list[float]:
    """Renewal arrivals that began long ago: the first is a uniform part of a gap chosen by its length."""
    rng = np.random.default_rng([seed, client])
    rate, shape = window.rate, window.shape
    num = math.ceil(rate * horizon_s) + 16
    if window.family == "Gamma":
        scale = 1.0 / (rate * shape)
        times = np.array([rng.random() * rng.gamma(shape + 1, scale)])
    else:
        scale = 1.0 / (rate * math.gamma(1 + 1 / shape))
        times = np.array([rng.random() * scale * rng.gamma(1 + 1 / shape) ** (1 / shape)])
    while times[-1] < horizon_s:
        gaps = scale * (rng.gamma(shape, 1.0, num) if window.family == "Gamma" else rng.weibull(shape, num))
        times = np.concatenate([times, times[-1] + np.cumsum(gaps)])
    return [float(at_s) for at_s in times if at_s < horizon_s]


class _Dice:
    """Draws the lengths of one client's calls."""

    def __init__(self, histograms: tuple[_Histogram, _Histogram], rng: np.random.Generator) -> None:
        self._tables = [(np.array(list(h)), np.array(list(h.values()))) for h in histograms]
        self._rng = rng

    def call(self, at_s: float) -> Call:
        """A call at this time."""
        num_input, num_output = (
            max(1, int(self._rng.choice(values, p=shares / shares.sum()))) for values, shares in self._tables
        )
        return Call(at_s=at_s, num_input_tokens=num_input, num_output_tokens=num_output)
