"""Tests that what is stated in several places agrees: parameters, the C struct, docs, imports."""

import ast
import ctypes
import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import pytest
import torch

import llm_sampling
from llm_sampling import BatchParams, SamplingParams, history, results, sequence_rules
from llm_sampling.backends import BACKENDS, base, c_abi
from llm_sampling.backends.base import SampleCall
from llm_sampling.fields import FIELDS, OFF_VALUES
from llm_sampling.params import KERNEL_TENSORS, RULE_TENSORS, SEQUENCE_TENSORS
from llm_sampling.tools import explain
from llm_sampling.tools.cli.options import sampling_options

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "llm_sampling"

PARAMETERS = [f.name for f in fields(SamplingParams)]

#: parameter -> its fields in BatchParams and in the C struct, where they differ from its name
PIECES = {
    "logit_bias": ["logit_bias_offsets", "logit_bias_ids", "logit_bias_values"],
    **{f.name: [f.packed.name] for f in FIELDS.values() if f.packed is not None},
    **{f.name: [*SEQUENCE_TENSORS] for f in FIELDS.values() if f.kind == "sequences"},
}

#: The same for parameters that kernels find in the history and not in BatchParams.
OF_THE_HISTORY = {"penalty_last_n": ["windows"]}

#: The fields of BatchParams that are no parameters: flags, positions, and which rows have no seed.
FLAGS = {"needs_history", "all_greedy", "any_filter"}
FLAGS |= {"kept_at_most", "any_top_k", "any_top_p", "any_floor", "any_output_scope", "any_window"}
FLAGS |= {"any_ordered_rule"}
DERIVED = {"unseeded", "position", *FLAGS}

#: The layers of the package. A module may import only modules of the layers above its own.
LAYERS = (
    ("version", "checks", "sequence_rules", "backends.triton_kernel"),
    ("tensors",),
    ("fields", "history", "results", "backends.triton_history"),
    ("params", "masks"),
    ("backends.base",),
    ("backends.known_rows", "backends.triton_rules"),
    ("backends.first_use",),
    ("backends", "reference", "backends.c_abi"),
    ("backends.native", "table"),
    ("calls", "step_masks"),
    ("ops",),
    ("backends.cpu", "backends.cuda", "backends.torch", "backends.triton", "sample"),
    ("growing_table", "distributed"),
    ("sampler",),
    ("__init__",),  # what ``import llm_sampling`` loads ends here
    ("generation.stop_strings", "generation.text", "generation.prompts", "generation.config"),
    ("generation.rows", "generation.token_sequences"),
    ("generation.loop", "generation.models"),
    ("generation",),
    ("integrations", "tools"),
    ("integrations.generate_call", "integrations.engine", "integrations.grammar"),
    ("integrations.huggingface", "integrations.continuous_batching"),
    ("integrations.sglang", "integrations.vllm.both"),
    ("integrations.transformers_serve", "integrations.vllm.v1", "integrations.vllm.v2"),
    ("integrations.vllm",),
    ("integrations.engines",),
    ("tools.files", "tools.explain.steps", "tools.tuning.space"),
    ("tools.explain.compare", "tools.explain.page", "tools.explain.picture"),
    ("tools.tuning.resume",),
    ("tools.tuning.search",),
    ("tools.tuning.objectives", "tools.tuning.report"),
    ("tools.explain", "tools.tuning"),
    ("tools.cli.console",),
    ("tools.cli.constraint", "tools.cli.running"),
    ("tools.cli.options",),
    ("tools.cli.explain", "tools.cli.generate", "tools.cli.info", "tools.cli.tune"),
    ("tools.cli.chat",),
    ("tools.cli",),
    ("tools.cli.__main__",),
)

#: Packages that ``import llm_sampling`` must not import, because they are optional or slow.
HEAVY = (
    *("triton", "transformers", "typer", "rich", "gguf", "accelerate", "scipy"),
    *("optuna", "matplotlib", "sqlalchemy", "vllm", "sglang", "xgrammar", "llguidance"),
)


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


# One parameter, many places


def test_off_values_name_every_parameter_once():
    assert list(OFF_VALUES) == PARAMETERS


def test_off_values_are_the_defaults():
    assert {f.name: f.default for f in fields(SamplingParams)} == dict(OFF_VALUES)


