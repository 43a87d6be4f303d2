"""The launches of frozen plans run in Triton's interpreter, whose bf16 and fp8 need repair."""

from vat_fast.kernels.proof import interpreter

interpreter.install()
