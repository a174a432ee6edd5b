"""The set-up that all tests share: parallel processes, markers, and fixtures."""

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

# These files need Triton's interpreter, which a process uses for all of its kernels or for none.
# test_triton.py starts a pytest process that uses it.
NEED_INTERPRETER = [
    "kernels/test_triton_interpreted.py",
    "kernels/test_triton_known_rows.py",
    "kernels/test_triton_results.py",
    "kernels/test_triton_rules.py",
    "kernels/test_triton_split.py",
]
collect_ignore = [] if INTERPRETED else NEED_INTERPRETER

#: The largest number of parallel pytest processes. More would need much more memory and save
#: little time.
MOST_PROCESSES = 8


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Use one process per core for whole folders, if pytest-xdist is installed and -n not given.

    A run of named files or tests stays in one process. So does a run with a debugger or with
    uncaptured output, and a run of the tests marked gpu, vllm, sglang or large: parallel processes
    would compete for the GPU or the memory.
    """
    option = config.option
    if hasattr(config, "workerinput"):
        # pytest-benchmark warns in a worker unless it is disabled, as in the main process.
        option.benchmark_disable = True
    elif getattr(option, "numprocesses", 0) is None:  # xdist is installed and -n is not given
        wants_one = option.usepdb or option.trace or option.capture == "no"
        wants_one |= re.search(r"(?<!not )(gpu|vllm|sglang|large)", option.markexpr) is not None
        if not wants_one and all(Path(arg).is_dir() for arg in config.args):
            option.numprocesses = min(MOST_PROCESSES, len(os.sched_getaffinity(0)))
            # With worksteal a worker runs neighbouring tests, which share module fixtures.
            option.dist = "worksteal"
            option.benchmark_disable = True


def pytest_configure(config):
    """Give each parallel worker one thread; with more, they would mostly wait for each other."""
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the tests that only run with -m sweep or -m slow, and put the longest tests first.

    The longest ones start a process that runs for minutes, and at the end of a run no other test
    would be left for the second worker.
    """
    selection.mark(items)
    items.sort(key=lambda item: item.originalname != "test_everything_in_the_interpreter")


if INTERPRETED:
    import interpreter

    interpreter.save_time()


@pytest.fixture(params=ON_THE_CPU)
def backend(request):
    """Return the name of each backend in turn; skip with the reason where it is unavailable.

    By default these are the backends that run on the CPU. A test that also wants those that need
    a GPU parametrises this fixture with cases.EVERY_BACKEND.
    """
    device = torch.device(device_of(request.param))
    reason = BACKENDS[request.param].why_unavailable(device)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fill uninitialised memory with NaN or the largest integer, also if C++ allocates it.

    A kernel that reads memory that it has not written then gives a wrong result in every run.
    torch fills the memory when deterministic algorithms are requested; no other effect of that
    mode is needed here.
    """
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warned)


@pytest.fixture(autouse=True)
def sigint_is_not_ignored():
    """Make SIGINT raise KeyboardInterrupt in a test and end the processes that the test starts.

    If pytest was started with SIGINT ignored, as a background job of a script is, Python installs
    no handler for it and child processes inherit that.
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
    """Return a function that builds something in a folder once for all parallel processes.

    It takes the folder's name and a function that builds, and returns the finished folder. Runs of
    pytest with the same folder in LLM_SAMPLING_TEST_BUILDS share what they build: it must be new
    whenever a source has changed.
    """
    root = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        root = root.parent  # the folder that all workers share
    root = Path(os.environ.get("LLM_SAMPLING_TEST_BUILDS", root))

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
    """Return a function that makes a small random Hugging Face model of a vocabulary size."""
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
    """Return the Hugging Face directory of a tiny random byte-level model with a chat template."""
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
    """Return the default model of the command line, loaded once because that takes seconds."""
    pytest.importorskip("transformers", reason="needs the extra 'cli'")
    pytest.importorskip("gguf", reason="needs the extra 'cli'")
    try:
        path = models.default_model_path()
    except models.NotInstalledError as error:
        pytest.skip(str(error))
    return models.load(path, lambda stage: None)
