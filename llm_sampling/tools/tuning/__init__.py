"""A resumable search for a model's best sampling parameters, its objectives, and a report.

Importing this package imports neither optuna nor matplotlib.
"""

from llm_sampling.tools.tuning.objectives import METRICS, Metric, ModelObjective, check_objective
from llm_sampling.tools.tuning.report import write_report
from llm_sampling.tools.tuning.search import (
    DIRECTIONS,
    METHODS,
    Direction,
    Method,
    Objective,
    TuningResult,
    check_search,
    tune,
)
from llm_sampling.tools.tuning.space import Choice, Range, Space, space_from_text

__all__ = [
    "DIRECTIONS",
    "METHODS",
    "METRICS",
    "Choice",
    "Direction",
    "Method",
    "Metric",
    "ModelObjective",
    "Objective",
    "Range",
    "Space",
    "TuningResult",
    "check_objective",
    "check_search",
    "space_from_text",
    "tune",
    "write_report",
]
