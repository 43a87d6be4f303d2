"""What a training frees, it gets back without the system's help."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from vat_fast.train.host_memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
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
