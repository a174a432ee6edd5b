"""How long the default model's texts are, in tokens, for each ``stop_limit``.

``python examples/stop_strings.py stop-strings.png`` continues a few prompts up to the first, second
and so on end of a sentence, and plots the lengths of the texts. Needs the extra ``tune``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llm_sampling import SamplingParams
from llm_sampling.generation import generate, models

PROMPTS = (
    "The lighthouse keeper",
    "How to bake a loaf of bread:",
    "My favourite colour is",
    "It rained all day, so",
)
STOP = (".", "!", "?")
LIMITS = (1, 2, 3, 4, 5)
MAX_NEW_TOKENS = 120
PARAMS = SamplingParams(temperature=0.7, top_p=0.9, seed=1)


def lengths(language_model: models.LanguageModel, prompt: str) -> list[int]:
    """The length of the prompt's text for each limit; each text is a prefix of the next."""
    return [
        len(
            generate(
                language_model.model,
                prompt,
                PARAMS,
                tokenizer=language_model.tokenizer,
                stop=STOP,
                stop_limit=limit,
                ignore_eos=True,
                max_new_tokens=MAX_NEW_TOKENS,
            )[0].token_ids
        )
        for limit in LIMITS
    ]


def draw(of_prompt: Sequence[Sequence[int]], path: str) -> None:
    """Plot a line for each prompt."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for prompt, tokens in zip(PROMPTS, of_prompt, strict=True):
        axes.plot(LIMITS, tokens, "o-", label=prompt)
    axes.axhline(MAX_NEW_TOKENS, color="grey", linewidth=0.8, linestyle="--")
    axes.annotate("max_new_tokens", (1, MAX_NEW_TOKENS), va="bottom", color="grey")
    axes.set(xticks=LIMITS, xlabel="stop_limit, with . ! ? as stop strings", ylabel="tokens")
    axes.set_ylim(0, MAX_NEW_TOKENS * 1.12)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)


def main(path: str) -> None:
    """Load the model, generate and draw."""
    language_model = models.load(models.default_model_path(), lambda stage: None)
    draw([lengths(language_model, prompt) for prompt in PROMPTS], path)


if __name__ == "__main__":
    main(*sys.argv[1:])
