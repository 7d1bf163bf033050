"""compute-sanitizer over every op on small shapes: memory errors, and races in shared memory."""

import ast
import os
import re
import shutil
from pathlib import Path

from bench.suite.environment import ROOT

TOOLS = ("memcheck", "racecheck")
PLANTED = "_planted_write_kernel"
_USUAL_PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")


def find_sanitizer() -> str | None:
    """Where the program is, or None."""
    places = [os.environ.get("PATH", ""), *_USUAL_PLACES]
    if "CUDA_HOME" in os.environ:
        places.append(f"{os.environ['CUDA_HOME']}/bin")
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def sanitizer_command(program: str, tool: str, log: Path) -> list[str]:
    """What to put before the command that is watched."""
    command = [program, "--tool", tool, "--error-exitcode", "9", "--log-file", str(log)]
    if tool == "memcheck":
        # PyTorch asks for what a device may not have, and deals with the answer.
        command += ["--report-api-errors", "no"]
    return command


def our_kernels() -> set[str]:
    """Names of the Triton kernels: jitted functions whose names end in ``_kernel``."""
    sources = (ROOT / "kernels" / "_triton").glob("*.py")
    trees = [ast.parse(path.read_text("utf-8")) for path in sources]
    return {
        node.name
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and node.name.endswith("_kernel")
        and any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }


def finished(report: str) -> bool:
    """Whether the tool got to its end, rather than refusing the device or being killed."""
    return re.search(r"^=+ (ERROR|RACECHECK) SUMMARY:", report, re.M) is not None


def findings(report: str) -> list[str]:
    """What was found: blocks of lines that start with ``=========``, separated by empty ones."""
    found = []
    for block in re.split(r"^=========\s*$", report, flags=re.M):
        lines = [line.lstrip("= ").strip() for line in block.strip().splitlines()]
        text = "\n".join(lines)
        if re.search(r"^(Invalid |Misaligned |Error: |.*Race reported )", text, re.M):
            found.append(text[:600])
    return found
