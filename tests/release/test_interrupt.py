"""Tests that Ctrl-C leaves objects and the terminal in a usable state."""

from __future__ import annotations

import dis
import functools
import io
import itertools
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import llm_sampling
from llm_sampling import MaskStep, Sampler, SamplingParams, TokenHistory, generation
from llm_sampling.backends import cpu
from llm_sampling.tools import cli

VOCAB_SIZE = 97
STEPS = 12
PROMPTS = torch.tensor([[5, 17, 17], [9, 2, 64]])
#: The parameters have penalties, so that each token depends on all tokens drawn before it.
PARAMS = (
    SamplingParams(temperature=1.5, repetition_penalty=1.3, seed=1),
    SamplingParams(top_p=0.9, frequency_penalty=0.5, seed=2),
)
LOGITS = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))


def press_ctrl_c() -> None:
    """Send SIGINT as a terminal does, so that Python raises KeyboardInterrupt in this call."""
    signal.raise_signal(signal.SIGINT)


class Model(torch.nn.Module):
    """A model whose logits depend on the last token only.

    It presses Ctrl-C in call number ``interrupted``; calls are counted from 1.
    """

    def __init__(self, interrupted: int = 0) -> None:
        super().__init__()
        self.interrupted, self.calls = interrupted, 0

    def forward(
        self, input_ids: Tensor, past_key_values: object = None, use_cache: bool = True
    ) -> SimpleNamespace:
        self.calls += 1
        if self.calls == self.interrupted:
            press_ctrl_c()
        return SimpleNamespace(logits=LOGITS[input_ids], past_key_values=0)

    def of_ids(self, input_ids: Tensor, cache: object) -> Tensor:
        return self.forward(input_ids).logits


class Tokenizer:
    """A tokenizer with one character per token, which presses Ctrl-C in call ``interrupted``."""

    def __init__(self, interrupted: int = 0) -> None:
        self.interrupted, self.calls = interrupted, 0

    def decode(self, tokens: list[int], **options: object) -> str:
        self.calls += 1
        if self.calls == self.interrupted:
            press_ctrl_c()
        return "".join(chr(ord("0") + token) for token in tokens)


def generate(model: Model, tokenizer: Tokenizer, prompts: Tensor, params: Any) -> Iterator[Any]:
    for chunk in generation.generate_stream(
        model.of_ids,
        prompts,
        params,
        tokenizer=tokenizer,
        vocab_size=VOCAB_SIZE,
        max_new_tokens=STEPS,
    ):
        yield chunk.index, chunk.token, chunk.text


@pytest.mark.parametrize("call", [1, 2, STEPS])
@pytest.mark.parametrize("where", ["model", "tokenizer"])
def test_an_interrupted_text_leaves_what_it_was_made_of(where: str, call: int) -> None:
    """An interrupt of ``generate_stream`` has no lasting effect.

    The pieces before it are right, the caller's arguments are unchanged, and a new text is right.
    """
    expected = list(generate(Model(), Tokenizer(), PROMPTS, PARAMS))
    prompts, params = PROMPTS.clone(), list(PARAMS)
    model = Model(call if where == "model" else 0)
    tokenizer = Tokenizer(call if where == "tokenizer" else 0)
    pieces: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        # extend keeps the pieces that came before the interrupt.
        pieces.extend(generate(model, tokenizer, prompts, params))
    assert pieces == expected[: len(pieces)]
    assert len(pieces) < len(expected)
    if where == "model":
        assert len(pieces) == (call - 1) * len(prompts)
    assert torch.equal(prompts, PROMPTS)
    assert tuple(params) == PARAMS
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert list(generate(model, tokenizer, prompts, params)) == expected
    done = generation.generate(
        model.of_ids, prompts, params, vocab_size=VOCAB_SIZE, max_new_tokens=STEPS
    )
    tokens = [[token for index, token, _ in expected if index == row] for row in range(2)]
    assert [text.token_ids for text in done] == tokens


