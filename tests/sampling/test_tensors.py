"""Can a kernel ever read other memory than a tensor's own?

Every kind of tensor, through every way in, gives the tokens of a plain copy of it, or a ValueError
that names the argument and the kind. The kinds are those that torch has besides dense memory: other
layouts, bits that are resolved when a tensor is read, subclasses, wrappers, tensors without memory,
and whatever a tracer, a dispatch mode or a transform puts around a call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import distribute_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from llm_sampling import (
    BatchParams,
    Sampler,
    SamplingParams,
    TokenHistory,
    filter_logits,
    pack_mask,
    sample,
)
from llm_sampling.results import tensors_of
from llm_sampling.tensors import has_memory

V = 100
PARAMS = SamplingParams(temperature=0.8, top_k=60, logit_bias={3: 4.0}, seed=5)


class Plain(torch.Tensor):
    """A subclass around ordinary memory, as many libraries have one."""


class Negating(torch.Tensor):
    """A subclass whose ``__torch_function__`` returns the negative of what it is asked for."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if not isinstance(result, Tensor):
            return result
        with torch._C.DisableTorchFunctionSubclass():
            return -result if result.is_floating_point() else result


class Wrapper(torch.Tensor):
    """A subclass without memory, whose ``__torch_dispatch__`` runs every op on an inner tensor."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, strides=inner.stride()
        )
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        unwrapped = torch.utils._pytree.tree_map(
            lambda x: x.inner if isinstance(x, Wrapper) else x, (args, kwargs or {})
        )
        return func(*unwrapped[0], **unwrapped[1])


class Refusing(Wrapper):
    """A wrapper that knows no op of ours."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "llm_sampling" in str(func):
            return NotImplemented
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(4, V, generator=torch.Generator().manual_seed(0)) * 3


def negated(x: Tensor) -> Tensor:
    """Return ``x`` as a view of the memory of ``-x``, with the bit that says so."""
    view: Tensor = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg()
    return view


def inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def freed(x: Tensor, nbytes: int) -> Tensor:
    copy = x.clone()
    copy.untyped_storage().resize_(nbytes)
    return copy


def shared(x: Tensor) -> Tensor:
    return x.clone().share_memory_()


#: Kinds of tensors of which a plain copy exists: name -> the tensor with the values of ``x``.
READABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "negated": negated,
    "negated as a whole": lambda x: torch._neg_view(-x),
    "negated and transposed": lambda x: negated(x.t().contiguous()).t(),
    "parameter": torch.nn.Parameter,
    "buffer": lambda x: torch.nn.Buffer(x.clone()),
    "gradient": lambda x: x.clone().requires_grad_(),
    "a result of autograd": lambda x: x.clone().requires_grad_() * 1,
    "subclass": lambda x: x.clone().as_subclass(Plain),  # type: ignore[no-untyped-call]
    "subclass with a function": lambda x: torch.Tensor._make_subclass(Negating, x.clone()),
    "wrapper": Wrapper,
    "inference": inference,
    "copy on write": torch._lazy_clone,
    "shared memory": shared,
    "numpy's memory": lambda x: torch.from_numpy(x.numpy().copy()),
    "every second column": lambda x: torch.stack([x, -x], 2)[:, :, 0],
    "every second row": lambda x: torch.stack([x, -x], 1)[:, 0],
    "transposed": lambda x: x.t().contiguous().t(),
    "unaligned": lambda x: torch.nn.functional.pad(x, (1, 2))[:, 1:-2],
    "flipped": lambda x: x.flip(0).flip(0),
    "a view of bytes": lambda x: x.view(torch.uint8).clone().view(x.dtype),
    "storage larger": lambda x: torch.cat([x, x])[: len(x)],
}

