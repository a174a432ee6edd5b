"""What each step of sampling does to one row of logits: as numbers, a picture, a page and texts."""

from llm_sampling.tools.explain.compare import Continuation, compare, decoding_types
from llm_sampling.tools.explain.page import SETTINGS, page
from llm_sampling.tools.explain.picture import PICTURES, picture
from llm_sampling.tools.explain.steps import (
    CUTS,
    STAGES,
    Explanation,
    Row,
    changes,
    cut_label,
    explain,
    list_label,
    lowered,
    reason_label,
    record,
    rows,
    stage_label,
    token_texts,
    visible,
)

__all__ = [
    "CUTS",
    "PICTURES",
    "SETTINGS",
    "STAGES",
    "Continuation",
    "Explanation",
    "Row",
    "changes",
    "compare",
    "cut_label",
    "decoding_types",
    "explain",
    "list_label",
    "lowered",
    "page",
    "picture",
    "reason_label",
    "record",
    "rows",
    "stage_label",
    "token_texts",
    "visible",
]