def test_an_interrupted_stream_is_over() -> None:
    """An interrupted stream yields nothing more, rather than the rest of the text."""
    chunks = generation.generate_stream(
        Model(3).of_ids, PROMPTS, PARAMS, vocab_size=VOCAB_SIZE, max_new_tokens=STEPS
    )
    with pytest.raises(KeyboardInterrupt):
        list(chunks)
    assert next(chunks, None) is None


def new_sampler() -> Sampler:
    history = TokenHistory.from_ids(PROMPTS.tolist(), None, VOCAB_SIZE)
    return Sampler(PARAMS, vocab_size=VOCAB_SIZE, history=history)


def steps(model: Model, ids: Tensor, sampler: Sampler, into: list[list[int]]) -> list[list[int]]:
    """Append the tokens of each step to ``into`` until it has STEPS steps, and return it."""
    for step in generation.stream(model, ids, sampler, max_new_tokens=STEPS - len(into)):
        into.append(step.tokens)
    return into


def test_an_interrupted_sampler_goes_on_where_it_was() -> None:
    """A loop that is resumed with the same Sampler draws what an uninterrupted one draws.

    The negative control resumes with a new Sampler, and must draw other tokens.
    """
    expected = steps(Model(), PROMPTS, new_sampler(), [])
    sampler, drawn = new_sampler(), []
    with pytest.raises(KeyboardInterrupt):
        steps(Model(6), PROMPTS, sampler, drawn)
    assert drawn == expected[:5]
    assert sampler.positions.tolist() == sampler.history.lengths.tolist() == [5, 5]
    last = torch.tensor(drawn[-1]).unsqueeze(-1)
    anew = steps(Model(), last, new_sampler(), list(drawn))
    assert steps(Model(), last, sampler, drawn) == expected
    assert anew != expected  # the negative control


