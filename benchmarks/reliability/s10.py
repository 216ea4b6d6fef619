"""Line S10: the official `openai` client against a running server, check by check.

    python -m benchmarks.reliability.s10
    python -m benchmarks.reliability.s10 --guard off
    pip install --target /tmp/openai-1 "openai==1.*"
    python -m benchmarks.reliability.s10 --client /tmp/openai-1

The checks are those of tests/server/test_openai_client*.py: chat, completions, streams, tools,
log-probabilities, JSON by a schema, a typed exception for each status, retries, time-outs, embeddings,
responses, models. `--client` is a folder with another release of the client. With `--guard off`
the server counts no tokens, names no tier, calls no end `tool_calls` and holds no call to its schema: the
checks must notice.
"""

import argparse
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from tempfile import TemporaryDirectory

from scripts.scorecard import Line
from scripts.scorecard.__main__ import as_json, as_text

__all__ = ["main", "run"]

_ROOT = Path(__file__).parents[2]
_CHECKS = (
    "tests/server/test_openai_client.py",
    "tests/server/test_openai_client_errors.py",
    "tests/server/test_openai_client_more.py",
)
_CONTROL = "TOKENMILL_S10_CONTROL"
_VERSION = "import openai; print(openai.__version__)"


def run(guard: bool = True, client: str = "") -> Line:
    """Run all checks in a process that imports the client from this folder. A skipped one is a violation."""
    begun_s = time.monotonic()
    paths = [
        path for path in (client, str(_ROOT / "src"), str(_ROOT), os.environ.get("PYTHONPATH", "")) if path
    ]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    env.pop(_CONTROL, None)
    if not guard:
        env[_CONTROL] = "1"
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "--tb=no", "--no-header", "-p", "no:cacheprovider", f"--junit-xml={report}"]
        command = [sys.executable, "-m", "pytest", *options, *_CHECKS]
        subprocess.run(command, cwd=_ROOT, env=env, stdout=subprocess.DEVNULL, check=False)
        cases = list(ET.parse(report).iter("testcase"))
    version = subprocess.run(
        [sys.executable, "-c", _VERSION], env=env, capture_output=True, text=True, check=True
    ).stdout.strip()
    missed = [case.get("name", "") for case in cases if len(case)]
    return Line(
        name="S10",
        what=f"checks of the official openai client {version} on a running server",
        cases=len(cases),
        violations=len(missed) + (not cases),
        seconds=time.monotonic() - begun_s,
        figures={"passed": len(cases) - len(missed), "missed": ", ".join(missed[:12]) or "none"},
    )


def main(arguments: list[str] | None = None) -> int:
    """Run and print; 0 if the guarded run found nothing, or the control something."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability.s10", description=__doc__)
    parser.add_argument("--guard", choices=("on", "off"), default="on")
    parser.add_argument("--client", default="", help="a folder with another release of the client")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args(arguments)
    guard = options.guard == "on"
    line = run(guard, options.client)
    print(as_json(line, 0, guard) if options.json else as_text(line, 0, guard))
    return 0 if (line.violations == 0) == guard else 1


if __name__ == "__main__":
    sys.exit(main())
