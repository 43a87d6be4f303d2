"""Where a test of the frozen policy cannot run."""

import pytest

from vat_fast.precision import computes_bfloat16_in_onednn

needs_onednn_bf16 = pytest.mark.skipif(
    not computes_bfloat16_in_onednn(), reason="oneDNN has no bf16 products for this processor"
)
