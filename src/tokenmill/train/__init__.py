"""Training: data packing, losses, the trainer, adapters. A model directory in, a model directory out.

Importing this needs torch (the `train` extra).
"""

from tokenmill.models.packed_row import PackedRow
from tokenmill.models.torch_twin import TorchDecoder
from tokenmill.train.checkpoint import discard_checkpoint
from tokenmill.train.config import TrainConfig
from tokenmill.train.conversations import ConversationEncoder
from tokenmill.train.examples import Example, fitting
from tokenmill.train.flops import peak_flops, row_flops
from tokenmill.train.loop import TrainResult, train
from tokenmill.train.lora import LoraConfig, add_lora, merge_lora, save_adapter
from tokenmill.train.losses import Loss
from tokenmill.train.packing import Targets, TrainRow, make_row, plan_epoch, plan_rows
from tokenmill.train.save import save_model
from tokenmill.train.trainer import StepFigures, Trainer

__all__ = [
    "ConversationEncoder",
    "Example",
    "LoraConfig",
    "Loss",
    "PackedRow",
    "StepFigures",
    "Targets",
    "TorchDecoder",
    "TrainConfig",
    "TrainResult",
    "TrainRow",
    "Trainer",
    "add_lora",
    "discard_checkpoint",
    "fitting",
    "make_row",
    "merge_lora",
    "peak_flops",
    "plan_epoch",
    "plan_rows",
    "row_flops",
    "save_adapter",
    "save_model",
    "train",
]