def pieces(name):
    return PIECES.get(name, [name])


def test_batch_has_every_parameter():
    batch = {f.name for f in fields(BatchParams)}
    assert batch - DERIVED == {piece for name in PARAMETERS for piece in pieces(name)}
    assert batch >= DERIVED


@pytest.mark.parametrize("name", PARAMETERS)
def test_docstring_describes_every_parameter(name):
    assert re.search(rf"^ {{4,8}}{name}: \S", SamplingParams.__doc__, re.MULTILINE)


def test_command_line_has_every_parameter():
    """The sampling options, which several commands share, have one for every parameter."""
    assert list(vars(sampling_options().parse_args([]))) == PARAMETERS


def test_page_has_every_parameter_with_its_rule():
    """The page of ``explain`` has an input for every parameter but those that it never changes."""
    template = read("llm_sampling/tools/data/explain.html")
    fields = template[template.index("const FIELDS = {") : template.index("const NUMBER")]
    shown = [n for n, f in FIELDS.items() if f.kind not in ("bias", "seed", "sequences")]
    assert re.findall(r"^  (\w+): \{", fields, re.MULTILINE) == shown
    page = explain.page(torch.zeros(1), ["a"], SamplingParams())
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert data["fields"] == {
        name: {"rule": FIELDS[name].rule, "off": FIELDS[name].off} for name in shown
    }


def parameter_table(path):
    """Return the table of a document that starts ``| name | range | off``, without backticks.

    The result maps each name to its range and its off value.
    """
    rows = {}
    lines = iter(read(path).splitlines())
    for line in lines:
        if re.match(r"\| *name *\| *range *\| *off\b", line):
            break
    else:
        raise AssertionError(f"{path} has no table | name | range | off |")
    next(lines)
    for line in lines:
        if not line.startswith("|"):
            break
        name, range_, off, *_ = (cell.replace("`", "").strip() for cell in line[1:].split("|"))
        assert name not in rows, f"{path} has two rows for {name}"
        rows[name] = (range_, off)
    return rows


@pytest.mark.parametrize("path", ["README.md", "docs/semantics.md"])
def test_docs_list_every_parameter(path):
    """The documents' own text is read, so that a mistake in docs/tables.py is found too."""
    table = parameter_table(path)
    assert sorted(table) == sorted(PARAMETERS)
    for name, (range_, off) in table.items():
        assert range_
        value = OFF_VALUES[name]
        expected = f'"{value}"' if isinstance(value, str) else "None"
        if isinstance(value, (int, float)):
            expected = f"{value:g}"
        assert re.match(rf"{expected}(\D|$)", off), f"{name} is off at {expected}, not {off!r}"


TABLES = runpy.run_path(str(ROOT / "docs/tables.py"))


@pytest.mark.parametrize("path", TABLES["TABLES"])
def test_tables_are_made_from_the_fields(path):
    text = read(path)
    made = TABLES["with_table"](text, TABLES["TABLES"][path]())
    assert made == text, "run: python docs/tables.py"


# Every place that a new parameter needs

FILTERS = ("rank", "mass", "depth")
EVERY_KIND = ("bias", "penalty", "scope", "scale", *FILTERS, "floor", "seed")
#: The rules that look at the history.
RULES = ("rule", "sequences")

#: The kinds that the page of ``explain`` has an input for.
OF_THE_PAGE = ("penalty", "scope", "scale", *FILTERS, "floor", "rule")

