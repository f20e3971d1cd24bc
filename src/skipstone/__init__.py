"""Skipstone: faster generation with no second model and exactly the same output.

    import skipstone
    engine = skipstone.load("smollm2-135m-instruct")
    print(engine.generate("Rainbows form when", max_new_tokens=64).text)
"""

from .engine.cache import ContextTooLong
from .engine.engine import Engine, Event, Generation, LosslessReport, Stream
from .engine.gate import ALWAYS, PLAIN, DraftPolicy, Gate, calibrated, fixed_exit
from .engine.load import load
from .engine.sampling import SamplingParams, TokenLogprobs
from .engine.statistics import Statistics
from .heads.head_set import HeadSet

__version__ = "0.1.0"

__all__ = [
    "ALWAYS",
    "PLAIN",
    "ContextTooLong",
    "DraftPolicy",
    "Engine",
    "Event",
    "Gate",
    "Generation",
    "HeadSet",
    "LosslessReport",
    "SamplingParams",
    "Statistics",
    "Stream",
    "TokenLogprobs",
    "calibrated",
    "fixed_exit",
    "load",
]