#: Kinds that no kernel can read: name -> the tensor, and what the message says of ``logits``.
REFUSED: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "sparse": (lambda x: x.to_sparse(), "must be a dense tensor, got layout torch.sparse_coo"),
    "csr": (lambda x: x.to_sparse_csr(), "must be a dense tensor, got layout torch.sparse_csr"),
    "bsr": (
        lambda x: x.to_sparse_bsr((2, 2)),
        "must be a dense tensor, got layout torch.sparse_bsr",
    ),
    "mkldnn": (lambda x: x.to_mkldnn(), "must be a dense tensor, got layout torch._mkldnn"),
    "nested": (
        lambda x: torch.nested.nested_tensor([x[0], x[1]]),
        "must be a dense tensor, got a nested",
    ),
    "jagged": (
        lambda x: torch.nested.nested_tensor([x[0], x[1]], layout=torch.jagged),
        "must be a dense tensor, got a nested one",
    ),
    "masked": (
        lambda x: torch.masked.masked_tensor(x, x > 0),
        "must be a plain tensor, or one whose class or transform can run custom ops, "
        "got MaskedTensor",
    ),
    "a wrapper that refuses": (
        Refusing,
        "must be a plain tensor, or one whose class or transform can run custom ops, got Refusing",
    ),
    "uninitialized": (
        lambda x: torch.nn.parameter.UninitializedParameter(),
        "must be initialized, got UninitializedParameter",
    ),
    "freed": (lambda x: freed(x, 0), "must have memory, got a tensor whose storage was freed"),
    "cut": (
        lambda x: freed(x, x.nbytes - 4),
        "must have memory, got a tensor whose storage was freed",
    ),
    "complex": (lambda x: x + 0j, "must be float32, float16 or bfloat16, got torch.complex64"),
    "quantized": (
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        "must be float32, float16 or bfloat16, got torch.qint8",
    ),
    "numpy": (lambda x: x.numpy(), "must be a torch.Tensor, got ndarray"),
    "a list": (lambda x: x.tolist(), "must be a torch.Tensor, got list"),
    "None": (lambda x: None, "must be a torch.Tensor, got NoneType"),
}


def prepared(x: Tensor, backend: str) -> Sequence[Tensor]:
    """Take a second step with ``x``, for which the first one has prepared the call."""
    sampler = Sampler([PARAMS] * len(x), vocab_size=V, backend=backend)
    sampler(torch.zeros(x.shape, dtype=x.dtype))
    return tensors_of(sampler(x))


#: The ways in: name -> a call that returns tensors.
WAYS_IN: dict[str, Callable[[Tensor, str], Sequence[Tensor]]] = {
    "sample": lambda x, b: tensors_of(
        sample(x, PARAMS, logprobs="raw", top_logprobs=3, kept="ends", backend=b)
    ),
    "filter_logits": lambda x, b: (filter_logits(x, PARAMS, backend=b),),
    "Sampler": lambda x, b: tensors_of(Sampler([PARAMS] * len(x), vocab_size=V, backend=b)(x)),
    "prepared": prepared,
}