#: file or folder -> the kinds of parameters that it must name
PLACES = {
    "csrc/llm_sampling.h": (*EVERY_KIND, *RULES),
    "csrc/validate.h": (*EVERY_KIND, *RULES),
    "csrc/sequence_rules.h": ("rule",),
    "llm_sampling/backends/triton_rules.py": ("rule",),
    "llm_sampling/sequence_rules.py": RULES,
    "csrc/semantics.h": ("depth",),  # in the function depth_cut
    "llm_sampling/reference.py": EVERY_KIND,
    "llm_sampling/backends/c_abi.py": (*EVERY_KIND, *RULES),
    "llm_sampling/backends/triton.py": EVERY_KIND,
    "llm_sampling/backends/triton_kernel.py": EVERY_KIND,
    # distributed.py gets the limit of min-p from reference.depth_cut.
    "llm_sampling/distributed.py": ("scale", "rank", "mass", "floor"),
    "llm_sampling/generation/config.py": ("scale", *FILTERS),
    "llm_sampling/integrations/vllm/both.py": ("bias", "penalty", "scale", *FILTERS, "seed"),
    "llm_sampling/integrations/sglang.py": ("bias", "penalty", "scale", *FILTERS, "seed"),
    "llm_sampling/tools/data/explain.html": OF_THE_PAGE,
    "docs/semantics.md": (*EVERY_KIND, *RULES),
    "docs/parameters.md": ("penalty", "scope", "scale", *FILTERS, "seed", *RULES),
    "README.md": (*EVERY_KIND, *RULES),
    "tests/sampling/test_rules.py": RULES,
    "tests/cases.py": EVERY_KIND,
    "tests/strategies.py": EVERY_KIND,
    "tests/sampling/differential.py": EVERY_KIND,
    "tests/kernels/cpp/fuzz_cpu.cpp": (*EVERY_KIND, "rule"),
    "tests/tools/test_cli.py": EVERY_KIND,
    "benchmarks/oracle.py": ("penalty", "scale", *FILTERS),
}

#: The folders of the kernels, which get the limit of a filter by depth from ``depth_cut`` only.
KERNELS = ("csrc/cpu", "csrc/cuda")


def read_all(path):
    """Return the text of a file, or of all files of a folder."""
    return "\n".join(read(file) for file in FILES if file == path or file.startswith(f"{path}/"))


def is_named(parameter, text):
    """Return whether a text names a parameter, or all fields that hold it."""
    names = [[parameter], pieces(parameter), OF_THE_HISTORY.get(parameter, [parameter])]
    return any(all(re.search(rf"\b{n}\b", text) for n in these) for these in names)


@pytest.mark.parametrize("path", PLACES)
def test_every_place_names_the_parameter(path):
    text = read_all(path)
    assert text, f"there is no {path}"
    wanted = [f.name for f in FIELDS.values() if f.kind in PLACES[path]]
    assert wanted
    missing = [name for name in wanted if not is_named(name, text)]
    assert not missing, f"{path} does not know {', '.join(missing)}"


@pytest.mark.parametrize("folder", KERNELS)
def test_kernels_know_no_filter_by_depth(folder):
    """A new filter by depth changes ``depth_cut`` in csrc/semantics.h, but not the kernels."""
    code = re.sub(r"//.*", "", read_all(folder))
    for field in FIELDS.values():
        if field.kind == "depth":
            assert not is_named(field.name, code), f"{folder} reads {field.name}"


# The C struct

C_TYPES = {
    "uint32_t": ctypes.c_uint32,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
}
C_DTYPES = {torch.float32: "float", torch.int32: "int32_t", torch.int64: "int64_t"}


def header():
    """Return csrc/llm_sampling.h without comments."""
    return re.sub(r"//.*", "", read("csrc/llm_sampling.h"))


def struct_fields(struct="LlmSamplingArgs"):
    """Return the C type of each field of a struct, in order, without const.

    A field that is a struct itself has its name as the type.
    """
    body = re.search(rf"struct {struct} \{{(.*?)\}} {struct};", header(), re.DOTALL)[1]
    found = {}
    for declaration in body.split(";"):
        if declaration.strip():
            type_, star, name = re.fullmatch(
                r"\s*(?:const\s+)?(\w+)\s*(\*?)\s*(\w+)\s*", declaration
            ).groups()
            assert name not in found
            found[name] = type_ + star
    return found


def constant(name):
    """Return the value of the ``#define`` or enumerator ``LLM_SAMPLING_<name>``."""
    match = re.search(rf"\bLLM_SAMPLING_{name}\b(?: =)? \(?(\d+)(?: << (\d+))?\b", header())
    return int(match[1]) << int(match[2] or 0)


def test_struct_has_every_parameter():
    struct = struct_fields()
    for name in PARAMETERS:
        for piece in OF_THE_HISTORY.get(name, pieces(name)):
            assert piece in struct, f"{name} is missing in csrc/llm_sampling.h"


