"""What every test shares: processes, what the default run leaves to -m sweep, and fixtures."""

import fcntl
import os
import re
import signal
from pathlib import Path

import pytest
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

    One process runs a file or a test that is named, and all where there is a debugger, output that
    is not captured, a GPU or vLLM's engine.
    """
    option = config.option
    is_worker = hasattr(config, "workerinput")
    if is_worker or not hasattr(option, "numprocesses") or option.numprocesses is not None:
        return
    wants_one = option.usepdb or option.trace or option.capture == "no"
    wants_one |= re.search(r"(?<!not )(gpu|vllm)", option.markexpr) is not None
    if not wants_one and all(Path(arg).is_dir() for arg in config.args):
        option.numprocesses = min(MOST_PROCESSES, len(os.sched_getaffinity(0)))
        # neighbouring tests share what they build, so that they stay in one process
        option.dist = "worksteal"
        option.benchmark_disable = True  # or pytest-benchmark warns that it is


def pytest_configure(config):
    """Processes side by side have a thread each: more wait for each other for most of the time."""
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


# What the default run leaves to -m sweep


class Some:
    """Which cases of a test the default run has: those of some values, one in so many of them.

    With a number that has no factor in common with the lengths of the lists of values, every value
    still occurs, if not with each of the others.
    """

    def __init__(self, one_in=1, **values):
        self.one_in, self.values = one_in, values
        self.found = 0

    def has_next(self, params):
        """Whether this case, the next in the order of the file, is one of them."""
        if any(params[name] not in values for name, values in self.values.items()):
            return False
        self.found += 1
        return self.found % self.one_in == 1 % self.one_in


#: By file and function. A test that repeats itself over more than a second has a row here.
SOME = {
    "test_cuda_emulated.py::test_covering_cases": Some(4),
    "test_cuda_emulated.py::test_every_launch": Some(5),
    "test_cuda_emulated.py::test_layouts": Some(2),
    "test_cuda_emulated.py::test_orders_of_threads": Some(4),
    "test_cuda_emulated.py::test_what_is_not_waited_for_is_seen": Some(3),
    "test_triton_compile.py::test_every_kind_of_call_compiles": Some(3),
    "test_triton_compile.py::test_no_rule_is_broken_on_sm_90": Some(3),
    "test_triton_compile.py::test_no_rule_is_broken_elsewhere": Some(arch=("sm_100",)),
    "test_triton_compile.py::"
    "test_an_odd_vocabulary_in_aligned_rows_is_loaded_16_bytes_at_a_time": Some(3),
    "test_cpu_paths.py::test_best_tokens_that_are_penalised": Some(3),
    "test_parity.py::test_every_case": Some(4),
    "test_parity.py::test_covering_cases": Some(4),
    "test_parity.py::test_raw_logprobs": Some(4),
    "test_parity.py::test_layouts": Some(5),
    "test_parity.py::test_expanded_rows": Some(4),
    "test_parity.py::test_largest_vocabulary": Some(3),
    "test_distributed.py::test_every_row_with_every_mix": Some(ranks=(1, 3)),
    "test_distributed.py::test_every_vocabulary": Some(ranks=(1, 3)),
    "test_distributed.py::test_large_vocabularies": Some(ranks=(1, 3)),
    "test_distribution.py::test_frequencies_are_the_softmax": Some(3),
    "test_golden.py::test_every_build_gives_them": Some(5),
    "test_differential.py::test_a_broken_backend_is_found_and_shown": Some(3),
    "test_benchmarks.py::test_providers_compute_what_they_are_asked_for": Some(4),
    "test_benchmarks.py::test_peers_of_a_gpu_with_functions_that_stand_in_for_theirs": Some(4),
    "test_contract.py::test_code_in_docs_runs": Some(path=("README.md",)),
}
#: The same for a backend in Triton's interpreter, which takes milliseconds for what a kernel does
#: in microseconds.
SOME_INTERPRETED = {
    "test_edges.py::test_extremes_are_those_of_the_reference": Some(7),
    "test_edges.py::test_status_bits": Some(4),
    "test_edges.py::test_filters_beyond_the_row_keep_all": Some(3),
    "test_edges.py::test_results_have_their_dtypes_and_shapes": Some(3),
    "test_edges.py::test_nothing_that_is_given_changes": Some(3),
    "test_parity.py::test_covering_cases": Some(vocab_size=(33,)),
    "test_vectors.py::test_case": Some(11),
    "test_vectors.py::test_all_rows_in_one_batch": Some(vocab_size=(7,)),
    "test_triton_interpreted.py::test_small_tiles": Some(4),
    "test_triton_interpreted.py::test_small_tiles_on_hard_rows": Some(7),
}
#: Whole tests and single cases of more than ten seconds, or with what takes so long to build.
LONG = {
    "test_c_interface.py::test_the_arithmetic_in_cpp",
    "test_cuda_emulated.py::test_reading_beyond_the_row_is_seen[counts]",
    "test_tail.py::test_rare_tokens_are_drawn_as_often_as_they_should_be[tiles]",
    "test_stateful.py::test_a_wrong_one_is_seen"
    "[Decoding-llm_sampling.backends.torch-sample-sample_then_check]",
    "test_benchmarks.py::test_real_logits",
    "test_benchmarks.py::test_the_command_writes_what_it_prints",
    "test_benchmarks.py::test_the_pictures",
    "test_load.py::test_a_million_calls_take_no_more_memory[sampler]",
    "test_supply.py::test_two_builds_are_the_same_bytes[sdists]",
    "test_supply.py::test_two_builds_are_the_same_bytes[wheels]",
    "test_supply.py::test_the_sdist_is_what_git_has",
    "test_supply.py::test_the_wheel_has_the_package_alone",
    "test_supply.py::test_the_wheel_installs_without_an_index_and_draws",
    "test_cli.py::test_a_chat_that_no_longer_fits_ends",
    "test_objectives.py::test_a_real_model_answers_and_repeats_itself",
}
LONG_INTERPRETED = {
    "test_edges.py::test_num_samples_of_many[triton]",
    "test_parity.py::test_raw_logprobs[V32000-bfloat16-triton]",
    "test_vectors.py::test_half_precision[triton-float16]",
    "test_vectors.py::test_half_precision[triton-bfloat16]",
}
#: What the interpreter leaves to -m slow: these tests have a backend's most rows, and by default
#: only these sizes, or sizes with a dtype.
INTERPRETED_SIZES = {
    "test_every_case": (),
    "test_covering_cases": (
        (33, torch.float32),
        (513, torch.bfloat16),
        (1000, torch.float16),
        (128256, torch.float16),
    ),
    "test_all_rows_in_one_batch": (7, 64),
    "test_raw_logprobs": ((32000, torch.bfloat16),),
    "test_layouts": (),
    "test_expanded_rows": (),
    "test_mask_layouts": (),
    "test_masses_to_the_bit": (),
    "test_largest_vocabulary": (),
}


def _is_left_to_slow(item):
    values = item.callspec.params if hasattr(item, "callspec") else {}
    sizes = INTERPRETED_SIZES.get(item.function.__name__)
    size = values.get("vocab_size")
    return sizes is not None and size not in sizes and (size, values.get("dtype")) not in sizes


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark what the default run leaves to others; what another run has already stays there."""
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        is_interpreted = bool({"backend", "triton_alone"} & params.keys()) and bool(
            {params.get("backend"), params.get("triton_alone")} & set(INTERPRETED)
        )
        if is_interpreted and _is_left_to_slow(item):
            item.add_marker(pytest.mark.slow)
        if any(item.get_closest_marker(name) for name in ("slow", "large", "gpu", "vllm")):
            continue
        function = f"{item.path.name}::{item.originalname}"
        some = (SOME_INTERPRETED if is_interpreted else SOME).get(function)
        long = LONG_INTERPRETED if is_interpreted else LONG
        if (some and not some.has_next(params)) or f"{item.path.name}::{item.name}" in long:
            item.add_marker(pytest.mark.sweep)


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
