"""What every test shares: processes, markers, and fixtures."""

import fcntl
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import selection
import torch
from cases import INTERPRETED, ON_THE_CPU, device_of

from llm_sampling.backends import BACKENDS
from llm_sampling.generation import models

pytest.register_assert_rewrite("parity")

# It needs Triton's interpreter, which a process has for all of its kernels or for none:
# test_triton.py starts that process.
collect_ignore = [] if INTERPRETED else ["kernels/test_triton_interpreted.py"]

#: More of them take more memory than time is gained.
MOST_PROCESSES = 8


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Run whole folders in a process per core where pytest-xdist is installed and -n is not given.

    One process runs a file or a test that is named, and everything with a debugger, with output
    that is not captured, on a GPU, in vLLM's engine, and where a test takes most of the memory.
    """
    option = config.option
    if hasattr(config, "workerinput"):
        option.benchmark_disable = True  # as it is here; pytest-benchmark would warn
    elif getattr(option, "numprocesses", 0) is None:  # there is xdist, and no -n
        wants_one = option.usepdb or option.trace or option.capture == "no"
        wants_one |= re.search(r"(?<!not )(gpu|vllm|large)", option.markexpr) is not None
        if not wants_one and all(Path(arg).is_dir() for arg in config.args):
            option.numprocesses = min(MOST_PROCESSES, len(os.sched_getaffinity(0)))
            # a worker has tests that follow each other, which share what they build
            option.dist = "worksteal"
            option.benchmark_disable = True


def pytest_configure(config):
    """Processes side by side have a thread each: more wait for each other for most of the time."""
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark what the default run leaves to -m sweep, and the interpreter to -m slow."""
    selection.mark(items)


def _patch_less_often():
    """The interpreter patches triton.language at every call of a function: do it once a launch."""
    from triton.runtime import interpreter

    patched = set()
    launch = interpreter.GridExecutor.__call__

    def launch_anew(self, *args, **kwargs):
        patched.clear()  # the interpreter takes its patches back when a launch ends
        return launch(self, *args, **kwargs)

    def call(self, *args, **kwargs):
        module = id(self.fn.__globals__)
        if module not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = launch_anew
    interpreter.InterpretedFunction.__call__ = call


if INTERPRETED:
    _patch_less_often()


@pytest.fixture(params=ON_THE_CPU)
def backend(request):
    """The name of each backend in turn, skipped with the reason where it cannot run.

    Those that run on the CPU only, unless a test asks for others: see cases.EVERY_BACKEND.
    """
    device = torch.device(device_of(request.param))
    reason = BACKENDS[request.param].why_unavailable(device)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Every allocation without a value holds NaN or the largest integer, also those made in C++.

    torch does so where deterministic algorithms are asked for; nothing else of that mode matters.
    """
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def sigint_is_not_ignored():
    """SIGINT raises KeyboardInterrupt in a test and ends the processes that it starts.

    A process that ignores the signal, as under nohup or in the background of a script, hands that
    on to its children, and a Python that is started so installs no handler of its own.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def build_once(request, tmp_path_factory):
    """A function: the folder of this name, which one of the processes of the run has built in."""
    root = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        root = root.parent  # that of all workers

    def build(name, build_in):
        folder, unfinished = root / name, root / f"{name}.unfinished"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                build_in(unfinished)
                unfinished.rename(folder)
        return folder

    return build


@pytest.fixture(scope="session")
def tiny_llama():
    """A function: a small random Hugging Face model of this vocabulary."""
    transformers = pytest.importorskip("transformers", reason="needs the extra 'cli'")

    def make(vocab_size, **options):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            # Large weights, so that the next token depends on the whole prefix.
            initializer_range=0.5,
            **options,
        )
        return transformers.LlamaForCausalLM(config).eval()

    return make


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    """A tiny random model over bytes with a chat template, as a Hugging Face directory."""
    transformers = pytest.importorskip("transformers", reason="needs the extra 'cli'")
    from toy_tokenizers import byte_tokenizer

    path = tmp_path_factory.mktemp("tiny")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=100_000,
        initializer_range=0.5,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def smollm():
    """The default model, loaded once: that takes seconds."""
    pytest.importorskip("transformers", reason="needs the extra 'cli'")
    pytest.importorskip("gguf", reason="needs the extra 'cli'")
    try:
        path = models.default_model_path()
    except models.NotInstalledError as error:
        pytest.skip(str(error))
    return models.load(path, lambda stage: None)
