"""A resumable search for the values that suit a model, what a model is tuned for, and a report."""

from llm_sampling.tools.tuning.search import (
    DIRECTIONS,
    METHODS,
    Direction,
    Range,
    Space,
    TuningResult,
    check_search,
    space_from_text,
    tune,
)

__all__ = [
    "DIRECTIONS",
    "METHODS",
    "Direction",
    "Range",
    "Space",
    "TuningResult",
    "check_search",
    "space_from_text",
    "tune",
]
