"""`explain` says what the plan holds."""

import json

import pytest

from vat_fast import VATConfig
from vat_fast.cli import main
from vat_fast.frozen.bounds import bounds, dram_traffic
from vat_fast.frozen.build import base_plan
from vat_fast.frozen.costs import step_cost
from vat_fast.frozen.engine import make_plan
from vat_fast.frozen.explain import explain
from vat_fast.frozen.target import Target
from vat_fast.frozen.tiles import last_rows
from vat_fast.kernels.gemm import LastRows

SO400M = VATConfig.from_preset("siglip2-so400m")
TARGET = Target("triton", "bf16", images="uint8")


def test_flops_equal_the_count_of_the_configuration() -> None:
    """Counted from the plan's shapes and, independently, from the configuration."""
    from vat_fast.cost import forward_cost

    for preset in ("siglip2-so400m", "dinov2-large", "vit-tiny"):
        config = VATConfig.from_preset(preset)
        counted = forward_cost(config)
        plan = make_plan(config, 1, Target("torch", "fp32"), without=["film_table", "first_layer_constants"])
        assert sum(step_cost(plan, step, "torch").flops for step in plan.steps) == counted.total


def test_json_has_steps_passes_totals(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--preset", "siglip2-so400m", "--device", "H100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"steps", "passes", "totals", "bounds"} <= set(found)
    assert found["totals"]["launches"] == sum(step["launches"] for step in found["steps"])
    assert found["totals"]["flops"] == sum(step["flops"] for step in found["steps"])
    assert found["totals"]["launches"] <= 270
    assert found["passes"][0]["parameters"] > found["passes"][-1]["parameters"]
    assert [b["device"] for b in found["bounds"]] == ["H100"]


def test_text_names_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--preset", "vit-tiny", "--views", "3"]) == 0
    out = capsys.readouterr().out
    plan = make_plan(VATConfig.from_preset("vit-tiny", num_views=3), 1, TARGET)
    assert all(step.name in out for step in plan.steps)
    assert "Bounds, not measurements" in out


def test_left_out_passes_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--summary", "--without", "film_table,fold_norms"]) == 0
    assert "Passes switched off: film_table, fold_norms" in capsys.readouterr().out


def test_goals_of_the_plan() -> None:
    plan = make_plan(SO400M, 1, TARGET)
    h100, ada = bounds(plan, "H100"), bounds(plan, "4090")
    assert h100.share < 1.6
    assert ada.share < 1.4
    for b in (h100, ada):
        assert b.floor_us <= b.plan_us
        assert b.floor_bytes <= b.dram_bytes < 1.15 * b.floor_bytes


def test_bounds_grow_with_work() -> None:
    one, four = (bounds(make_plan(SO400M, B, TARGET), "H100") for B in (1, 4))
    assert one.plan_us < four.plan_us < 4 * one.plan_us


def test_small_caches_cost_traffic() -> None:
    plan = make_plan(SO400M, 1, TARGET)
    small, large = (sum(dram_traffic(plan, size, "triton").values()) for size in (2 << 20, 64 << 20))
    assert small > 1.2 * large


def test_fewer_launches_than_eager() -> None:
    base = sum(step_cost(s_plan, s, "torch").launches for s_plan in [base_plan(SO400M)] for s in s_plan.steps)
    assert explain(SO400M, TARGET).totals["launches"] < base / 2


def test_unknown_device() -> None:
    with pytest.raises(ValueError, match="unknown device 'H1000'; bounds are known for A100"):
        explain(SO400M, TARGET, device="H1000")


def test_training_is_estimated_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--train", "--preset", "vit-tiny", "--gpus", "4", "--zero", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "ranks" in json.dumps(found)
    assert main(["explain", "--train", "--preset", "vit-tiny"]) == 0
    assert "no step is faster than this" in capsys.readouterr().out


def test_keys_of_extra_tokens_are_computed_for_them_alone() -> None:
    """In the same launch as the query; in 8 bits, where all tokens get them, `last_rows` is None."""
    config = SO400M.replace(proprio_dim=8)
    D, T = config.action_width, config.num_action_tokens
    plan = make_plan(config, 3, TARGET)
    (step,) = (step for step in plan.all_steps if step.name == "action.1.project")
    assert step.options["last"] == (1, D)
    assert last_rows(plan, step) == LastRows(1, T + 1, D)
    assert step_cost(plan, step, "triton").flops == 2 * D * 3 * ((T + 1) * D + 2 * D)
    eight = make_plan(config, 3, Target(executor="triton", dtype="int8"))
    (step,) = (step for step in eight.all_steps if step.name == "action.1.project")
    assert last_rows(eight, step) is None
    launches = [explain(c, TARGET).totals["launches"] for c in (SO400M, config)]
    assert launches[1] - launches[0] < 10


def test_integers_for_processors() -> None:
    plain, short = (explain(SO400M, Target("native", dtype)) for dtype in ("fp32", "int16"))
    assert short.totals["steps"] == plain.totals["steps"]
    assert short.passes[-2]["name"] == "quantise"
    large = {s["name"]: s["weight_bytes"] for s in plain.steps if s["name"].endswith("fc1") and "head" not in s["name"]}
    assert large
    for step in short.steps:
        if step["name"] in large:
            assert step["options"]["quantised"] == "int16"
            assert 0.49 < step["weight_bytes"] / large[step["name"]] < 0.51
    # Norms and FiLM are inside the linears that read them; the last one is read by the head in groups of tokens.
    assert sum(step["op"] == "norm" for step in short.steps) <= 2
