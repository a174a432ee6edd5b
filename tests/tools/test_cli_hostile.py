"""What the command ``llm-sampling`` makes of hostile words, files, streams and locales.

Every failure is one line on stderr and an exit code. Each row of the table is a command line with
what it must end in. All rows run with an ordinary, a closed and a full stdout, in a UTF-8 locale
and in one that has ASCII alone.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from forking import CLOSED, GONE, READ_ONLY, Done, ForkingProcess

import llm_sampling
from llm_sampling.generation import models
from llm_sampling.tools import cli

for package in cli.EXTRA_PACKAGES:
    pytest.importorskip(package, reason="needs the extra 'cli'")

from safetensors.torch import load_file, save_file  # noqa: E402
from toy_tokenizers import byte_tokenizer  # noqa: E402

ROOT = str(Path(llm_sampling.__file__).parent.parent)
A, B, ESCAPE = (byte_tokenizer()(text)["input_ids"][0] for text in "ab\x1b")
UTF8 = {"LC_ALL": "C.UTF-8"}
#: Python by itself takes UTF-8 for this locale; these switch it off.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

#: When a command ends: before it looks at stdout; then before it loads the model; then before it
#: writes to stdout; or when it has written.
EARLY, UNLOADED, LATE, WRITTEN = "early", "unloaded", "late", "written"


@dataclass(frozen=True)
class Row:
    """A command line and its end.

    Attributes:
        argv: the words; ``MODEL`` stands for the tiny model.
        code: the exit code.
        line: the last line of stderr without the command's name, or a pattern of it; None where
            there is no complaint.
        ends: EARLY, UNLOADED, LATE or WRITTEN.
        streams: options of ForkingProcess.run. A row that names stdout or stderr does not run with
            others.
        stdin: what is on stdin.
    """

    argv: list[str | bytes]
    code: int
    line: str | re.Pattern[str] | None
    ends: str = EARLY
    streams: dict[str, Any] = field(default_factory=dict)
    stdin: bytes = b""


MODEL = ["--model", "tiny", "--max-new-tokens", "3"]
SPACE = ["temperature=0.1:2.0", "--trials", "1", "--texts", "1", "--max-new-tokens", "4"]
TUNE = ["tune", *SPACE, "--model", "tiny"]
AAA = ["--logit-bias", f"{A}=100"]
FULL = "stdout cannot be written: No space left on device"
SHUT = "stdout cannot be written: it is closed"


def model(path: str, line: str | re.Pattern[str], ends: str = EARLY) -> Row:
    """A row of a model that cannot be used."""
    return Row(["generate", "x", "--model", path], 2, line, ends)


def storage(url: str, line: str | re.Pattern[str], code: int = 2, ends: str = UNLOADED) -> Row:
    """A row of a storage that cannot be used."""
    return Row([*TUNE, "--storage", url], code, line, ends)


NO_SCHEMA = re.escape("json_schema must be a JSON schema (a dict, or its JSON)")


def schema(path: str, rule: str) -> Row:
    """A row of a schema that cannot be read."""
    return Row(["generate", "x", "--json-schema", path], 2, f"json_schema {path!r} {rule}")


ROWS: dict[str, Row] = {
    # ---- words
    "no command": Row([], 2, "the following arguments are required: COMMAND"),
    "another command": Row(["nonsense"], 2, re.compile("argument COMMAND: invalid choice: .*")),
    "a command of control characters": Row(
        ["\x1b[2J"], 2, re.compile(r"argument COMMAND: invalid choice: '\\x1b\[2J'.*")
    ),
    "another option": Row(["info", "--what"], 2, re.compile("unrecognized arguments: --what")),
    "an escape in an option": Row(
        ["generate", "x", "--\x1b]0;x\x07"], 2, "unrecognized arguments: --\\x1b]0;x\\x07"
    ),
    "no prompt": Row(["generate"], 2, "the following arguments are required: PROMPT"),
    "a prompt that is no text": Row(
        ["generate", b"a\xff"], 2, "argument PROMPT: must be valid UTF-8, got 'a\\udcff'"
    ),
    "half a character": Row(
        ["explain", b"\xe6\x97"], 2, "argument PROMPT: must be valid UTF-8, got '\\udce6\\udc97'"
    ),
    "an output that is no text": Row(
        ["explain", "x", "--output", b"\xff"],
        2,
        "argument --output: must be valid UTF-8, got '\\udcff'",
    ),
    "a stop text that is no text": Row(
        ["generate", "x", "--stop", b"\xff"],
        2,
        "argument --stop: must be valid UTF-8, got '\\udcff'",
    ),
    "a system message that is no text": Row(
        ["chat", "--system", b"\xff"],
        2,
        "argument --system: must be valid UTF-8, got '\\udcff'",
    ),
    "a study that is no text": Row(
        [*TUNE, "--study-name", b"\xff"],
        2,
        "argument --study-name: must be valid UTF-8, got '\\udcff'",
    ),
    "a space that is no text": Row(
        ["tune", b"top_p\xff=1"],
        2,
        "argument NAME=VALUES: must be valid UTF-8, got 'top_p\\udcff=1'",
    ),
    "a number that is no text": Row(
        ["generate", "x", "--top-k", b"\xff"],
        2,
        "argument --top-k: invalid int value: '\\udcff'",
    ),
    "threads beyond any machine": Row(
        ["generate", "x", "--threads", "3000000000"],
        2,
        "threads must be an integer in 1 .. 1024, got 3000000000",
    ),
    "threads beyond 64 bits": Row(
        ["chat", "--threads", "9" * 30],
        2,
        f"threads must be an integer in 1 .. 1024, got {'9' * 30}",
    ),
    "a negative number of threads": Row(
        ["explain", "x", "--threads", "-1"], 2, "threads must be an integer in 1 .. 1024, got -1"
    ),
    "a seed of -1": Row(
        ["generate", "x", "--seed", "-1"],
        2,
        "seed must be an integer in [0, 2^64), or left out for a new one each time, got -1",
    ),
    "a stop id that is no number": Row(
        ["generate", "x", "--stop-id", "a"], 2, "argument --stop-id: invalid int value: 'a'"
    ),
    "a negative stop id": Row(
        ["generate", "x", "--stop-id", "-1"], 2, "stop_id must be an integer >= 0, got -1"
    ),
    "a stop id beyond the vocabulary": Row(
        ["generate", "x", *MODEL, "--stop-id", "257"],
        2,
        "stop_id must name tokens in 0 .. 256, got 257",
        LATE,
    ),
    "a stop id beyond the vocabulary of a chat": Row(
        ["chat", *MODEL, "--stop-id", "9" * 30],
        2,
        f"stop_id must name tokens in 0 .. 256, got {'9' * 30}",
        LATE,
    ),
    "a bad word that is no text": Row(
        ["generate", "x", "--bad-words-text", b"a\xff"],
        2,
        "argument --bad-words-text: must be valid UTF-8, got 'a\\udcff'",
    ),
    "a breaker that is no text": Row(
        ["explain", "x", "--dry-breakers-text", b"\xe6"],
        2,
        "argument --dry-breakers-text: must be valid UTF-8, got '\\udce6'",
    ),
    "an empty bad word of a chat": Row(
        ["chat", "--bad-words-text", ""], 2, "bad_words_text must have no empty string, got ['']"
    ),
    "an empty breaker": Row(
        ["explain", "x", "--dry-breakers-text", ""],
        2,
        "dry_breakers_text must have no empty string, got ['']",
    ),
    "a bad word without tokens": Row(
        ["generate", "x", "--model", "fewer_words", "--bad-words-text", "ab\x1b"],
        2,
        "bad_words_text does not suit fewer_words: words must be strings that the tokenizer has "
        "tokens for, got 'ab\\x1b'",
        LATE,
    ),
    "a breaker without tokens": Row(
        ["chat", "--model", "fewer_words", "--dry-breakers-text", "\x1b[2J"],
        2,
        "dry_breakers_text must be a text that tokens of fewer_words write, got '\\x1b[2J'",
        LATE,
    ),
    "rules as texts and no texts for a search": Row(
        [*TUNE, "--bad-words-text=a"], 2, "unrecognized arguments: --bad-words-text=a"
    ),
    "a schema that is not there": schema("none", "cannot be read: No such file or directory"),
    "a folder for a schema": schema("folder", "is not a file"),
    "a FIFO for a schema": schema("fifo", "is not a file"),
    "a socket for a schema": schema("socket", "is not a file"),
    "an endless schema": schema("/dev/zero", "is not a file"),
    "a link to itself for a schema": schema(
        "loop", "cannot be read: Too many levels of symbolic links"
    ),
    "a schema of a long name": schema("n" * 300, "cannot be read: File name too long"),
    "a schema that is no text": schema(
        "latin.json", "must be valid UTF-8: invalid continuation byte"
    ),
    "an empty schema": Row(
        ["generate", "x", "--json-schema", "empty"], 2, re.compile(f"{NO_SCHEMA}: Expecting .*")
    ),
    "a schema that is no JSON": Row(
        ["chat", "--json-schema", "text"], 2, re.compile(f"{NO_SCHEMA}: Expecting .*")
    ),
    "a schema of brackets": Row(
        ["generate", "x", "--json-schema", "deep.json"], 2, re.compile(f"{NO_SCHEMA}: maximum .*")
    ),
    "a list for a schema": Row(
        ["generate", "x", "--json-schema", "list.json"], 2, re.compile(rf"{NO_SCHEMA}, got '\[5\]'")
    ),
    "a schema of no known type": Row(
        ["generate", "x", "--json-schema", "type.json"],
        2,
        'json_schema must be one that xgrammar can compile: Unsupported type "x"',
    ),
    "a schema of no known type in a chat": Row(
        ["chat", "--json-schema", "type.json", "--grammar-engine", "llguidance"],
        2,
        "json_schema must be one that llguidance can compile: Invalid type: x",
    ),
    "a schema and a regular expression": Row(
        ["generate", "x", "--json-schema", "type.json", "--regex", "a"],
        2,
        "json_schema and regex must not be given together",
    ),
    "an open regular expression": Row(
        ["generate", "x", "--regex", "("],
        2,
        re.compile("regex must be one that xgrammar can compile: .*parenthesis is not closed.*"),
    ),
    "an open regular expression in a chat": Row(
        ["chat", "--regex", "(\x1b", "--grammar-engine", "llguidance"],
        2,
        re.compile("regex must be one that llguidance can compile: .*unclosed group.*"),
    ),
    "a regular expression that is no text": Row(
        ["generate", "x", "--regex", b"\xff"],
        2,
        "argument --regex: must be valid UTF-8, got '\\udcff'",
    ),
    "an engine that nobody has": Row(
        ["generate", "x", "--regex", "a", "--grammar-engine", "y"],
        2,
        re.compile("argument --grammar-engine: invalid choice: 'y'.*"),
    ),
    "an engine alone": Row(
        ["chat", "--grammar-engine", "llguidance"],
        2,
        "grammar_engine needs json_schema or regex, got 'llguidance' alone",
    ),
    "a regular expression that goes on": Row(
        ["generate", "x", "--regex", "a", "--ignore-eos"],
        2,
        "ignore_eos must not be given beside json_schema or regex: after such a text there is "
        "nothing but its end token",
    ),
    "two prompts on one stdin": Row(
        ["generate", "-", "x", "-"],
        2,
        "PROMPT may be - once, since there is one stdin; after -- it is a text",
    ),
    "a range of three": Row(
        ["tune", "temperature=1:2:3:4"],
        2,
        "space must have ranges LOW:HIGH, LOW:HIGH:log or LOW:HIGH:STEP, got 'temperature=1:2:3:4'",
    ),
    "a tuple for a range": Row(
        ["tune", "temperature=(0.1,2.0)"],
        2,
        "space must have entries NAME=LOW:HIGH or NAME=VALUE,..., got 'temperature=(0.1,2.0)'",
    ),
    "an endless length": Row(
        ["generate", "x", "--model", "tiny", "--max-new-tokens", "9" * 30],
        2,
        "max_new_tokens must leave the prompt's 1 tokens room in the model's context of 100000, "
        f"got {'9' * 30}",
        LATE,
    ),
    "texts beyond any memory": Row(
        ["generate", "x", "--n", "9" * 12], 2, f"n must be at most 65536, got {'9' * 12}"
    ),
    "texts beyond any memory, explained": Row(
        ["explain", "x", "--n", "65537"], 2, "n must be at most 65536, got 65537"
    ),
    "texts beyond any memory in a search": Row(
        [*TUNE, "--texts", "9" * 20], 2, f"texts must be at most 65536, got {'9' * 20}"
    ),
    "a seed of 130 bits": Row(
        [*TUNE, "--seed", "9" * 40],
        2,
        re.compile(r"seed must be an integer in \[0, 2\^64\), .*got 9{40}"),
    ),
    "one file for a picture and a page": Row(
        ["explain", "x", "--picture", "a.svg", "--html", "a.svg"],
        2,
        "html must be another file than picture, got 'a.svg'",
    ),
    # ---- models
    "a FIFO": model("fifo", "model 'fifo' is neither a GGUF file nor a directory"),
    "a socket": model("socket", "model 'socket' is neither a GGUF file nor a directory"),
    "an empty file": model("empty", "model 'empty' is neither a GGUF file nor a directory"),
    "the null device": model(
        "/dev/null", "model '/dev/null' is neither a GGUF file nor a directory"
    ),
    "endless zeros": model("/dev/zero", "model '/dev/zero' is neither a GGUF file nor a directory"),
    "a link to itself": model(
        "loop", "model 'loop' cannot be read: Too many levels of symbolic links"
    ),
    "a name that is too long": model(
        "x" * 300, f"model '{'x' * 300}' cannot be read: File name too long"
    ),
    "a file as a folder": model("empty/x", "model 'empty/x' cannot be read: Not a directory"),
    "no name": model("", "model '.' is a directory without a config.json"),
    "a folder without a config": model(
        "folder", "model 'folder' is a directory without a config.json"
    ),
    "a model with suppressed tokens": model(
        "suppressed",
        "model 'suppressed' cannot be used: suppress_tokens of the generation config cannot be "
        "honoured, got [5]: set it to None there",
        LATE,
    ),
    "a model with bad words that are none": model(
        "bad_words",
        "model 'bad_words' cannot be used: the generation config cannot be honoured: "
        "bad_words[0] must be token ids in [0, 2^31), got 5",
        LATE,
    ),
    "a model with a length that is none": model(
        "no_length",
        "model 'no_length' cannot be used: min_length of the generation config must be an integer "
        ">= 0, got 'x'",
        LATE,
    ),
    "weights that are not all there": model(
        "fewer_weights",
        "model 'fewer_weights' cannot be loaded: it has no model.norm.weight",
        LATE,
    ),
    "weights that are a FIFO": model(
        "fifo_weights",
        "model 'fifo_weights' is a directory in which pytorch_model.bin is not a file",
    ),
    "a config that is a FIFO": model(
        "fifo_config", "model 'fifo_config' is a directory without a config.json"
    ),
    "a GGUF file of eight bytes": model(
        "short.gguf", re.compile(r"model 'short\.gguf' cannot be loaded: .+"), LATE
    ),
    "a GGUF file of huge counts": model(
        "huge.gguf", re.compile(r"model 'huge\.gguf' cannot be loaded: .+"), LATE
    ),
    "a config that is no JSON": model(
        "broken_config", re.compile("model 'broken_config' cannot be loaded: .+"), LATE
    ),
    "a config that is a list": model(
        "list_config", re.compile("model 'list_config' cannot be loaded: .+"), LATE
    ),
    "a config that is nested without end": model(
        "deep_config", re.compile("model 'deep_config' cannot be loaded: .+"), LATE
    ),
    "a model without a tokenizer": model(
        "no_tokenizer", re.compile("model 'no_tokenizer' cannot be loaded: .+"), LATE
    ),
    "a model without weights": model(
        "no_weights", re.compile("model 'no_weights' cannot be loaded: .+"), LATE
    ),
    "weights that end too early": model(
        "cut_weights", re.compile("model 'cut_weights' cannot be loaded: .+"), LATE
    ),
    "an end token that is none": model(
        "far_end",
        "model 'far_end' cannot be loaded: its end token 9999 is not in 0 .. 256",
        LATE,
    ),
    "the tokenizer of another model": model(
        "other_tokenizer",
        "the tokenizer of other_tokenizer gives token 257, and its model has tokens in 0 .. 256",
        LATE,
    ),
    "a chat template that refuses a system message": Row(
        ["chat", "--model", "no_system", "--system", "s"],
        2,
        "the chat template of no_system does not take the messages: no system",
        LATE,
    ),
    "a chat template that is no template": Row(
        ["generate", "x", "--chat", "--model", "bad_template"],
        2,
        re.compile("the chat template of bad_template does not take the messages: .+"),
        LATE,
    ),
    "logits that are no numbers": Row(
        ["generate", "x", "--model", "nan"],
        1,
        re.compile(r"\d+ tokens in .*"),
        WRITTEN,
    ),
    "logits that are no numbers, explained": Row(
        ["explain", "x", "--model", "nan"],
        1,
        re.compile("nan cannot go on: NaN in logits in row 0.*"),
        LATE,
    ),
    # ---- files that are written
    "a page in no folder": Row(
        ["explain", "x", *MODEL, "--html", "nowhere/a.html"],
        2,
        "nowhere/a.html cannot be written: No such file or directory",
        UNLOADED,
    ),
    "a page that is a folder": Row(
        ["explain", "x", *MODEL, "--html", "folder"],
        2,
        "folder cannot be written: Is a directory",
        UNLOADED,
    ),
    "a page without a name": Row(
        ["explain", "x", *MODEL, "--html", ""], 2, ". cannot be written: Is a directory", UNLOADED
    ),
    "a page below a file": Row(
        ["explain", "x", *MODEL, "--html", "empty/a.html"],
        2,
        "empty/a.html cannot be written: Not a directory",
        UNLOADED,
    ),
    "a page where nothing can be made": Row(
        ["explain", "x", *MODEL, "--html", "/proc/a.html"],
        2,
        re.compile(r"/proc/a\.html cannot be written: .+"),  # the reason depends on the user
        UNLOADED,
    ),
    "a picture that is a folder": Row(
        ["explain", "x", *MODEL, "--picture", "folder.png"],
        2,
        "folder.png cannot be written: Is a directory",
        UNLOADED,
    ),
    "a page on a full device": Row(
        ["explain", "x", *MODEL, "--html", "/dev/full"],
        1,
        "/dev/full cannot be written: No space left on device",
        WRITTEN,
    ),
    "a report in a file": Row([*TUNE, "--out", "empty"], 2, "out must be a directory, got 'empty'"),
    "a report below a file": Row(
        [*TUNE, "--out", "empty/x"], 2, "empty/x cannot be written: Not a directory", UNLOADED
    ),
    "a report of a long name": Row(
        [*TUNE, "--out", "x" * 300],
        2,
        f"{'x' * 300} cannot be written: File name too long",
        UNLOADED,
    ),
    "a report whose page is a folder": Row(
        [*TUNE, "--out", "occupied"],
        2,
        "occupied/report.html cannot be written: Is a directory",
        UNLOADED,
    ),
    "a report where nothing can be made": Row(
        [*TUNE, "--out", "/proc"], 2, re.compile("/proc cannot be written: .+"), UNLOADED
    ),
    # ---- storages
    "a storage that is no database": storage(
        "sqlite:///text", "storage 'sqlite:///text' cannot be used: file is not a database"
    ),
    "a storage that is a folder": storage(
        "sqlite:///folder", "storage must be a file, got 'sqlite:///folder'"
    ),
    "a storage that is a FIFO": storage(
        "sqlite:///fifo", "storage must be a file, got 'sqlite:///fifo'"
    ),
    "a storage on a full device": storage(
        "sqlite:////dev/full", "storage must be a file, got 'sqlite:////dev/full'"
    ),
    "a storage that is read only": storage(
        "sqlite:///file:there.db?mode=ro&uri=true",
        "storage 'sqlite:///file:there.db?mode=ro&uri=true' cannot be used: "
        "attempt to write a readonly database",
    ),
    "a storage where nothing can be made": storage(
        "sqlite:////proc/x.db",
        re.compile(r"storage 'sqlite:////proc/x\.db' cannot be used: .+"),
    ),
    "a storage in no folder": storage(
        "sqlite:///nowhere/x.db",
        "storage must lie in a folder that is there, got 'sqlite:///nowhere/x.db'",
        ends=EARLY,
    ),
    "a storage in a folder of a long name": storage(
        f"sqlite:///{'x' * 300}/x.db",
        f"storage must lie in a folder that is there, got 'sqlite:///{'x' * 300}/x.db'",
        ends=EARLY,
    ),
    "a storage of a long name": storage(
        f"sqlite:///{'x' * 300}",
        f"storage 'sqlite:///{'x' * 300}' cannot be used: File name too long",
    ),
    "a database without its driver": storage(
        "firebird+nothing://x",
        "storage 'firebird+nothing://x' cannot be used: "
        "Can't load plugin: sqlalchemy.dialects:firebird.nothing",
    ),
    "a server without its driver": storage(
        "oracle://x",
        "storage 'oracle://x' cannot be used: its database's driver is not installed",
        1,
    ),
    "no URL": storage(
        "://", "storage '://' cannot be used: Could not parse SQLAlchemy URL from given URL string"
    ),
    "a port that is no number": storage(
        "postgresql://h:p/x",
        re.compile("storage 'postgresql://h:p/x' cannot be used: .*'p'"),
    ),
    # ---- streams
    "stdin is closed": Row(
        ["chat", *MODEL],
        1,
        "stdin cannot be read: it is closed",
        UNLOADED,
        {"stdin": CLOSED},
    ),
    "stdin is closed for a prompt": Row(
        ["generate", "-", *MODEL],
        1,
        "stdin cannot be read: it is closed",
        UNLOADED,
        {"stdin": CLOSED},
    ),
    "stdin is closed and not read": Row(
        ["generate", "x", *MODEL, *AAA], 0, None, WRITTEN, {"stdin": CLOSED}
    ),
    "a prompt on stdin that is no text": Row(
        ["generate", "-", *MODEL],
        2,
        "stdin must be valid UTF-8, got 'abc\\udcff'",
        UNLOADED,
        stdin=b"abc\xff def",
    ),
    "a stdin that fails": Row(
        ["generate", "-", *MODEL],
        1,
        "stdin cannot be read: Input/output error",
        UNLOADED,
        {"stdin": "/proc/self/mem"},
    ),
    "an empty prompt on stdin": Row(
        ["generate", "-", *MODEL], 2, "PROMPT must have at least one token, got ''", LATE
    ),
    "a line of a chat that is no text": Row(
        ["chat", *MODEL, *AAA],
        2,
        "stdin must be valid UTF-8, got 'b\\udcff'",
        WRITTEN,
        stdin=b"a\nb\xff\n",
    ),
    "the first line of a chat is no text": Row(
        ["chat", *MODEL], 2, "stdin must be valid UTF-8, got '\\udcff'", LATE, stdin=b"\xff\nb\n"
    ),
    "the reader has gone": Row(["generate", "x", *MODEL], 141, None, WRITTEN, {"stdout": GONE}),
    "the reader of the tables has gone": Row(["info"], 141, None, WRITTEN, {"stdout": GONE}),
    "the reader of the help has gone": Row(["--help"], 141, None, WRITTEN, {"stdout": GONE}),
    "a stdout that is only read": Row(
        ["info"], 1, "stdout cannot be written: Bad file descriptor", WRITTEN, {"stdout": READ_ONLY}
    ),
    "no stderr and a bad value": Row(
        ["generate", "x", "--top-p", "2"], 2, None, EARLY, {"stderr": CLOSED}
    ),
    "a full stderr and a bad value": Row(
        ["generate", "x", "--top-p", "2"], 2, None, EARLY, {"stderr": "/dev/full"}
    ),
    "a stderr that nobody reads and a bad value": Row(
        ["generate", "x", "--top-p", "2"], 2, None, EARLY, {"stderr": GONE}
    ),
    "a full stderr": Row(["generate", "x", *MODEL], 0, None, WRITTEN, {"stderr": "/dev/full"}),
    "no stream at all": Row(
        ["generate", "x", *MODEL],
        1,
        None,
        LATE,
        {"stdin": CLOSED, "stdout": CLOSED, "stderr": CLOSED},
    ),
    # ---- what works
    "help": Row(["--help"], 0, None, WRITTEN),
    "help for a command": Row(["tune", "--help"], 0, None, WRITTEN),
    "info": Row(["info"], 0, None, WRITTEN),
    "JSON of Japanese": Row(["generate", "日本", *MODEL, "--json"], 0, None, WRITTEN),
    "a chat in Japanese": Row(["chat", *MODEL], 0, None, WRITTEN, stdin="日本\n".encode()),
    "a regular expression": Row(["generate", "x", *MODEL, "--regex", "[ab]{2}"], 0, None, WRITTEN),
    "a schema": Row(
        ["generate", "x", *MODEL, "--json-schema", "digit.json", "--grammar-engine", "llguidance"],
        0,
        None,
        WRITTEN,
    ),
    "Japanese that is never written": Row(
        ["generate", "x", *MODEL, "--bad-words-text", "日", "--dry-breakers-text", "本"],
        0,
        None,
        WRITTEN,
    ),
    "Japanese explained": Row(["explain", "日本", *MODEL], 0, None, WRITTEN),
    "a search": Row([*TUNE, "--storage", "sqlite:///made.db"], 0, None, WRITTEN),
}


@pytest.fixture(scope="module")
def place(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the hostile files."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "tiny").symlink_to(model_path)
    os.mkfifo(folder / "fifo")
    bound = socket.socket(socket.AF_UNIX)
    before = os.getcwd()
    os.chdir(folder)  # the name of a socket must be short
    bound.bind("socket")
    os.chdir(before)
    (folder / "loop").symlink_to("loop")
    (folder / "empty").write_bytes(b"")
    (folder / "latin.json").write_bytes(b'{"const": "\xe9"}')
    (folder / "deep.json").write_bytes(b"[" * 100_000)
    (folder / "list.json").write_bytes(b"[5]")
    (folder / "type.json").write_bytes(b'{"type": "x"}')
    (folder / "digit.json").write_bytes(b'{"enum": [1, 2]}')
    sqlite3.connect(folder / "there.db").execute("CREATE TABLE t (x)").connection.close()
    (folder / "text").write_text("no database\n" * 500)
    for name in ("folder", "folder.png", "occupied/report.html"):
        (folder / name).mkdir(parents=True)
    (folder / "short.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    (folder / "huge.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 56)

    def changed(name: str, **contents: bytes | None) -> Path:
        """A copy of the tiny model with other files; the names have _ for the last dot."""
        copy = folder / name
        shutil.copytree(model_path, copy)
        for file, content in contents.items():
            path = copy / ".".join(file.rsplit("_", 1))
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content)
        return copy

    config = json.loads((model_path / "config.json").read_text())
    tokenizer = json.loads((model_path / "tokenizer.json").read_text())
    os.mkfifo(changed("fifo_config", config_json=None) / "config.json")
    os.mkfifo(changed("fifo_weights") / "pytorch_model.bin")
    changed("suppressed", generation_config_json=b'{"suppress_tokens": [5]}')
    changed("bad_words", generation_config_json=b'{"bad_words_ids": [5]}')
    changed("no_length", generation_config_json=b'{"min_length": "x"}')
    fewer = load_file(model_path / "model.safetensors")
    del fewer["model.norm.weight"]
    save_file(fewer, changed("fewer_weights") / "model.safetensors", metadata={"format": "pt"})
    changed("broken_config", config_json=b"{")
    changed("list_config", config_json=b"[]")
    changed("deep_config", config_json=b"[" * 100_000)
    changed("no_tokenizer", tokenizer_json=None, tokenizer_config_json=None)
    changed("no_weights", model_safetensors=None)
    changed("cut_weights", model_safetensors=(model_path / "model.safetensors").read_bytes()[:-99])
    of_far_end = json.dumps(config | {"eos_token_id": 9999}).encode()
    changed("far_end", config_json=of_far_end, generation_config_json=b'{"eos_token_id": 9999}')
    vocab = tokenizer["model"]["vocab"]
    escape = next(word for word, token in vocab.items() if token == ESCAPE)
    model_of = tokenizer["model"] | {"vocab": {w: i for w, i in vocab.items() if w != escape}}
    fewer_words = json.dumps(tokenizer | {"model": model_of}).encode()
    changed("fewer_words", tokenizer_json=fewer_words)
    vocab["x"] = 257
    changed("other_tokenizer", tokenizer_json=json.dumps(tokenizer).encode())
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    changed("no_system", chat_template_jinja=refuses.encode())
    changed("bad_template", chat_template_jinja=b"{% if %}")
    import transformers

    nan = changed("nan")
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(nan, local_files_only=True)
    loaded.lm_head.weight.data.fill_(float("nan"))
    loaded.save_pretrained(nan)
    yield folder
    bound.close()


def environment(**more: str) -> dict[str, str]:
    """The environment of a process that finds this package, with one thread."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"} | more


