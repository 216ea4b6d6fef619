"""Cheaper models out of model directories: smaller vocabularies, students, and what keeps them honest.

A model directory in, a cheaper one out, with parent and recipe in its manifest. Importing this package needs
torch (the `train` extra).
"""

from tokenmill.compress.drift import Drift, drift, row_drift
from tokenmill.compress.export_check import ExportMismatch, ExportReport, check_export
from tokenmill.compress.students import PRESETS, StudentShape, make_student
from tokenmill.compress.vocabulary import trim_vocabulary

__all__ = [
    "PRESETS",
    "Drift",
    "ExportMismatch",
    "ExportReport",
    "StudentShape",
    "check_export",
    "drift",
    "make_student",
    "row_drift",
    "trim_vocabulary",
]