@pytest.mark.skipif(cpu.why_unavailable() is not None, reason="the CPU kernel is not built")
@pytest.mark.parametrize("lost", [0, 1])
def test_an_interrupt_around_the_kernel(lost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt right before or after the kernel's call leaves a consistent state.

    All of the state shows the step as done, or none of it. After a step that is done, the caller
    may not get its tokens.
    """
    expected = steps(Model(), PROMPTS, new_sampler(), [])
    sampler, drawn = new_sampler(), []
    kernel, calls = cpu.LIBRARY._function, 0

    def interrupted(*args: object) -> int:
        nonlocal calls
        calls += 1
        if calls == 6 and lost == 0:
            press_ctrl_c()
        code = kernel(*args)
        if calls == 6:
            press_ctrl_c()
        return code

    with monkeypatch.context() as patch:
        patch.setattr(cpu.LIBRARY, "_function", interrupted)
        with pytest.raises(KeyboardInterrupt):
            steps(Model(), PROMPTS, sampler, drawn)
    assert drawn == expected[:5]
    assert sampler.positions.tolist() == sampler.history.lengths.tolist() == [5 + lost] * 2
    drawn += expected[5 : 5 + lost]
    assert steps(Model(), torch.tensor(drawn[-1]).unsqueeze(-1), sampler, drawn) == expected


class Interrupt:
    """A trace function that raises KeyboardInterrupt before one instruction of the package.

    Args:
        instruction: the number of the instruction, counted from 1.
        only_after_calls: count only the instructions before which CPython handles signals: the
            first of a function, and those after a call or a backward jump.
    """

    package = str(Path(llm_sampling.__file__).parent)

    def __init__(self, instruction: int, only_after_calls: bool = False) -> None:
        self.left, self.place = instruction, ""
        self.only_after_calls = only_after_calls
        self.last: dict[FrameType, str] = {}

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "call":
            if not frame.f_code.co_filename.startswith(self.package):
                return None
            frame.f_trace_opcodes = True
        elif event == "opcode":
            last = self.last.get(frame, "RESUME")
            self.last[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if self.only_after_calls and not re.match("RESUME|CALL|JUMP_BACKWARD", last):
                return self
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                self.place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self


def interrupted_at(interrupt: Interrupt, work: Callable[[], object]) -> str:
    """Do the work and return the place of the interrupt, or "" if the work ended before it."""
    before = sys.gettrace()
    sys.settrace(interrupt)
    try:
        work()
    except KeyboardInterrupt:
        assert interrupt.place
    finally:
        sys.settrace(before)
    return interrupt.place


def state(sampler: Sampler) -> list[list[Any]]:
    history = sampler.history
    assert history is not None
    tensors = (sampler.positions, history.seen, history.counts, history.lengths)
    return [tensor.tolist() for tensor in tensors]


@pytest.mark.skipif(cpu.why_unavailable() is not None, reason="the CPU kernel is not built")
@pytest.mark.parametrize("before", [0, 2], ids=["first step", "third step"])
def test_a_step_that_is_interrupted_anywhere(before: int) -> None:
    """A step interrupted anywhere is done completely or not at all.

    The steps after it draw the same tokens as without an interrupt.
    """
    rows = [LOGITS[2 * step : 2 * step + 2] for step in range(6)]
    sampler = new_sampler()
    states, expected = [state(sampler)], []
    for logits in rows:
        expected.append(sampler(logits).tokens.tolist())
        states.append(state(sampler))

    wrong, reached = {}, set()
    for instruction in itertools.count(1):
        sampler = new_sampler()
        for logits in rows[:before]:
            sampler(logits)
        interrupt = Interrupt(instruction, only_after_calls=True)
        place = interrupted_at(interrupt, functools.partial(sampler, rows[before]))
        if not place:
            break
        done = int(sampler.positions[0])
        reached.add(done - before)
        try:
            assert state(sampler) == states[done]
            assert [sampler(logits).tokens.tolist() for logits in rows[done:]] == expected[done:]
        except Exception as error:
            wrong[place] = repr(error)
    assert wrong == {}
    assert reached == {0, 1}


@pytest.mark.skipif(cpu.why_unavailable() is not None, reason="the CPU kernel is not built")
def test_a_step_with_a_callback_that_is_interrupted_anywhere() -> None:
    """The callback is told every token that was drawn, or the next call is an error."""
    rows = [LOGITS[2 * step : 2 * step + 2] for step in range(6)]

    def no_token_twice(step: MaskStep) -> Tensor:
        for index, row in enumerate(step.rows):
            output = outputs.setdefault(row.id, [])
            output[row.start :] = row.tokens
            for token in output:
                step.bitmask[index, token // 32] &= ~(1 << token % 32)
        return step.bitmask

    def drawn(sampler: Sampler, steps: list[Tensor]) -> list[list[int]]:
        return [sampler(logits).tokens.tolist() for logits in steps]

    def new() -> Sampler:
        sampler = new_sampler()
        sampler.set_allowed_mask(no_token_twice)
        outputs.clear()
        return sampler

    outputs: dict[int, list[int]] = {}
    expected = drawn(new(), rows)
    wrong, ends = {}, set()
    for instruction in itertools.count(1):
        sampler = new()
        drawn(sampler, rows[:1])
        interrupt = Interrupt(instruction, only_after_calls=True)
        place = interrupted_at(interrupt, functools.partial(sampler, rows[1]))
        if not place:
            break
        done = int(sampler.positions[0])
        try:
            assert drawn(sampler, rows[done:]) == expected[done:]
            ends.add(done)
        except RuntimeError as error:
            ends.add(str(error)[:17])
        except Exception as error:
            wrong[place] = repr(error)
    assert wrong == {}
    assert ends == {1, 2, "the mask callback"}


CHANGES: dict[str, Callable[[Sampler], object]] = {
    "add": lambda sampler: sampler.add(PARAMS[0], prompt_ids=[7, 8], output_ids=[9]),
    "reorder": lambda sampler: sampler.reorder([1, 0]),
    "remove": lambda sampler: sampler.remove([0]),
}


@pytest.mark.skipif(cpu.why_unavailable() is not None, reason="the CPU kernel is not built")
@pytest.mark.parametrize("kind", ["penalties", "none", "a callback"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_rows_that_fails_anywhere(change: str, kind: str) -> None:
    """A change of rows that fails at any instruction is done completely or not at all.

    Rows, history and positions change together, whether Ctrl-C or an error of a call ended it.
    """

    def started() -> Sampler:
        params = PARAMS if kind == "penalties" else [SamplingParams(seed=seed) for seed in (1, 2)]
        sampler = Sampler(params, vocab_size=VOCAB_SIZE)
        if kind == "a callback":
            sampler.set_allowed_mask(lambda step: [[row.id, 40 + row.id] for row in step.rows])
        for step in range(3):
            sampler(LOGITS[2 * step : 2 * step + 2])
        return sampler

    def drawn(sampler: Sampler) -> list[object]:
        """Return the state of each row and the tokens that it draws next."""
        history = sampler.history
        slots = None if history is None else history.slots.long()
        before = [] if history is None else [history.counts[slots].tolist()]
        more = [sampler(LOGITS[10 * n :][: sampler.rows]).tokens.tolist() for n in range(2)]
        after = [] if history is None else [history.lengths[slots].tolist()]
        return [*before, *more, *after, sampler.positions.tolist()]

    change_rows = CHANGES[change]
    without, with_it = started(), started()
    change_rows(with_it)
    outcomes = [drawn(without), drawn(with_it)]
    assert outcomes[0] != outcomes[1]
    wrong, reached = {}, set()
    for instruction in itertools.count(1):
        sampler = started()
        interrupt = Interrupt(instruction, only_after_calls=True)
        place = interrupted_at(interrupt, functools.partial(change_rows, sampler))
        if not place:
            break
        try:
            reached.add(outcomes.index(drawn(sampler)))
        except Exception as error:
            wrong[place] = repr(error)
    assert wrong == {}
    assert 0 in reached


SIGNALS = """
import os, random, signal, sys, threading, time
import torch
from llm_sampling import Sampler, SamplingParams
from llm_sampling.generation import generate

signal.signal(signal.SIGINT, signal.default_int_handler)
PARAMS = [
    SamplingParams(temperature=1.5, repetition_penalty=1.3, seed=1),
    SamplingParams(top_p=0.9, frequency_penalty=0.5, seed=2),
]
LOGITS = torch.randn(97, 97, generator=torch.Generator().manual_seed(0))
times = random.Random(0)
asked, caught = threading.Lock(), threading.Lock()
asked.acquire()
caught.acquire()


def press():
    while True:
        asked.acquire()
        time.sleep(times.uniform(0, 0.003))
        os.kill(os.getpid(), signal.SIGINT)
        while not caught.acquire(timeout=60):  # Python ignores what comes in a destructor
            os.kill(os.getpid(), signal.SIGINT)


def interrupt(work):
    try:
        asked.release()
        while True:
            work()
    except KeyboardInterrupt:
        caught.release()


def logits(position):
    return LOGITS[position % 48 * 2 :][:2]


def everything(sampler):
    history = sampler.history
    return [x.tolist() for x in (sampler.positions, history.seen, history.counts, history.lengths)]


def steps():
    for position in range(int(sampler.positions[0]), 1 << 40):
        sampler(logits(position))


def model(ids, cache):
    return LOGITS[ids[:, -1]]


def texts():
    done = generate(model, [[1, 2], [3, 4]], PARAMS, vocab_size=97, max_new_tokens=12)
    return [text.token_ids for text in done]


threading.Thread(target=press, daemon=True).start()
sampler, alone = (Sampler(PARAMS, vocab_size=97) for _ in range(2))
for _ in range(300):
    interrupt(steps)
    position = int(sampler.positions[0])
    for other in range(int(alone.positions[0]), position):
        alone(logits(other))
    assert everything(sampler) == everything(alone)
    assert torch.equal(sampler(logits(position)).tokens, alone(logits(position)).tokens)
assert position > 300

expected = texts()
for _ in range(100):
    interrupt(texts)
    assert texts() == expected
print("usable")
"""


@pytest.mark.slow
@pytest.mark.skipif(cpu.why_unavailable() is not None, reason="the CPU kernel is not built")
def test_real_signals_at_any_time() -> None:
    """Signals sent by another thread at 400 random moments leave everything usable.

    A Sampler goes on where it was, and generate still gives the right tokens.
    """
    done = subprocess.run(
        [sys.executable, "-c", SIGNALS],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"PYTHONPATH": str(Path(llm_sampling.__file__).parent.parent)},
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "usable\n"), done.stderr


# ---- the command ---------------------------------------------------------------------------------

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
INTERRUPTED = 130
#: Code that makes the terminal on stdin the controlling terminal, so that it can send SIGINT.
ON_A_TERMINAL = "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
COMMAND = ON_A_TERMINAL + "from llm_sampling.tools.cli import main; sys.exit(main())"


class Terminal:
    """A Python program that runs on a pseudo-terminal of its own."""

    def __init__(self, program: str, *argv: str) -> None:
        self._written = b""
        self._ours, self._its = pty.openpty()
        self._flags = termios.tcgetattr(self._its)
        environment = os.environ | {
            "PYTHONPATH": str(Path(llm_sampling.__file__).parent.parent),
            "TERM": "xterm",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", program, *argv],
            stdin=self._its,
            stdout=self._its,
            stderr=self._its,
            start_new_session=True,
            env=environment,
        )

    @property
    def output(self) -> str:
        """The output so far; its last character may still be incomplete."""
        return self._written.decode(errors="replace")

    def _read(self, is_enough: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not is_enough():
            assert time.monotonic() < deadline, self.output
            if select.select([self._ours], [], [], 0.05)[0]:
                self._written += os.read(self._ours, 65536)

    def wait_for(self, pattern: str) -> None:
        """Read until the output matches the pattern."""
        self._read(lambda: re.search(pattern, self.output) is not None)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def exit_code(self) -> int:
        """Wait until the program ends, and return its exit code."""
        self._read(lambda: self._process.poll() is not None)
        return self._process.returncode

    def complaints(self) -> list[str]:
        """Wait for the program's end; return what is wrong with it or with the terminal."""
        code = self.exit_code()
        while select.select([self._ours], [], [], 0)[0]:
            self._written += os.read(self._ours, 65536)
        is_wrong = {
            "exit code": code != INTERRUPTED,
            "traceback": "Traceback" in self.output,
            "cursor": self.output.rfind(HIDE) > self.output.rfind(SHOW),
            "newline": not self.output.endswith("\n"),
            "flags": termios.tcgetattr(self._its) != self._flags,
        }
        return [name for name, wrong in is_wrong.items() if wrong]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ours)
        os.close(self._its)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    """Return a function that starts a program on a terminal; the program ends with the test."""
    made: list[Terminal] = []

    def start(program: str, *argv: str) -> Terminal:
        made.append(Terminal(program, *argv))
        return made[-1]

    yield start
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def model_options(model_path: Path) -> list[str]:
    """Return options that make the command use a tiny byte-level model that only writes "a"."""
    for package in cli.EXTRA_PACKAGES:
        pytest.importorskip(package, reason="needs the extra 'cli'")
    from toy_tokenizers import byte_tokenizer

    (letter,) = byte_tokenizer()("a")["input_ids"]
    return ["--model", str(model_path), "--logit-bias", f"{letter}=100", "--threads", "1"]


