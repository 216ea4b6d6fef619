"""Cheaper models out of model directories: smaller vocabularies, students, distillation, checked exports.

A model directory in, a cheaper one out, with parent and recipe in its manifest. Importing this needs torch
(the `train` extra).
"""

from tokenmill.compress.corpus import Conversation, conversations_of, examples_of, prepare_teacher
from tokenmill.compress.drift_figures import Drift, drift, row_drift
from tokenmill.compress.export_check import ExportMismatch, ExportReport, check_export, engine_logits
from tokenmill.compress.folding import common_system_prompt, folded_template
from tokenmill.compress.generation import Answers, answer_prompts, prompt_of
from tokenmill.compress.mill import MillConfig, Milled, mill, train_teacher
from tokenmill.compress.recipes import DistilConfig, Distilled, OnPolicyConfig, distil
from tokenmill.compress.students import PRESETS, StudentShape, make_student
from tokenmill.compress.synthesis import PromptGate, Synthesis, synthesise
from tokenmill.compress.teacher_logits import CacheConfig, TeacherLogits, cache_teacher, examples_digest
from tokenmill.compress.vocabulary import trim_vocabulary

__all__ = [
    "PRESETS",
    "Answers",
    "CacheConfig",
    "Conversation",
    "DistilConfig",
    "Distilled",
    "Drift",
    "ExportMismatch",
    "ExportReport",
    "MillConfig",
    "Milled",
    "OnPolicyConfig",
    "PromptGate",
    "StudentShape",
    "Synthesis",
    "TeacherLogits",
    "answer_prompts",
    "cache_teacher",
    "check_export",
    "common_system_prompt",
    "conversations_of",
    "distil",
    "drift",
    "engine_logits",
    "examples_digest",
    "examples_of",
    "folded_template",
    "make_student",
    "mill",
    "prepare_teacher",
    "prompt_of",
    "row_drift",
    "synthesise",
    "train_teacher",
    "trim_vocabulary",
]
