"""LoRA: nothing changes at first, only what should train does, and merged equals unmerged."""

import sys

import pytest
import torch
from torch.nn import functional as F

from benchmarks.variants import random_batch, randomise, small_config
from vat_fast import VAT
from vat_fast.config import ConfigError
from vat_fast.layers import parameters_of
from vat_fast.train.adapters import LoRAOptions, add_lora, has_lora, merge_lora

OPTIONS = LoRAOptions(rank=3, alpha=6.0)


def test_trains_alone_and_merges() -> None:
    config = small_config("siglip2-so400m", "VAT")
    vat = VAT(config)
    randomise(vat, 0)
    batch = random_batch(config, 2, 1)
    before = vat.loss(batch).detach()
    frozen = {name: p.detach().clone() for name, p in vat.named_parameters() if name.startswith("vision_blocks")}
    add_lora(vat, OPTIONS)
    torch.testing.assert_close(vat.loss(batch).detach(), before)
    trains = {name for name, p in vat.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in trains if name.startswith("vision_blocks"))
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
    merged = merge_lora(state, OPTIONS)
    assert not has_lora(merged)
    plain = VAT(config)
    plain.load_state_dict(merged)
    torch.testing.assert_close(plain.loss(batch), vat.loss(batch))
    assert float(plain.loss(batch).detach()) < float(before)
    changed = {name for name, value in frozen.items() if not torch.equal(merged[name], value)}
    assert changed == {
        f"vision_blocks.{index}.{part}.weight"
        for index in range(len(vat.vision_blocks) - 1)
        for part in OPTIONS.targets
    }
    assert merge_lora(merged, OPTIONS) == merged


def test_norms_train_where_asked() -> None:
    vat = VAT(small_config("dinov2-large", "VAT"))
    add_lora(vat, LoRAOptions(targets=("qkv",), norms=True))
    trains = {name for name, p in vat.named_parameters() if p.requires_grad}
    assert {"vision_blocks.0.norm1.weight", "vision_blocks.0.ls1"} <= trains
    assert not any("fc1.base_layer" in name for name, _ in vat.named_parameters())
    with pytest.raises(ConfigError, match="already"):
        add_lora(vat, LoRAOptions())


def adapted(seed: int = 0) -> VAT:
    """A small model whose adapters already do something."""
    vat = VAT(small_config("siglip2-so400m", "VAT"))
    torch.manual_seed(seed)
    randomise(vat, seed)
    add_lora(vat, OPTIONS)
    for name, p in vat.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(p, std=0.02)
    return vat


def test_weights_are_those_that_pefts_own_forward_uses() -> None:
    layer = adapted().vision_blocks[0].fc1
    x = torch.randn(5, layer.in_features)
    updated = F.linear(x, *parameters_of(layer))
    torch.testing.assert_close(updated, layer(x))
    layer.enable_adapters(False)
    plain = F.linear(x, *parameters_of(layer))
    assert torch.equal(plain, layer(x))
    assert not torch.allclose(plain, updated)
    layer.enable_adapters(True)
    layer.merge()
    torch.testing.assert_close(F.linear(x, *parameters_of(layer)), updated)


@pytest.mark.parametrize("precision", ["fp32", "recompute", "autocast", "bf16"])
def test_gradients_are_those_of_the_plain_model_with_updated_weights(precision: str) -> None:
    """In the same precision; the factors' gradients follow from those of the updated weights."""
    vat = adapted()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    batch = random_batch(vat.config, 2, 1)
    batch = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
    plain = VAT(vat.config)
    vat.to(dtype)
    plain.load_state_dict(merge_lora(vat.state_dict(), OPTIONS))
    plain.to(dtype)
    vat.recompute_layers = precision == "recompute"
    for model in (vat, plain):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            prediction, target = model.predict(batch)
        # An L1 loss's gradient jumps where rounding flips a sign.
        F.mse_loss(prediction.float(), target.float()).backward()
    tolerance = 1e-5 if precision in ("fp32", "recompute") else 0.2
    compared = 0
    for name, layer in vat.named_modules():
        if hasattr(layer, "base_layer"):
            up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
            grad = OPTIONS.scale * plain.get_submodule(name).weight.grad.float()
            for factor, expected in ((up, grad @ down.float().mT), (down, up.float().mT @ grad)):
                assert float((factor.grad - expected).detach().norm() / expected.detach().norm()) < tolerance, name
                compared += 1
    assert compared == 2 * 4 * (len(vat.vision_blocks) - 1)


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"needs the library peft: pip install 'vat_fast\[train\]'"):
        add_lora(VAT(small_config("dinov2-large", "VAT")), LoRAOptions())


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match=r"train\.lora\.rank"):
        LoRAOptions(rank=0)
    with pytest.raises(ConfigError, match=r"train\.lora\.targets"):
        LoRAOptions(targets=("query",))
    with pytest.raises(ConfigError, match=r"unknown key train\.lora\.r;"):
        LoRAOptions.from_dict({"r": 4})
    with pytest.raises(ConfigError, match="nothing to adapt"):
        add_lora(VAT(small_config("siglip2-so400m", "VAT").replace(depth=2)), LoRAOptions())
    with pytest.raises(ValueError, match=r"adapter of a has no 'a\.lora_B\.default\.weight'"):
        merge_lora({"a.base_layer.weight": torch.zeros(2, 2)}, OPTIONS)
    with pytest.raises(ConfigError, match="share their weights"):
        add_lora(VAT(small_config("siglip2-so400m", "VAT").replace(action_stream="shared")), LoRAOptions())
