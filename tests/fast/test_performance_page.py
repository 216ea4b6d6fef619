"""docs/performance.md: its marks, its figures of the limit, and what the generators make of made-up ones."""

import importlib

import numpy as np
import pytest

from scripts import performance_page, performance_plot, profile_step
from tests.fast.random_plan import random_plan
from tokenmill.kernels.probe import MachineLimits

PAGE = performance_page.PAGE.read_text(encoding="utf-8")
LIMITS = MachineLimits(isa="amx", num_threads=2, int8_tops=2.0, bf16_tops=1.0, read_gb_s={1: 100.0, 100: 10.0})
