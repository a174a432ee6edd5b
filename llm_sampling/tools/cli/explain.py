"""``llm-sampling explain``: what each step does to the probabilities of the next token.

options -> ExplainRequest (checked) -> Running.load -> explain -> table, picture, page, texts
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llm_sampling import InvalidLogitsError, SamplingParams, checks
from llm_sampling.generation import models
from llm_sampling.generation.config import with_rules_of_config
from llm_sampling.tools import explain as explaining
from llm_sampling.tools import files
from llm_sampling.tools.cli import console
from llm_sampling.tools.cli.options import (
    FLAG,
    INTEGER,
    check_texts,
    request_of,
    running,
    running_options,
    sampling_options,
    sampling_params,
    text,
    word_options,
    words,
)
from llm_sampling.tools.cli.running import Running, Words, check_fit
from llm_sampling.tools.explain.picture import check_suffix

if TYPE_CHECKING:
    from rich.table import Table

    from llm_sampling.tools.cli.options import Commands


@dataclass(frozen=True)
class ExplainRequest:
    """The options of ``explain``, checked without loading the model.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    prompt: str
    params: SamplingParams
    chat: bool
    output: str
    top: int
    picture: Path | None
    html: Path | None
    n: int
    max_new_tokens: int
    words: Words
    on: Running

    def __post_init__(self) -> None:
        """Check the values."""
        check_texts("n", self.n)
        for name in ("top", "max_new_tokens"):
            checks.integer_at_least(name, getattr(self, name), 1)
        if self.html is not None and self.html == self.picture:
            raise ValueError(f"html must be another file than picture, got {str(self.html)!r}")
        if self.picture is not None:
            check_suffix("picture", self.picture)


def add_parser(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "explain",
        help="Show what each step does to the next token.",
        description="Show what each step does to the probabilities of the token after PROMPT.",
        parents=[sampling_options(), word_options(), running_options()],
    )
    add = parser.add_argument
    add("prompt", type=text, metavar="PROMPT", help="The text before the token.")
    add("--chat", **FLAG, help="Put PROMPT into the model's chat template.")
    add(
        "--output",
        type=text,
        default="",
        metavar="TEXT",
        help="What the model has written since PROMPT, which the penalties count.",
    )
    add("--top", **INTEGER, default=20, help="How many of the best tokens to show.")
    add("--picture", type=Path, metavar="PATH", help="Write a picture too: .png or .svg.")
    add(
        "--html",
        type=Path,
        metavar="PATH",
        help="Write a page too, whose sliders change the parameters.",
    )
    add("--n", **INTEGER, default=2, help="How many texts of each decoding type except greedy.")
    add("--max-new-tokens", **INTEGER, default=40, help="The length of these texts, in tokens.")
    parser.set_defaults(make_request=make_request, run=run)


def make_request(options: argparse.Namespace) -> ExplainRequest:
    """The command's options, checked."""
    return request_of(
        ExplainRequest,
        options,
        params=sampling_params(options),
        words=words(options),
        on=running(options),
    )


def run(request: ExplainRequest) -> int:
    """Print the table and the texts, write the picture and the page; the exit code."""
    if request.picture is not None:
        console.require("tune", ["matplotlib"])
    console.check_writable(request.picture, request.html)
    language_model = request.on.load(console.messages())
    try:
        _explain(request, language_model)
    except InvalidLogitsError as error:
        message = f"{language_model.name} cannot go on: {error}"
        raise console.CommandError(message, console.EXIT_FAILED) from error
    return 0


def _explain(request: ExplainRequest, language_model: models.LanguageModel) -> None:
    ids = language_model.encode(request.prompt, chat=request.chat)
    written: list[int] = []
    if request.output:
        tokenizer = language_model.tokenizer
        written = tokenizer(request.output, add_special_tokens=False)["input_ids"]
    params = with_rules_of_config(  # as the loop that generates the texts
        request.words.added(request.params, language_model),
        language_model.model.generation_config,
        end_ids=language_model.eos_token_ids,
        prompt_length=len(ids),
    )
    check_fit(language_model, len(ids) + len(written), request.max_new_tokens, params)
    logits, history = explaining.record(
        language_model, ids, written, penalty_last_n=params.penalty_last_n
    )
    texts = explaining.token_texts(language_model)
    explanation = explaining.explain(logits, params, history=history)
    title = request.prompt + request.output
    output = console.output()
    output.print(_steps_table(explanation, texts, request.top))
    output.print(f"{int(explanation.kept.sum())} of {explanation.vocab_size} tokens are kept")
    for line in _list_of_rules(explanation, texts, request.top):
        output.print(line, markup=False, soft_wrap=True)
    with console.writing_files(console.EXIT_FAILED):
        if request.picture is not None:
            with files.replacing(request.picture) as new:
                explaining.picture(explanation, texts, new, request.top, title=title)
        if request.html is not None:
            page = explaining.page(logits, texts, params, history, title)
            with files.replacing(request.html) as new:
                new.write_text(page, encoding="utf-8")
    continuations = explaining.compare(
        language_model,
        [*ids, *written],
        params,
        n=request.n,
        max_new_tokens=request.max_new_tokens,
        backend=request.on.backend,
    )
    for decoding, group in itertools.groupby(continuations, key=lambda one: one.decoding):
        output.print(f"\n{decoding}:", style="bold", markup=False)
        for one in group:
            console.write("  ")
            console.write_json(one.text)


def _steps_table(explanation: explaining.Explanation, texts: Sequence[str], top: int) -> Table:
    """A row for each token, with its probability after each step that changes something."""
    from rich.table import Table
    from rich.text import Text

    params = explanation.params
    stages = [stage for stage in explaining.STAGES if explaining.changes(stage, params)]
    table = Table(box=None)
    table.add_column("token")
    for name in ("id", "logit", *(explaining.stage_label(stage, params) for stage in stages)):
        table.add_column(name, justify="right")
    table.add_column("cut by")
    if explanation.reasons:
        table.add_column("lowered by")
    for row in explaining.rows(explanation, top):
        shares = [f"{row.probabilities[stage]:.2%}" for stage in stages]
        cut = "" if row.cut_by is None else explaining.cut_label(row.cut_by)
        table.add_row(
            Text(explaining.visible(texts[row.token])),
            *(str(row.token), f"{row.logit:.2f}", *shares, cut),
            *([explaining.list_label(row.reasons)] if explanation.reasons else []),
            style="" if row.kept else "dim",
        )
    return table


def _list_of_rules(
    explanation: explaining.Explanation, texts: Sequence[str], top: int
) -> Iterator[str]:
    """A line for each reason to lower a token, of at most ``top`` tokens."""
    tokens = explaining.lowered(explanation)
    if not tokens:
        return
    yield f"\nlowered by rules that look at the history: {len(tokens)}"
    for token in tokens[:top]:
        for reason in explanation.reasons[token]:
            why = explaining.reason_label(explanation, token, reason, texts)
            yield f"  {explaining.visible(texts[token])} ({token}) {why}"
    if len(tokens) > top:
        yield f"  and {len(tokens) - top} more"