@pytest.fixture(scope="module")
def utf8() -> Iterator[ForkingProcess]:
    """The process that runs commands in a UTF-8 locale."""
    process = ForkingProcess(environment(**UTF8))
    yield process
    process.close()


@pytest.fixture(scope="module")
def ascii_alone() -> Iterator[ForkingProcess]:
    """The process that runs commands in a locale that has ASCII alone."""
    process = ForkingProcess(environment(**ASCII))
    yield process
    process.close()


def encoded(argv: list[str | bytes]) -> list[bytes]:
    return [word if isinstance(word, bytes) else word.encode() for word in argv]


def run_row(process: ForkingProcess, row: Row, folder: Path, stdout: str | None) -> Done:
    if row.argv[:1] == ["tune"] and row.ends != EARLY:
        for package in cli.TUNE_PACKAGES:
            pytest.importorskip(package, reason="needs the extra 'tune'")
    if {"--json-schema", "--regex"}.intersection(map(str, row.argv)):
        for package in ("xgrammar", "llguidance"):
            pytest.importorskip(package, reason="needs the extra 'grammar'")
    (folder / ".stdin").write_bytes(row.stdin)
    streams = {"stdin": str(folder / ".stdin"), "stdout": stdout} | row.streams
    return process.run(encoded(row.argv), folder, **streams)


