"""Speed under load: requests sent as traffic comes, and figures from the raw samples."""

from tokenmill.evals.load.arrivals import ARRIVALS, ArrivalKind, ClosedLoop, OpenLoop, at_rate
from tokenmill.evals.load.driver import DriveConfig, LoadProgress, LoadRun, drive
from tokenmill.evals.load.prompts import PromptMaker, read_prompts
from tokenmill.evals.load.samples import Sample
from tokenmill.evals.load.summary import Slo, Summary, summarize
from tokenmill.evals.load.sweep import Level, LevelResult, find_highest, run_level
from tokenmill.evals.load.target import Finish, LoadRequest, Piece, StreamEvent, Target
from tokenmill.evals.load.traces import Call, read_trace
from tokenmill.evals.load.versus import MachinePrice, Side, TokenPrice, compare_sides

__all__ = [
    "ARRIVALS",
    "ArrivalKind",
    "Call",
    "ClosedLoop",
    "DriveConfig",
    "Finish",
    "Level",
    "LevelResult",
    "LoadProgress",
    "LoadRequest",
    "LoadRun",
    "MachinePrice",
    "OpenLoop",
    "Piece",
    "PromptMaker",
    "Sample",
    "Side",
    "Slo",
    "StreamEvent",
    "Summary",
    "Target",
    "TokenPrice",
    "at_rate",
    "compare_sides",
    "drive",
    "find_highest",
    "read_prompts",
    "read_trace",
    "run_level",
    "summarize",
]
