"""Reads compiled code: registers, shared memory, occupancy, tensor-core instructions, widths of global accesses.

NVIDIA code is disassembled with the cuobjdump that comes with Triton; AMD code is read as the assembly Triton keeps.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import triton

Arch = int | str


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor holds. Source: CUDA C++ Programming Guide, table of technical specifications per
    compute capability, and cuda_occupancy.h of the CUDA toolkit."""

    warps: int
    blocks: int
    shared: int
    """bytes of shared memory on a multiprocessor"""
    shared_per_block: int
    """bytes that one block may ask for"""
    registers: int = 65536


LIMITS: dict[int, Limits] = {
    80: Limits(64, 32, 164 * 1024, 163 * 1024),
    86: Limits(48, 16, 100 * 1024, 99 * 1024),
    87: Limits(48, 16, 164 * 1024, 163 * 1024),
    89: Limits(48, 24, 100 * 1024, 99 * 1024),
    90: Limits(64, 32, 228 * 1024, 227 * 1024),
    100: Limits(64, 32, 228 * 1024, 227 * 1024),
    110: Limits(48, 24, 228 * 1024, 227 * 1024),
}
# CDNA3 instruction set architecture guide: 512 VGPRs and 64 KB of LDS for each of a compute unit's SIMDs and groups.
GFX942_VGPRS, GFX942_LDS, GFX942_WAVES = 512, 64 * 1024, 8


def occupancy(arch: int, registers: int, shared: int, warps: int) -> tuple[int, str]:
    """(blocks on one multiprocessor, what limits them) on NVIDIA.

    Registers are given out to warps in units of 256 from four equal files; a block's shared memory is rounded up to 128
    bytes and costs 1 KB more.
    """
    limits = LIMITS[arch]
    per_warp = math.ceil(registers * 32 / 256) * 256
    bounds = {
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
        "registers": limits.registers // 4 // per_warp * 4 // warps,
        "shared": limits.shared // (math.ceil((shared + 1024) / 128) * 128),
    }
    name = min(bounds, key=lambda bound: bounds[bound])
    return bounds[name], name


@dataclass
class Mix:
    """Counts over a stretch of instructions. Bytes are per thread and instruction, whatever the mask."""

    instructions: int = 0
    mma: int = 0
    mma_kind: str = ""
    local: int = 0
    """loads and stores of local memory: spills"""
    load_bytes: dict[int, int] = field(default_factory=dict)
    """bytes that global loads and asynchronous copies fetch, by width of one access"""
    store_bytes: dict[int, int] = field(default_factory=dict)
    bulk: int = 0
    """bulk (TMA) copies"""

    def narrow_share(self) -> float:
        """Share of the loaded and stored bytes that moves in accesses narrower than 16 bytes."""
        total = sum(self.load_bytes.values()) + sum(self.store_bytes.values())
        wide = sum(n for counts in (self.load_bytes, self.store_bytes) for width, n in counts.items() if width >= 16)
        return 1 - wide / total if total else 0.0


_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?);")
_MMA = ("HMMA", "IMMA", "QMMA", "DMMA", "HGMMA", "QGMMA", "IGMMA")
_BRANCHES = ("BRA", "s_branch", "s_cbranch")
# A line of AMD assembly: a label, or an instruction. Directives begin with a dot, comments with a semicolon.
_AMD_LABEL = re.compile(r"^([.\w]+):")
_AMD_INSTRUCTION = re.compile(r"^\t([a-z]\w*)\s*([^;]*)")
_AMD_MEMORY = re.compile(r"^(?:global|buffer|flat)_(load|store)_(?:[us]?(byte|short)|dword(?:x([234]))?)(?:_|$)")


def _width(opcode: str) -> int:
    """Bytes one thread moves: .128 is 16, .U16 is 2, no suffix is 4."""
    found = re.search(r"\.(?:U|S)?(8|16|64|128|256)(?:\.|$)", opcode)
    return int(found[1]) // 8 if found else 4


def mix(instructions: list[tuple[int, str, str]]) -> Mix:
    """Counts a stretch of (address, opcode, operands)."""
    counts = Mix(instructions=len(instructions))
    for _, opcode, _ in instructions:
        base = opcode.split(".")[0]
        amd = _AMD_MEMORY.match(opcode)
        if amd:
            width = {"byte": 1, "short": 2}.get(amd[2], 4 * int(amd[3] or 1))
            moved = counts.load_bytes if amd[1] == "load" else counts.store_bytes
            moved[width] = moved.get(width, 0) + width
        elif opcode.startswith(("v_mfma", "v_smfmac")):
            counts.mma += 1
            counts.mma_kind = opcode
        elif opcode.startswith(("scratch_load", "scratch_store")):
            counts.local += 1
        elif base in _MMA or (base.startswith("UTC") and "MMA" in base):
            counts.mma += 1
            counts.mma_kind = opcode
        elif base in ("LDG", "LDGSTS"):
            counts.load_bytes[_width(opcode)] = counts.load_bytes.get(_width(opcode), 0) + _width(opcode)
        elif base == "STG":
            counts.store_bytes[_width(opcode)] = counts.store_bytes.get(_width(opcode), 0) + _width(opcode)
        elif base in ("LDL", "STL"):
            counts.local += 1
        elif base.startswith(("UTMALDG", "UTMASTG", "UBLKCP")):
            counts.bulk += 1
    return counts