@pytest.mark.parametrize("way", WAYS_IN)
@pytest.mark.parametrize("kind", READABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kind_gives_what_a_plain_copy_gives(
    backend: str, logits: Tensor, kind: str, way: str, dtype: torch.dtype
) -> None:
    if dtype == torch.bfloat16 and kind in ("negated", "negated and transposed", "numpy's memory"):
        pytest.skip("torch has no complex bfloat16, and numpy has no bfloat16")
    plain = logits.to(dtype)
    given_ = READABLE[kind](plain.clone())
    before = plain.clone()
    call = WAYS_IN[way]
    if kind == "wrapper" and way in ("Sampler", "prepared"):
        with pytest.raises(ValueError, match=r"^logits must be a plain tensor outside of tracers"):
            call(given_, backend)
        return
    for expected, got in zip(call(plain, backend), call(given_, backend), strict=True):
        assert type(got) is Tensor
        assert not got.requires_grad
        assert torch.equal(got, expected)
    assert torch.equal(plain, before)


@pytest.mark.parametrize("way", ["sample", "filter_logits", "Sampler"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_kernel_can_read_is_refused_by_name(
    backend: str, logits: Tensor, kind: str, way: str
) -> None:
    make, message = REFUSED[kind]
    if way == "Sampler" and kind in ("masked", "a wrapper that refuses"):
        message = "must be a plain tensor outside of tracers"
    if way == "Sampler":
        sampler = Sampler([PARAMS] * 4, vocab_size=V, backend=backend)
        expected = Sampler([PARAMS] * 4, vocab_size=V, backend=backend)
        for _ in range(2):  # before the first step, and once a step is prepared
            with pytest.raises(ValueError, match=f"^logits {re.escape(message)}"):
                sampler(make(logits))  # type: ignore[arg-type]
            assert torch.equal(sampler(logits).tokens, expected(logits).tokens)
        return
    with pytest.raises(ValueError, match=f"^logits {re.escape(message)}"):
        WAYS_IN[way](make(logits), backend)  # type: ignore[arg-type]


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A device mesh whose only rank is this process."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    dist.destroy_process_group()


@pytest.mark.parametrize("way", WAYS_IN)
def test_a_dtensor_is_refused_by_name(
    backend: str, logits: Tensor, mesh: DeviceMesh, way: str
) -> None:
    given = distribute_tensor(logits, mesh)
    with pytest.raises(ValueError, match=r"^logits must not be a DTensor: sample_sharded takes"):
        WAYS_IN[way](given, backend)


def test_a_zero_tensor_has_no_memory(backend: str) -> None:
    zero = torch._efficientzerotensor((3, V))
    assert zero.data_ptr() == 0
    for call in WAYS_IN.values():
        for expected, got in zip(
            call(torch.zeros(3, V), backend), call(zero, backend), strict=True
        ):
            assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "floats", "is_there"),
    [
        ((2, 3), (3, 1), 0, 6, True),
        ((2, 3), (3, 1), 0, 5, False),
        ((2, 3), (3, 1), 1, 6, False),
        ((2, 3), (3, 1), 1, 7, True),
        ((2, 3), (5, 1), 0, 8, True),
        ((2, 3), (5, 1), 0, 7, False),
        ((4, 3), (0, 1), 2, 5, True),
        ((4, 3), (0, 1), 2, 4, False),
        ((0, 3), (3, 1), 100, 0, True),
        ((2, 0), (1, 1), 100, 0, True),
        ((3, 2), (1, 3), 0, 6, True),
        ((3, 2), (1, 3), 0, 5, False),
    ],
)
def test_how_far_a_storage_reaches(
    shape: tuple[int, int], strides: tuple[int, int], offset: int, floats: int, is_there: bool
) -> None:
    tensor = torch.zeros(200).as_strided(shape, strides, offset)
    tensor.untyped_storage().resize_(4 * floats)
    assert has_memory(tensor) is is_there


# ---- Kinds at random -----------------------------------------------------------------------------

#: Steps that keep the values of a tensor, or change them and its plain copy alike.
STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: make for name, make in READABLE.items() if name not in ("wrapper", "plain")},
    "expanded": lambda x: x[:1].expand(len(x), -1),
    "sliced": lambda x: x[1:] if len(x) > 1 else x,
    "half": lambda x: x.half(),
    "detached": lambda x: x.detach(),
    "contiguous": lambda x: x.contiguous(),
    "zero": lambda x: x * 0,
}


def plain_copy(x: Tensor) -> Tensor:
    """Return the values of a tensor, by way of Python's numbers."""
    with torch._C.DisableTorchFunctionSubclass():
        values = torch.tensor(x.detach().double().tolist(), dtype=torch.float64)
        return values.reshape(x.shape).to(x.dtype)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    steps=st.lists(st.sampled_from(sorted(STEPS)), max_size=4),
    way=st.sampled_from(sorted(WAYS_IN)),
    rows=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
@pytest.mark.parametrize("backend_", ["cpu", "torch"])
def test_kinds_of_kinds(backend_: str, steps: list[str], way: str, rows: int, seed: int) -> None:
    """A tensor made by several steps gives what the reference gives for its values."""
    x = torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 3
    for step in steps:
        try:
            x = STEPS[step](x)
        except (RuntimeError, TypeError):  # torch has no such kind, as of complex half precision
            return
    if x.dtype not in (torch.float32, torch.float16):
        return
    values = plain_copy(x)
    for expected, got in zip(WAYS_IN[way](values, "torch"), WAYS_IN[way](x, backend_), strict=True):
        torch.testing.assert_close(
            got, expected, rtol=0, atol=1e-5 if got.is_floating_point() else 0
        )


# ---- Masks, positions, parameters and histories --------------------------------------------------


