"""Tests of the supply chain: what the package contains, imports, reads, writes and executes.

The sources are scanned, the package is watched by an audit hook while it is imported and used, and
an sdist and a wheel are built twice, in different folders, and inspected.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {
    ".".join(path.relative_to(ROOT / "llm_sampling").with_suffix("").parts): path
    for path in sorted((ROOT / "llm_sampling").rglob("*.py"))
}

# ---- the sources ---------------------------------------------------------------------------------

#: What every module may import. None of these executes a file's content or uses a network by
#: itself.
ANYWHERE = {
    *(
        "__future__",
        "argparse",
        "base64",
        "collections",
        "contextlib",
        "copy",
        "ctypes",
        "dataclasses",
    ),
    *("fcntl", "functools", "html", "importlib", "inspect", "io", "itertools", "json", "logging"),
    *("array", "math", "numbers", "operator", "os", "pathlib", "platform", "re", "secrets"),
    *("select", "termios"),
    *(
        "signal",
        "string",
        "struct",
        "sys",
        "threading",
        "time",
        "types",
        "typing",
        "warnings",
        "weakref",
        "zlib",
    ),
    *("llm_sampling", "numpy", "torch"),
}
SOMEWHERE = {
    "generation.models": {"gguf", "transformers"},
    "integrations.generate_call": {"transformers"},
    "integrations.huggingface": {"transformers"},
    "backends.triton": {"triton"},
    "backends.triton_history": {"triton"},
    "backends.triton_kernel": {"triton"},
    "backends.triton_rules": {"triton"},
    "tools.cli.chat": {"rich"},
    "tools.cli.console": {"rich", "tqdm"},
    "tools.cli.explain": {"rich"},
    "tools.cli.generate": {"rich"},
    "tools.cli.info": {"rich"},
    "tools.cli.running": {"rich"},
    "tools.cli.tune": {"optuna", "rich"},
    "tools.explain.picture": {"matplotlib"},
    "tools.tuning.report": {"matplotlib", "optuna"},
    "tools.tuning.resume": {"optuna", "sqlalchemy"},
    "tools.tuning.search": {"optuna"},
    "tools.tuning.space": {"optuna"},
}
#: Functions that access a file, start a process or execute a text as code, whatever object they
#: are called on.
REACHING = {
    *("open", "read_text", "read_bytes", "fromfile", "memmap", "CDLL", "LoadLibrary"),
    *("from_pretrained", "write_text", "write_bytes", "mkdir", "makedirs", "unlink", "rename"),
    *("rmtree", "import_module", "__import__", "load_library", "run_path", "run_module"),
}
#: Functions that do so if they are called by name alone or on one of OWNERS.
REACHING_OF = {
    *("load", "loads", "save", "eval", "exec", "compile", "remove", "system", "popen"),
    *("fork", "execv", "execve", "spawnv", "posix_spawn", "load_state_dict_from_url"),
}
OWNERS = {"", "builtins", "json", "np", "numpy", "os", "torch", "torch.jit", "torch.hub"}

#: The calls of such functions that the package may have: the function that has the call, and what
#: it calls. The package itself reads only the first four bytes of a model, to tell its format;
#: transformers reads everything else, including configurations.
KNOWN = {
    ("backends.Backend._module", "importlib.import_module"),  # only of names in BACKENDS
    ("backends.known_rows.data", "?.read_text"),  # a data file of the package
    ("backends.known_rows.data", "json.loads"),
    ("backends.native.Library._loaded", "failure.read_text"),  # why the library was not built
    ("backends.native.Library._loaded", "ctypes.CDLL"),
    ("tools.cli.console.hold_closed_descriptors", "os.open"),  # the null device
    ("tools.cli.console._discard", "os.open"),  # the null device
    ("tools.cli.constraint.read_schema", "path.open"),
    ("tools.cli.explain._explain", "new.write_text"),
    ("tools.files.check_writable", "os.open"),  # without changing the file
    ("tools.files.check_folder", "folder.mkdir"),
    ("tools.files._try_new_file", "path.open"),
    ("tools.files._try_new_file", "path.unlink"),
    ("tools.files.replacing", "new.open"),
    ("tools.files.replacing", "new.unlink"),  # of a file that it has made itself
    ("tools.explain.page.page", "_TEMPLATE.read_text"),
    ("integrations.engine.find", "importlib.import_module"),  # only of engines' modules
    ("integrations.grammar._engine", "importlib.import_module"),  # xgrammar or llguidance
    ("integrations.grammar._LlguidanceVocabulary.__init__", "importlib.import_module"),
    ("integrations.grammar._source", "json.loads"),  # a JSON schema
    ("generation.models.check_path", "path.open"),
    ("generation.models.load", "transformers.AutoTokenizer.from_pretrained"),
    ("generation.models.load", "transformers.AutoModelForCausalLM.from_pretrained"),
    ("tools.tuning.objectives._data", "?.read_text"),  # a data file of the package
    ("tools.tuning.report.write_report", "new.write_text"),
    ("tools.tuning.report.write_report", "new.write_bytes"),
    ("tools.tuning.resume.locked", "?.open"),  # a lock file
}


def dotted(node: ast.expr) -> str:
    """Return the dotted name of an expression; a part that is no name becomes ``?`` or empty."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value) or '?'}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the top-level package of every import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").partition(".")[0]


