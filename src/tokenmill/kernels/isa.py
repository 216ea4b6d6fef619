"""Which kernels run: the native extension with its instruction sets, or the numpy twin without it.

`TOKENMILL_ISA` forces one of `amx`, `avx512`, `avxvnni`, `avx2`, `neon`, `portable`, `numpy`.
"""

import functools
import importlib
import os
import warnings
from collections.abc import Mapping
from typing import Any

from tokenmill.core import UsageError

__all__ = ["NUMPY", "available_isas", "choose_isa", "default_threads", "load_native"]

NUMPY = "numpy"

_REMEDY = "install a C++ compiler (Debian: apt install g++) and run pip install --force-reinstall tokenmill"


@functools.cache
def load_native() -> Any | None:
    """The extension module, or None (with one warning that names the remedy) if it was not built."""
    try:
        return importlib.import_module("tokenmill.kernels._native")
    except ModuleNotFoundError:
        warnings.warn(
            f"tokenmill was installed without native kernels and runs on numpy, slowly: {_REMEDY}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


@functools.cache
def available_isas() -> tuple[str, ...]:
    """Instruction sets that run here, best first; `numpy` is always last."""
    native = load_native()
    return (*native.available_isas(), NUMPY) if native is not None else (NUMPY,)


def choose_isa(environ: Mapping[str, str] = os.environ) -> str:
    """The best instruction set, or the one that `TOKENMILL_ISA` forces."""
    forced = environ.get("TOKENMILL_ISA", "")
    isas = available_isas()
    if forced and forced not in isas:
        raise UsageError(
            f"TOKENMILL_ISA is {forced!r}", hint=f"this machine and installation have: {', '.join(isas)}"
        )
    return forced or isas[0]


def default_threads() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0))
