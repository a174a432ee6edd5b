"""Do the copies agree? Fields, struct, docs and imports say the same thing in several places."""

import ast
import ctypes
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import llm_sampling
from llm_sampling import BatchParams, SamplingParams, backends, history, library
from llm_sampling.backends import BACKENDS, SampleCall, args
from llm_sampling.params import _RULES, OFF_VALUES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "llm_sampling"

PARAMETERS = [f.name for f in fields(SamplingParams)]

#: BatchParams and the C struct hold a parameter under its own name, this one in three pieces.
PIECES = {"logit_bias": ["logit_bias_offsets", "logit_bias_ids", "logit_bias_values"]}

#: What BatchParams has beyond the parameters: derived from them, or given with a call.
FLAGS = {"needs_history", "all_greedy", "any_filter"}
FLAGS |= {"kept_at_most", "any_top_k", "any_top_p", "any_floor"}
DERIVED = {"min_p_cut", "unseeded", "position", *FLAGS}

#: Each module may import from the lines above its own, and from no other.
LAYERS = (
    ("version", "params", "history", "stopping"),
    ("backends",),
    ("reference", "backends.args", "backends.triton_kernel", "library"),
    ("backends.compiled",),
    ("backends.cpu", "backends.cuda", "backends.torch", "backends.triton", "sample"),
    ("sampler", "sharded"),
    ("__init__",),
    ("generation", "models", "integrations", "tuning"),
    ("integrations.huggingface", "integrations.vllm", "objectives", "report", "explain"),
    ("cli",),
)

#: Never imported by ``import llm_sampling``.
HEAVY = (
    *("triton", "transformers", "typer", "rich", "gguf", "accelerate", "scipy"),
    *("optuna", "matplotlib", "sqlalchemy", "vllm"),
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
    """Among the options of those that draw."""
    tree = ast.parse(read("llm_sampling/cli.py"))
    (sampling,) = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "sampling"
    )
    options = {argument.arg for argument in sampling.args.args + sampling.args.kwonlyargs}
    assert set(PARAMETERS) <= options


def test_page_has_every_parameter_with_its_rule():
    """But for the two that it cannot change."""
    page = read("llm_sampling/data/explain.html")
    fields = page[page.index("const FIELDS = {") : page.index("const NUMBER")]
    rules = dict(re.findall(r'^  (\w+): \{.*?rule: "(.*?)"', fields, re.MULTILINE | re.DOTALL))
    offs = dict(re.findall(r"^  (\w+): \{\s*label: .*?, off: (\S+),", fields, re.MULTILINE))
    shown = [name for name in PARAMETERS if name not in ("logit_bias", "seed")]
    assert rules == {name: _RULES[name] for name in shown}
    assert {name: float(off) for name, off in offs.items()} == {
        name: OFF_VALUES[name] for name in shown
    }


def parameter_table(path):
    """The table that starts ``| name | range | off``: name to (range, off), without backticks."""
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
    table = parameter_table(path)
    assert sorted(table) == sorted(PARAMETERS)
    for name, (range_, off) in table.items():
        assert range_
        value = OFF_VALUES[name]
        expected = "None" if value is None else f"{value:g}"
        assert re.match(rf"{expected}(\D|$)", off), f"{name} is off at {expected}, not {off!r}"


# The C struct

C_TYPES = {
    "uint32_t": ctypes.c_uint32,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
}
C_DTYPES = {torch.float32: "float", torch.int32: "int32_t", torch.int64: "int64_t"}


def header():
    """csrc/llm_sampling.h without comments."""
    return re.sub(r"//.*", "", read("csrc/llm_sampling.h"))


def struct_fields():
    """Name to C type, in order; a pointer's type ends in ``*``, without const."""
    body = re.search(r"struct LlmSamplingArgs \{(.*?)\} LlmSamplingArgs;", header(), re.DOTALL)[1]
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
    """The value of a ``#define`` or an enumerator, ``LLM_SAMPLING_`` left out of its name."""
    match = re.search(rf"\bLLM_SAMPLING_{name}\b(?: =)? \(?(\d+)(?: << (\d+))?\b", header())
    return int(match[1]) << int(match[2] or 0)


def test_struct_has_every_parameter():
    struct = struct_fields()
    for name in PARAMETERS:
        for piece in pieces(name):
            assert piece in struct, f"{name} is missing in csrc/llm_sampling.h"


def test_struct_reads_the_dtypes_that_a_batch_has():
    batch = BatchParams.from_list([SamplingParams(logit_bias={1: 2})], positions=[0])
    struct = struct_fields()
    for name in args.POINTERS:
        assert struct[name] == C_DTYPES[getattr(batch, name).dtype] + "*", name


def test_pointers_are_what_a_batch_has():
    tensors = [f.name for f in fields(BatchParams) if f.name not in ("unseeded", *FLAGS)]
    assert sorted(args.POINTERS) == sorted(tensors)
    assert sorted(library.BATCH_FIELDS) == sorted(tensors)


def test_ctypes_struct_is_the_header_s():
    expected = [
        (name, ctypes.c_void_p if type_.endswith("*") else C_TYPES[type_])
        for name, type_ in struct_fields().items()
    ]
    assert [tuple(field) for field in args.SampleArgs._fields_] == expected


def test_header_and_python_have_the_same_constants():
    assert constant("ABI_VERSION") == args.ABI_VERSION
    assert constant("MAX_VOCAB_SIZE") == history.MAX_VOCAB_SIZE
    assert constant("STATUS_NAN") == backends.STATUS_NAN
    assert constant("STATUS_NO_CANDIDATE") == backends.STATUS_NO_CANDIDATE
    assert constant("STATUS_POS_INF") == backends.STATUS_POS_INF


