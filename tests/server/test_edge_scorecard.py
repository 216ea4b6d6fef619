"""Short forms of the scorecard's lines about the edge; the long ones are in benchmarks/reliability."""

import asyncio
from pathlib import Path

from benchmarks.reliability import s5, s15, s22
from tokenmill.server.edge import needed_scope


def test_clients_that_leave_leave_nothing_behind() -> None:
    line = s5.run(cases=60, seed=3, guard=True)
    faults = [str(value) for name, value in line.figures.items() if name.startswith("fault")]
    assert [fault for fault in faults if "p99" not in fault] == []  # steps are counted on an idle machine
    assert line.figures["of them cancelled"]


def test_bad_requests_break_nothing() -> None:
    line = s15.run(cases=120, seed=3, guard=True)
    assert line.violations == 0, line.figures


def test_every_route_is_closed_but_for_those_that_are_listed(tmp_path: Path) -> None:
    """A new route fails this test until somebody says who may use it."""
    routes = asyncio.run(s22.served_routes(tmp_path))
    assert len(routes) > 20
    opened = {path for _, path in routes if needed_scope(path) is None}
    assert opened == set(s22.PUBLIC)
    assert {path for _, path in routes if needed_scope(path) == "admin"} == {"/admin/erase"}


def test_the_time_of_a_wrong_key_says_nothing_and_a_leaky_comparison_is_seen() -> None:
    assert 0.4 < s22.timing_auc(1000, 1, leaky=False) < 0.6
    assert s22.timing_auc(1000, 1, leaky=True) > 0.9