def test_masks_and_positions_of_every_kind(backend: str, logits: Tensor) -> None:
    """An int32 or int64 tensor may be a view, a subclass or of inference mode as well."""
    mask = torch.randint(-(2**31), 2**31, (4, 4), generator=torch.Generator().manual_seed(1)).int()
    positions = torch.tensor([5, 0, 7, 2**40])
    expected = sample(logits, PARAMS, allowed_mask=mask, positions=positions, backend=backend)
    for kind in ("subclass", "inference", "every second column", "transposed", "unaligned"):
        got = sample(
            logits,
            PARAMS,
            allowed_mask=READABLE[kind](mask),
            positions=READABLE["subclass" if kind == "transposed" else "inference"](positions),
            backend=backend,
        )
        assert torch.equal(got.tokens, expected.tokens), kind
    for bad in (mask.to_sparse(), freed(mask, 4)):
        with pytest.raises(ValueError, match=r"^allowed_mask must (be a dense tensor|have memory)"):
            sample(logits, PARAMS, allowed_mask=bad, backend=backend)
    for bad in (positions.to_sparse(), freed(positions, 4)):
        with pytest.raises(ValueError, match=r"^positions must (be a dense tensor|have memory)"):
            sample(logits, PARAMS, positions=bad, backend=backend)


@pytest.mark.parametrize("name", ["seen", "counts", "lengths", "slots"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x.to_sparse(), "must be a dense tensor, got layout torch.sparse_coo"),
        (lambda x: freed(x, 4), "must have memory, got a tensor whose storage was freed"),
        (lambda x: x.as_subclass(Plain), "must be a plain torch.Tensor, got Plain"),
        (lambda x: torch._neg_view(x), "must be a plain torch.Tensor, got Tensor"),
        (lambda x: x.tolist(), "must be a torch.Tensor, got list"),
    ],
    ids=["sparse", "freed", "subclass", "negated", "list"],
)
def test_a_history_is_made_of_plain_tensors(
    name: str, make: Callable[[Tensor], object], message: str
) -> None:
    """A kernel writes into them, so that a resolved copy would lose what is written."""
    history = TokenHistory.from_ids([[1], [2]], [[3], [4]], V)
    parts = {part: getattr(history, part) for part in ("seen", "counts", "lengths", "slots")}
    with pytest.raises(ValueError, match=f"^{name} {re.escape(message)}"):
        TokenHistory(**{**parts, name: make(parts[name])}, vocab_size=V)


# ---- Whatever watches a call ---------------------------------------------------------------------


