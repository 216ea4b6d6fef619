"""Prints requirements of pyproject.toml, one a line: `build`, or the names of extras.

pip cannot install an extra, or the tools of the build, without building the package as well.
"""

import sys
import tomllib
from pathlib import Path

BUILD_TOOLS = ("cmake", "ninja")


def requirements(names: list[str]) -> list[str]:
    """The requirements of the named groups; `build` adds the tools that isolation would have fetched."""
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    groups = {**extras, "build": [*project["build-system"]["requires"], *BUILD_TOOLS]}
    return [line for name in names for line in groups[name]]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))
