"""Every test carries the marker of its folder, and a test without a group is refused."""

from pathlib import Path

import pytest

from tests.conftest import GROUPS, TESTS, group_of


def test_groups_are_the_markers_of_the_project(pytestconfig: pytest.Config) -> None:
    own = {line.split(":")[0] for line in pytestconfig.getini("markers")}
    assert set(GROUPS) <= own
    assert {"fast", "model", "server", "slow", "stateful", "train"} == set(GROUPS)


def test_this_test_is_marked_fast(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("fast")
    assert not request.node.get_closest_marker("model")


def test_a_test_outside_the_groups_is_refused() -> None:
    assert group_of(TESTS / "model" / "deep" / "test_x.py") == "model"
    with pytest.raises(pytest.UsageError, match="lies in no test group"):
        group_of(TESTS / "test_x.py")


def test_every_test_file_lies_in_a_group() -> None:
    for path in Path(TESTS).rglob("test_*.py"):
        assert group_of(path) in GROUPS
