"""What the retuner checks before it times, and the attention choice that it writes."""

import sys
import types

import pytest

from vat_fast.kernels import attention_model, retune, static_model, tables
from vat_fast.kernels.vision_attention import vision_attention_ref


def test_patch_embedding_is_checked_before_it_is_timed():
    blocks = static_model.Blocks(64, 64, 32, 8, 1, 4, 2)
    assert retune.patch_embed_call(512, 24, 592, blocks, "cpu")().shape == (1, 2, 256, 24)


def test_attention_times_become_the_choice():
    asked = []

    def time(provider, head_dim, views):
        asked.append((provider, head_dim, views))
        return views * (2.0 if provider == "triton" else 1.5 if head_dim == 64 else 2.5)

    rows = retune.flash_rows(time)
    assert len(asked) == 2 * len(retune.HEAD_DIMS) * len(retune.VIEWS) == 2 * len(rows)
    assert rows[0] == (64, 512, 4.0, 3.0)
    assert [row[1] for row in rows[:3]] == [512, 2048, None]
    scope = {}
    exec(retune.source({}, 90, "a card, a day", rows), scope)
    assert scope["FLASH_ATTENTION"] == {90: rows}
    assert scope["MEASURED"] == {90: "a card, a day"}
    assert scope["PATCH_EMBED"] == tables.PATCH_EMBED
    exec(retune.source({}, 90, "a card, a day"), scope)
    assert scope["FLASH_ATTENTION"] == tables.FLASH_ATTENTION


@pytest.mark.parametrize("right", [True, False])
def test_attention_is_checked_before_it_is_timed(right, monkeypatch):
    def flash_attn_qkvpacked_func(qkv, softmax_scale):
        scale = softmax_scale if right else 2 * softmax_scale
        return vision_attention_ref(qkv.flatten(2), qkv.shape[3], scale).unflatten(-1, qkv.shape[3:])

    module = types.ModuleType("flash_attn")
    module.flash_attn_qkvpacked_func = flash_attn_qkvpacked_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(retune, "PATCHES", 32)
    monkeypatch.setattr(retune, "HEADS", 2)
    if right:
        calls = retune.vision_attention_calls(16, 1, "cpu")
        assert all(call().shape == (1, 32, 32) for call in calls.values())
    else:
        with pytest.raises(RuntimeError, match="wrong result with flash_attn"):
            retune.vision_attention_calls(16, 1, "cpu")


@pytest.mark.parametrize("name", attention_model.ATTENTION_TABLES)
def test_attention_of_every_table_is_checked_before_it_is_timed(name):
    problem = attention_model.Problem(1, 2, 40, 40 if name.startswith("VISION") else 64, 16)
    splits = 2 if attention_model.ATTENTION_TABLES[name].op == "cross_attention" else 1
    retune.attention_call(name, problem, attention_model.AttentionBlocks(32, 32, splits, 4, 1), "cpu")()


def test_the_fastest_attention_that_compiles_is_written():
    device = static_model.DEVICES["H100"]

    def time(name, problem, blocks):
        if blocks.BLOCK_N == 128:
            raise RuntimeError("out of resources")
        return abs(blocks.BLOCK_M - 64) + abs(blocks.BLOCK_N - 64) + blocks.num_stages + problem.batch * blocks.SPLITS

    rows = dict(retune.retuned_attention(device, time, ["VISION_ATTENTION", "CROSS_ATTENTION"]))
    assert rows["VISION_ATTENTION"] == [(bound, None, 64, 64, 1, 4, 2) for bound in (64, 80, None)]
    scope = {}
    exec(retune.source(rows, 90, "a card, a day"), scope)
    assert scope["CROSS_ATTENTION"][90] == rows["CROSS_ATTENTION"]
    assert scope["CROSS_ATTENTION"][80] == tables.CROSS_ATTENTION[80]
