"""The host half of the CUDA library: which launch it starts on which device.

csrc/cuda/launch.cu is compiled with a runtime that does nothing but describe a device and record
launches, fake_cuda/cuda_runtime.h.
"""

import contextlib
import ctypes
import itertools
import shutil
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from llm_sampling import RequestTable, SamplingParams, TokenHistory
from llm_sampling.backends import c_abi, cuda, native
from llm_sampling.backends.base import make_results
from llm_sampling.calls import make_call

FAKE = Path(__file__).parent / "fake_cuda"
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


class Machine(ctypes.Structure):
    """``fake_cuda::Machine``."""

    _fields_ = tuple(
        (name, ctypes.c_int32)
        for name in ("major", "processors", "shared_bytes", "static_bytes", "ptx_version", "room")
    )


class Launch(NamedTuple):
    blocks: int
    cluster: int
    shared_bytes: int
    kernel: int  # of those of its dtype in fake_cuda/host.cpp


SPLIT, PLAIN_SPLIT = 2, 3
MORE_IN_PLACE, MORE_SPLIT = 4, 6
A100 = {"major": 8, "processors": 108, "shared_bytes": 163 * 1024, "ptx_version": 80}
RTX_4090 = {"major": 8, "processors": 128, "shared_bytes": 99 * 1024, "ptx_version": 80}
H100 = {"major": 9, "processors": 132, "shared_bytes": 227 * 1024, "ptx_version": 90}
THOR = {"major": 11, "processors": 20, "shared_bytes": 227 * 1024, "ptx_version": 90}

NO_KERNEL_IMAGE = 1209
DRAW = SamplingParams(seed=1)
CPU = torch.device("cpu")

#: What the library has found out about a device it keeps, so each test has devices of its own.
DEVICES = itertools.count()


