"""FrozenVAT from the outside."""

import gc
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.parity import relative
from benchmarks.variants import randomise, small_config
from tests.frozen.test_passes import arguments, models
from vat_fast import VAT
from vat_fast.frozen.cpu import candidates
from vat_fast.frozen.target import Executor


@torch.inference_mode()
def test_samples_do_not_see_each_other_with_one_plan() -> None:
    config = small_config("siglip2-so400m", "VAT")
    vat, _ = models(config)
    frozen = vat.freeze(executor="torch")
    pixels, task_id, _ = arguments(config, 5)
    together = frozen(pixels, task_id)
    apart = torch.cat([frozen(pixels[i : i + 1], task_id[i : i + 1]) for i in range(5)])
    assert torch.equal(together, apart)


@torch.inference_mode()
def test_batches_share_weights_and_any_number_runs() -> None:
    config = small_config("siglip2-so400m", "VAT")
    vat, reference = models(config)
    frozen = vat.freeze(batch=[4, 2], executor="torch")
    assert sorted(frozen.plans) == [1, 2, 4]
    shared = [{name: w.data_ptr() for name, w in r.weights.items()} for r in frozen._runners.values()]
    assert shared[0] == shared[1] == shared[2]
    args = arguments(config, 7)
    assert relative(frozen(*args), reference(*args)) < 1e-5


@torch.inference_mode()
def test_result_survives_the_next_call() -> None:
    config = small_config("vit-tiny", "VAT")
    vat, _ = models(config)
    frozen = vat.freeze(executor="torch")
    pixels, task_id, _ = arguments(config, 2)
    first = frozen(pixels[:1], task_id[:1])
    kept = first.clone()
    frozen(pixels[1:], task_id[1:])
    assert torch.equal(first, kept)


@pytest.mark.parametrize("executor", ["torch", "native", "onednn", "openvino"])
@torch.inference_mode()
def test_training_on_does_not_reach_a_frozen_policy(executor: Executor) -> None:
    config = small_config("siglip2-so400m", "VAT")
    vat, reference = models(config)
    if executor not in (*candidates("fp32"), "torch"):
        pytest.skip(f"the {executor} executor does not run here")
    frozen, args = vat.freeze(executor=executor), arguments(config, 1)
    expected = reference(*args)
    for p in vat.parameters():
        p.mul_(1.5)
    assert relative(frozen(*args), expected) < 1e-5
    own = {p.untyped_storage().data_ptr() for p in vat.parameters()}
    assert not own & {p.untyped_storage().data_ptr() for p in frozen.parameters()}


@torch.inference_mode()
def test_other_number_of_views() -> None:
    config = small_config("siglip2-so400m", "VAT")
    vat, _ = models(config)
    pixels, task_id, _ = arguments(config.replace(num_views=3), 2)
    assert vat.freeze(views=3, executor="torch")(pixels, task_id).shape == (2, 8, 7)


@torch.inference_mode()
def test_views_on_the_channel_axis() -> None:
    config = small_config("siglip2-so400m", "VAT")
    vat, _ = models(config)
    frozen = vat.freeze(executor="torch")
    pixels, task_id, _ = arguments(config, 1)
    assert torch.equal(frozen(pixels, task_id), frozen(pixels.flatten(1, 2), task_id))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: (a[0][:, :1], a[1]), r"pixels must be \(batch, 2, 3, 56, 56\)"),
        (lambda a: (a[0], None), "task_id is missing"),
        (lambda a: (a[0], torch.tensor([1, 30, 2])), "task ids must be 0 to 29"),
        (lambda a: (a[0], torch.tensor([1, 2])), r"one integer or \(3,\)"),
        (lambda a: (a[0], a[1], torch.zeros(3, 8)), "reads no proprio"),
    ],
)
def test_wrong_inputs_are_told(change: object, message: str) -> None:
    config = small_config("siglip2-so400m", "VAT")
    vat = VAT(config)
    randomise(vat, 0)
    frozen = vat.freeze(executor="torch")
    with pytest.raises(ValueError, match=message):
        frozen(*change(arguments(config, 3)))


def test_wrong_options_are_told() -> None:
    vat = VAT(small_config("vit-tiny", "VAT"))
    with pytest.raises(ValueError, match='images must be "float" or "uint8"'):
        vat.freeze(images="rgb")
    with pytest.raises(ValueError, match="batch sizes must be at least 1"):
        vat.freeze(batch=0)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@torch.inference_mode()
def test_low_precision_is_no_worse_than_the_reference_in_it(dtype: str) -> None:
    config = small_config("siglip2-so400m", "VAT")
    vat, reference = models(config)
    pixels, task_id, _ = arguments(config, 4)
    wide = reference.double()(pixels.double(), task_id)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    narrow = reference.to(kind)(pixels.to(kind), task_id).double()
    frozen = vat.freeze(batch=4, dtype=dtype, executor="torch")(pixels, task_id).double()
    assert relative(frozen, wide) < 1.5 * relative(narrow, wide)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells which files are mapped")
@pytest.mark.parametrize("executor", ["torch", "native", "onednn", "openvino"])
@torch.inference_mode()
def test_the_checkpoint_does_not_stay_in_memory(executor: Executor, tmp_path: Path) -> None:
    """A view of one bias would keep the whole file mapped."""
    if executor not in (*candidates("fp32"), "torch"):
        pytest.skip(f"the {executor} executor does not run here")
    config = small_config("siglip2-so400m", "VAT")
    models(config)[0].save_pretrained(tmp_path)
    vat = VAT.from_pretrained(tmp_path)
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    frozen, args = vat.freeze(executor=executor), arguments(config, 1)
    del vat
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert frozen(*args).isfinite().all()
