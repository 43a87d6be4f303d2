"""LoRA: nothing changes at first, only what should train does, and merged equals unmerged."""

import pytest
import torch

from benchmarks.variants import random_batch, randomise, small_config
from vat_fast import VAT
from vat_fast.config import ConfigError
from vat_fast.train.adapters import LoRAOptions, add_lora, has_lora, merge_lora


def test_trains_alone_and_merges() -> None:
    config = small_config("siglip2-so400m", "VAT")
    vat = VAT(config)
    randomise(vat, 0)
    batch = random_batch(config, 2, 1)
    before = vat.loss(batch).detach()
    frozen = {name: p.detach().clone() for name, p in vat.named_parameters() if name.startswith("vision_blocks")}
    options = LoRAOptions(rank=3, alpha=6.0)
    add_lora(vat, options)
    torch.testing.assert_close(vat.loss(batch).detach(), before)
    trains = {name for name, p in vat.named_parameters() if p.requires_grad}
    assert all(".0.up" in name or ".0.down" in name for name in trains if name.startswith("vision_blocks"))
    assert not any(name.startswith(("patch_embed", "pos_embed")) for name in trains)
    assert "action_blocks.0.query.weight" in trains
    optimizer = torch.optim.AdamW([p for p in vat.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        vat.loss(batch).backward()
        assert all(p.grad is not None for p in vat.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    state = vat.state_dict()
    assert has_lora(state)
    merged = merge_lora(state, options)
    assert not has_lora(merged)
    plain = VAT(config)
    plain.load_state_dict(merged)
    torch.testing.assert_close(plain.loss(batch), vat.loss(batch))
    assert float(plain.loss(batch).detach()) < float(before)
    changed = {name for name, value in frozen.items() if not torch.equal(merged[name], value)}
    assert changed == {
        f"vision_blocks.{index}.{part}.weight"
        for index in range(len(vat.vision_blocks) - 1)
        for part in options.targets
    }
    assert merge_lora(merged, options) == merged


def test_norms_train_where_asked() -> None:
    vat = VAT(small_config("dinov2-large", "VAT"))
    add_lora(vat, LoRAOptions(targets=("qkv",), norms=True))
    trains = {name for name, p in vat.named_parameters() if p.requires_grad}
    assert {"vision_blocks.0.norm1.weight", "vision_blocks.0.ls1"} <= trains
    assert not any("fc1.parametrizations" in name for name, _ in vat.named_parameters())
    with pytest.raises(ConfigError, match="already"):
        add_lora(vat, LoRAOptions())


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match=r"train\.lora\.rank"):
        LoRAOptions(rank=0)
    with pytest.raises(ConfigError, match=r"train\.lora\.targets"):
        LoRAOptions(targets=("query",))
    with pytest.raises(ConfigError, match=r"unknown key train\.lora\.r;"):
        LoRAOptions.from_dict({"r": 4})
    with pytest.raises(ConfigError, match="share their weights"):
        add_lora(VAT(small_config("siglip2-so400m", "VAT").replace(action_stream="shared")), LoRAOptions())