class Host:
    """The library, and one device after another."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.llm_sampling_error.restype = ctypes.c_char_p
        self.library.llm_sampling_cuda_workspace.argtypes = [
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int32,
            ctypes.c_void_p,
        ]
        self._kept: list[object] = []

    def use(self, *, room: int = 0, static_bytes: int = 0, **machine: int) -> None:
        """Go on with a device that nothing has run on."""
        described = Machine(room=room, static_bytes=static_bytes, **machine)
        self.library.fake_cuda_set(ctypes.byref(described))
        self.index = next(DEVICES)
        assert self.index < 64, "the library remembers no more devices"
        self.library.fake_cuda_use_device(self.index)

    def args(
        self,
        rows: int,
        vocab_size: int,
        dtype: torch.dtype = torch.bfloat16,
        params: SamplingParams | RequestTable = DRAW,
        **options: object,
    ) -> c_abi.SampleArgs:
        logits = torch.zeros(1, vocab_size, dtype=dtype).expand(rows, vocab_size)
        call = make_call(logits, params, **({"history": None, "check": False} | options))
        args, output = c_abi.make_args(call), make_results(call)
        c_abi.set_results(args, output)
        self._kept += [call, output]
        return args

    def workspace_bytes(self, args: c_abi.SampleArgs) -> int:
        size = ctypes.c_int64(-1)
        code = self.library.llm_sampling_cuda_workspace(
            args.rows, args.vocab_size, args.dtype, ctypes.byref(size)
        )
        assert code == 0
        return size.value

    def with_workspace(self, args: c_abi.SampleArgs) -> c_abi.SampleArgs:
        size = self.workspace_bytes(args)
        if size > 0:
            memory = torch.zeros(size // 8, dtype=torch.int64)
            self._kept.append(memory)
            args.workspace, args.workspace_bytes = memory.data_ptr(), size
        return args

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self._kept.append(tensor)
        return tensor

    def run(self, args: c_abi.SampleArgs) -> int:
        return self.library.llm_sampling_cuda(ctypes.byref(args), None)

    def launches(self) -> list[Launch]:
        values = (ctypes.c_int32 * 4)()
        found = []
        for number in range(self.library.fake_cuda_launches()):
            self.library.fake_cuda_launch(number, values)
            found.append(Launch(*values))
        return found

    def limits(self) -> tuple[int, int]:
        values = (ctypes.c_int32 * 2)()
        self.library.fake_cuda_limits(values)
        return values[0], values[1]


@pytest.fixture(scope="module")
def library(build_once) -> Path:
    def build(folder: Path) -> None:
        command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
        output = folder / "libfake.so"
        command += ["-pthread", f"-I{FAKE}", "-x", "c++", str(FAKE / "host.cpp"), "-o", str(output)]
        subprocess.run(command, check=True)

    (built,) = build_once("cuda_host", build).iterdir()
    return built


@pytest.fixture
def host(library) -> Host:
    return Host(library)


# Which devices


@pytest.mark.parametrize(
    ("major", "code"), [(7, NO_KERNEL_IMAGE), (8, 0), (9, 0), (11, 0), (13, 0)]
)
def test_a_device_is_usable_from_8_0_on(host, major, code):
    host.use(**{**A100, "major": major})
    assert host.library.llm_sampling_cuda_usable(0) == code


def test_older_code_on_a_new_device_is_launched_without_clusters(host):
    """A library of an old compiler has PTX for 8.0 alone, which knows no clusters."""
    host.use(**{**H100, "ptx_version": 80})
    assert host.run(host.args(1, 128256)) == 0
    assert [launch.cluster for launch in host.launches()] == [1]


@pytest.mark.parametrize("device", [H100, THOR], ids=["9.0", "11.0"])
def test_clusters_are_used_where_the_code_knows_them(host, device):
    host.use(**device)
    assert host.run(host.args(1, 128256)) == 0
    assert host.launches()[0].cluster == 8


# Lists


def args_with_lists(host: Host, rows: int, max_length: int) -> c_abi.SampleArgs:
    """A call with a rule that looks at the history, and memory for its lists."""
    history = TokenHistory.empty(rows, 50, max_length=max_length)
    params = SamplingParams(no_repeat_ngram_size=2, seed=1)
    args = host.args(rows, 50, params=params, history=history)
    assert args.list_capacity == 50
    c_abi.set_lists(args, host.keep(c_abi.list_memory(args, torch.device("cpu"))))
    return args


@pytest.mark.parametrize(
    ("max_length", "staged"), [(1, 65), (4096, 4160), (8128, 8192), (100_000, 8192)]
)
def test_a_block_makes_the_list_of_a_row(host, max_length, staged):
    """The ids that it keeps in shared memory need no higher limit than there is by itself.

    They are made in one launch before that of the sampling kernel.
    """
    host.use(**A100)
    args = args_with_lists(host, 3, max_length)
    assert host.run(args) == 0
    lists, sampling = host.launches()
    assert lists[:3] == (3, 1, 5376 + 4 * staged)
    args.dry_multiplier = None
    assert host.run(args) == 0
    assert [launch[:3] for launch in host.launches()] == [lists[:3], sampling[:3], sampling[:3]]


def test_lists_that_cannot_be_made(host):
    host.use(**A100)
    args = args_with_lists(host, 2, 9)
    for changes, code in (
        ({"list_bits": None}, 4),
        ({"list_before": None}, 4),
        ({"list_counts": None}, 4),
        ({"list_amounts": None}, 4),
        ({"list_capacity": 49}, 2),
        ({"logits": None}, 4),
        ({"rows": 0}, 0),
    ):
        before = {name: getattr(args, name) for name in changes}
        for name, value in changes.items():
            setattr(args, name, value)
        assert host.run(args) == code, changes
        for name, value in before.items():
            setattr(args, name, value)
    assert host.launches() == []


# Shared memory


def test_the_limit_of_shared_memory_is_set_once_for_a_kernel(host):
    host.use(**H100)
    before = host.limits()
    for rows in (1, 64, 256, 1):
        assert host.run(host.args(rows, 128256)) == 0
    after = host.limits()
    assert after[0] - before[0] == after[1] - before[1] == 1
    host.use(**H100)  # another device
    assert host.run(host.args(1, 128256)) == 0
    assert host.limits()[0] == after[0] + 1


def test_what_a_kernel_has_by_itself_counts_too(host):
    host.use(static_bytes=1024, **H100)
    assert host.run(host.args(1, 32000)) == 0


def test_a_device_that_cannot_be_remembered_is_asked_each_time(host):
    host.use(**H100)
    host.library.fake_cuda_use_device(64)
    before = host.limits()[0]
    for _ in range(2):
        assert host.run(host.args(1, 32000)) == 0
    assert host.limits()[0] == before + 2


def test_threads_with_other_shapes_do_not_disturb_each_other(host):
    host.use(**A100)
    index = host.index
    sizes = [(1, 32000), (1, 50000), (256, 1000)]
    args = [host.args(rows, vocab_size) for rows, vocab_size in sizes]
    codes: list[int] = []
    start = threading.Barrier(len(args))

    def hammer(own: c_abi.SampleArgs) -> None:
        host.library.fake_cuda_use_device(index)
        start.wait()
        codes.extend(host.run(own) for _ in range(500))

    threads = [threading.Thread(target=hammer, args=(own,)) for own in args]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0] * 1500
    assert len({launch.shared_bytes for launch in host.launches()}) == 3


# Room for clusters


@pytest.mark.parametrize(("room", "cluster"), [(8, 8), (4, 4), (2, 2), (1, 1)])
def test_a_cluster_is_as_large_as_there_is_room_for(host, room, cluster):
    host.use(room=room, **H100)
    assert host.run(host.args(1, 128256)) == 0
    assert host.launches()[0].cluster == cluster


def test_the_room_for_a_cluster_is_asked_for_once(host):
    host.use(**H100)
    args = host.args(1, 128256)
    for _ in range(5):
        assert host.run(args) == 0
    assert host.library.fake_cuda_occupancy_calls() == 1
    assert host.library.llm_sampling_cuda(ctypes.byref(args), ctypes.c_void_p(1)) == 0
    assert host.library.fake_cuda_occupancy_calls() == 2, "another stream may have other room"


def test_code_with_clusters_splits_no_row(host):
    """Its kernel for split rows is empty, whatever room there is for clusters."""
    host.use(room=1, **H100)
    args = host.args(1, 262144)
    assert host.workspace_bytes(args) == 0
    args.workspace_bytes = 2**20
    args.workspace = host.keep(torch.zeros(2**17, dtype=torch.int64)).data_ptr()
    assert host.run(args) == 0
    (launch,) = host.launches()
    assert (launch.blocks, launch.cluster) == (1, 1)


def test_older_code_on_a_new_device_splits_rows(host):
    host.use(**{**H100, "ptx_version": 80})
    args = host.with_workspace(host.args(1, 262144))
    assert host.run(args) == 0
    (launch,) = host.launches()
    assert (launch.blocks, launch.cluster) == (32, 1)


# Split rows


@pytest.mark.parametrize(
    ("device", "rows", "vocab_size", "blocks"),
    [
        (A100, 1, 128256, 32),
        (RTX_4090, 1, 128256, 32),
        (A100, 8, 128256, 8 * 13),
        (A100, 54, 128256, 54),  # the half of a row does not fit one block
        (A100, 64, 128256, 64),
        (A100, 1, 32000, 1),  # one block has a copy of it
        (RTX_4090, 2, 262144, 64),
        (RTX_4090, 1, 2**20, 1),  # the 32nd part of a row does not fit one block
        (H100, 1, 128256, 8),  # a cluster
    ],
)
def test_few_rows_are_split_over_more_blocks(host, device, rows, vocab_size, blocks):
    host.use(**device)
    args = host.with_workspace(host.args(rows, vocab_size))
    assert host.run(args) == 0
    assert host.launches()[0].blocks == blocks


def test_only_a_plain_call_takes_the_kernel_for_plain_calls(host):
    """That kernel looks at nothing but logits and parameters."""
    host.use(**A100)
    vocab_size = 128256

    def kernel_of(params=DRAW, **options):
        args = host.with_workspace(host.args(1, vocab_size, params=params, **options))
        assert host.run(args) == 0
        return host.launches()[-1].kernel

    assert kernel_of() == PLAIN_SPLIT
    assert kernel_of(SamplingParams(top_k=50, top_p=0.9, min_p=0.1, seed=1)) == PLAIN_SPLIT
    assert kernel_of(SamplingParams(logit_bias={1: 1.0})) == SPLIT
    mask = torch.ones(1, vocab_size, dtype=torch.bool)
    assert kernel_of(allowed_mask=mask) == SPLIT
    assert kernel_of(num_samples=2) == SPLIT
    assert kernel_of(logprobs="processed") == SPLIT
    history = TokenHistory.from_ids([[1]], [[2]], vocab_size)
    assert kernel_of(SamplingParams(presence_penalty=0.5), history=history) == SPLIT
    table = RequestTable(1, vocab_size=vocab_size, backend="torch")
    table.set(0, SamplingParams(seed=1))
    slots = torch.zeros(1, dtype=torch.int32)
    assert kernel_of(table, slots=slots) == SPLIT


def test_a_call_for_more_results_takes_a_kernel_of_its_own(host):
    host.use(**A100)

    def launch_of(**options):
        args = host.with_workspace(host.args(1, 128256, **options))
        assert host.run(args) == 0
        launch = host.launches()[-1]
        return launch.kernel, launch.blocks

    assert launch_of(logprobs="processed", top_logprobs=0) == (MORE_SPLIT, 32)
    assert launch_of(kept="mask") == (MORE_SPLIT, 32)
    assert launch_of(logprobs="processed", logprob_token_ids=[1]) == (MORE_SPLIT, 32)
    # All tokens of the row are looked at once more.
    assert launch_of(logprobs="raw", top_logprobs=2) == (MORE_IN_PLACE, 1)
    assert launch_of(logprobs=("processed", "raw"), kept="ids") == (MORE_IN_PLACE, 1)


def test_without_a_workspace_no_row_is_split(host):
    host.use(**A100)
    args = host.args(1, 128256)
    assert host.workspace_bytes(args) > 0
    assert host.run(args) == 0
    assert host.launches()[0].blocks == 1


def test_a_workspace_that_is_too_small_is_refused(host):
    host.use(**A100)
    args = host.with_workspace(host.args(1, 128256))
    args.workspace_bytes -= 8
    assert host.run(args) == 2
    assert host.launches() == []


def test_raw_logprobs_and_filtered_logits_are_not_split(host):
    host.use(**A100)
    args = host.with_workspace(host.args(1, 128256, logprobs="raw"))
    assert host.run(args) == 0
    args = host.with_workspace(host.args(1, 128256))
    filtered = torch.empty(1, 128256)
    args.filtered, args.filtered_stride = filtered.data_ptr(), 128256
    assert host.run(args) == 0
    assert [launch.blocks for launch in host.launches()] == [1, 1]


@pytest.mark.parametrize(
    ("rows", "vocab_size", "dtype", "code"),
    [(-1, 100, 0, 2), (1, 0, 0, 2), (1, 2**20 + 1, 0, 2), (1, 100, 3, 3), (0, 100, 0, 0)],
)
def test_a_workspace_is_asked_for_with_valid_numbers(host, rows, vocab_size, dtype, code):
    host.use(**A100)
    size = ctypes.c_int64(-1)
    function = host.library.llm_sampling_cuda_workspace
    assert function(rows, vocab_size, dtype, ctypes.byref(size)) == code
    assert size.value == 0
    assert function(1, 100, 0, None) == 4


# Python's half, on tensors of the CPU: the fake runtime reads no memory


@pytest.fixture
def as_backend(host, library, monkeypatch):
    """The backend's module, with this library, on the device that ``host`` uses."""
    loaded = native.Library("cuda", ctypes.c_void_p)
    loaded.path = library
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(cuda, "LIBRARY", loaded)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    made = []
    make = cuda._make_workspace

    def record(args, device):
        made.append(make(args, device))
        return made[-1]

    monkeypatch.setattr(cuda, "_make_workspace", record)
    return SimpleNamespace(module=cuda, stream=stream, made=made)


