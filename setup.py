"""Builds csrc/ into plain shared libraries with a C interface; metadata is in pyproject.toml.

The libraries link neither torch nor Python, so one build serves every version of both.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

# Rounding after every operation is part of the semantics; the other two let loops vectorise.
EXACT = ["-fno-fast-math", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]
FLAGS = ["-std=c++17", "-O3", *EXACT, "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"]

CPU = Extension(
    "llm_sampling.lib.libllm_sampling_cpu",
    sources=["csrc/cpu/sample.cpp"],
    depends=[str(path) for path in Path("csrc").rglob("*.h")],
    extra_compile_args=FLAGS,
    extra_link_args=["-pthread", "-Wl,-z,defs"] if sys.platform == "linux" else ["-pthread"],
    language="c++",
)


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
        try:
            super().build_extension(ext)
        except (BaseError, CCompilerError) as error:
            print(f"warning: the cpu backend was not built: {error}", file=sys.stderr)
            failure_of(library).write_text(" ".join(str(error).split()))

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


setup(ext_modules=[CPU], cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel})
