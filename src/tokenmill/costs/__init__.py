"""What a token costs: operations and bytes against a machine, its constants, joules and dollars.

`roofline` is the limit of a measured machine; `shape`, `step`, `interconnect`, `hierarchy`, `acceptance` and
`queueing` are the formulas of a plan; `calibration` fits their constants; `prices` and `hardware` are the
tables; `energy`, `power`, `money` and `metering` turn time into joules and dollars. Nothing here knows an
engine or a model file.
"""

from tokenmill.costs.acceptance import prefix_hits
from tokenmill.costs.calibration import (
    Calibration,
    Observation,
    Prediction,
    calibrate,
    predict,
)
from tokenmill.costs.catalogue import find_shape, load_shapes
from tokenmill.costs.defaults import class_calibration, class_constants
from tokenmill.costs.energy import (
    EnergyModel,
    EnergyRange,
    measured_energy_model,
    step_joules,
    tdp_energy_model,
)
from tokenmill.costs.hardware import Hardware, HourPrice, find_hardware, load_hardware
from tokenmill.costs.money import (
    ApiRates,
    BreakEven,
    HourlyCost,
    break_even,
    break_even_utilisation,
    tiers,
    usd_per_million,
)
from tokenmill.costs.power import EnergyMeter, Unmeasured, find_counters
from tokenmill.costs.prices import Price, find_price, load_prices, select_prices, update_prices
from tokenmill.costs.queueing import max_rate, waiting_p99
from tokenmill.costs.roi import price_at, would_cost_nano_usd
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
from tokenmill.costs.saved import MeasuredMachine, load_machine, save_machine
from tokenmill.costs.shape import EFFECTIVE_BITS, ModelShape, kv_bytes, weight_bytes
from tokenmill.costs.step import (
    MachinePeak,
    StepLoad,
    critical_batch,
    decode_load,
    prefill_load,
    step_seconds,
    step_terms,
)
from tokenmill.costs.traffic import CHARS_PER_TOKEN, Traffic, read_traffic

__all__ = [
    "CHARS_PER_TOKEN",
    "EFFECTIVE_BITS",
    "ApiRates",
    "BreakEven",
    "Calibration",
    "Ceiling",
    "DecoderCost",
    "EnergyMeter",
    "EnergyModel",
    "EnergyRange",
    "Hardware",
    "HourPrice",
    "HourlyCost",
    "LimitName",
    "MachinePeak",
    "MachineRates",
    "MeasuredMachine",
    "ModelShape",
    "Observation",
    "Prediction",
    "Price",
    "ReadRate",
    "StepLoad",
    "Traffic",
    "Unmeasured",
    "Work",
    "bandwidth_at",
    "break_even",
    "break_even_utilisation",
    "calibrate",
    "ceiling",
    "class_calibration",
    "class_constants",
    "critical_batch",
    "decode_load",
    "decode_work",
    "find_counters",
    "find_hardware",
    "find_price",
    "find_shape",
    "kv_bytes",
    "load_hardware",
    "load_machine",
    "load_prices",
    "load_shapes",
    "max_rate",
    "measured_energy_model",
    "predict",
    "prefill_load",
    "prefill_work",
    "prefix_hits",
    "price_at",
    "read_traffic",
    "save_machine",
    "select_prices",
    "step_joules",
    "step_seconds",
    "step_terms",
    "tdp_energy_model",
    "tiers",
    "update_prices",
    "usd_per_million",
    "waiting_p99",
    "weight_bytes",
    "would_cost_nano_usd",
]
