"""Line S18: hostile model files. Each is refused with one clear error, or loaded and sound; nothing else.

More than 1,100 GGUF files and 900 folders, made by hand (`hostile_gguf.py`, `hostile_safetensors.py`,
`hostile_folders.py`, `hostile_tokenizers.py`), are imported in a watched child: under a second of processor
time and 64 MiB each, no code run, nothing left. More than 100 chat templates (`hostile_templates.py`) are
rendered, with tools. The controls leave out one guard of the readers at a time, or render in plain Jinja2,
and each must be noticed. Mutations of such files are `scripts/fuzz_models.py`.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache

from scripts.scorecard import Line, hostile_templates
from scripts.scorecard.hostile_files import HostileCase
from scripts.scorecard.hostile_folders import hostile_folders
from scripts.scorecard.hostile_gguf import hostile_gguf
from scripts.scorecard.hostile_safetensors import hostile_safetensors
from scripts.scorecard.hostile_shards import hostile_shards
from scripts.scorecard.hostile_tokenizers import hostile_tokenizers
from scripts.scorecard.import_child import CONTROLS
from scripts.scorecard.import_probe import ImportProbe, Tried

__all__ = ["all_files", "run", "sample", "tally"]

_WHAT = "hostile model files: one clear error or a sound model, in 1 s and 64 MiB, nothing run, nothing left"
_FORMS = {
    "gguf checks": "gguf",
    "safetensors checks": "safetensors",
    "tokenizer pipeline": "folder tokenizer",
}
"""What of the corpus a control is tried on; the others on the configurations."""


def run(*, cases: int, seed: int, guard: bool) -> Line:
    """At most `cases` files, spread over all families; without the guards, each control on its own files."""
    del seed  # the files are the same every time
    started = time.monotonic()
    every = all_files()
    files = sample(every, cases)
    templates = list(hostile_templates.cases())[:: _step(every, cases)]
    if guard:
        with ImportProbe() as probe:
            count, violations, figures = tally(probe.run(files))
        problems = [f"template {each.name}: {problem}" for each, problem in _rendered(templates) if problem]
        count, violations = count + len(templates), violations + len(problems)
        figures |= {"templates": len(templates), "first_template_violation": (problems or ["none"])[0]}
    else:
        count, violations, figures = _unguarded(files, templates)
    return Line(
        name="S18",
        what=_WHAT,
        cases=count,
        violations=violations,
        seconds=time.monotonic() - started,
        figures=figures,
    )


@cache
def all_files() -> Sequence[HostileCase]:
    """The whole corpus."""
    return [
        *hostile_gguf(),
        *hostile_safetensors(),
        *hostile_shards(),
        *hostile_folders(),
        *hostile_tokenizers(),
    ]


def sample(files: Sequence[HostileCase], count: int) -> list[HostileCase]:
    """The first of each family, and every n-th of all, so that there are about `count`."""
    firsts = {case.family: case for case in reversed(files)}
    chosen = {id(case): case for case in (*firsts.values(), *files[:: _step(files, count)])}
    return list(chosen.values())


def _step(files: Sequence[HostileCase], count: int) -> int:
    """Every how many of the files makes `count` of them."""
    return max(1, -(-len(files) // max(1, count)))


def _rendered(templates: Iterable[hostile_templates.Case]) -> Iterator[tuple[hostile_templates.Case, str]]:
    for each in templates:
        yield each, hostile_templates.check(each) or ""


def tally(tried: Iterable[Tried]) -> tuple[int, int, dict[str, float | int | str]]:
    """Cases, violations, and figures: how they ended, by family; the slowest and the largest."""
    outcomes: Counter[str] = Counter()
    found: list[str] = []
    count, cpu_s, wall_s, grew = 0, 0.0, 0.0, 0
    for case, answer, faults in tried:
        count += 1
        outcomes[f"{case.family.partition(' ')[0]} {answer.outcome if answer else 'died'}"] += 1
        found += [f"{case.title}: {fault}" for fault in faults[:1]]
        if answer is not None:
            cpu_s, wall_s = max(cpu_s, answer.cpu_s), max(wall_s, answer.wall_s)
            grew = max(grew, answer.grew_bytes)
    figures: dict[str, float | int | str] = {**outcomes}
    figures |= {"slowest_cpu_s": round(cpu_s, 3), "slowest_wall_s": round(wall_s, 3), "most_mib": grew >> 20}
    return count, len(found), figures | {"first_violation": found[0] if found else "none"}


def _unguarded(
    files: Sequence[HostileCase], templates: Sequence[hostile_templates.Case]
) -> tuple[int, int, dict[str, float | int | str]]:
    """Each control until its first violation, which the figures name; 0 violations unless all are noticed."""
    count = violations = 0
    figures: dict[str, float | int | str] = {}
    for control in CONTROLS:
        family = _FORMS.get(control, "folder config")
        with ImportProbe(control) as probe:
            figures[f"violation, {control}"] = "none"
            for case, _, faults in probe.run([case for case in files if case.family.startswith(family)]):
                count += 1
                if faults:
                    violations += 1
                    figures[f"violation, {control}"] = f"{case.title}: {faults[0]}"[:200]
                    break
    for kind in ("escape", "bomb"):
        chosen = (each for each in templates if each.kind == kind)
        tried = ((each, hostile_templates.check_unguarded(each)) for each in chosen)
        count += 1  # the first is enough: a plain Jinja2 stops nothing
        first = next((f"{each.name}: {problem}" for each, problem in tried if problem), "none")
        figures[f"violation, plain Jinja2, {kind}"] = first[:200]
        violations += first != "none"
    return count, violations if violations == len(CONTROLS) + 2 else 0, figures