def calls(tree: ast.AST, where: str) -> Iterator[tuple[str, str]]:
    """Yield for each call the function that contains it, and the dotted name of what it calls."""
    for node in ast.iter_child_nodes(tree):
        inside = where
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            inside = f"{where}.{node.name}"
        if isinstance(node, ast.Call):
            yield where, dotted(node.func)
        yield from calls(node, inside)


def strange_imports(source: str, module: str) -> set[str]:
    """Return the packages that a module's source imports although it may not."""
    return set(imported(ast.parse(source))) - ANYWHERE - SOMEWHERE.get(module, set())


def reaching_calls(source: str, module: str) -> set[tuple[str, str]]:
    """Return the calls that access a file, start a process or execute a text as code."""
    where = module.removesuffix(".__init__")
    found = set()
    for place, name in calls(ast.parse(source), where):
        owner, _, last = name.rpartition(".")
        if last in REACHING or (last in REACHING_OF and owner in OWNERS):
            found.add((place, name))
    return found


@pytest.mark.parametrize("module", SOURCES)
def test_nothing_else_is_imported(module: str) -> None:
    assert strange_imports(SOURCES[module].read_text(encoding="utf-8"), module) == set()


def test_every_reach_for_a_file_is_known() -> None:
    found = [reaching_calls(path.read_text(encoding="utf-8"), m) for m, path in SOURCES.items()]
    assert set().union(*found) == KNOWN


def test_models_are_local() -> None:
    """Models are loaded from local files only, and code in a model's folder is never trusted."""
    source = SOURCES["generation.models"].read_text(encoding="utf-8")
    assert 'options: dict[str, Any] = {"local_files_only": True' in source
    loads = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and dotted(node.func).endswith(".from_pretrained")
    ]
    assert len(loads) == 2
    for call in loads:
        spread = [k.value.id for k in call.keywords if isinstance(k.value, ast.Name)]
        assert "options" in spread
    for path in SOURCES.values():
        text = path.read_text(encoding="utf-8").replace(" ", "").replace('":', "=")
        assert "trust_remote_code=True" not in text


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import marshal as m",
        "def f():\n from urllib.request import urlopen",
        "from subprocess import run",
        "import huggingface_hub.file_download",
        "import transformers",
    ],
)
def test_the_scan_sees_imports(source: str) -> None:
    assert len(strange_imports(source, "sample")) == 1


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("class A:\n def f(self): return eval('1')", ("m.A.f", "eval")),
        ("def f(): return torch.load('x')", ("m.f", "torch.load")),
        ("def f(path): return path.read_text()", ("m.f", "path.read_text")),
        ("x = [json.load(x)]", ("m", "json.load")),
        ("x = Path('x').open()", ("m", "?.open")),
        ("exec(compile('x'))", ("m", "exec")),
        ("exec(compile('x'))", ("m", "compile")),
        ("AutoConfig.from_pretrained('x')", ("m", "AutoConfig.from_pretrained")),
    ],
)
def test_the_scan_sees_calls(source: str, call: tuple[str, str]) -> None:
    assert call in reaching_calls(source, "m")


