"""The command line as a user meets it: the default model, in processes of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tokenmill.cli.show import weight_bytes
from tokenmill.models.packing.compile import load_packed
from tokenmill.models.packing.pack import WEIGHT_FORMATS
from tokenmill.models.store.directory import ModelDirectory

PROGRAM = [sys.executable, "-m", "tokenmill"]
QUESTION = "What is the capital of France? Answer in one sentence."


def tokenmill(*words: str | Path, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    command = [*PROGRAM, *map(str, words)]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def test_run_answers_the_same_on_both_streams(model_dir: Path) -> None:
    plain = tokenmill("run", model_dir, QUESTION)
    assert "Paris" in plain.stdout and plain.stderr == ""
    as_json = tokenmill("run", model_dir, "-", "--json", stdin=QUESTION + "\n")
    document = json.loads(as_json.stdout)
    assert document["text"] == plain.stdout.removesuffix("\n") == as_json.stderr.removesuffix("\n")
    assert document["finish_reason"] == "completed"


def test_run_raw_continues_and_stops(model_dir: Path) -> None:
    done = tokenmill("run", model_dir, "Count: 1 2 3 4", "--raw", "--stop", " 7", "--max-tokens", "20")
    assert done.stdout == " 5 6\n"


def test_chat_remembers(model_dir: Path) -> None:
    turns = "My name is Ann and I have a cat.\nWhat animal do I have?\n"
    document = json.loads(tokenmill("chat", model_dir, "--max-tokens", "40", "--json", stdin=turns).stdout)
    assert len(document["turns"]) == 2 and "cat" in document["turns"][1]["text"].lower()


def test_score_tells_sense_from_nonsense(model_dir: Path) -> None:
    sense = "The sun rises in the east and sets in the west, and so it goes every day."
    nonsense = " ".join(reversed(sense.split()))
    values = []
    for text in (sense, nonsense):
        values.append(json.loads(tokenmill("score", model_dir, "--json", stdin=text).stdout)["perplexity"])
    assert 1 < values[0] < 20 < values[1]


def test_shown_bytes_are_what_the_engine_reads(model_dir: Path) -> None:
    model = ModelDirectory.open(model_dir)
    shown = weight_bytes(model)
    document = json.loads(tokenmill("show", model_dir, "--json").stdout)
    assert document["weight_bytes"] == shown
    assert document["num_params"] == 134_515_008 and document["kv_bytes_per_token"] == 23_040
    for weights in WEIGHT_FORMATS:
        assert shown[weights] == pytest.approx(load_packed(model, weights).num_linear_bytes, rel=0.005)


def test_ctrl_c_ends_with_130_and_what_was_said_stays(model_dir: Path) -> None:
    words = ["run", str(model_dir), "Write a very long story about the sea.", "--max-tokens", "4000"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [*PROGRAM, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A parent that runs in the background leaves its children deaf to Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        first = child.stdout.read(1)
        time.sleep(0.2)
        child.send_signal(signal.SIGINT)
        rest, errors = child.stdout.read(), child.stderr.read()
    assert child.returncode == 130
    assert first and rest.endswith("\n") and errors == "error: interrupted\n"