def test_ctrl_c_leaves_a_usable_prompt(
    terminal: Callable[..., Terminal], model_options: list[str]
) -> None:
    """Ctrl-C ends the command cleanly wherever it comes.

    It is pressed while the model loads, in a text, in an answer of a chat, and at its prompt.
    """
    endless = [*model_options, "--max-new-tokens", "90000"]
    short = [*model_options, "--max-new-tokens", "3"]
    # The four programs run in parallel, because starting them takes most of the time.
    loading, text, answer, prompt = (
        terminal(COMMAND, *argv)
        for argv in (
            ("generate", "x", *endless),
            ("generate", "x", *endless),
            ("chat", *endless),
            ("chat", *short),
        )
    )
    asks = r"> \S*$"
    loading.wait_for(re.escape(HIDE))
    loading.type("\x03")
    for talk in (answer, prompt):
        talk.wait_for(asks)
        talk.type("hello\n")
    prompt.wait_for(r"aaa\r\n" + r"\S*" + asks)
    for one in (text, answer):
        one.wait_for("aaa")
    for one in (text, answer, prompt):
        one.type("\x03")
    for name, one in {
        "loading": loading,
        "text": text,
        "answer": answer,
        "prompt": prompt,
    }.items():
        assert one.complaints() == [], (name, one.output)
    end_line = r"(^|\n)\d+ tokens in [^\n]*\r\n$"
    for one in (text, answer, prompt):
        assert re.search(end_line, one.output), one.output
    assert "aaa" not in loading.output


