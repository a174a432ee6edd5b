"""Builds csrc/ into plain shared libraries with a C interface; metadata is in pyproject.toml.

The libraries link neither torch nor Python, so one build serves every version of both. The cuda one
is built where nvcc is found; ``LLM_SAMPLING_CUDA=0`` leaves it out, ``LLM_SAMPLING_CUDA=1`` insists
on it.

The same sources give the same bytes, in whatever folder and under whatever umask: an sdist always,
a wheel by the same compiler and under the same ``SOURCE_DATE_EPOCH``.
"""

import gzip
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist
from setuptools.errors import BaseError, CCompilerError, ExecError, OptionError

# Rounding after every operation is part of the semantics; the other two let loops vectorise.
EXACT = ["-fno-fast-math", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]
FLAGS = ["-std=c++17", "-O3", *EXACT, "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"]
# Python's own flags come before these: -g would write the name of the folder into the library, and
# -fwrapv would cost instructions in loops whose integers cannot overflow.
FLAGS += ["-g0", "-fno-wrapv"]
LINK = ["-pthread", *(["-ldl", "-Wl,-z,defs"] if sys.platform == "linux" else [])]

HEADERS = sorted(str(path) for end in ("h", "cuh") for path in Path("csrc").rglob(f"*.{end}"))

CPU = Extension(
    "llm_sampling.lib.libllm_sampling_cpu",
    sources=["csrc/cpu/sample.cpp"],
    depends=HEADERS,
    extra_compile_args=FLAGS,
    extra_link_args=LINK,
    language="c++",
)

# No contraction into fused multiply-adds. That subnormals are kept is nvcc's default.
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-shared", "-cudart", "static", "--threads", "0"]
NVCC_FLAGS += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
#: Machine code for these runs on their device and on those of the same major version after it. None
#: has an "a": code for 90a or 100a would run on that one device alone.
ARCHITECTURES = ["80", "86", "89", "90", "100", "120"]
#: From their PTX a driver compiles for every other device from 8.0 on: from that for 90, which has
#: clusters, wherever it can.
PORTABLE = ["80", "90"]

CUDA = Extension(
    "llm_sampling.lib.libllm_sampling_cuda",
    sources=[f"csrc/cuda/{name}.cu" for name in ("launch", "sample", "history", "rules")],
    depends=HEADERS,
)


def find_nvcc() -> str | None:
    """The nvcc of CUDA_HOME or CUDA_PATH, else the first on the path, else /usr/local/cuda's."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=str(Path(home) / "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def architecture_options(nvcc: str) -> list[str]:
    """The -gencode options for what this nvcc knows of ARCHITECTURES and PORTABLE."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    known = listed.stdout.split()
    if f"sm_{PORTABLE[0]}" not in known:
        raise ExecError(f"{nvcc} does not know the architecture {PORTABLE[0]}")
    return [
        f"-gencode=arch=compute_{arch},code={kind}_{arch}"
        for kind, of_kind in (("sm", ARCHITECTURES), ("compute", PORTABLE))
        for arch in of_kind
        if f"sm_{arch}" in known
    ]


class BuildLibraries(build_ext):
    """A library that cannot be built leaves its reason behind; the package works without it."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        for old in (library, failure_of(library)):
            old.unlink(missing_ok=True)
        wanted = os.environ.get("LLM_SAMPLING_CUDA", "auto")
        if wanted not in ("auto", "0", "1"):
            raise OptionError(f"LLM_SAMPLING_CUDA must be auto, 0 or 1, got {wanted!r}")
        try:
            if ext is CUDA:
                self.build_cuda(library, wanted)
            else:
                super().build_extension(ext)
        except (BaseError, CCompilerError, OSError, subprocess.CalledProcessError) as error:
            if ext is CUDA and wanted == "1":
                raise
            backend = library.stem.rpartition("_")[2]
            print(f"warning: the {backend} backend was not built: {error}", file=sys.stderr)
            library.unlink(missing_ok=True)  # a compiler may leave half of it
            failure_of(library).write_text(" ".join(str(error).split()))

    def build_cuda(self, library: Path, wanted: str) -> None:
        if wanted == "0":
            raise ExecError("LLM_SAMPLING_CUDA was 0")
        nvcc = find_nvcc()
        if nvcc is None:
            raise ExecError("nvcc was not found")
        self.spawn(
            [nvcc, *NVCC_FLAGS, *architecture_options(nvcc), "-o", str(library), *CUDA.sources]
        )

    def get_outputs(self) -> list[str]:
        return [output for output in super().get_outputs() if Path(output).exists()]

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            wanted = Path(self.get_ext_filename(ext.name))
            built = Path(self.build_lib) / wanted
            wanted.parent.mkdir(parents=True, exist_ok=True)
            for source, target in ((built, wanted), (failure_of(built), failure_of(wanted))):
                target.unlink(missing_ok=True)
                if source.exists():
                    self.copy_file(str(source), str(target))


def failure_of(library: Path) -> Path:
    """Where the reason is written why a library was not built."""
    return library.with_suffix(".failure.txt")


class PlatformWheel(bdist_wheel):
    """The libraries need a platform, but no particular Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]

    def write_wheelfile(self, wheelfile_base: str, *args: str, **kwargs: str) -> None:
        """The last file: all are there then, and go into the archive with their modes."""
        super().write_wheelfile(wheelfile_base, *args, **kwargs)
        for path in filter(Path.is_file, Path(self.bdist_dir).rglob("*")):
            path.chmod(mode_of(path))


class SameSdist(sdist):
    """An archive that has nothing of the machine and the moment that it was made on and at."""

    def make_archive(self, base_name: str, format: str, *args: str, **kwargs: str) -> str:
        if format != "gztar":
            return super().make_archive(base_name, format, *args, **kwargs)
        moment = int(os.environ.get("SOURCE_DATE_EPOCH", EARLIEST))
        name = f"{base_name}.tar.gz"
        self.mkpath(str(Path(name).parent))
        root = kwargs["base_dir"]
        with (
            open(name, "wb") as raw,
            gzip.GzipFile("", "wb", fileobj=raw, mtime=moment) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for path in sorted(filter(Path.is_file, Path(root).rglob("*"))):
                member = tarfile.TarInfo(path.as_posix())
                member.size = path.stat().st_size
                member.mtime = moment
                member.mode = mode_of(path)
                with path.open("rb") as file:
                    archive.addfile(member, file)
        return name


#: The first moment that a zip file can hold: a wheel may be built of these files.
EARLIEST = 315532800


def mode_of(path: Path) -> int:
    """0o755 or 0o644, whatever the umask was."""
    return 0o755 if path.stat().st_mode & 0o100 else 0o644


COMMANDS = {"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel, "sdist": SameSdist}
setup(ext_modules=[CPU, CUDA], cmdclass=COMMANDS)
