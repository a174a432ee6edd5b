"""Rows that are split over blocks without a cluster, csrc/cuda/split.cuh, in the emulation.

test_cuda_emulated.py compares them with the reference over all kinds of calls. Here are the rows
that they are for, which the last block must finish from the lists of all blocks.
"""

import hashlib
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from llm_sampling import SamplingParams, TokenHistory, sample

sys.path.append(str(Path(__file__).parent / "cuda_emulation"))
import backend as emulation

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")

#: What a block does that must sample its row alone, and a token that tells of it.
ALONE = "  RowSampler<kDtype, Layout::kInPlace, kMore> alone(args, plan.whole_vecs, row);\n"
ALONE += "  alone.run(std::bool_constant<kMore>());\n"
TOLD = "  if (threadIdx.x == 0) plan.args.tokens[int64_t{row} * plan.args.num_samples] = -7;\n"
#: Of rows that are finished from lists. The best tokens of the last one are equal, and all in one
#: part.
FINISHED = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.0, frequency_penalty=0.7, repetition_penalty=1.3),
    SamplingParams(top_k=50, seed=1),
    SamplingParams(top_k=50, top_p=0.9, temperature=0.8, seed=2),
    SamplingParams(top_k=1, seed=3),
    SamplingParams(top_k=192, top_p=0.95, seed=4),
    SamplingParams(top_k=20, min_p=0.05, presence_penalty=0.4, seed=5),
    SamplingParams(min_p=0.1, seed=6),
    SamplingParams(min_p=0.2, min_tokens_to_keep=40, temperature=1.3, seed=7),
    SamplingParams(top_k=50, top_p=0.2, min_tokens_to_keep=9, logit_bias={5: 3.0}, seed=8),
    SamplingParams(top_k=50, top_p=0.97, temperature=1.5, seed=9),
]
#: With the last one, a row that needs one block alone: it keeps more tokens of a part than a list.
ONE_ALONE = [*FINISHED[:-1], SamplingParams(min_p=0.3, seed=10)]


def make_rows(vocab_size=6007):
    """Return logits like a model's, a history and a mask, of a row for each of FINISHED."""
    generator = torch.Generator().manual_seed(3)
    rows = len(FINISHED)
    falling = 4 - 1.6 * torch.arange(1, vocab_size + 1).log()
    logits = falling + 0.7 * torch.randn(rows, vocab_size, generator=generator)
    logits = logits[:, torch.randperm(vocab_size, generator=generator)]
    logits[-1, 1000:1150] = 6
    best = logits.topk(40).indices
    history = TokenHistory.from_ids(best[:, ::3].tolist(), best[:, ::2].tolist(), vocab_size)
    mask = torch.rand(rows, vocab_size, generator=generator) < 0.9
    return logits, history, mask


def needs_nothing_else(row):
    """Whether the row may be in a plain call, for which there is a kernel of its own."""
    penalties = row.repetition_penalty, row.frequency_penalty, row.presence_penalty
    return penalties == (1, 0, 0) and not row.logit_bias


def draw(backend, params, is_plain):
    logits, history, mask = make_rows()
    options = {
        "history": history,
        "allowed_mask": mask,
        "num_samples": 8,
        "logprobs": "processed",
    }
    if is_plain:
        logits = logits[[needs_nothing_else(row) for row in params]]
        params, options = [row for row in params if needs_nothing_else(row)], {}
    output = sample(logits, params, backend=backend, check=False, **options)
    return torch.cat([output.tokens.view(len(params), -1), output.status[:, None]], dim=1)


def wrong_rows(name, params, is_plain=False):
    """The rows of five launches, with other orders of threads each, that are not right."""
    wanted = draw("torch", params, is_plain)
    found = [(draw(name, params, is_plain) != wanted).any(1) for _ in range(5)]
    return torch.stack(found).any(0).nonzero().flatten().tolist()


@pytest.fixture
def build_planted(build_once):
    """A function that builds the library with a text replaced, once for all tests that want it."""

    def build_planted(text, wrong):
        name = hashlib.sha256(repr((text, wrong)).encode()).hexdigest()[:16]
        folder = build_once(
            f"cuda_split_{name}",
            lambda folder: emulation.build(folder, emulation.BRIEF, (text, wrong), True),
        )
        (library,) = folder.glob("*.so")
        return library

    return build_planted


