"""What the actions of `plan` have in common: the model's shape, the machine, the price, a forecast."""

import argparse
import datetime
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tokenmill.cli.arguments import open_model
from tokenmill.cli.output import format_bytes, format_count
from tokenmill.core import NotFoundError, UsageError
from tokenmill.costs import (
    EFFECTIVE_BITS,
    Calibration,
    EnergyModel,
    EnergyRange,
    HourlyCost,
    HourPrice,
    MachinePeak,
    ModelShape,
    Prediction,
    StepLoad,
    class_calibration,
    decode_load,
    find_hardware,
    find_shape,
    kv_bytes,
    load_hardware,
    load_machine,
    load_shapes,
    measured_energy_model,
    predict,
    prefill_load,
    step_joules,
    tdp_energy_model,
    weight_bytes,
)

if TYPE_CHECKING:
    from tokenmill.costs.defaults import Runtime
    from tokenmill.models.architecture import Architecture

__all__ = [
    "Machine",
    "Phase",
    "Target",
    "architecture_shape",
    "check_memory",
    "memory_needed",
    "model_bits",
    "named_shape",
    "open_machine",
    "open_target",
    "price_fields",
    "speed_fields",
]

Phase: TypeAlias = Literal["decode", "prefill"]

_EIGHT_BIT_PRODUCTS = ("fp8", "int8", "w8a8", "w4a8")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine to plan for. `peak(bytes)` are its rates for a step that reads so much.

    `energy` None: `energy_note` says why. `devices` are `count` of the same kind.
    """

    name: str
    count: int
    peak: Callable[[float], MachinePeak]
    decode: Calibration
    prefill: Calibration
    link_bytes_per_s: float
    memory_bytes: float
    price: HourPrice | None
    energy: EnergyModel | None
    energy_note: str
    kwh_usd: float
    utilisation: float

    @property
    def hour(self) -> HourlyCost | None:
        """An hour of all devices; None if no price is known."""
        if self.price is None:
            return None
        watts = 0.0 if self.energy is None else self.energy.watts * self.count
        return HourlyCost(usd=self.price.usd * self.count, power_w=watts, usd_per_kwh=self.kwh_usd)

    def forecast(self, load: StepLoad, phase: Phase) -> Prediction:
        """Bound, estimate and interval of a step."""
        peak = self.peak(load.weight_bytes + load.kv_bytes)
        return predict(load, peak, self.decode if phase == "decode" else self.prefill)

    def joules(self, load: StepLoad, seconds: float) -> EnergyRange | None:
        """Energy of a step, estimated; None if nothing is known of its power."""
        if self.energy is None:
            return None
        return step_joules(self.energy, seconds, load.flops, self.count)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A model in a format on a machine."""

    shape: ModelShape
    bits: float
    kv_value_bytes: float
    machine: Machine

    def decode(self, batch: float, context: float) -> StepLoad:
        """A step of `batch` sequences."""
        return decode_load(
            self.shape,
            bits=self.bits,
            batch=batch,
            context=context,
            kv_value_bytes=self.kv_value_bytes,
            num_devices=self.machine.count,
            link_bytes_per_s=self.machine.link_bytes_per_s,
        )

    def prefill(self, num_tokens: float) -> StepLoad:
        """One prompt."""
        return prefill_load(
            self.shape,
            bits=self.bits,
            num_tokens=num_tokens,
            kv_value_bytes=self.kv_value_bytes,
            num_devices=self.machine.count,
            link_bytes_per_s=self.machine.link_bytes_per_s,
        )

    def max_batch(self, context: float) -> int:
        """Sequences of `context` tokens whose cache fits beside the weights."""
        free = self.machine.memory_bytes - weight_bytes(self.shape.params, self.bits)
        return max(0, int(free / kv_bytes(self.shape, context, self.kv_value_bytes)))


def open_target(args: argparse.Namespace) -> Target:
    """What the flags say."""
    shape, bits = _shape_and_bits(args)
    return Target(shape=shape, bits=bits, kv_value_bytes=args.kv_bits / 8, machine=open_machine(args))


def open_machine(args: argparse.Namespace) -> Machine:
    """The machine of `--hardware`. Raises NotFoundError."""
    machine = _this_machine(args) if args.hardware == "this" else _listed_machine(args)
    if args.hour_usd is not None:
        today = datetime.date.today().isoformat()
        price = HourPrice(usd=args.hour_usd, kind="yours", date=today, source="--hour-usd")
        machine = replace(machine, price=price)
    if args.watts is not None:
        energy = EnergyModel(watts=args.watts, joules_per_flop=0.0, error=0.1, basis="--watts")
        machine = replace(machine, energy=energy, energy_note="")
    return machine


def architecture_shape(name: str, architecture: "Architecture") -> ModelShape:
    """The shape of a model that is here."""
    experts = architecture.experts
    idle = architecture.num_params - architecture.num_active_params
    share = experts.num_experts / (experts.num_experts - experts.num_active) if experts and idle else 0.0
    windows = [layer.window for layer in architecture.layers if layer.window]
    head = architecture.vocab_size * architecture.hidden_size
    return ModelShape(
        name=name,
        params=architecture.num_params,
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        num_heads=architecture.num_heads,
        num_kv_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
        num_experts=experts.num_experts if experts and idle else 0,
        num_active=experts.num_active if experts and idle else 0,
        nonexpert_params=architecture.num_params - share * idle if idle else 0.0,
        window_layers=len(windows),
        window=min(windows, default=0),
        lookup_params=0 if architecture.tied_embeddings else head,
        head_params=head,
    )


