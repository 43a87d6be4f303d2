"""Configuration tables: picking rules, targets, and the static model behind the shipped tables."""

import math
import os
import subprocess
import sys

import pytest
import torch

from vat_fast.kernels import (
    attention_model,
    attention_tiles,
    choose,
    configs,
    gemm,
    low_precision,
    static_model,
    tables,
)
from vat_fast.kernels.proof import aot

TABLE = {
    90: [
        ({"M": 64, "dtype": "bf16"}, {"tile": 1}),
        ({"M": (100, 200)}, {"tile": 2}),
        ({}, {"tile": 3}),
    ],
    "default": [({"M": 10}, {"tile": 4})],
}


@pytest.mark.parametrize(
    ("arch", "shape", "tile"),
    [
        (90, {"M": 64, "dtype": "bf16"}, 1),
        (90, {"M": 65, "dtype": "bf16"}, 3),
        (90, {"M": 64, "dtype": "fp16"}, 3),
        (90, {"M": 100, "dtype": "bf16"}, 2),
        (90, {"M": 201, "dtype": "bf16"}, 3),
        (80, {"M": 10, "dtype": "bf16"}, 4),
    ],
)
def test_first_matching_rule_wins(arch, shape, tile):
    assert configs.pick(TABLE, arch, **shape) == {"tile": tile}


def test_related_target_borrows_a_table_before_the_default():
    table = {89: [({}, {"tile": 89})], "gfx942": [({}, {"tile": 942})], "default": [({}, {"tile": 0})]}
    assert configs.pick(table, 120)["tile"] == 89
    assert configs.pick(table, "gfx90a")["tile"] == 942
    assert configs.pick(table, 100)["tile"] == 0


def test_a_picked_configuration_is_a_copy():
    configs.pick(TABLE, 80, M=1)["tile"] = 99
    assert configs.pick(TABLE, 80, M=1) == {"tile": 4}


def test_bad_tables_and_shapes_say_what_to_do():
    with pytest.raises(ValueError, match="no rule for 80 matches"):
        configs.pick(TABLE, 80, M=11)
    with pytest.raises(ValueError, match="asks for 'dtype'"):
        configs.pick(TABLE, 90, M=1)
    with pytest.raises(ValueError, match="no configurations for 75"):
        configs.pick({90: []}, 75)


def test_current_arch_in_the_interpreter_and_overridden():
    assert configs.current_arch() == configs.INTERPRETER_ARCH
    with configs.override_arch("gfx942"):
        assert configs.current_arch() == "gfx942"
        with configs.override_arch(100):
            assert configs.current_arch() == 100
        assert configs.current_arch() == "gfx942"
    assert configs.current_arch() == configs.INTERPRETER_ARCH


def test_without_a_device_the_error_says_what_to_do():
    code = "from vat_fast.kernels.configs import current_arch\ntry: current_arch()\nexcept RuntimeError as e: print(e)"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "need a CUDA or ROCm device" in run.stdout, run.stdout + run.stderr


# --- the static model --------------------------------------------------------------------------------------------


def test_shipped_tables_are_what_the_model_chooses():
    """Except for targets that somebody retuned on a card; MEASURED names it."""
    for name, table in choose.chosen().items():
        shipped = getattr(tables, name)
        assert shipped.keys() == table.keys()
        for arch, rows in table.items():
            assert arch in tables.MEASURED or shipped[arch] == rows, (
                f"{name}, {arch}: run python -m vat_fast.kernels.choose"
            )


@pytest.mark.parametrize("device", static_model.DEVICES.values(), ids=lambda device: device.name)
@pytest.mark.parametrize("name", static_model.TABLES)
def test_every_shipped_configuration_fits_twice(device, name):
    spec = static_model.TABLES[name]
    for row in static_model.choose_table(name, device):
        blocks = static_model.Blocks(*row[3:])
        assert static_model.blocks_per_multiprocessor(blocks, spec.element, device) >= 2
        if spec.grouped:
            assert blocks.BLOCK_N in (64, 128), "the column tile is the group of 8-bit columns"


def test_estimates_never_beat_the_roofline_and_follow_it():
    for device in static_model.DEVICES.values():
        for M, N, K in [(56, 1152, 1152), (512, 4304, 1152), (16384, 1152, 4304)]:
            blocks = static_model.choose(M, N, K, 2, device)
            estimate, on_chip = static_model.microseconds(M, N, K, blocks, 2, device)
            compute = 2e-6 * M * N * K / device.tflops
            memory = ((M + N) * K + M * N) * 2 / device.bandwidth / 1e3
            assert on_chip <= estimate
            assert estimate >= max(compute, memory), device.name
            assert math.isfinite(estimate)


def test_few_rows_fill_the_machine_by_splitting():
    """A (56, 1152) result in the H100's tiles is too few programs for 132 multiprocessors, unless K is split."""
    device = static_model.DEVICES["H100"]
    config = gemm.linear_config(56, 1152, 1152, torch.bfloat16, arch=90)
    tiles = math.ceil(56 / config["BLOCK_M"]) * math.ceil(1152 / config["BLOCK_N"])
    assert config["SPLIT_K"] > 1
    assert tiles < device.multiprocessors / 2
    assert tiles * config["SPLIT_K"] > 0.75 * device.multiprocessors