@needs_gxx
@pytest.mark.parametrize("is_plain", [False, True])
@pytest.mark.parametrize("parts", [2, 7, 8])
def test_no_block_samples_such_a_row_alone(monkeypatch, build_planted, parts, is_plain):
    library = build_planted(ALONE, TOLD)
    name = emulation.install(monkeypatch, library, emulation.Launch(parts, True, True))
    assert wrong_rows(name, FINISHED, is_plain) == []


@needs_gxx
@pytest.mark.parametrize("is_plain", [False, True])
def test_a_list_is_guessed_right(monkeypatch, build_planted, is_plain):
    """The last row alone needs more than the guess: too many of its tokens are equal.

    The best tokens of the others have logits on both sides of 0.
    """
    text = "    range.low =\n        narrow(kLowestCode"
    library = build_planted(text, "    return kNoCode;\n" + text)
    name = emulation.install(monkeypatch, library, emulation.Launch(2, True, True))
    assert wrong_rows(name, FINISHED, is_plain) == [(8 if is_plain else len(FINISHED)) - 1]


@needs_gxx
def test_no_such_row_of_a_cluster_is_searched(monkeypatch, build_planted):
    """The guess is the same there. The control is a row whose kept set is long."""
    text = "        range = search("
    library = build_planted(text, "        return;\n" + text)
    name = emulation.install(monkeypatch, library, emulation.Launch(4, True))
    assert wrong_rows(name, FINISHED) == []
    flat = SamplingParams(top_p=0.9, temperature=9.0, seed=1)
    assert wrong_rows(name, [flat, *FINISHED[1:]]) == [0]


def assert_right(name):
    assert wrong_rows(name, FINISHED) == [], "the tokens are wrong"
    assert wrong_rows(name, ONE_ALONE) == [], "the tokens are wrong"


@needs_gxx
@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("  if (lane < lists.parts) {", "  if (lane < lists.parts && lane != 1) {"),
        ("= lists.parts * lists.listed / 2;", "= 7 * lists.listed / 2;"),
        ("    if (shared_.is_last) *counter = 0;\n", ""),
        ("? bound : kLowestCode;", "? kLowestCode : kLowestCode;"),
        (" == static_cast<uint32_t>(parts) - 1;", " == static_cast<uint32_t>(parts) - 2;"),
    ],
    ids=["maximum", "list", "counter", "bound", "last"],
)
def test_what_is_wrong_is_seen(monkeypatch, build_planted, text, wrong):
    library = build_planted(text, wrong)
    name = emulation.install(monkeypatch, library, emulation.Launch(8, True, True))
    with pytest.raises(AssertionError, match=r"a counter is not 0|the tokens are wrong"):
        assert_right(name)


# The order of memory, which the emulation does not have: its threads see each write at once.


@pytest.fixture(scope="module")
def ptx(cuda_code):
    """The PTX of the kernels for split rows, by their names."""
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc")
    _, text = cuda_code("sm_80")
    kernels = re.split(r"^\.visible \.entry ", text, flags=re.MULTILINE)[1:]
    return {text.split("(")[0]: text for text in kernels if "split_kernel" in text.split("(")[0]}


COUNT = "atom.add.acq_rel.gpu.global.u32"
LIST_STORE = r"st\.global\.u64"
BARRIER = "bar.sync"
READS = ("ld.global.cg.u64", "cp.async.cg.shared.global")


def is_ordered(text):
    """Whether a list is written, then comes a barrier, a count, and a barrier before any read."""
    before, after = text.split(COUNT)
    written = [found.end() for found in re.finditer(LIST_STORE, before)][-1]
    read = min(after.index(text) for text in READS)
    return READS[0] not in before and BARRIER in before[written:] and BARRIER in after[:read]


def test_a_list_is_released_and_acquired(ptx):
    assert len(ptx) == 9
    for text in ptx.values():
        assert text.count(COUNT) == 1
        assert is_ordered(text)
        before, after = text.split(COUNT)
        place = before.rindex(BARRIER)
        assert not is_ordered(before[:place] + before[place + len(BARRIER) :] + COUNT + after)
        assert not is_ordered(before + COUNT + after.replace(BARRIER, "", 1))
