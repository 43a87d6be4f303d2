"""Configuration tables: picking rules, targets, and the static model behind the shipped tables."""

import math
import os
import subprocess
import sys

import pytest
import torch

from vat_fast.kernels import configs, gemm, low_precision, static_model, tables

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
    for name, table in static_model.all_tables().items():
        shipped = getattr(tables, name)
        assert shipped.keys() == table.keys()
        for arch, rows in table.items():
            assert arch in tables.MEASURED or shipped[arch] == rows, (
                f"{name}, {arch}: run python -m vat_fast.kernels.static_model > kernels/tables.py"
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