class Recording(TorchDispatchMode):
    """A dispatch mode that notes which ops it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_one_op(backend: str, logits: Tensor) -> None:
    batch = BatchParams.repeat(PARAMS, 4)
    for name, call in (
        ("sample", lambda: sample(logits, batch, positions=[0] * 4, backend=backend).tokens),
        ("filter_logits", lambda: filter_logits(logits, batch, backend=backend)),
    ):
        expected = call()
        with Recording() as mode:
            got = call()
        assert torch.equal(got, expected)
        assert sum(f"llm_sampling.{name}" in op for op in mode.seen) == 1


def test_a_sampler_says_that_it_is_not_for_tracers(backend: str, logits: Tensor) -> None:
    sampler = Sampler([PARAMS] * 4, vocab_size=V, backend=backend)
    sampler(logits)
    before = sampler.positions
    message = r"^logits must be a plain tensor outside of tracers, modes and transforms"
    with pytest.raises(ValueError, match=message), Recording():
        sampler(logits)
    for trace in (
        lambda: make_fx(lambda x: sampler(x).tokens)(logits),
        lambda: torch.jit.trace(lambda x: sampler(x).tokens, logits),
        lambda: torch.vmap(lambda x: sampler(x).tokens)(logits[None]),
        lambda: torch.func.functionalize(lambda x: sampler(x).tokens)(logits),
    ):
        with pytest.raises(ValueError, match=message):
            trace()
    assert torch.equal(sampler.positions, before)


def test_a_traced_function_samples_anew(backend: str, logits: Tensor) -> None:
    """``torch.jit.trace`` does not see what is written through an address."""
    for params in (SamplingParams(temperature=0), PARAMS):
        traced = torch.jit.trace(lambda x, p=params: sample(x, p, backend=backend).tokens, logits)
        for scale in (1.0, -1.0, 0.3):
            expected = sample(logits * scale, params, backend=backend).tokens
            assert torch.equal(traced(logits * scale), expected)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(backend: str, logits: Tensor, mode: str) -> None:
    graph = make_fx(lambda x: sample(x, PARAMS, backend=backend).tokens, tracing_mode=mode)(logits)
    assert "llm_sampling.sample" in graph.code
    other = torch.cat([logits, -logits]) if mode == "symbolic" else -logits
    assert torch.equal(graph(other), sample(other, PARAMS, backend=backend).tokens)


@pytest.mark.parametrize("is_inside", [True, False])
def test_fake_tensors(backend: str, logits: Tensor, is_inside: bool) -> None:
    mode = FakeTensorMode()
    fake = mode.from_tensor(logits)

    def call() -> Any:
        return sample(fake, PARAMS, num_samples=3, logprobs="raw", backend=backend)

    if is_inside:
        with mode:
            output = call()
    else:
        output = call()
    assert [type(x).__name__ for x in output[:3]] == ["FakeTensor"] * 3
    assert [tuple(x.shape) for x in output[:3]] == [(4, 3), (4, 3), (4,)]


def test_meta_tensors() -> None:
    output = sample(torch.empty(4, V, device="meta"), PARAMS, logprobs="processed")
    assert [(x.device.type, tuple(x.shape)) for x in output[:3]] == [("meta", (4,))] * 3
    assert filter_logits(torch.empty(4, V, device="meta"), PARAMS).shape == (4, V)


def test_transforms_of_torch_func(backend: str, logits: Tensor) -> None:
    def tokens(x: Tensor) -> Tensor:
        return sample(x, PARAMS, backend=backend).tokens

    batches = torch.stack([logits, -logits, logits.flip(1)])
    expected = torch.stack([tokens(x) for x in batches])
    assert torch.equal(torch.vmap(tokens)(batches), expected)
    assert torch.equal(torch.func.functionalize(tokens)(logits), tokens(logits))

    def loss(x: Tensor) -> Tensor:
        return (x.log_softmax(-1).gather(1, tokens(x)[:, None])).sum()

    plain = logits.clone().requires_grad_()
    chosen = tokens(logits)[:, None]
    plain.log_softmax(-1).gather(1, chosen).sum().backward()
    assert torch.allclose(torch.func.grad(loss)(logits), plain.grad)
    primal, tangent = torch.func.jvp(
        lambda x: filter_logits(x, PARAMS, backend=backend), (logits,), (torch.ones_like(logits),)
    )
    assert torch.equal(primal, filter_logits(logits, PARAMS, backend=backend))
    assert not tangent.any()  # no gradient goes through


def test_nothing_depends_on_defaults_of_torch(backend: str, logits: Tensor) -> None:
    """Every tensor that is made has the device and the dtype that it must have."""

    def everything() -> list[Any]:
        torch.manual_seed(3)
        history = TokenHistory.from_ids([[1], [2], [], [3]], [[4], [5, 5], [], []], V)
        params = [
            SamplingParams(),
            SamplingParams(frequency_penalty=0.3, seed=2),
            SamplingParams(min_p=0.1),
            SamplingParams(top_p=0.9, logit_bias={1: -float("inf")}, seed=4),
        ]
        sampler = Sampler(params, vocab_size=V, history=history, backend=backend)
        seen = [sampler(logits).tokens.tolist()]
        sampler.reorder([1, 0, 3, 2])
        sampler.add(SamplingParams(presence_penalty=0.1), prompt_ids=[7], output_ids=[8])
        seen.append(sampler(torch.cat([logits, logits[:1]])).tokens.tolist())
        sampler.remove([0])
        history.select([0, 1, 2, 3])
        history.append(torch.tensor([1, 2, 3, -1], device="cpu"))
        seen.append(sampler(logits, allowed_mask=[[1, 2], None, [3], [4]]).tokens.tolist())
        mask = pack_mask(np.arange(V) % 2 == 0, V)
        batch = BatchParams.from_list(params[:3:2], positions=[3, 4])
        seen.append(sample(logits[:2], batch, allowed_mask=mask, backend=backend).tokens.tolist())
        seen.append(filter_logits(logits, params[3], backend=backend).tolist())
        seen.append(history.among([0, None, 2]).slots.tolist())
        seen.append(history.part(3, 40).seen.tolist())
        return seen

    expected = everything()
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            assert everything() == expected
    finally:
        torch.set_default_dtype(default)


@pytest.fixture(autouse=True)
def _no_grad_mode_is_left() -> Iterator[None]:
    yield
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