def call_of(rows, vocab_size=128256, **options):
    logits = torch.zeros(1, vocab_size, dtype=torch.bfloat16).expand(rows, vocab_size)
    return make_call(logits, SamplingParams(seed=1), history=None, check=False, **options)


def test_a_prepared_call_keeps_its_workspaces(host, as_backend):
    """A captured graph may have the address of each."""
    host.use(**A100)
    table = RequestTable(8, vocab_size=128256, backend="torch")
    for slot in range(8):
        table.set(slot, SamplingParams(seed=slot))
    logits = torch.zeros(8, 128256, dtype=torch.bfloat16)
    slots = torch.arange(8, dtype=torch.int32)
    call = make_call(logits, table, history=None, check=False, slots=slots)
    step = as_backend.module.prepare(call)
    for rows in (8, 1, 8, 1, 64):
        step(logits[:1].expand(rows, -1), None, torch.zeros(rows, dtype=torch.int32))
    assert [launch.blocks for launch in host.launches()] == [8 * 13, 32, 8 * 13, 32, 64]
    eight, one, many = as_backend.made
    assert many is None
    assert not eight[:8].any()
    assert not one[:1].any()
    assert eight.data_ptr() != one.data_ptr()
    as_backend.stream.cuda_stream = 1
    step(logits[:1], None, torch.zeros(1, dtype=torch.int32))
    assert len(as_backend.made) == 4, "another stream may run at the same time"


