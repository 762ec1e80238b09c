"""Reads the machine code of a cubin: registers, stack, and the global loads and stores of the loops of each kernel.

The disassembler is the one that Triton brings along (``triton/backends/nvidia/bin``).

    python tests/kernels/gpu/cuda/support/cuda_sass.py  writes sass_ratchet.json anew, after a change that is meant
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import cuda_build

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
KERNEL = re.compile(r"\d+([a-z]+(?:_[a-z]+)*_kernel)I(.*?)EEv")
TYPES = {
    **{"d": "float64", "f": "float32", "NS_4HalfE": "float16", "NS_8BFloat16E": "bfloat16"},
    **{"t": "16 bit", "j": "32 bit", "m": "64 bit"},
}


def tools() -> Path | None:
    """The folder with cuobjdump and nvdisasm, or None."""
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    folder = Path(triton.origin).parent / "backends" / "nvidia" / "bin"
    return folder if all((folder / name).exists() for name in ("cuobjdump", "nvdisasm")) else None


def kernel_name(symbol: str) -> str | None:
    """``score_kernel<float32>`` from a mangled name, or None if it is no kernel of ours."""
    match = KERNEL.search(symbol)
    if not match:
        return None
    arguments = match[2]
    direction = {"Lb1E": ", gather", "Lb0E": ", scatter"}.get(arguments[-4:], "")
    if direction:
        arguments = arguments[:-4]
    return f"{match[1]}<{TYPES.get(arguments, arguments)}{direction}>"


def resources(cubin: Path) -> dict[str, dict[str, int]]:
    """Registers, stack and local memory (bytes per thread) of every kernel."""
    text = _run(tools() / "cuobjdump", "-res-usage", cubin)
    found = {}
    for symbol, usage in re.findall(r"Function (\S+):\n\s+(.*)", text):
        if name := kernel_name(symbol):
            numbers = dict(re.findall(r"([A-Z]+):(\d+)", usage))
            found[name] = {key.lower(): int(numbers[key]) for key in ("REG", "STACK", "LOCAL")}
    return found


def loops(cubin: Path) -> dict[str, list[Counter]]:
    """For every kernel its innermost loops, in the order of the code: how many instructions of each kind they hold.

    Kinds: ``LDG.128`` and ``STG.128`` (16 bytes), ``LDG`` and ``STG`` (less), ``local`` (LDL, STL), ``all``.
    """
    found: dict[str, list[Counter]] = {}
    for section in _run(tools() / "nvdisasm", "-c", cubin).split("//--------------------- .text.")[1:]:
        name = kernel_name(section.split(None, 1)[0])
        if not name:
            continue
        code: list[tuple[str, str]] = []
        labels: dict[str, int] = {}
        for line in section.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                labels[label[1]] = len(code)
            elif instruction := INSTRUCTION.search(line):
                code.append((instruction[3], instruction[4]))
        spans = []
        for i, (opcode, operands) in enumerate(code):
            target = re.search(r"`\((\.L_x_\d+)\)", operands)
            # A loop is a branch back. A branch to itself is the trap that ends every kernel.
            if opcode.startswith("BRA") and target and labels.get(target[1], i) < i:
                spans.append((labels[target[1]], i))
        inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
        found[name] = [_mix(code[first : last + 1]) for first, last in sorted(inner)]
    return found


def _mix(code: list[tuple[str, str]]) -> Counter:
    mix = Counter(all=len(code))
    for opcode, _ in code:
        base = opcode.split(".")[0]
        if base in ("LDG", "STG"):
            mix[base + (".128" if ".128" in opcode else "")] += 1
        elif base in ("LDL", "STL"):
            mix["local"] += 1
    return mix


def _run(*command: object, cwd: str | None = None) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True, cwd=cwd).stdout


def measure() -> dict:
    """What the ratchet holds: the compiler, and for every kernel its registers and its loops with 128-bit accesses."""
    release = re.search(r"release ([\d.]+)", _run(cuda_build.find_nvcc(), "--version"))
    kernels = {}
    for source in cuda_build.SOURCES:
        with tempfile.TemporaryDirectory() as folder:
            _run(tools() / "cuobjdump", "-xelf", "all", cuda_build.cuda_object(source), cwd=folder)
            (cubin,) = Path(folder).glob("*.cubin")
            bodies = loops(cubin)
            for name, usage in resources(cubin).items():
                wide = [dict(sorted(mix.items())) for mix in bodies[name] if mix["LDG.128"] or mix["STG.128"]]
                local = sum(mix["local"] for mix in bodies[name])
                kernels[name] = {**usage, "local_accesses": local, "wide_loops": wide}
    return {"nvcc": release[1] if release else "unknown", "kernels": dict(sorted(kernels.items()))}


if __name__ == "__main__":
    target = Path(__file__).parents[1] / "sass_ratchet.json"
    target.write_text(json.dumps(measure(), indent=1) + "\n")
    print(f"wrote {target}")