# ---- import and use ------------------------------------------------------------------------------

WATCHED = """
import os
import sys
import torch

seen = []
WATCHED = ("socket.", "urllib.", "ftplib.", "http.", "smtplib.", "pickle.", "subprocess.", "pty.")
WATCHED += ("os.system", "os.exec", "os.posix_spawn", "os.fork", "shutil.", "tempfile.")
WATCHED += ("os.remove", "os.rename", "os.mkdir", "os.chmod", "os.putenv")

def hook(event, arguments):
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event.startswith(WATCHED):
        seen.append((event, str(arguments)[:100]))

def tell():
    print(seen)
    seen.clear()

sys.dont_write_bytecode = True
sys.addaudithook(hook)
"""


def watched(*programs: str) -> list[str]:
    """Run programs in one process that has imported torch; return each one's watched events."""
    program = WATCHED + "".join(textwrap.dedent(each) + "\ntell()\n" for each in programs)
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_import_and_use_touch_nothing() -> None:
    """Import and use need no network, start no process, unpickle nothing and write no file."""
    use = """
        from llm_sampling import SamplingParams, Sampler, TokenHistory, filter_logits

        params = SamplingParams(top_k=5, repetition_penalty=1.2, seed=1)
        for backend in "auto", "torch":
            history = TokenHistory.from_ids([[1, 2]], vocab_size=100)
            sampler = Sampler(params, vocab_size=100, history=history, backend=backend)
            sampler(torch.zeros(1, 100))
        filter_logits(torch.zeros(1, 100), SamplingParams(top_p=0.9))
        """
    modules = "import llm_sampling.generation, llm_sampling.generation.models"
    assert watched("import llm_sampling", modules, use) == ["[]", "[]", "[]"]


def test_the_watch_sees() -> None:
    events = watched(
        "import socket; socket.socket().close()",
        "import pickle; pickle.loads(pickle.dumps(print))",
        "import subprocess; subprocess.run(['true'])",
        "open('/dev/null', 'w').close()",
        "os.close(os.open('/dev/null', os.O_WRONLY))",
        "open('/dev/null').close()",
    )
    names = ("socket.__new__", "pickle.find_class", "subprocess.Popen", "open", "open")
    for name, line in zip(names, events[:-1], strict=True):
        assert f"('{name}', " in line
    assert events[-1] == "[]"


# ---- sdist and wheel -----------------------------------------------------------------------------