def filled(dtype=torch.float32, **changes):
    batch = BatchParams.from_list([SamplingParams(seed=0)], positions=[0])
    return args.make_args(SampleCall(torch.zeros(1, 8, dtype=dtype), batch, None, None, **changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_header_and_python_number_dtypes_alike(dtype):
    assert filled(dtype).dtype == constant(str(dtype).removeprefix("torch.").upper())


@pytest.mark.parametrize("logprobs", [None, "processed", "raw"])
def test_header_and_python_number_logprobs_alike(logprobs):
    assert filled(logprobs=logprobs).logprobs_mode == constant(f"LOGPROBS_{logprobs}".upper())


@pytest.mark.parametrize(
    ("advance", "check", "name"),
    [(False, True, "NEVER"), (True, False, "ALWAYS"), (True, True, "IF_ALL_VALID")],
)
def test_header_and_python_number_advance_alike(advance, check, name):
    assert filled(advance=advance, check=check).advance == constant(f"ADVANCE_{name}")


# The steps and the arithmetic


def steps():
    """Step number to the first word of its name."""
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
    comments = re.findall(r"// (.*)", cuda_kernel())
    assert any(re.search(rf"(?:^|, ){number} {word}\b", comment) for comment in comments)


def test_cuda_s_kernel_takes_every_parameter():
    """Every parameter, and everything else that a call has, by its name in the struct."""
    read_by_it = set(re.findall(r"\bargs_?\.(\w+)", cuda_kernel()))
    not_a_kernel_s = {"struct_size", "version", "num_threads", "reserved", "num_slots"}
    assert set(struct_fields()) - not_a_kernel_s <= read_by_it


def test_triton_s_kernel_reads_every_parameter():
    """All but min_p itself, of which only min_p_cut is needed."""
    kernel = read("llm_sampling/backends/triton_kernel.py")
    assert {*args.POINTERS} - {"min_p"} == set(re.findall(r"\bbatch\.(\w+)", kernel))


@pytest.mark.parametrize(
    "path",
    [
        "llm_sampling/reference.py",
        "csrc/semantics.h",
        "llm_sampling/backends/triton_kernel.py",
        "llm_sampling/data/explain.html",
    ],
)
def test_constants_of_the_arithmetic_are_those_of_the_docs(path):
    number = r"-?0x1\.[0-9a-f]{6}p[+-]\d+"
    documented = set(re.findall(number, read("docs/semantics.md")))
    assert len(documented) == 7, "six coefficients and log2(e)"
    assert documented <= set(re.findall(number, read(path)))


# Imports


def modules():
    """Module name within the package to its path; a package has the name of its folder."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
        if parts[-1] == "__init__" and len(parts) > 1:
            parts.pop()
        found[".".join(parts)] = path
    return found


MODULES = modules()


def imports_of(source):
    """The modules of ours that a module imports, anywhere in it."""
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
                    parts.pop()  # a name inside a module, not a module
                found.add(".".join(parts[1:]) if parts else "__init__")
    return found


def layer(name):
    return next(index for index, names in enumerate(LAYERS) if name in names)


def test_every_module_has_a_layer():
    assert sorted(MODULES) == sorted(name for names in LAYERS for name in names)
    assert {backend.module for backend in BACKENDS.values()} <= {
        f"llm_sampling.{name}" for name in LAYERS[4]
    }


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name):
    for imported in imports_of(MODULES[name].read_text(encoding="utf-8")):
        assert layer(imported) < layer(name), f"{name} imports {imported}"


def test_back_edges_are_seen():
    assert imports_of("def f():\n    from llm_sampling.backends import cpu\n") == {"backends.cpu"}
    assert imports_of("import llm_sampling.sample\nimport torch") == {"sample"}
    assert imports_of("from llm_sampling import Sampler, history") == {"__init__", "history"}


def test_reference_is_for_one_backend_to_explain_and_between_ranks():
    users = [
        name
        for name, path in MODULES.items()
        if "reference" in imports_of(path.read_text(encoding="utf-8"))
    ]
    assert sorted(users) == ["backends.torch", "explain", "sharded"]


@pytest.mark.parametrize("name", [n for n in MODULES if n not in ("cli", "integrations.vllm")])
def test_environment_is_read_by_commands_alone(name):
    """Ours, and vLLM's: its plug-ins have no other switch."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not names & {"environ", "getenv"}


def run_python(code, folder):
    """What a new process prints, word by word; it finds the package that this process uses."""
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
    # The same question can be answered with yes, once the library is asked for.
    assert after == str(BACKENDS["cpu"].why_unavailable() is None)


# Docs and files

DOCS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("", "docs", "benchmarks", "examples")
    for path in (ROOT / folder).glob("*.md")
)


def python_blocks(path):
    """Each fenced block of Python, with as many lines before it as the document has."""
    text = read(path)
    return [
        "\n" * text.count("\n", 0, block.start(1)) + block[1]
        for block in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ]


@pytest.mark.parametrize("path", sorted({"README.md", *filter(python_blocks, DOCS)}))
def test_code_in_docs_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(path)
    assert blocks, f"{path} has no code to run"
    namespace = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, path, "exec"), namespace)


def project_files():
    """Everything that belongs to the project, by its path from the root."""
    yield from (path.name for path in ROOT.iterdir() if path.is_file())
    for folder in (".ci", "benchmarks", "csrc", "docs", "examples", "llm_sampling", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path.relative_to(ROOT).as_posix()


FILES = sorted(project_files())


@pytest.mark.parametrize("path", DOCS)
def test_docs_name_files_that_exist(path):
    for name in re.findall(r"`([\w./-]+\.(?:py|cpp|cu|h|md|json|toml))`", read(path)):
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