def test_struct_reads_the_dtypes_that_a_batch_has():
    params = SamplingParams(logit_bias={1: 2}, dry_multiplier=1, dry_breakers=[[1]])
    batch = BatchParams.from_list([params], positions=[0])
    struct = struct_fields()
    for name in KERNEL_TENSORS:
        assert struct[name] == C_DTYPES[getattr(batch, name).dtype] + "*", name


def test_pointers_are_what_a_batch_has():
    tensors = [
        f.name for f in fields(BatchParams) if f.name not in ("unseeded", *OF_THE_HISTORY, *FLAGS)
    ]
    assert sorted(KERNEL_TENSORS) == sorted(tensors)


#: The structs of the header and their own classes of ctypes.
STRUCTS = {
    "LlmSamplingArgs": c_abi.SampleArgs,
    "LlmSamplingUpdate": c_abi.HistoryUpdateArgs,
    "LlmSamplingLogprobs": c_abi.LogprobsArgs,
    "LlmSamplingKept": c_abi.KeptArgs,
}


def test_every_struct_of_the_header_has_a_class():
    assert sorted(re.findall(r"typedef struct (\w+)", header())) == sorted(STRUCTS)


@pytest.mark.parametrize("struct", STRUCTS)
def test_ctypes_struct_is_the_header_s(struct):
    kinds = {**C_TYPES, **STRUCTS}
    expected = [
        (name, ctypes.c_void_p if type_.endswith("*") else kinds[type_])
        for name, type_ in struct_fields(struct).items()
    ]
    assert [tuple(field) for field in STRUCTS[struct]._fields_] == expected


#: The structs inside of LlmSamplingArgs, and what holds the tensors that they point to.
PARTS = {
    "processed": ("LlmSamplingLogprobs", results.TokenLogprobs),
    "raw": ("LlmSamplingLogprobs", results.TokenLogprobs),
    "kept": ("LlmSamplingKept", results.KeptSet),
}
ALL_RESULTS = results.Wanted(
    ("processed", "raw"), 4, torch.tensor([[5, 6, 7]], dtype=torch.int32), "ids", 9
)


def filled_with_results(wanted):
    """Return the struct of a call with the addresses of its results, and the results."""
    batch = BatchParams.from_list([SamplingParams(seed=0)], positions=[0])
    call = SampleCall(torch.zeros(1, 8), batch, None, None, wanted=wanted)
    args, output = c_abi.make_args(call), base.make_results(call)
    c_abi.set_results(args, output)
    return args, output


@pytest.mark.parametrize("part", PARTS)
def test_results_have_the_names_and_dtypes_of_the_header(part):
    struct, tensors = PARTS[part]
    pointers = {name: type_ for name, type_ in struct_fields(struct).items() if type_.endswith("*")}
    assert list(pointers) == list(tensors._fields)
    found = {}
    for form in get_args(results.KeptForm):
        _, output = filled_with_results(replace(ALL_RESULTS, kept=form))
        for name, tensor in getattr(output, part)._asdict().items():
            if tensor is not None:
                found[name] = C_DTYPES[tensor.dtype] + "*"
    assert found == pointers


@pytest.mark.parametrize("own", STRUCTS.values(), ids=STRUCTS.keys())
def test_no_field_has_padding_before_it(own):
    """The struct is then the same for every compiler that has these types."""
    end = 0
    for name, type_ in own._fields_:
        assert getattr(own, name).offset == end, name
        end += ctypes.sizeof(type_)
    assert end == ctypes.sizeof(own)
    assert end % 8 == 0


def test_a_history_is_described_alike_in_both_structs():
    """Both have its fields, which one function of Python fills, and one of C++ reads."""
    sample, update = struct_fields(), struct_fields("LlmSamplingUpdate")
    described = [*update][[*update].index("seen") :]
    assert described == [name for name in sample if name in described]
    assert [update[name] for name in described] == [sample[name] for name in described]


def test_header_and_python_have_the_same_constants():
    assert constant("ABI_VERSION") == c_abi.ABI_VERSION
    assert constant("MAX_VOCAB_SIZE") == history.MAX_VOCAB_SIZE
    assert constant("STATUS_NAN") == base.STATUS_NAN
    assert constant("STATUS_NO_CANDIDATE") == base.STATUS_NO_CANDIDATE
    assert constant("STATUS_POS_INF") == base.STATUS_POS_INF
    assert constant("STATUS_TEXT_FULL") == base.STATUS_TEXT_FULL
    assert constant("MAX_EXTRA_OUTPUT") == base.MAX_EXTRA_OUTPUT
    assert constant("MAX_LISTED") == results.MAX_LISTED