def test_blocks_that_do_not_fit_are_refused():
    blocks = static_model.Blocks(128, 128, 256, 8, 1, 4, 5)
    with pytest.raises(ValueError, match="does not fit H100"):
        static_model.microseconds(512, 1152, 1152, blocks, 2, static_model.DEVICES["H100"])


def test_table_rows_become_rules():
    (conditions, config), *_ = configs.rules([(64, None, 2048, 1, 2, 3, 4, 5, 6, 7)])
    assert conditions == {"M": 64, "K": 2048}
    assert config == dict(zip(configs.ROW_FIELDS, range(1, 8), strict=True))


def test_fp8_is_refused_where_the_hardware_has_none():
    with pytest.raises(ValueError, match=r"8\.9 or newer, got 87; use int8"):
        low_precision.quant_linear_config(56, 64, 64, torch.float8_e4m3fn, 64, arch=87)
    with pytest.raises(ValueError, match="gfx942"):
        low_precision.quant_linear_config(56, 64, 64, torch.float8_e4m3fn, 64, arch="gfx942")


# --- attention ---------------------------------------------------------------------------------------------------

ATTENTION = [(name, device) for name in attention_model.ATTENTION_TABLES for device in static_model.DEVICES.values()]


@pytest.mark.parametrize(("name", "device"), ATTENTION, ids=lambda x: getattr(x, "name", x))
def test_attention_estimates_stay_above_the_roofline_and_what_is_chosen_ships(name, device):
    table = attention_model.ATTENTION_TABLES[name]
    for _, problem in table.problems():
        blocks = attention_model.choose(table, problem, device)
        fact = attention_model.fact_of(table.op, problem.head_dim, blocks, device.arch)
        assert fact["local"] == fact["stack"] == 0
        assert fact["blocks"] >= 2
        estimate = attention_model.microseconds(table, problem, blocks, fact, device)
        rows = problem.batch * problem.heads * problem.head_dim
        flops = (5 if table.backward else 2) * 2 * rows * problem.queries * problem.keys
        moved = 2 * rows * (problem.queries + problem.keys) * 2 * (2 if table.backward else 1)
        assert math.isfinite(estimate)
        assert estimate >= max(1e-6 * flops / device.tflops, 1e-3 * moved / device.bandwidth)


def test_facts_of_attention_are_of_the_code_that_ships():
    """The gate's digests are current, or its own test fails; the model's facts must have the same."""
    baseline = aot.load_baseline()
    compared = 0
    for name, table in attention_model.ATTENTION_TABLES.items():
        if len(table.splits) > 1:
            continue  # the digest holds how many
        rules = configs.attention_rules(getattr(tables, name), {})
        for arch in rules:
            for _, problem in table.problems():
                case = baseline.get(f"configuration/{name.lower()} {arch} head dim {problem.head_dim} B{problem.batch}")
                if case is None or arch in attention_model.TWINS or arch in tables.MEASURED:
                    continue
                picked = configs.pick(rules, arch, bits=16, head_dim=problem.head_dim, programs=problem.programs)
                fact = attention_model.fact_of(
                    table.op, problem.head_dim, attention_model.AttentionBlocks(**picked), arch
                )
                launched = {row["digest"] for row in case[aot.target_name(arch)]["launches"]}
                assert fact["digest"] in launched, "run python -m vat_fast.kernels.proof.attention_facts, then choose"
                compared += 1
    assert compared > 20


def test_keys_are_split_where_heads_alone_leave_the_machine_idle():
    """One sample's 16 heads on an H100's 132 multiprocessors, and on Orin's 16."""
    table = attention_model.ATTENTION_TABLES["CROSS_ATTENTION"]
    one, many = table.problem(72, 256, 1), table.problem(72, 256, 16)
    h100, orin = static_model.DEVICES["H100"], static_model.DEVICES["Orin"]
    assert attention_model.choose(table, one, h100).SPLITS > attention_model.choose(table, one, orin).SPLITS
    assert attention_model.choose(table, many, h100).SPLITS == 1


def test_no_warp_repeats_anothers_products():
    """Issued flops are counted by tiles: that is all there is only if no two warps multiply the same.

    Known of the older MMA, whose instructions are 16 x 8 x 16: those of the compiled hot loop are the tile's share.
    """
    compared = 0
    for name, table in attention_model.ATTENTION_TABLES.items():
        rules = configs.attention_rules(getattr(tables, name), {})
        for arch in (80, 89):
            for _, problem in table.problems():
                picked = configs.pick(rules, arch, bits=16, head_dim=problem.head_dim, programs=problem.programs)
                blocks = attention_model.AttentionBlocks(**picked)
                fact = attention_model.fact_of(table.op, problem.head_dim, blocks, arch)
                tails = () if table.backward else attention_tiles.query_tails(problem.queries, blocks.BLOCK_M, arch)
                shares = []
                for rows in {blocks.BLOCK_M, *tails} - {0}:
                    inner, outer = attention_model._columns(table, problem.head_dim, blocks, rows, arch)
                    columns = 2 * inner + 3 * outer if table.backward else inner + outer
                    shares.append(rows * blocks.BLOCK_N * columns / (16 * 8 * 16) / blocks.num_warps)
                assert attention_model.repeats(table, blocks, arch) == 1
                # dq's narrow tail has rows for two of four warps: a fiftieth.
                assert min(abs(fact["loop_mma"] / share - 1) for share in shares) < 0.03, (name, arch, blocks)
                compared += 1
    assert compared >= 2 * 3 * 11