def check_end(done: Done, code: int, line: str | re.Pattern[str] | None, ends: str) -> None:
    """Check the exit code, and that nothing is on stderr but progress and the line."""
    err = done.err.decode()
    assert "Traceback" not in err, err
    assert "Exception ignored" not in err, err
    assert done.code == code, err
    lines = err.splitlines()
    if line is not None:
        complaint = lines.pop()
        if isinstance(line, str):
            assert complaint == f"llm-sampling: {line}"
        else:
            assert line.fullmatch(complaint.removeprefix("llm-sampling: ")), complaint
    else:
        assert not any(line.startswith("llm-sampling: ") for line in lines), err
    if ends in (EARLY, UNLOADED):
        assert lines == []
        assert done.out == b""


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("stdout", [None, CLOSED, "/dev/full"], ids=["file", "closed", "full"])
@pytest.mark.parametrize("locale", ["utf8", "ascii_alone"])
def test_every_row(
    name: str, stdout: str | None, locale: str, place: Path, request: pytest.FixtureRequest
) -> None:
    row = ROWS[name]
    if stdout is not None and row.streams.keys() & {"stdout", "stderr"}:
        stdout = None  # it has streams of its own
    process = request.getfixturevalue(locale)
    done = run_row(process, row, place, stdout)
    if stdout == CLOSED and (row.ends != EARLY or "--help" in row.argv):
        check_end(done, 1, SHUT, LATE)
    elif stdout == "/dev/full" and row.ends == WRITTEN:
        check_end(done, 1, FULL, LATE)
    else:
        check_end(done, row.code, row.line, row.ends)


