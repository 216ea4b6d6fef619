"""The main job with scripted candidates: the cheapest that passes wins, others lose for their reason."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fast.optimize_fakes import PRICED, FakeCandidate, right, workload, wrong
from tokenmill.core import ResourceError, UsageError
from tokenmill.evals.statistics import PairedCounts, verdict
from tokenmill.optimize import (
    CannotBeMadeError,
    Machine,
    OptimizeConfig,
    Outcome,
    Problem,
    SearchConfig,
    optimize,
)
from tokenmill.workload import Incumbent, Quality, Slo, Terms

CHEAP = Machine(usd_per_hour=0.1)
DENYING = Terms(rules={"no-training": "deny"})


def flaky(share: float, salt: str = "") -> Callable[[str], tuple[str, float]]:
    """Wrong on this share of questions, always the same ones, and unsure of most of them."""

    def answer(text: str) -> tuple[str, float]:
        place = int(hashlib.sha256(f"{salt}{text}".encode()).hexdigest()[:8], 16) / 0xFFFFFFFF
        return (wrong(text), 0.3 + place) if place < share else (right(text), 0.9)

    return answer


def run(problem: Problem, folder: Path, *candidates: FakeCandidate, **config: object) -> Outcome:
    return optimize(problem, folder / "run", candidates, CHEAP, OptimizeConfig(**config))  # type: ignore[arg-type]


def test_the_cheapest_that_passes_wins(tmp_path: Path) -> None:
    quick, slow = FakeCandidate(name="quick"), FakeCandidate(name="slow", delay_s=0.02)
    bad = FakeCandidate(name="bad", answer=lambda text: (wrong(text), 0.9))
    found = run(workload(tmp_path), tmp_path, slow, bad, quick)
    assert found.choice.winner == "quick" and found.judged["slow"].outcome == "pass"
    assert found.choice.lost["slow"].startswith("it passes, but costs more")
    assert found.choice.lost["bad"].startswith("fails: fail: at least ")
    assert found.choice.saving is not None and 0.5 < found.choice.saving < 1
    assert found.num_looks == 3


def test_smaller_but_slower_loses(tmp_path: Path) -> None:
    incumbent = Incumbent(name="quick one", price_in=0.001, price_out=0.001, price_date="2026-08-01")
    problem = workload(tmp_path, incumbent=incumbent, price_per_hour=100.0)
    tiny = FakeCandidate(name="tiny", num_bytes=1, delay_s=0.01)
    found = optimize(problem, tmp_path / "run", [tiny], Machine(usd_per_hour=100.0))
    assert found.choice.winner == "" and "not proven cheaper" in found.choice.lost["tiny"]
    assert found.judged["tiny"].outcome == "pass"  # it is the cost that it loses by


def test_broken_at_export_loses(tmp_path: Path) -> None:
    broken = FakeCandidate(name="broken", make_error=CannotBeMadeError("the export is not what was trained"))
    found = run(workload(tmp_path), tmp_path, broken, FakeCandidate(name="whole", delay_s=0.01))
    assert found.choice.winner == "whole"
    assert found.choice.lost["broken"] == "could not be made: the export is not what was trained"
    assert broken.backends == []  # nothing was asked of it


def test_over_fitted_to_select_loses(tmp_path: Path) -> None:
    problem = workload(tmp_path)
    known = {case.call.messages[-1].content for case in problem.select if case.call is not None}
    parrot = FakeCandidate(name="parrot", answer=lambda text: (right(text) if text in known else "card", 0.9))
    found = run(problem, tmp_path, parrot)
    assert found.choice.winner == "" and found.judged["parrot"].outcome == "fail"
    (explored,) = found.explored
    assert explored.score.estimate == 1.0  # select alone would have let it pass


def test_trained_on_denied_rows_blocks(tmp_path: Path) -> None:
    problem = workload(tmp_path, row_terms=lambda at: ("own",) if at % 2 else ("no-training",), terms=DENYING)
    assert problem.denied and not problem.denied & {case.id for case in problem.train}
    thief = FakeCandidate(name="thief", trained=[*problem.denied][:3])
    honest = FakeCandidate(name="honest", delay_s=0.01)
    found = run(problem, tmp_path, thief, honest)
    assert found.choice.winner == "honest"
    assert "made from 3 rows whose terms deny that" in found.choice.lost["thief"]


def test_too_slow_for_the_limits_loses(tmp_path: Path) -> None:
    problem = workload(tmp_path, slo=Slo(e2e_ms=5.0, percentile=95.0))
    found = run(problem, tmp_path, FakeCandidate(name="late", delay_s=0.02), FakeCandidate(name="quick"))
    assert found.choice.winner == "quick"
    assert "of requests kept the latency limits, 95 % are asked for" in found.choice.lost["late"]


def test_one_slice_that_is_worse_is_enough_to_lose(tmp_path: Path) -> None:
    problem = workload(tmp_path, 1600, slice_by="answer")
    lame = FakeCandidate(
        name="lame", answer=lambda text: (wrong(text) if right(text) == "card" else right(text), 0.9)
    )
    found = run(problem, tmp_path, lame, with_cascades=False)
    assert "the slice card is worse" in found.choice.lost["lame"]


def test_what_cannot_be_served_is_one_that_lost(tmp_path: Path) -> None:
    problem = workload(tmp_path, 80)
    found = run(problem, tmp_path, FakeCandidate(name="huge", serve_error=ResourceError("no memory")))
    assert found.choice.lost["huge"] == "given up early: no memory"
    assert found.choice.why == "keep the incumbent: no candidate passes"


def test_nothing_to_try_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no candidate"):
        run(workload(tmp_path, 80), tmp_path)


def test_a_cascade_is_made_of_an_unsure_candidate(tmp_path: Path) -> None:
    problem = workload(tmp_path, 2000)
    unsure = FakeCandidate(name="unsure", answer=flaky(0.2))
    found = run(problem, tmp_path, unsure)
    assert found.judged["unsure"].outcome == "fail"
    entry = found.entries["unsure > incumbent"]
    assert found.choice.winner == entry.name and entry.cascade is not None
    assert entry.cascade.certified.is_proven and entry.cascade.certified.num_losses < 20
    share = entry.figures.deferred_share
    assert share is not None and share.estimate is not None and 0.1 < share.estimate < 0.3
    # Deferred calls pay for both attempts.
    first = {item.id: item for item in found.entries["unsure"].items}
    deferred = [item for item in entry.items if item.deferred_to]
    assert all(item.usd == first[item.id].usd + (item.incumbent_usd or 0) for item in deferred)


def test_many_candidates_are_halved_and_controls_stay(tmp_path: Path) -> None:
    problem = workload(tmp_path, 400)
    rivals = [
        FakeCandidate(name=f"r{at}", answer=flaky(0.1 * at, str(at)), is_trained=True) for at in range(8)
    ]
    control = FakeCandidate(name="control", answer=lambda text: ("none", 0.1), is_control=True)
    search = SearchConfig(shares=(0.25, 1.0), max_finalists=2)
    found = run(problem, tmp_path, *rivals, control, search=search, with_cascades=False)
    assert {"control", "r0"} < set(found.entries)
    assert len(found.entries) == 3 and found.num_looks == 3
    assert rivals[0].num_made == 2 and rivals[7].num_made == 1
    assert "is needed" in found.choice.lost["r7"]


def test_what_does_not_fit_into_the_time_is_left_out(tmp_path: Path) -> None:
    long = FakeCandidate(name="long", make_s=5000.0)
    found = run(workload(tmp_path, 80), tmp_path, FakeCandidate(name="quick"), long, budget_s=60.0)
    assert found.choice.lost["long"].startswith("not tried: 5001 s more do not fit into 60 s")
    assert long.num_made == 0 and found.plan.expected_s < 60


def test_a_killed_run_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    problem = workload(tmp_path, 200)
    first = [FakeCandidate(name="a", answer=flaky(0.02)), FakeCandidate(name="b", answer=flaky(0.04))]
    opens: list[str] = []

    def kill_at_last(candidate: FakeCandidate) -> None:
        opens.append(candidate.name)
        if len(opens) == 4:
            raise KeyboardInterrupt

    for each in first:
        each.on_open = kill_at_last
    with pytest.raises(KeyboardInterrupt):
        run(problem, tmp_path, *first)
    again = [FakeCandidate(name="a", answer=flaky(0.02)), FakeCandidate(name="b", answer=flaky(0.04))]
    found = run(problem, tmp_path, *again)
    assert [each.num_made for each in again] == [0, 0]
    assert sorted(each.num_asked > 0 for each in again) == [False, True]
    whole = run(problem, tmp_path / "other", *_copies(first))
    assert found.num_looks == whole.num_looks == 2
    for name in ("a", "b"):
        assert found.judged[name].overall.difference == whole.judged[name].overall.difference
        assert [item.answer for item in found.entries[name].items] == [
            item.answer for item in whole.entries[name].items
        ]


def _copies(candidates: list[FakeCandidate]) -> list[FakeCandidate]:
    return [FakeCandidate(name=each.name, answer=each.answer) for each in candidates]


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    problem = workload(tmp_path, 80)
    run(problem, tmp_path, FakeCandidate(name="a"))
    with pytest.raises(UsageError, match="holds a run of something else: candidates"):
        run(problem, tmp_path, FakeCandidate(name="b"))


def test_an_absolute_bar_needs_no_incumbent(tmp_path: Path) -> None:
    quality = Quality(scorer="label", bar=0.8, margin=0.05)
    problem = workload(tmp_path, 800, quality=quality, incumbent=Incumbent())
    good, bad = FakeCandidate(name="good", answer=flaky(0.05)), FakeCandidate(name="bad", answer=flaky(0.4))
    found = run(problem, tmp_path, good, bad)
    assert found.judged["good"].outcome == "pass" and found.judged["bad"].outcome == "fail"
    assert found.choice.winner == "good" and found.choice.saving is None


def test_the_bound_of_many_is_not_that_of_one() -> None:
    counts = PairedCounts(wins=3, losses=9, num_items=500)
    assert verdict(counts, margin=0.03).outcome == "pass"
    assert verdict(counts, margin=0.03, num_candidates=20).outcome == "undecided"
    assert PRICED.price_in is not None
