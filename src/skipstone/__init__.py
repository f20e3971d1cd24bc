"""Skipstone: faster generation with no second model and exactly the same output.

Example:
    import skipstone
    engine = skipstone.load("smollm2-135m-instruct")
    print(engine.generate("Rainbows form when", max_new_tokens=64).text)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.cache import ContextTooLong
    from .engine.engine import Engine
    from .engine.gate import (
        ALWAYS,
        PLAIN,
        DraftPolicy,
        Gate,
        Lookup,
        best_first,
        calibrated,
        fixed_exit,
        from_text,
        likely,
    )
    from .engine.generation import Event, Generation, LosslessReport, Stream
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
    "Lookup",
    "LosslessReport",
    "SamplingParams",
    "Statistics",
    "Stream",
    "TokenLogprobs",
    "best_first",
    "calibrated",
    "fixed_exit",
    "from_text",
    "likely",
    "load",
]

# Imported at first use: torch takes seconds, and `skipstone --help` needs none of it.
_PLACES = {
    "engine.cache": ("ContextTooLong",),
    "engine.engine": ("Engine",),
    "engine.generation": ("Event", "Generation", "LosslessReport", "Stream"),
    "engine.gate": (
        "ALWAYS",
        "PLAIN",
        "DraftPolicy",
        "Gate",
        "Lookup",
        "best_first",
        "calibrated",
        "fixed_exit",
        "from_text",
        "likely",
    ),
    "engine.load": ("load",),
    "engine.sampling": ("SamplingParams", "TokenLogprobs"),
    "engine.statistics": ("Statistics",),
    "heads.head_set": ("HeadSet",),
}
_PLACE_OF = {name: place for place, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _PLACE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_PLACE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
