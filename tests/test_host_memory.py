"""What training and freezing free, they get back without the system's help; freezing gives it back in the end."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vat_fast import host_memory

FAULTS = """
import resource, sys
from vat_fast import host_memory
if sys.argv[1] == "keep" and not host_memory.keep_freed_memory():
    print(-1)
    raise SystemExit
import torch

def step():
    blocks = [torch.ones(8 << 20) for _ in range(4)]

step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_a_second_step_faults_no_pages_in() -> None:
    def faults(how: str) -> int:
        result = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        return int(result.stdout.split()[-1])

    kept = faults("keep")
    if kept < 0:
        pytest.skip("no glibc here")
    # Five steps of 128 MiB are 163,840 pages of 4 KiB, or 320 where the system gives huge pages unasked.
    default = faults("default")
    assert kept < default / 5, (kept, default)


FOR_A_WHILE = """
import psutil, resource, torch
from vat_fast.host_memory import freed_memory_kept

def step():
    blocks = [torch.ones(8 << 20) for _ in range(4)]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

process = psutil.Process()
step()
default, before = faults(), process.memory_info().rss
with freed_memory_kept():
    step()
    kept = faults()
    block = torch.ones(8 << 20)  # holes below it
    small = torch.ones(8)
print(default, kept, (process.memory_info().rss - before) >> 20)
"""


def test_what_is_kept_for_a_while_is_given_back() -> None:
    if host_memory._glibc() is None:
        pytest.skip("no glibc here")
    result = subprocess.run([sys.executable, "-c", FOR_A_WHILE], capture_output=True, text=True, check=True)
    default, kept, grown = map(int, result.stdout.split())
    assert kept < default / 5
    assert grown < 32 + 16  # the block that lives on