def test_a_single_call_has_a_workspace_of_its_own(host, as_backend):
    host.use(**A100)
    for _ in range(2):
        as_backend.module.sample(call_of(1))
    assert len(as_backend.made) == 2
    assert [launch.blocks for launch in host.launches()] == [32, 32]


def test_what_cannot_be_split_gets_no_workspace(host, as_backend):
    host.use(**A100)
    as_backend.module.sample(call_of(1, logprobs="raw"))
    as_backend.module.filter_logits(call_of(1))
    assert as_backend.made == [None, None]


@pytest.mark.parametrize(
    ("device", "shapes"),
    [
        # blocks, copied, split
        (A100, {(1, 1, 0), (1, 0, 0), (32, 1, 1), (27, 1, 1), (4, 1, 1)}),
        (H100, {(1, 1, 0), (1, 0, 0), (2, 1, 0), (4, 1, 0), (8, 1, 0), (8, 0, 0), (2, 0, 0)}),
    ],
    ids=["A100", "H100"],
)
def test_known_rows_take_every_kind_of_launch(host, as_backend, device, shapes):
    host.use(**device)
    found = set()
    shape = (ctypes.c_int32 * 3)()
    for size in as_backend.module.known_sizes(CPU):
        of_size = ctypes.c_int64(size.rows), ctypes.c_int64(size.vocab_size)
        code = c_abi.DTYPES[size.dtype]
        assert host.library.llm_sampling_cuda_shape(*of_size, code, shape) == 0
        found.add(tuple(shape))
    assert found >= shapes, found
    assert {kind[1:] for kind in found} == {kind[1:] for kind in shapes}
