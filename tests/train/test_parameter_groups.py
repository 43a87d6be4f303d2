"""Which weight decay and learning rate each parameter gets."""

from dataclasses import dataclass

import pytest

from benchmarks.variants import small_config
from vat_fast import VAT
from vat_fast.train.parameter_groups import describe_groups, parameter_groups


@dataclass
class Options:
    weight_decay: float = 0.01
    decay_all: bool = True
    layer_decay: float = 1.0
    vision_lr: float = 1.0
    action_lr: float = 1.0


@pytest.fixture
def vat() -> VAT:
    return VAT(small_config("dinov2-large", "VAT"))


def settings(vat: VAT, options: Options) -> dict[str, tuple[float, float]]:
    groups = parameter_groups(vat, options)
    by_id = {id(p): name for name, p in vat.named_parameters()}
    for group in groups:
        assert [by_id[id(p)] for p in group["params"]] == group["names"]
    return {name: (group["weight_decay"], group["lr_scale"]) for group in groups for name in group["names"]}


def test_the_recipe_is_one_group(vat: VAT) -> None:
    (group,) = parameter_groups(vat, Options())
    assert len(group["params"]) == len(list(vat.parameters()))
    assert (group["weight_decay"], group["lr_scale"]) == (0.01, 1.0)


def test_no_decay_for_norms_biases_and_embeddings(vat: VAT) -> None:
    found = settings(vat, Options(decay_all=False))
    assert set(found) == {name for name, _ in vat.named_parameters()}
    decayed = {name for name, (decay, _) in found.items() if decay}
    assert {"patch_embed.weight", "vision_blocks.0.qkv.weight", "action_blocks.1.film.fc1.weight"} <= decayed
    for name in found:
        spared = name.endswith("bias") or "norm" in name or ".ls" in name or "position" in name
        spared |= name in ("pos_embed", "class_token", "register_tokens", "action_tokens", "task_embedding.weight")
        assert (name in decayed) != spared, name


def test_layer_decay_and_stream_factors(vat: VAT) -> None:
    found = settings(vat, Options(layer_decay=0.5, vision_lr=0.1, action_lr=2.0))
    last = len(vat.vision_blocks) - 1
    assert found[f"vision_blocks.{last}.norm1.weight"][1] == 0.1
    assert found["vision_blocks.0.qkv.weight"][1] == pytest.approx(0.1 * 0.5**last)
    assert found["pos_embed"][1] == found["patch_embed.weight"][1] == pytest.approx(0.1 * 0.5 ** (last + 1))
    assert found["action_blocks.0.query.weight"][1] == found["head.fc1.weight"][1] == 2.0


def test_frozen_parameters_are_in_no_group(vat: VAT) -> None:
    for name, parameter in vat.named_parameters():
        parameter.requires_grad_(name.startswith("head."))
    groups = parameter_groups(vat, Options(layer_decay=0.5))
    assert len(groups) == 1
    assert all(name.startswith("head.") for name in groups[0]["names"])
    assert "head.norm1.weight" in describe_groups(groups)
    vat.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter"):
        parameter_groups(vat, Options())
