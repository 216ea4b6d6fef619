"""What a token costs, in pure arithmetic: operations and bytes, against the limits of a machine."""

from tokenmill.costs.roofline import (
    Ceiling,
    DecoderCost,
    LimitName,
    MachineRates,
    ReadRate,
    Work,
    bandwidth_at,
    ceiling,
    decode_work,
    prefill_work,
)

__all__ = [
    "Ceiling",
    "DecoderCost",
    "LimitName",
    "MachineRates",
    "ReadRate",
    "Work",
    "bandwidth_at",
    "ceiling",
    "decode_work",
    "prefill_work",
]