EARLIEST = 315532800  # the start of 1980, as in setup.py
#: The files that a build needs even if they are not tracked by git yet.
READ_BY_A_BUILD = ("MANIFEST.in", "pyproject.toml", "setup.py")
#: Names of folders and files that are no sources, for a folder without git.
OTHERS = (".git", ".venv", "venv", "build", "dist", "lib", "__pycache__", "PKG-INFO", "setup.cfg")
OTHERS += (".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".benchmarks", ".peers")


def tracked() -> list[str]:
    """Return the files that git tracks; in a folder without git, all source files."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
        ).stdout
        names = {os.fsdecode(name) for name in listed.split(b"\0") if name}
        return sorted(n for n in names | {*READ_BY_A_BUILD} if (ROOT / n).is_file())
    files = [path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file()]
    return sorted(
        path.as_posix()
        for path in files
        if not any(part in OTHERS or part.endswith(".egg-info") for part in path.parts)
        and path.suffix not in (".so", ".pyc", ".o")
    )


@dataclass(frozen=True)
class Place:
    """A folder to build in, with what may differ between two machines.

    Attributes:
        folder: the folder.
        umask: the umask of the build.
        moment: the modification time of the source files.
        more: additional environment variables.
    """

    folder: Path
    umask: int = 0o022
    moment: int = 1_600_000_000
    more: tuple[tuple[str, str], ...] = ()

    def copy(self) -> Path:
        """Copy the sources into a new folder, and return it."""
        source = self.folder / "source"
        for name in tracked():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
        return self.as_here(source)

    def unpack(self, sdist: Path) -> Path:
        """Unpack an sdist, and return the folder of its sources."""
        with tarfile.open(sdist) as archive:
            # Python before 3.11.4 has no argument for it.
            archive.extraction_filter = getattr(tarfile, "data_filter", None)
            archive.extractall(self.folder)
        return self.as_here(self.folder / sdist.name.removesuffix(".tar.gz"))

    def as_here(self, source: Path) -> Path:
        """Give all files the modes and times of this place, and return the folder."""
        for path in source.rglob("*"):
            mode = 0o777 if path.is_dir() or path.name == "run" else 0o666
            path.chmod(mode & ~self.umask)
            os.utime(path, (self.moment, self.moment))
        return source

    def build(self, kind: str, source: Path, **environment: str) -> Path:
        """Build an sdist or a wheel, and return its path.

        The kind "setup.py" is an sdist that ``python setup.py sdist`` builds.
        """
        made = self.folder / kind / "made"
        program = ["-c", f"from setuptools import build_meta as b; b.build_{kind}({str(made)!r})"]
        if kind == "setup.py":
            program = ["setup.py", "-q", "sdist", "--dist-dir", str(made)]
        kept = {k: v for k, v in os.environ.items() if k not in ("SOURCE_DATE_EPOCH", "PYTHONPATH")}
        kept |= {"LLM_SAMPLING_CUDA": "0"} | dict(self.more) | environment
        if kind == "wheel":
            kept["SOURCE_DATE_EPOCH"] = "1700000000"
        done = subprocess.run(
            [sys.executable, *program],
            cwd=source,
            env=kept,
            umask=self.umask,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        (result,) = made.iterdir()
        return result


def two_places(folder: Path) -> tuple[Place, Place]:
    (folder / "one").mkdir()
    (folder / "another place").mkdir()
    other = (("TZ", "Pacific/Auckland"), ("PYTHONHASHSEED", "7"), ("LC_ALL", "C"))
    return (
        Place(folder / "one"),
        Place(folder / "another place", umask=0o077, moment=1_650_000_001, more=other),
    )


@dataclass(frozen=True)
class Built:
    """Two sdists and two wheels. The second wheel is built from the unpacked first sdist."""

    sdists: tuple[Path, Path]
    wheels: tuple[Path, Path]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    one, another = two_places(tmp_path_factory.mktemp("built"))
    with ThreadPoolExecutor() as pool:
        source = one.copy()
        sdist = one.build("sdist", source)
        wheels = [
            pool.submit(one.build, "wheel", source),
            pool.submit(another.build, "wheel", another.unpack(sdist)),
        ]
        other = another.build("setup.py", another.copy())
        first, second = (wheel.result() for wheel in wheels)
    return Built((sdist, other), (first, second))


@pytest.mark.parametrize("kind", ["sdists", "wheels"])
def test_two_builds_are_the_same_bytes(kind: str, built: Built) -> None:
    first, second = getattr(built, kind)
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("sdist", "member.mtime = moment"),
        ("sdist", "member.mode = mode_of(path)"),
        ("wheel", "path.chmod(mode_of(path))"),
    ],
)
def test_a_line_less_and_they_are_not(kind: str, line: str, tmp_path: Path) -> None:
    """The negative control: without one of these lines of setup.py, two builds differ."""
    stated = {
        "member.mtime = moment": "member.mtime = int(path.stat().st_mtime)",
        "member.mode = mode_of(path)": "member.mode = path.stat().st_mode & 0o777",
        "path.chmod(mode_of(path))": "pass",
    }
    made = []
    for place in two_places(tmp_path):
        source = place.copy()
        text = (source / "setup.py").read_text(encoding="utf-8")
        assert text.count(line) == 1
        (source / "setup.py").write_text(text.replace(line, stated[line]), encoding="utf-8")
        place.as_here(source)
        made.append(place.build(kind, source, CC="false", CXX="false").read_bytes())
    assert made[0] != made[1]


def test_the_sdist_is_what_git_has(built: Built) -> None:
    """The sdist contains all tracked files, and nothing in it shows who built it or when."""
    with tarfile.open(built.sdists[0]) as archive:
        members = archive.getmembers()
    top = built.sdists[0].name.removesuffix(".tar.gz")
    names = {member.name.removeprefix(f"{top}/") for member in members}
    made = {name for name in names if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    assert names - made == set(tracked())
    order = sorted(names, key=lambda name: name.split("/"))
    assert [member.name for member in members] == [f"{top}/{name}" for name in order]
    assert {(m.uid, m.gid, m.uname, m.gname, m.mtime) for m in members} == {
        (0, 0, "", "", EARLIEST)
    }
    executable = {member.name for member in members if member.mode != 0o644}
    assert executable == {f"{top}/{name}" for name in tracked() if name.endswith("/run")}
    # Bytes 4 to 7 of a gzip file are its time.
    assert built.sdists[0].read_bytes()[4:8] == EARLIEST.to_bytes(4, "little")


def test_the_wheel_has_the_package_alone(built: Built) -> None:
    wheel = built.wheels[0]
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        infos = {n.partition("/")[2] for n in names if n.partition("/")[0].endswith(".dist-info")}
        library = archive.read("llm_sampling/lib/libllm_sampling_cpu.so")
        modes = {info.external_attr >> 16 & 0o777 for info in archive.infolist()}
        (licence,) = (name for name in names if name.endswith("/LICENSE"))
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
    assert wheel.name.startswith("llm_sampling-")
    assert "-py3-none-" in wheel.name
    package = {name for name in names if not name.partition("/")[0].endswith(".dist-info")}
    assert package == {
        *(name for name in tracked() if name.startswith("llm_sampling/")),
        "llm_sampling/lib/libllm_sampling_cpu.so",
        "llm_sampling/lib/libllm_sampling_cuda.failure.txt",
    }
    assert infos == {
        *("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt")
    }
    assert modes <= {0o644, 0o755, 0o664}  # 0o664 is the mode of RECORD, which setuptools writes
    assert os.fsencode(ROOT) not in library
    assert os.fsencode(wheel.parent.parent) not in library


def test_the_wheel_installs_without_an_index_and_draws(built: Built, tmp_path: Path) -> None:
    """The wheel can be installed without an index if torch is installed, and can draw tokens."""
    target = tmp_path / "installed"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*command, "--target", target, built.wheels[1]], check=True, timeout=120)
    shutil.rmtree(target / "bin")  # the command line's script is not needed here
    program = f"""
import torch, llm_sampling
from llm_sampling import SamplingParams, sample

assert llm_sampling.__file__.startswith({str(target)!r}), llm_sampling.__file__
logits = torch.tensor([[1.0, 2.5, -0.5, 2.5, 0.0, -3.0]])
params = SamplingParams(top_p=0.8, seed=1234)
print(sample(logits, params, positions=[5], num_samples=8, backend="cpu").tokens.tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[[1, 1, 1, 1, 3, 1, 3, 3]]\n"  # the example in docs/semantics.md


def test_the_code_beside_a_model_is_not_run(tmp_path: Path) -> None:
    """Code in a model's folder is not run, and the user is not asked on stdin whether it may."""
    pytest.importorskip("transformers", reason="needs the extra 'cli'")
    (tmp_path / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}'
    )
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    program = f"from llm_sampling.generation import models; models.load({str(tmp_path)!r}, print)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        input="y\n" * 9,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=os.environ | {"HF_HOME": str(tmp_path / "home")},
        check=False,
    )
    assert "ModelError" in done.stderr
    assert "custom code?" not in done.stdout
    assert not (tmp_path / "ran").exists()