def test_header_and_python_number_records_alike():
    for name in ("BREAKER_IDS", "BREAKER", "BAD_WORD", "STOP_IDS"):
        assert constant(name) == getattr(sequence_rules, name)


def test_header_and_python_number_updates_and_positions_alike():
    for kind, number in history.UPDATE_KINDS.items():
        assert constant(f"UPDATE_{kind}".upper()) == number
    for of, number in base.POSITION_MODES.items():
        assert constant(f"POSITION_OF_{of}".upper()) == number


def filled(dtype=torch.float32, **changes):
    batch = BatchParams.from_list([SamplingParams(seed=0)], positions=[0])
    return c_abi.make_args(SampleCall(torch.zeros(1, 8, dtype=dtype), batch, None, None, **changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_header_and_python_number_dtypes_alike(dtype):
    assert filled(dtype).dtype == constant(str(dtype).removeprefix("torch.").upper())


def test_sizes_of_results_are_those_that_are_wanted():
    args = filled(wanted=ALL_RESULTS)
    assert (args.num_top_logprobs, args.kept.max_ids, args.num_token_ids) == (4, 9, 3)
    assert args.token_ids == ALL_RESULTS.token_ids.data_ptr()
    assert args.token_ids_stride == 0  # one row of ids is for all rows
    nothing = filled()
    assert (nothing.num_top_logprobs, nothing.kept.max_ids, nothing.num_token_ids) == (0, 0, 0)
    assert nothing.token_ids is None


@pytest.mark.parametrize("kinds", [("processed",), ("raw",), ("raw", "processed"), ()], ids=str)
@pytest.mark.parametrize("form", [None, *get_args(results.KeptForm)])
def test_every_result_has_its_address(kinds, form):
    """Each is in the part and in the field of its name; what is not wanted is NULL."""
    args, output = filled_with_results(replace(ALL_RESULTS, logprobs=kinds, kept=form))
    assert (args.tokens, args.status) == (output.tokens.data_ptr(), output.status.data_ptr())
    for part, (_, fields_of) in PARTS.items():
        tensors = getattr(output, part)
        assert (tensors is None) == (part not in (*kinds, form and "kept"))
        for name in fields_of._fields:
            tensor = getattr(tensors, name, None)
            address = None if tensor is None else tensor.data_ptr()
            assert getattr(getattr(args, part), name) == address, (part, name)


@pytest.mark.parametrize(
    ("advance", "check", "name"),
    [(False, True, "NEVER"), (True, False, "ALWAYS"), (True, True, "IF_ALL_VALID")],
)
def test_header_and_python_number_advance_alike(advance, check, name):
    assert filled(advance=advance, check=check).advance == constant(f"ADVANCE_{name}")


# The steps and the arithmetic


def steps():
    """Return for each step number of docs/semantics.md the first word of the step's name."""
    rows = re.findall(r"^\| (\d+) \| ([\w-]+)", read("docs/semantics.md"), re.MULTILINE)
    return {int(number): word for number, word in rows}


def test_semantics_numbers_its_steps():
    assert list(steps()) == list(range(1, 15))


@pytest.mark.parametrize(
    "path", ["llm_sampling/reference.py", "llm_sampling/backends/triton_kernel.py"]
)
@pytest.mark.parametrize(("number", "word"), steps().items())
def test_python_has_the_step(path, number, word):
    comments = re.findall(r"(?:# |\"\"\"|, )(\d+ .*)", read(path))
    assert re.search(rf"\b{number} {word}\b", "\n".join(comments))


def cuda_kernel():
    return "".join(read(file) for file in FILES if file.startswith("csrc/cuda/"))


@pytest.mark.parametrize(("number", "word"), steps().items())
def test_cuda_has_the_step(number, word):
    # sample.cu is left out: its run() names every step again, which would hide a missing comment.
    files = [file for file in FILES if file.startswith("csrc/cuda/") and "sample.cu" not in file]
    comments = re.findall(r"// (.*)", "".join(map(read, files)))
    assert any(re.search(rf"(?:^|, ){number} {word}\b", comment) for comment in comments)


def test_cuda_s_kernel_takes_every_parameter():
    """The kernel, or a function of the shared headers that it calls, reads every field."""
    kernel = cuda_kernel()
    names = ("semantics", "rows", "history", "sequence_rules")
    headers = "".join(read(f"csrc/{name}.h") for name in names)
    read_by_it = set(re.findall(r"\bargs_?\.(\w+)", kernel))
    functions = re.findall(
        r"(\w+)\(const (?:LlmSampling)?Args& args.*?\{\n(.*?)\n\}", headers, re.DOTALL
    )
    called, code = set(), kernel
    for _ in functions:  # one of them may call another
        called |= {f for f in functions if re.search(rf"\b{f[0]}\((?:args_?|plan\.args)", code)}
        code = kernel + "".join(body for _, body in called)
    read_by_it |= set(re.findall(r"\bargs\.(\w+)", code))
    not_a_kernel_s = {"struct_size", "version", "num_threads"}
    assert set(struct_fields()) - not_a_kernel_s <= read_by_it


def test_triton_s_kernel_reads_every_parameter():
    """Those of the rules that look at the history are read by the maker of their lists."""
    kernel = read("llm_sampling/backends/triton_kernel.py")
    maker = read("llm_sampling/backends/triton_rules.py")
    assert {*KERNEL_TENSORS} - {*RULE_TENSORS} == set(re.findall(r"\bbatch\.(\w+)", kernel))
    numbers = {*RULE_TENSORS} - {*SEQUENCE_TENSORS}
    assert numbers == set(re.findall(r"\brules\.(\w+) \+ index", maker))


@pytest.mark.parametrize(
    "path",
    [
        "llm_sampling/reference.py",
        "csrc/semantics.h",
        "llm_sampling/backends/triton_kernel.py",
        "llm_sampling/tools/data/explain.html",
    ],
)
def test_constants_of_the_arithmetic_are_those_of_the_docs(path):
    number = r"-?0x1\.[0-9a-f]{6}p[+-]\d+"
    documented = set(re.findall(number, read("docs/semantics.md")))
    assert len(documented) == 7, "six coefficients and log2(e)"
    assert documented <= set(re.findall(number, read(path)))


# Imports


def modules():
    """Return the path of each module by its name within the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
        if parts[-1] == "__init__" and len(parts) > 1:
            parts.pop()
        found[".".join(parts)] = path
    return found


MODULES = modules()


def imports_of(source):
    """Return the modules of this package that a source imports, at any place in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "llm_sampling":
                while parts and ".".join(parts[1:]) not in MODULES:
                    parts.pop()  # the last part is a name inside a module
                found.add(".".join(parts[1:]) if parts else "__init__")
    return found


def layer(name):
    return next(index for index, names in enumerate(LAYERS) if name in names)


def test_every_module_has_a_layer():
    assert sorted(MODULES) == sorted(name for names in LAYERS for name in names)
    (backends,) = (names for names in LAYERS if "backends.cpu" in names)
    assert {backend.module for backend in BACKENDS.values()} <= {
        f"llm_sampling.{name}" for name in backends
    }


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name):
    for imported in imports_of(MODULES[name].read_text(encoding="utf-8")):
        assert layer(imported) < layer(name), f"{name} imports {imported}"


def test_back_edges_are_seen():
    assert imports_of("def f():\n    from llm_sampling.backends import cpu\n") == {"backends.cpu"}
    assert imports_of("import llm_sampling.sample\nimport torch") == {"sample"}
    assert imports_of("from llm_sampling import Sampler, history") == {"__init__", "history"}


def test_who_uses_the_reference():
    """A backend, what explains it, what works between ranks, and the seeds of sequences."""
    users = [
        name
        for name, path in MODULES.items()
        if "reference" in imports_of(path.read_text(encoding="utf-8"))
    ]
    assert sorted(users) == [
        "backends.torch",
        "distributed",
        "generation.rows",
        "tools.explain.steps",
    ]


@pytest.mark.parametrize(
    "name",
    [n for n in MODULES if n not in ("backends.first_use", "tools.cli", "integrations.engine")],
)
def test_environment_is_read_by_commands_alone(name):
    """Only the command, the plug-ins for engines and the self-test read environment variables.

    The plug-ins must, because engines give them no other switch. The self-test does, because
    it comes before any argument: with LLM_SAMPLING_SELF_TEST=0 it is left out.
    """
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not names & {"environ", "getenv"}


def run_python(code, folder):
    """Run code in a new process that imports the same package, and return the printed words."""
    environment = os.environ | {"PYTHONPATH": str(Path(llm_sampling.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_import_is_free(tmp_path):
    loaded = run_python(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import llm_sampling\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(*(set(sys.modules) - before))",
        tmp_path,
    )
    assert "llm_sampling.sample" in loaded
    assert not {name.split(".")[0] for name in loaded} & set(HEAVY)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
def test_import_loads_no_compiled_library(tmp_path):
    before, after = run_python(
        "import llm_sampling\n"
        "mapped = lambda: 'libllm_sampling' in open('/proc/self/maps').read()\n"
        "before = mapped()\n"
        "llm_sampling.backend_info()\n"
        "print(before, mapped())",
        tmp_path,
    )
    assert before == "False"
    # backend_info loads the library if it is built, so the check can detect a loaded library.
    assert after == str(BACKENDS["cpu"].why_unavailable() is None)


# Docs and files

DOCS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("", "docs", "docs/engines", "benchmarks", "examples")
    for path in (ROOT / folder).glob("*.md")
)


def python_blocks(path):
    """Return each fenced Python block of a document with the text block that follows, or None.

    The text block shows what the Python block prints. The Python block begins with as many empty
    lines as precede it in the document, so that tracebacks have the document's line numbers.
    """
    text = read(path)
    blocks = re.finditer(
        r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", text, re.MULTILINE | re.DOTALL
    )
    return [("\n" * text.count("\n", 0, block.start(1)) + block[1], block[2]) for block in blocks]


@pytest.mark.parametrize("path", sorted({"README.md", *filter(python_blocks, DOCS)}))
def test_code_in_docs_runs(path, tmp_path, monkeypatch, capsys):
    """The Python blocks run in order and print what the document shows after them, if anything."""
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(path)
    assert blocks, f"{path} has no code to run"
    namespace = {"__name__": "__main__"}
    for block, shown in blocks:
        capsys.readouterr()
        exec(compile(block, path, "exec"), namespace)
        if shown is not None:
            assert capsys.readouterr().out == shown


def test_readme_shows_what_its_code_prints():
    assert all(shown for _, shown in python_blocks("README.md"))


def project_files():
    """Yield the path, relative to the root, of every file that belongs to the project."""
    yield from (path.name for path in ROOT.iterdir() if path.is_file())
    for folder in (".ci", "benchmarks", "csrc", "docs", "examples", "llm_sampling", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path.relative_to(ROOT).as_posix()


FILES = sorted(project_files())


@pytest.mark.parametrize("path", DOCS)
def test_docs_name_files_that_exist(path):
    for name in re.findall(r"`([\w./-]+\.(?:py|cpp|cuh?|h|md|json|toml))`", read(path)):
        if "NAME" not in name:
            tail = "/" + name.removeprefix("./")
            assert any(f"/{file}".endswith(tail) for file in FILES), f"{path} names {name}"
    for target in re.findall(r"\]\(((?!https?:)[^)#]+)", read(path)):
        assert (ROOT / path).parent.joinpath(target).exists(), f"{path} links to {target}"


def test_no_leftover_modules():
    leftovers = {"util", "utils", "common", "core", "helper", "helpers", "misc"}
    assert [file for file in FILES if leftovers & set(re.split(r"[/.]", file))] == []


def test_changelog_has_this_version_and_its_numerics():
    changelog = read("CHANGELOG.md")
    assert re.findall(r"^## \[(.+?)\]", changelog, re.MULTILINE)[0] == "Unreleased"
    this = re.search(
        rf"^## \[{re.escape(llm_sampling.__version__)}\].*?(?=^## |\Z)",
        changelog,
        re.MULTILINE | re.DOTALL,
    )
    assert this, f"no heading [{llm_sampling.__version__}]"
    assert re.search(r"^### Numerics$", this[0], re.MULTILINE)
