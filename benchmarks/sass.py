"""Reads the machine code of NVIDIA's GPUs, by the cuobjdump and nvdisasm of CUDA or of Triton."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple


class Instruction(NamedTuple):
    """An instruction, and the lines of its source, from the innermost inlined call outwards."""

    name: str
    suffixes: list[str]
    operands: str
    lines: tuple[tuple[str, int], ...]

    @property
    def loaded(self) -> int:
        """The bytes that a thread loads from global memory; 0 for other instructions."""
        return self.bytes if self.name in ("LDG", "LDGSTS") else 0

    @property
    def bytes(self) -> int:
        """The bytes of each thread, for an instruction that loads or stores."""
        sizes = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return next((sizes[suffix] for suffix in self.suffixes if suffix in sizes), 4)


def find_tool(name: str) -> str | None:
    """The path of a tool, from the PATH or else from Triton's package."""
    triton = importlib.util.find_spec("triton")
    folders = triton.submodule_search_locations if triton is not None else None
    more = [Path(folder, "backends/nvidia/bin") for folder in folders or ()]
    return shutil.which(name) or next(
        filter(None, (shutil.which(name, path=p) for p in more)), None
    )


def run_tool(name: str, *options: str, cubin: bytes) -> str:
    """What one of the tools prints about a cubin."""
    tool = find_tool(name)
    if tool is None:
        raise FileNotFoundError(f"{name} is neither on the path nor in Triton's package")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Code(NamedTuple):
    """A function's instructions, and the places of its loops and detours among them.

    A loop extends from a label to the last jump back to it. A detour is the code by which the lanes
    of a diverged warp execute a shuffle or a vote; a warp that has not diverged never runs it.
    """

    instructions: list[Instruction]
    loops: list[range]
    detours: list[range]


def disassemble(cubin: bytes, is_of_interest: Callable[[Path], bool]) -> dict[str, Code]:
    """The functions of a cubin by name; instructions have the lines of files of interest only."""
    text = run_tool("nvdisasm", "-c", "-gi", cubin=cubin)
    parts = re.split(r"^\s*\.text\.(\S+):$", text, flags=re.M)
    functions = zip(parts[1::2], parts[2::2], strict=True)
    return {name: read_function(body, is_of_interest) for name, body in functions}


def read_function(text: str, is_of_interest: Callable[[Path], bool]) -> Code:
    """Parse what nvdisasm prints for one function."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str, bool]] = []  # place, label, whether it is unconditional
    diverging: list[str] = []
    lines: tuple[tuple[str, int], ...] = ()
    is_new = True
    for line in map(str.strip, text.splitlines()):
        if match := re.match(r"(\.L_x_\d+):", line):
            labels[match[1]] = len(code)
        elif match := re.match(r'//## File "([^"]*)", line (\d+)', line):
            path = Path(match[1])
            here = ((path.name, int(match[2])),) if is_of_interest(path) else ()
            lines = (() if is_new else lines) + here
            is_new = False
        elif match := re.match(r"/\*[0-9a-f]{4,}\*/\s+(@\S+\s+)?([A-Z][\w.]*)\s*([^;]*);", line):
            opcode, *suffixes = match[2].split(".")
            target = re.search(r"\.L_x_\d+", match[3])
            if opcode == "BRA" and target:
                if "DIV" in suffixes:
                    diverging.append(target[0])
                else:
                    jumps.append((len(code), target[0], match[1] is None))
            code.append(Instruction(opcode, suffixes, match[3], lines))
            is_new = True
    ends = {labels[label]: place + 1 for place, label, _ in jumps if labels[label] <= place}
    always = [place for place, _, is_always in jumps if is_always]
    detours = []
    for start in (labels[label] for label in diverging):
        detours.append(range(start, min(place for place in always if place >= start) + 1))
    return Code(code, [range(start, end) for start, end in ends.items()], detours)


def count_spills(code: Iterable[Instruction]) -> int:
    """The number of loads and stores of spilled registers."""
    return sum(i.name in ("LDL", "STL") for i in code)
