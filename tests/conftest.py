"""What all tests share: the marker of each folder, and the default model."""

import os
from pathlib import Path

import pytest

from tokenmill.core.errors import NotFoundError
from tokenmill.models.store.library import Library

TESTS = Path(__file__).parent
GROUPS = tuple(sorted(path.parent.name for path in TESTS.glob("*/__init__.py")))
DEFAULT_MODEL = "smollm2-135m"


def group_of(path: Path) -> str:
    """The group of a test file: the folder under `tests` that it lies in."""
    group = path.relative_to(TESTS).parts[0]
    if group not in GROUPS:
        raise pytest.UsageError(f"{path} lies in no test group; move it to one of {', '.join(GROUPS)}")
    return group


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every test the marker of its group."""
    for item in items:
        item.add_marker(group_of(item.path))


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The folder of the default model. Without it tests are skipped, but in CI they fail."""
    try:
        return Library().find(DEFAULT_MODEL).path
    except NotFoundError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{error}; `make test` does it")
        pytest.skip(str(error))