# ---- streams of real processes, by a shell -------------------------------------------------------

BY_A_SHELL = {
    "a full stderr": ("generate x --top-p 2 2>/dev/full", 2, ""),
    "no stderr": ("generate x --top-p 2 2>&-", 2, ""),
    "a full stdout": ("info >/dev/full", 1, FULL),
    "no stdout": ("info >&-", 1, SHUT),
    "no stdin": ("chat --model tiny <&-", 1, "stdin cannot be read: it is closed"),
    "a full stdout for the help": ("--help >/dev/full", 1, FULL),
    "both are full": ("info >/dev/full 2>/dev/full", 1, ""),
    "a FIFO of the shell": (
        "generate x --model <(echo GGUF)",
        2,
        re.compile("model '/dev/fd/63' is neither a GGUF file nor a directory"),
    ),
}


@pytest.mark.parametrize("name", BY_A_SHELL)
def test_streams_of_a_shell(name: str, place: Path) -> None:
    """The interpreter's own start and end with these streams, which other tests stand in for."""
    words, code, line = BY_A_SHELL[name]
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m llm_sampling.tools.cli {words}"],
        capture_output=True,
        cwd=place,
        env=environment(),
        check=False,
    )
    assert done.returncode == code, done.stderr
    expected = line.pattern if isinstance(line, re.Pattern) else re.escape(line)
    pattern = rf"llm-sampling: {expected}\n" if line else ""
    assert re.fullmatch(pattern, done.stderr.decode()), done.stderr