def hot_loop(instructions: list[tuple[int, str, str]]) -> Mix | None:
    """The loop with the most tensor-core instructions per instruction, else the longest; None without loops.

    Loops are backward branches. Density matters: an out-of-line wait on Blackwell branches back over nearly everything.
    """
    loops = []
    for address, opcode, operands in instructions:
        target = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith(_BRANCHES) else None
        if target and int(target[1], 16) < address:
            begin = int(target[1], 16)
            loops.append(mix([line for line in instructions if begin <= line[0] <= address]))
    return max(loops, key=lambda loop: (loop.mma / loop.instructions, loop.instructions), default=None)


def disassemble(sass: str) -> list[tuple[int, str, str]]:
    """(address, opcode, operands) of each instruction in cuobjdump's listing."""
    found = (_INSTRUCTION.match(line) for line in sass.splitlines())
    return [(int(match[1], 16), match[2], match[3]) for match in found if match]


def read_amd(text: str) -> list[tuple[int, str, str]]:
    """The same of AMD assembly: the line is the address, and a branch's label becomes its line in hexadecimal."""
    lines = text.splitlines()
    labels = {found[1]: number for number, line in enumerate(lines) if (found := _AMD_LABEL.match(line))}
    instructions = []
    for number, line in enumerate(lines):
        found = _AMD_INSTRUCTION.match(line)
        if found and not found[1].startswith("."):
            operands = found[2].strip()
            if found[1].startswith(_BRANCHES) and operands in labels:
                operands = hex(labels[operands])
            instructions.append((number, found[1], operands))
    return instructions


def tool(name: str) -> str:
    """Path of a CUDA tool bundled with Triton."""
    return os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)


def describe(compiled, arch: Arch) -> dict:
    """Everything the gate looks at, as plain data, from a compiled kernel."""
    if isinstance(arch, str):
        return _describe_amd(compiled)
    metadata = compiled.metadata
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run(tool("cuobjdump"), "--dump-resource-usage", str(cubin))
        instructions = disassemble(_run(tool("cuobjdump"), "-sass", str(cubin)))
    registers = int(_group(r"REG:(\d+)", usage))
    blocks, limit = occupancy(arch, registers, metadata.shared, metadata.num_warps)
    whole, loop = mix(instructions), hot_loop(instructions)
    return {
        "registers": registers,
        "stack": int(_group(r"STACK:(\d+)", usage)),
        "local": whole.local,
        "shared": metadata.shared,
        "tensor_memory": getattr(metadata, "tmem_size", 0) or 0,
        "blocks": blocks,
        "limit": limit,
        "instructions": whole.instructions,
        "mma": whole.mma,
        "mma_kind": whole.mma_kind,
        "narrow_share": round(whole.narrow_share(), 3),
        "loop": _loop_row(loop),
    }


def _loop_row(loop: Mix | None) -> dict | None:
    if loop is None:
        return None
    return {
        "instructions": loop.instructions,
        "mma": loop.mma,
        "load_bytes": {str(width): n for width, n in sorted(loop.load_bytes.items())},
        "bulk": loop.bulk,
        "narrow_share": round(loop.narrow_share(), 3),
    }


def _describe_amd(compiled) -> dict:
    text, metadata = compiled.asm["amdgcn"], compiled.metadata
    registers = int(_group(r"\.vgpr_count:\s+(\d+)", text))
    waves = min(GFX942_WAVES, GFX942_VGPRS // max(8, math.ceil(registers / 8) * 8))
    bounds = {
        "registers": waves * 4 // metadata.num_warps,
        "shared": GFX942_LDS // metadata.shared if metadata.shared else 32,
    }
    limit = min(bounds, key=lambda bound: bounds[bound])
    instructions = read_amd(text)
    whole, loop = mix(instructions), hot_loop(instructions)
    return {
        "registers": registers,
        "stack": int(_group(r"\.private_segment_fixed_size:\s+(\d+)", text)),
        "local": int(_group(r"\.vgpr_spill_count:\s+(\d+)", text)) + whole.local,
        "shared": metadata.shared,
        "tensor_memory": 0,
        "blocks": bounds[limit],
        "limit": limit,
        "instructions": whole.instructions,
        "mma": whole.mma,
        "mma_kind": whole.mma_kind,
        "narrow_share": round(whole.narrow_share(), 3),
        "loop": _loop_row(loop),
    }


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _group(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if not found:
        raise ValueError(f"the disassembler's output has no {pattern!r}: is it another version of cuobjdump?")
    return found[1]
