"""The machine code of the CUDA kernels, which takes minutes to compile."""

import pytest

from benchmarks import cuda_cost


@pytest.fixture(scope="session")
def cuda_code(build_once):
    """Return a function that compiles the kernels, with line information, once for all tests.

    It takes an architecture and returns the cubin and the PTX that it was made from.
    """

    def compile_in(folder, arch):
        flags = [*cuda_cost.FLAGS, "--keep", f"--keep-dir={folder}"]
        cubin = cuda_cost.compile_cubin(arch, flags)
        ptx = (folder / f"{cuda_cost.SOURCE.stem}.ptx").read_text()
        for path in folder.iterdir():
            path.unlink()
        (folder / "kernel.cubin").write_bytes(cubin)
        (folder / "kernel.ptx").write_text(ptx)

    def code_of(arch):
        folder = build_once(f"cuda_code_{arch}", lambda folder: compile_in(folder, arch))
        return (folder / "kernel.cubin").read_bytes(), (folder / "kernel.ptx").read_text()

    return code_of