def test_a_closed_descriptor_is_not_left_to_the_next_file(tmp_path: Path) -> None:
    program = """if True:
        import os
        from llm_sampling.tools.cli import console
        os.close(0), os.close(2)
        console.hold_closed_descriptors()
        print(os.open("file", os.O_CREAT), *(os.readlink(f"/proc/self/fd/{n}") for n in (0, 2)))
    """
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(),
        check=True,
    )
    number, *held = done.stdout.split()
    assert int(number) > 2
    assert held == [os.devnull, os.devnull]


@pytest.mark.parametrize(
    ("path", "code", "err"), [("/dev/full", 1, f"llm-sampling: {FULL}\n"), (None, 141, "")]
)
def test_what_others_write_to_stdout_is_flushed_too(
    path: str | None, code: int, err: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A stdout that fails only in the flush at the end ends the command as any other does."""
    if path is None:
        reader, descriptor = os.pipe()
        os.close(reader)
    else:
        descriptor = os.open(path, os.O_WRONLY)
    monkeypatch.setattr(cli.info, "show_backends", lambda: sys.stdout.write("x") and 0)
    with open(descriptor, "w") as stdout, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stdout)
        assert cli.main(["info"]) == code
    assert capsys.readouterr().err == err


def test_an_endless_stdin_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.console, "MOST_INPUT", 3)
    monkeypatch.setattr(sys, "stdin", io.StringIO("abc"))
    assert cli.console.read(whole=True) == "abc"
    for whole, what in ((True, "stdin"), (False, "a line of stdin")):
        monkeypatch.setattr(sys, "stdin", io.StringIO("abcd"))
        message = f"^{what} must have at most 3 characters, got more$"
        with pytest.raises(cli.console.CommandError, match=message):
            cli.console.read(whole)


def test_half_a_character_of_two_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a"), encoding="utf-16-le"))
    with pytest.raises(
        cli.console.CommandError, match=r"^stdin must be valid UTF-16-LE: "
    ) as error:
        cli.console.read(whole=True)
    assert error.value.exit_code == 2


def test_ctrl_c_says_nothing_while_python_shuts_down() -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        for handler, expected in (
            (signal.default_int_handler, signal.SIG_DFL),
            (signal.SIG_IGN, signal.SIG_IGN),
        ):
            signal.signal(signal.SIGINT, handler)
            cli.console.end_without_a_word()
            assert signal.getsignal(signal.SIGINT) == expected
    finally:
        signal.signal(signal.SIGINT, before)


# ---- encodings -----------------------------------------------------------------------------------

JAPANESE = "日本"


def run_japanese(process: ForkingProcess, place: Path, *options: str, **streams: Any) -> bytes:
    argv = ["generate", JAPANESE, *MODEL, "--seed", "1", *options]
    done = process.run(encoded([*argv]), place, **streams)
    assert done.code == 0, done.err
    return done.out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "utf-16"])
def test_json_is_the_same_in_every_encoding(
    encoding: str, utf8: ForkingProcess, place: Path
) -> None:
    written = run_japanese(utf8, place, "--json", encoding=encoding).decode(encoding)
    line = json.loads(written)
    assert line["prompt"] == JAPANESE
    assert line == json.loads(run_japanese(utf8, place, "--json"))
    assert (JAPANESE in written) == encoding.startswith("utf")


def test_bytes_of_utf8_are_read_where_the_locale_has_ascii_alone(
    utf8: ForkingProcess, ascii_alone: ForkingProcess, place: Path
) -> None:
    line = json.loads(run_japanese(utf8, place, "--json"))
    assert json.loads(run_japanese(ascii_alone, place, "--json")) == line
    (place / ".stdin").write_bytes(JAPANESE.encode())
    argv = ["generate", "-", *MODEL, "--seed", "1", "--json"]
    for process in (utf8, ascii_alone):
        done = process.run(encoded([*argv]), place, stdin=str(place / ".stdin"))
        assert json.loads(done.out) == line


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_text_that_an_encoding_does_not_have_is_escaped(
    encoding: str, utf8: ForkingProcess, place: Path
) -> None:
    options = ["--max-new-tokens", "20"]
    whole = run_japanese(utf8, place, *options).decode()
    assert not whole.isascii()
    written = run_japanese(utf8, place, *options, encoding=encoding)
    assert written == whole.encode(encoding, "backslashreplace")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_escapes_of_text(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding=encoding))
    cli.console.write_model_text("é 日\n")
    expected = {"ascii": rb"\xe9 \u65e5", "latin-1": b"\xe9 \\u65e5", "cp1252": b"\xe9 \\u65e5"}
    assert buffer.getvalue() == expected[encoding] + b"\n"


# ---- what a terminal would obey ------------------------------------------------------------------

OBEYED = [chr(c) for c in (*range(32), 0x7F, *range(0x80, 0xA0)) if chr(c) not in "\n\t"]
OBEYED += list("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def test_what_a_terminal_obeys_is_escaped() -> None:
    for character in OBEYED:
        assert cli.console.printable(f"a{character}b").isprintable(), repr(character)
        assert cli.console.printable(character) == character.encode("unicode_escape").decode()
    harmless = "a\n\tb é 日 \u200d \u200f 👩‍👩‍👧 \\x1b"
    assert cli.console.printable(harmless) == harmless


@pytest.fixture
def terminal() -> Iterator[tuple[str, int]]:
    """A terminal: the path to open it by, and the descriptor that gives what it shows."""
    ours, its = os.openpty()
    yield os.ttyname(its), ours
    os.close(its)
    os.close(ours)


@pytest.mark.parametrize(
    ("command", "shown", "raw"),
    [
        (["generate", "x"], rb"\x1b\x1b\x1b", b"\x1b\x1b\x1b"),
        (["generate", "x", "--n", "2"], rb"\x1b\x1b\x1b", b"\x1b\x1b\x1b"),
        (["generate", "x", "--json"], rb'"\u001b\u001b\u001b"', rb'"\u001b\u001b\u001b"'),
        (["chat"], rb"\x1b\x1b\x1b", b"\x1b\x1b\x1b"),
        (["explain", "x"], rb'"\u001b\u001b\u001b"', rb'"\u001b\u001b\u001b"'),
    ],
    ids=["generate", "several", "json", "chat", "explain"],
)
def test_a_models_escape_sequences_are_shown_and_not_obeyed(
    command: list[str],
    shown: bytes,
    raw: bytes,
    utf8: ForkingProcess,
    place: Path,
    terminal: tuple[str, int],
) -> None:
    (place / ".stdin").write_bytes(b"x\n")
    argv = encoded([*command, *MODEL, "--logit-bias", f"{ESCAPE}=100"])
    streams = {"stdin": str(place / ".stdin"), "environment": {"NO_COLOR": "1", "TERM": "dumb"}}
    path, ours = terminal
    assert utf8.run(argv, place, stdout=path, **streams).code == 0
    written = os.read(ours, 1 << 16)
    assert shown in written
    assert b"\x1b" not in written
    assert raw in utf8.run(argv, place, **streams).out


def test_json_on_a_terminal_has_no_other_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(sys, "stdout", written)
    monkeypatch.setattr(cli.console, "is_terminal", lambda stream: True)
    for text in (*OBEYED, "é"):
        cli.console.write_json(text)
    lines = written.getvalue().splitlines()
    assert [json.loads(line) for line in lines] == [*OBEYED, "é"]
    assert all(line.isascii() and line.isprintable() for line in lines[:-1])
    assert lines[-1] == '"é"'


# ---- Ctrl-C --------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(model_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs ``generate``, with Ctrl-C or another end after some chunks."""

    def run(after: int, *argv: str, end: type[BaseException] = KeyboardInterrupt) -> Any:
        whole = cli.generate.stream

        def cut(*args: Any) -> Iterator[Any]:
            for number, chunk in enumerate(whole(*args)):
                if number == after:
                    raise end
                yield chunk

        monkeypatch.setattr(cli.generate, "stream", cut)
        code = cli.main(["generate", *argv, "--model", str(model_path), *AAA])
        return code, *capsys.readouterr()

    return run


def test_ctrl_c_leaves_the_texts_so_far(interrupted: Any) -> None:
    code, out, err = interrupted(5, "x", "y", "--max-new-tokens", "9")
    assert (code, out) == (130, "aaa\n\naa\n")
    assert "5 tokens in " in err.splitlines()[-1]


def test_ctrl_c_leaves_the_texts_of_n_so_far(interrupted: Any) -> None:
    assert interrupted(7, "x", "--n", "3", "--max-new-tokens", "9")[:2] == (
        130,
        "aaa\n\naa\n\naa\n",
    )


def test_ctrl_c_before_the_first_token_leaves_empty_texts(interrupted: Any) -> None:
    assert interrupted(0, "x", "y")[:2] == (130, "\n\n\n")


def test_ctrl_c_leaves_json_of_the_texts_so_far(interrupted: Any) -> None:
    options = ["--stop", "aa", "--max-new-tokens", "9", "--seed", "5"]
    code, out, _ = interrupted(3, "x", "--json", "--n", "2", *options)
    assert code == 130
    done, going = map(json.loads, out.splitlines())
    assert (done["finish_reason"], done["stop_reason"], done["text"]) == ("stop", "aa", "")
    assert done["token_ids"] == [A, A]
    assert (going["finish_reason"], going["stop_reason"]) == ("abort", None)
    assert (going["prompt"], going["index"], going["token_ids"]) == ("x", 1, [A])
    assert going["seed"] is not None


@pytest.mark.parametrize(
    ("end", "line"),
    [
        (MemoryError, "there is not enough memory"),
        (RecursionError, "RecursionError: (LLM_SAMPLING_TRACEBACK=1 shows where)"),
        (RuntimeError, "RuntimeError: (LLM_SAMPLING_TRACEBACK=1 shows where)"),
        (torch.OutOfMemoryError, "OutOfMemoryError: (LLM_SAMPLING_TRACEBACK=1 shows where)"),
        (AssertionError, "AssertionError: (LLM_SAMPLING_TRACEBACK=1 shows where)"),
    ],
)
def test_an_error_without_a_message_is_one_line(end: Any, line: str, interrupted: Any) -> None:
    code, out, err = interrupted(3, "x", "y", "--max-new-tokens", "9", end=end)
    assert (code, out) == (1, "aa\n\na\n")
    assert err.splitlines()[-1] == f"llm-sampling: {line}"
    assert "Traceback" not in err


def test_the_traceback_can_be_asked_for(interrupted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_SAMPLING_TRACEBACK", "1")
    with pytest.raises(RecursionError):
        interrupted(3, "x", end=RecursionError)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("no\nluck")])
