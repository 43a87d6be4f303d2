"""Every pass keeps the actions, alone and together, for every variant of the model."""

import pytest
import torch

from benchmarks.parity import relative
from benchmarks.variants import VARIANTS, random_batch, randomise, small_config
from vat_fast import VAT, ReferenceVAT, VATConfig
from vat_fast.frozen.engine import make_plan
from vat_fast.frozen.passes import PASSES, SCHEDULING
from vat_fast.frozen.plan import Plan
from vat_fast.frozen.target import Target

NAMES = [p.name for p in PASSES if p.name not in ("uint8_input", "quantise", "fuse_norms")] + ["reuse_buffers"]


def models(config: VATConfig) -> tuple[VAT, ReferenceVAT]:
    vat = VAT(config).eval()
    randomise(vat, 0)
    reference = ReferenceVAT(config).eval()
    reference.load_state_dict(vat.state_dict())
    return vat, reference


def arguments(config: VATConfig, batch: int, seed: int = 1) -> tuple[torch.Tensor | None, ...]:
    inputs = random_batch(config, batch, seed)
    return inputs["pixels"], inputs.get("task_id"), inputs.get("proprio")


@pytest.mark.parametrize("preset", ["siglip2-so400m", "dinov2-large"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_all_passes_together_equal_the_reference(preset: str, variant: str) -> None:
    config = small_config(preset, variant)
    vat, reference = models(config)
    args = arguments(config, 3)
    noise = [{"generator": torch.Generator().manual_seed(7)} if config.head == "diffusion" else {} for _ in range(3)]
    actions = vat.freeze(batch=3, executor="torch")(*args, **noise[0])
    expected = reference(*args, **noise[1])
    if config.head == "diffusion":
        # Ten clipped rounds carry rounding errors further, the reference's own too: measure both against float64.
        wide = [x.double() if x is not None and x.is_floating_point() else x for x in args]
        truth = reference.double()(*wide, **noise[2])
        assert relative(actions, truth) < 4 * relative(expected, truth) + 1e-5
    else:
        assert relative(actions, expected) < 1e-5


@pytest.mark.parametrize("left_out", [n for n in NAMES if n != "drop_dead_layer"])
@pytest.mark.parametrize("preset", ["siglip2-so400m", "dinov2-large"])
@torch.inference_mode()
def test_each_pass_can_be_left_out(preset: str, left_out: str) -> None:
    config = small_config(preset, "3 views, 14 action dims")
    vat, reference = models(config)
    args = arguments(config, 2)
    frozen = vat.freeze(batch=2, executor="torch", without=[left_out])
    assert left_out not in frozen.plan.applied
    assert relative(frozen(*args), reference(*args)) < 1e-5


@pytest.mark.parametrize(
    "variant", ["VAT", "last-layer baseline", "shared weights, last view", "additive task", "proprio"]
)
@pytest.mark.parametrize("only", ["drop_dead_layer", *(n for n in NAMES if n != "drop_dead_layer")])
@torch.inference_mode()
def test_each_pass_alone(variant: str, only: str) -> None:
    config = small_config("vit-tiny", variant)
    vat, reference = models(config)
    args = arguments(config, 2)
    others = [n for n in (*NAMES, "fuse_norms", *SCHEDULING) if n not in (only, "drop_dead_layer")]
    frozen = vat.freeze(batch=2, executor="torch", without=others)
    assert relative(frozen(*args), reference(*args)) < 1e-5


@torch.inference_mode()
def test_norms_inside_linears_equal_the_reference() -> None:
    """The form for Triton, run by the plain executor."""
    from vat_fast.frozen.torch_executor import TorchExecutor
    from vat_fast.frozen.weights import Folded

    config = small_config("dinov2-large", "proprio")
    vat, reference = models(config)
    pixels, task_id, proprio = arguments(config, 2)
    plan = make_plan(config, 2, Target("triton", "fp32"))
    assert sum("norm" in step.options for step in plan.steps) > 3 * config.layers
    folded = Folded(plan, vat.state_dict(), torch.float32, torch.device("cpu"))
    executor = TorchExecutor(plan, dict(folded), folded.constants(), torch.device("cpu"))
    actions = executor.run({"pixels": pixels, "task_id": task_id, "proprio": proprio})
    assert relative(actions, reference(pixels, task_id, proprio)) < 1e-5


@torch.inference_mode()
def test_bytes_in_equal_normalised_pixels() -> None:
    config = small_config("siglip2-so400m", "VAT")
    vat, reference = models(config)
    S = config.image_size
    images = torch.randint(256, (2, 2, S, S, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    pixels = ((images / 255 - mean) / std).permute(0, 1, 4, 2, 3)
    frozen = vat.freeze(batch=2, executor="torch", images="uint8", mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    assert relative(frozen(images, 3), reference(pixels, torch.tensor([3, 3]))) < 1e-5


def so400m(executor: str = "triton") -> Plan:
    return make_plan(VATConfig.from_preset("siglip2-so400m"), 1, Target(executor, "bf16", images="uint8"))


def test_what_is_not_needed_is_dropped() -> None:
    plan = so400m()
    assert 785e6 < plan.parameters < 795e6
    read = {name for weight in plan.weights.values() for name in weight.recipe.parameters()}
    held = dict(VAT(small_config("siglip2-so400m", "VAT")).named_parameters())
    assert not any(".25.qkv" in name or ".25.fc" in name for name in read if name.startswith("vision_blocks"))
    assert {name.split(".")[0] for name in held} >= {name.split(".")[0] for name in read}
    films = [weight for weight in plan.weights.values() if "film" in weight.name]
    assert [weight.shape for weight in films] == [(30, 2304)] * 25


def test_one_projection_serves_both_streams() -> None:
    plan = so400m()
    projections = [weight for name, weight in plan.weights.items() if name.endswith("project.weight")]
    assert [weight.shape for weight in projections] == [(5760, 1152)] * 25


def test_launch_budget() -> None:
    assert len(so400m().steps) <= 265


def test_dead_layer_left_in_is_refused_when_run() -> None:
    vat = VAT(small_config("siglip2-so400m", "VAT"))
    with pytest.raises(
        ValueError, match=r"vision_blocks\.3\.\w+\.weight, which this model does not hold.*drop_dead_layer"
    ):
        vat.freeze(executor="torch", without=["drop_dead_layer"])


def test_unknown_pass_is_named() -> None:
    with pytest.raises(ValueError, match=r"no pass is named 'fold_norm' .did you mean 'fold_norms'"):
        VAT(small_config("vit-tiny", "VAT")).freeze(without=["fold_norm"])


def test_weights_are_rounded_once() -> None:
    """Folded in float32 where that is the same: the bits of float64 and then float32."""
    from vat_fast.frozen.recipes import evaluate, rounds_once
    from vat_fast.frozen.weights import Folded

    config = small_config("dinov2-large", "proprio")  # with LayerScale
    state = models(config)[0].state_dict()
    plan = make_plan(config, 1, Target("native", "fp32"))
    narrow = 0
    for name, weight in Folded(plan, state, torch.float32, torch.device("cpu")).items():
        recipe = plan.weights[name].recipe
        assert torch.equal(weight, evaluate(recipe, state).float())
        narrow += rounds_once(recipe) and recipe.op != "parameter"
    assert narrow > 3 * config.layers