def named_shape(name: str) -> ModelShape:
    """The shape of MODEL: a well-known name, a config.json, or a model that is here. Raises NotFoundError."""
    shapes = load_shapes()
    try:
        return find_shape(shapes, name)
    except NotFoundError as unknown:
        path = Path(name).expanduser()
        if path.suffix == ".json" and path.is_file():
            return _config_shape(path)
        try:
            model = open_model(name)
        except NotFoundError as error:
            hint = f"pull it, give --params and --layers, or use one of {', '.join(s.name for s in shapes)}"
            raise NotFoundError(error.message, hint=hint) from unknown
        return architecture_shape(model.name, model.architecture)


def model_bits(weights: str | None) -> float:
    """Bits of a weight: of a format's name, or as a number. Raises UsageError."""
    name = (weights or "bf16").lower()
    if name in EFFECTIVE_BITS:
        return EFFECTIVE_BITS[name]
    try:
        bits = float(name)
    except ValueError:
        bits = 0.0
    if not 1 <= bits <= 32:
        raise UsageError(
            f"{weights!r} is no format of weights", hint=f"use {', '.join(EFFECTIVE_BITS)}, or bits"
        )
    return bits


def memory_needed(target: Target, batch: float, context: float) -> float:
    """Bytes of weights and cache."""
    cache = batch * kv_bytes(target.shape, context, target.kv_value_bytes)
    return weight_bytes(target.shape.params, target.bits) + cache


def speed_fields(prediction: Prediction, tokens: float) -> dict[str, float]:
    """Tokens a second: the bound, the estimate, and the interval."""
    return {
        "bound": tokens / prediction.bound_s,
        "estimate": tokens / prediction.estimate_s,
        "low": tokens / prediction.high_s,
        "high": tokens / prediction.low_s,
    }


def price_fields(price: HourPrice) -> dict[str, Any]:
    """A price for programs."""
    return {"usd_per_hour": price.usd, "kind": price.kind, "date": price.date, "source": price.source}


def _shape_and_bits(args: argparse.Namespace) -> tuple[ModelShape, float]:
    weights = args.weights
    if weights is None and args.hardware == "this":
        weights = load_machine().weights
    if getattr(args, "params", None):
        return _given_shape(args), model_bits(weights)
    if not args.model:
        raise UsageError("no model is named", hint="give MODEL, or --params, --layers and --width")
    return named_shape(args.model), model_bits(weights)


def _given_shape(args: argparse.Namespace) -> ModelShape:
    if not args.layers or not args.width:
        raise UsageError("--params needs --layers and --width", hint="give both")
    heads = int(args.heads or max(1, args.width // 128))
    head_dim = int(args.width // heads)
    if heads < 1 or head_dim < 1 or args.layers < 1:
        raise UsageError("no model has such layers and heads", hint="check --layers, --width and --heads")
    return ModelShape(
        name=args.model or f"a model of {format_count(args.params)} parameters",
        params=args.params,
        num_layers=int(args.layers),
        hidden_size=int(args.width),
        num_heads=heads,
        num_kv_heads=int(args.kv_heads or heads),
        head_dim=head_dim,
    )


def _config_shape(path: Path) -> ModelShape:
    from tokenmill.models.hf_config import load_json_object, read_architecture

    return architecture_shape(
        path.parent.name or path.name, read_architecture(load_json_object(path), str(path))
    )


def _this_machine(args: argparse.Namespace) -> Machine:
    saved = load_machine()
    if args.devices > 1:
        raise UsageError("there is one of this machine", hint="name another --hardware")
    if args.weights is not None and args.weights.lower() != saved.weights:
        raise UsageError(
            f"this machine was calibrated with {saved.weights}, not {args.weights}",
            hint=f"run `tokenmill plan calibrate {saved.model} --weights {args.weights.lower()}`",
        )
    energy = None
    if saved.watts is not None:
        basis = f"measured while calibrating on {saved.date}"
        energy = EnergyModel(watts=saved.watts, joules_per_flop=0.0, error=0.1, basis=basis)
    return Machine(
        name=f"this machine ({saved.name})",
        count=1,
        peak=saved.peak,
        decode=saved.decode,
        prefill=saved.prefill,
        link_bytes_per_s=math.inf,
        memory_bytes=saved.memory_bytes,
        price=None,
        energy=energy,
        energy_note=saved.energy_note,
        kwh_usd=args.kwh_usd,
        utilisation=args.utilisation,
    )


def _listed_machine(args: argparse.Namespace) -> Machine:
    hardware = find_hardware(load_hardware(), args.hardware)
    peak = hardware.peak(low_precision=(args.weights or "").lower() in _EIGHT_BIT_PRODUCTS)
    runtime: Runtime = args.runtime or ("graph" if hardware.machine_class == "gpu" else "launch")
    calibration = class_calibration(hardware.machine_class, runtime)
    energy = measured_energy_model(hardware.name)
    if energy is None and hardware.tdp_w is not None:
        energy = tdp_energy_model(hardware.tdp_w)
    note = "" if energy else f"nobody says what {hardware.name} draws; give --watts"
    return Machine(
        name=hardware.name,
        count=args.devices,
        peak=lambda _bytes: peak,
        decode=calibration,
        prefill=calibration,
        link_bytes_per_s=hardware.link_bytes_per_s,
        memory_bytes=hardware.mem_gb * 1e9 * args.devices,
        price=hardware.price,
        energy=energy,
        energy_note=note,
        kwh_usd=args.kwh_usd,
        utilisation=args.utilisation,
    )


def check_memory(target: Target, batch: float, context: float) -> str:
    """Empty if weights and cache fit, else what is too much."""
    needed, there = memory_needed(target, batch, context), target.machine.memory_bytes
    if needed <= there:
        return ""
    return f"needs {format_bytes(needed)}, {target.machine.name} has {format_bytes(there)}: it does not fit"