#: A library that interrupts the process right before the first call that waits for stdin, which is
#: too late for Python to see it before the call.
INTERRUPTS_A_WAIT = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <sys/select.h>
#include <unistd.h>

static void interrupt_once(void) {
  static int is_done = 0;
  if (!is_done) {
    is_done = 1;
    raise(SIGINT);
    write(1, "waits\\n", 6);
  }
}

ssize_t read(int descriptor, void* bytes, size_t size) {
  ssize_t (*original)(int, void*, size_t) = dlsym(RTLD_NEXT, "read");
  if (descriptor == 0) interrupt_once();
  return original(descriptor, bytes, size);
}

int select(int count, fd_set* in, fd_set* out, fd_set* other, struct timeval* limit) {
  int (*original)(int, fd_set*, fd_set*, fd_set*, struct timeval*) = dlsym(RTLD_NEXT, "select");
  if (FD_ISSET(0, in)) interrupt_once();
  return original(count, in, out, other, limit);
}
"""
READS_A_LINE = """
import sys
from llm_sampling.tools.cli import console
try:
    line = sys.stdin.readline() if sys.argv[1:] else console.read(whole=False)
    print(f"read {line!r}")
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_ctrl_c_right_before_a_line_is_read(
    terminal: Callable[..., Terminal], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Ctrl-C that comes when Python is about to wait for a line is not missed.

    The negative control reads by ``readline``, which sees it only when the line has ended.
    """
    source, library = tmp_path / "interrupts.c", tmp_path / "interrupts.so"
    source.write_text(INTERRUPTS_A_WAIT)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    by_console, by_readline = terminal(READS_A_LINE), terminal(READS_A_LINE, "readline")
    by_console.wait_for("waits\r\n")
    by_console.wait_for("interrupted")
    by_readline.wait_for("waits\r\n")
    time.sleep(0.2)  # for an interrupt that is not missed
    by_readline.type("line\n")
    by_readline.wait_for("(interrupted|read)")
    assert "line\r\n" in by_readline.output.partition("interrupted")[0]


def test_a_command_that_is_started_with_ctrl_c_ignored_keeps_it_ignored(
    terminal: Callable[..., Terminal], model_options: list[str]
) -> None:
    """A command started with SIGINT ignored, as in the background of a script, ignores Ctrl-C."""
    ignored = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    chat = terminal(ignored + COMMAND, "chat", *model_options, "--max-new-tokens", "3")
    asks = r"> \S*$"
    chat.wait_for(asks)
    chat.type("\x03hello\n")
    chat.wait_for(r"aaa\r\n" + r"\S*" + asks)
    chat.type("\x04")
    assert chat.exit_code() == 0, chat.output


def test_what_is_interrupted_here_is_so_where_the_parent_ignores_ctrl_c() -> None:
    """Tests that interrupt this process or a child also pass in a pytest with SIGINT ignored."""
    program = (
        "import signal, sys, pytest; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    chosen = "test_an_interrupted_stream_is_over or test_a_prompt_that_is_not_usable_is_seen"
    options = ["-q", "-x", "-n0", "-p", "no:cacheprovider", __file__, "-k", chosen]
    done = subprocess.run(
        [sys.executable, "-c", program, *options],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"PYTHONPATH": str(Path(llm_sampling.__file__).parent.parent)},
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert f"{1 + len(BROKEN)} passed" in done.stdout


BROKEN = {
    "exit code": "print(); sys.exit(1)",
    "traceback": "print('Traceback'); sys.exit(130)",
    "cursor": f"print({HIDE!r}); sys.exit(130)",
    "newline": "sys.stdout.write('x'); sys.exit(130)",
    "flags": "flags = termios.tcgetattr(0); flags[3] &= ~termios.ECHO\n"
    "    termios.tcsetattr(0, termios.TCSANOW, flags); print(); sys.exit(130)",
}


@pytest.mark.parametrize("complaint", BROKEN)
def test_a_prompt_that_is_not_usable_is_seen(
    complaint: str, terminal: Callable[..., Terminal]
) -> None:
    """Negative controls: each program leaves one thing wrong, and only that is reported."""
    waits = "try:\n    print('ready', flush=True); sys.stdin.read()\n"
    broken = terminal(f"{ON_A_TERMINAL}{waits}except KeyboardInterrupt:\n    {BROKEN[complaint]}\n")
    broken.wait_for("ready")
    broken.type("\x03")
    assert broken.complaints() == [complaint]


@pytest.mark.parametrize("shows", [False, True], ids=["start", "stop"])
def test_an_interrupt_in_the_middle_of_the_status_line(
    shows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt while the status line starts or stops still leaves the cursor visible.

    It comes right after the cursor is hidden, or right before it is shown again.
    """
    console = pytest.importorskip("rich.console", reason="needs the extra 'cli'").Console
    pytest.importorskip("tqdm", reason="needs the extra 'cli'")
    show_cursor = console.show_cursor

    def interrupted(self: Any, show: bool = True) -> bool:
        if show and shows:
            press_ctrl_c()
        done = show_cursor(self, show)
        if not show and not shows:
            press_ctrl_c()
        return bool(done)

    monkeypatch.setattr(console, "show_cursor", interrupted)
    written = io.StringIO()
    handler, threads = signal.getsignal(signal.SIGINT), threading.active_count()
    reports = []
    messages = console(file=written, force_terminal=True)
    with pytest.raises(KeyboardInterrupt), cli.console.progress(messages, "Loading") as report:
        reports.append(report)
    assert written.getvalue().rfind(SHOW) > written.getvalue().rfind(HIDE) >= 0
    assert len(reports) == shows
    assert signal.getsignal(signal.SIGINT) is handler
    deadline = time.monotonic() + 60
    while threading.active_count() > threads:  # wait for the thread that redraws the line
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("place", "argv"),
    [
        ("info.run", ["info"]),
        ("generate.Request.__post_init__", ["generate", "x"]),
        ("chat.Request.__post_init__", ["chat"]),
        ("options._parse_logit_bias", ["generate", "x"]),
        ("running.Running.load", ["chat"]),
    ],
)
def test_an_interrupt_before_the_work_begins(
    place: str,
    argv: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An interrupt before the work begins also exits with 130 and without a traceback.

    It also ends the terminal's line, where the terminal has written ^C.
    """
    for package in cli.EXTRA_PACKAGES:
        pytest.importorskip(package, reason="needs the extra 'cli'")
    monkeypatch.setattr(f"llm_sampling.tools.cli.{place}", lambda *_, **__: press_ctrl_c())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main(argv) == INTERRUPTED
    assert capsys.readouterr() == ("", f"{SHOW}\n")
