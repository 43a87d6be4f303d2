"""Models as shapes alone."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.variants import small_config
from vat_fast import VAT
from vat_fast.reference import ReferenceVAT
from vat_fast.without_values import without_values

LOADING = """
import sys, torch
from benchmarks.variants import small_config
from vat_fast import VAT
VAT(small_config("vit-tiny", "VAT")).save_pretrained(sys.argv[1])
assert VAT.from_pretrained(sys.argv[1]).pos_embed.any()
print("torch._dynamo" in sys.modules)
"""


@pytest.mark.parametrize("model", [VAT, ReferenceVAT])
@pytest.mark.parametrize("variant", ["VAT", "diffusion", "proprio"])
def test_all_parameters_are_there_without_memory(model: type[torch.nn.Module], variant: str) -> None:
    config = small_config("dinov2-large", variant)
    with without_values():
        empty = model(config)
    full = model(config)
    assert {name: p.shape for name, p in empty.state_dict().items()} == {
        name: p.shape for name, p in full.state_dict().items()
    }
    assert all(p.is_meta for p in empty.parameters())
    assert full.pos_embed.any()


def test_loading_a_checkpoint_does_not_import_the_compiler(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LOADING, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"