def test_an_error_while_the_model_loads(
    error: Exception, interrupted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise error

    import transformers

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", broken)
    code, out, err = interrupted(0, "x")
    if isinstance(error, MemoryError):
        assert (code, err.splitlines()[-1]) == (1, "llm-sampling: there is not enough memory")
    else:
        assert code == 2
        assert err.splitlines()[-1].endswith("cannot be loaded: no luck")
    assert out == ""


def test_a_second_ctrl_c_ends_the_command_too(
    interrupted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(message: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.console, "complain", again)
    assert interrupted(0, "x", "--top-p", "2")[0] == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---- files that are written ----------------------------------------------------------------------


@pytest.fixture
def explain(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    """Return a function that runs ``explain`` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*options: str) -> Any:
        argv = ["explain", "x", "--model", str(model_path), "--max-new-tokens", "1", *options]
        return cli.main(argv), *capsys.readouterr()

    return run


def test_a_page_is_replaced_and_keeps_its_mode(explain: Any, tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    page.write_text("before")
    page.chmod(0o640)
    assert explain("--html", "a.html")[0] == 0
    assert page.read_text().startswith("<!doctype html>")
    assert page.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_a_page_is_not_harmed_by_what_comes_to_nothing(
    explain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the check before the model is loaded nor a write that fails changes the file."""
    page = tmp_path / "a.html"
    page.write_text("before")
    os.utime(page, (1, 1))
    assert explain("--html", "a.html", "--stop-id", "x")[0] == 2
    monkeypatch.setattr(models, "load", lambda *_: (_ for _ in ()).throw(models.ModelError("no")))
    assert explain("--html", "a.html", "--picture", "b.png")[0] == 2
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)

    def full(self: Path, *_: Any, **__: Any) -> None:
        self.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    code, _, err = explain("--html", "a.html")
    assert (code, err.splitlines()[-1]) == (
        1,
        "llm-sampling: a.html cannot be written: No space left on device",
    )
    assert (page.read_bytes(), page.stat().st_mtime) == (b"before", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_a_link_that_the_user_names_is_written_through(explain: Any, tmp_path: Path) -> None:
    (tmp_path / "a.html").symlink_to("b.html")  # which is not there yet
    assert explain("--html", "a.html")[0] == 0
    assert (tmp_path / "a.html").is_symlink()
    assert (tmp_path / "b.html").read_text().startswith("<!doctype html>")


def test_links_in_the_folder_of_a_report_are_replaced(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for package in cli.TUNE_PACKAGES:
        pytest.importorskip(package, reason="needs the extra 'tune'")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").write_text("other")
    (tmp_path / "tuning").mkdir()
    for name in ("report.html", "history.png"):
        (tmp_path / "tuning" / name).symlink_to("../other")
    (tmp_path / "s.db.lock").symlink_to("other")
    argv = ["tune", *SPACE, "--model", str(model_path), "--storage", "sqlite:///s.db"]
    assert cli.main(argv) == 0, capsys.readouterr()
    assert (tmp_path / "other").read_text() == "other"
    assert not (tmp_path / "tuning/report.html").is_symlink()
    assert (tmp_path / "tuning/history.png").read_bytes().startswith(b"\x89PNG")
    names = {path.name for path in (tmp_path / "tuning").iterdir()}
    assert names == {"report.html", "history.png", "slice.png"}


# ---- new words -----------------------------------------------------------------------------------


def run_in(place: Path, process: ForkingProcess, argv: list[str], stdin: str = "") -> str:
    (place / ".stdin").write_text(stdin)
    done = process.run(encoded([*argv]), place, stdin=str(place / ".stdin"))
    assert done.code == 0, done.err
    return done.out.decode()


@pytest.mark.parametrize(
    ("words", "stdin", "prompts"),
    [
        (["-"], "a\nb\n", ["a\nb"]),
        (["-"], "a\n\n", ["a\n"]),
        (["-"], "a", ["a"]),
        (["x", "-", "y"], "a\n", ["x", "a", "y"]),
        (["--", "-"], "a\n", ["-"]),
        (["-", "--", "-", "--"], "a\n", ["a", "-", "--"]),
        (["x", "--stop", "-"], "a\n", ["x"]),
    ],
)
def test_a_prompt_on_stdin(
    words: list[str], stdin: str, prompts: list[str], utf8: ForkingProcess, place: Path
) -> None:
    out = run_in(place, utf8, ["generate", "--json", *MODEL, *words], stdin)
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == prompts


def test_a_chat_knows_its_system_message(utf8: ForkingProcess, place: Path) -> None:
    """The tiny model's template writes each message in brackets."""
    options = [*MODEL, "--seed", "1", "--temperature", "2"]
    told = run_in(place, utf8, ["chat", *options, "--system", "be brief"], "hi\n")
    assert told == run_in(place, utf8, ["generate", "[be brief][hi]", *options])
    assert told != run_in(place, utf8, ["chat", *options], "hi\n")
    empty = run_in(place, utf8, ["chat", *options, "--system", ""], "hi\n")
    assert empty == run_in(place, utf8, ["generate", "[][hi]", *options])


@pytest.mark.parametrize("engine", ["xgrammar", "llguidance"])
def test_texts_conform(engine: str, utf8: ForkingProcess, place: Path) -> None:
    pytest.importorskip(engine, reason="needs the extra 'grammar'")
    options = [*MODEL, "--max-new-tokens", "9", "--seed", "1", "--grammar-engine", engine]
    out = run_in(place, utf8, ["generate", "x", *options, "--n", "3", "--regex", "[xyz]{2,4}"])
    assert re.fullmatch("([xyz]{2,4}\n\n?){3}", out)
    out = run_in(place, utf8, ["generate", "x", *options, "--json-schema", "digit.json", "--json"])
    line = json.loads(out)
    assert (json.loads(line["text"]) in (1, 2), line["finish_reason"]) == (True, "stop")
    answers = run_in(place, utf8, ["chat", *options, "--regex", "yes|no"], "x\ny\nz\n").split()
    assert len(answers) == 3
    assert {*answers} <= {"yes", "no"}


def test_stop_ids_end_a_text(utf8: ForkingProcess, place: Path) -> None:
    argv = ["generate", "x", *MODEL, *AAA]
    assert run_in(place, utf8, argv) == "aaa\n"
    assert run_in(place, utf8, [*argv, "--stop-id", str(B)]) == "aaa\n"
    stops = ["--stop-id", str(B), "--stop-id", str(A)]
    line = json.loads(run_in(place, utf8, [*argv, *stops, "--json"]))
    assert (line["text"], line["token_ids"]) == ("", [A])
    assert (line["finish_reason"], line["stop_reason"]) == ("stop", A)
    chat = ["chat", *MODEL, *AAA]
    assert run_in(place, utf8, chat, "x\n") == "aaa\n"
    assert run_in(place, utf8, [*chat, *stops], "x\n") == "\n"
