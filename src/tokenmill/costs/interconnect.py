"""What it takes to move activations and caches between devices.

Ring exchanges: every byte passes the link 2 (n - 1) / n times in an all-reduce. Overlap with arithmetic is
not counted, and a link is as fast as its slowest part.
"""

from dataclasses import dataclass

__all__ = ["Link", "all_reduce_seconds", "all_to_all_seconds", "pipeline_seconds", "transfer_seconds"]


@dataclass(frozen=True, kw_only=True)
class Link:
    """One direction of a link between two devices: bytes a second, and seconds before the first byte."""

    bytes_per_s: float
    latency_s: float


def all_reduce_seconds(link: Link, num_devices: int, num_bytes: float) -> float:
    """One all-reduce; tensor parallelism does two a layer, of tokens x width x bytes of an activation."""
    if num_devices == 1:
        return 0.0
    return link.latency_s + 2 * (num_devices - 1) / num_devices * num_bytes / link.bytes_per_s


def all_to_all_seconds(link: Link, num_devices: int, num_bytes: float) -> float:
    """One all-to-all; expert parallelism does two a layer, of tokens x experts a token x width."""
    if num_devices == 1:
        return 0.0
    return link.latency_s + num_bytes / num_devices / link.bytes_per_s


def pipeline_seconds(link: Link, num_stages: int, num_bytes: float) -> float:
    """The hops of one token through a pipeline: its latency grows, its throughput does not fall."""
    return (num_stages - 1) * (link.latency_s + num_bytes / link.bytes_per_s)


def transfer_seconds(link: Link, num_bytes: float) -> float:
    """Moving a cache, for example from a prefill machine to a decode machine; add it to the first token."""
    return link.latency_s + num_bytes / link.bytes_per_s
