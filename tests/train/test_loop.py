"""The optimiser step: it learns, accumulates, recomputes and repeats exactly; DeepSpeed in this process, one rank."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.variants import VARIANTS, random_batch, randomise, small_config
from vat_fast import VAT
from vat_fast.reference import ReferenceVAT
from vat_fast.train.build import build_model, set_learning_rate
from vat_fast.train.config import Config, config_from_dict
from vat_fast.train.data.loader import Batch
from vat_fast.train.datasets import RunData, open_data, prepare_paths
from vat_fast.train.loop import Trainer, total_steps
from vat_fast.train.schedule import learning_rate

SIZE = {"image_size": 32, "patch_size": 8, "width": 48, "depth": 3, "num_heads": 3, "mlp_hidden": 96, "num_tasks": 2}


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed synthetic demonstrations."""
    folder = tmp_path_factory.mktemp("data")
    config = make_config(folder, {}, synthetic={"demos": 10, "steps": 20, "image_size": 32})
    return prepare_paths(config, is_first=True)[0]


def make_config(folder: Path, train: dict[str, Any], stage: int = 1, **data: Any) -> Config:
    values = {
        "output": str(folder / "run"),
        "model": {"preset": "vit-tiny", "weights": "random", "options": {**SIZE, **train.pop("model", {})}},
        "data": {"paths": [str(folder / "demos")], "workers": 0, "holdout": 0.2, "augment": False, **data},
        "train": {"steps": 10, "global_batch": 16, "lr": 3e-3, "precision": "fp32", **train},
        "zero": {"stage": stage},
    }
    return config_from_dict(values).resolve(1)


def make_trainer(packed: Path, device: torch.device, stage: int = 1, **train: Any) -> tuple[Trainer, RunData]:
    config = make_config(packed.parent, train, stage, paths=[str(packed)])
    vat = build_model(config)
    data = open_data(config, vat.config, [packed], 0, 1)
    return Trainer(config, vat, total_steps(config, data.train.batches_per_epoch), device, 0), data


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.vat.named_parameters()}


def test_it_learns_what_the_images_show(demonstrations: Path, one_rank: torch.device) -> None:
    """From an untrained model's loss to less than half of it, which is half of what the best constant action has."""
    trainer, data = make_trainer(demonstrations, one_rank, steps=80)
    results = [trainer.train_step(data.train) for _ in range(trainer.total)]
    first, last = (float(torch.stack([r.loss for r in part]).mean()) for part in (results[:3], results[-10:]))
    actions = torch.cat([outcome.target for r in results[-10:] for outcome in r.outcomes])
    constant = float((actions - actions.flatten(0, 1).median(0).values).abs().mean())
    assert last < first / 2.5
    assert last < 0.5 * constant
    assert trainer.step == 80
    assert set(results[0].seconds) == {"data", "forward", "backward", "optimizer"}
    assert results[0].samples == 16
    rates = [r.lr for r in results]
    assert rates == [learning_rate(step, 80, 3e-3, 0.1, 1e-7) for step in range(80)]


@pytest.mark.parametrize("precision", ["autocast", "bf16"])
def test_it_learns_in_bfloat16(precision: str, demonstrations: Path, one_rank: torch.device) -> None:
    trainer, data = make_trainer(demonstrations, one_rank, stage=2, steps=40, precision=precision)
    losses = [float(trainer.train_step(data.train).loss) for _ in range(trainer.total)]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    expected = torch.bfloat16 if precision == "bf16" else torch.float32
    assert {p.dtype for p in trainer.vat.parameters()} == {expected}


def test_accumulation_equals_a_big_batch(demonstrations: Path, one_rank: torch.device) -> None:
    """4 forwards of 4 samples and 1 of 16 see the same samples and make the same weights, up to float32 rounding."""
    made = []
    for micro in (16, 4):
        trainer, data = make_trainer(demonstrations, one_rank, micro_batch=micro, clip=0.5)
        results = [trainer.train_step(data.train) for _ in range(3)]
        assert all(r.samples == 16 for r in results)
        assert len(results[0].outcomes) == 16 // micro
        made.append((weights(trainer), [float(r.loss) for r in results], results[-1].grad_norm))
    (big, big_losses, big_norm), (small, small_losses, small_norm) = made
    assert small_losses == pytest.approx(big_losses, rel=1e-5)
    assert small_norm == pytest.approx(big_norm, rel=1e-4)
    for name, value in big.items():
        torch.testing.assert_close(small[name], value, rtol=0, atol=2e-4, msg=name)


def test_a_step_is_adamw_on_the_reference(demonstrations: Path, one_rank: torch.device) -> None:
    """Through DeepSpeed, VAT's weights follow PyTorch's AdamW on the plain reference model."""
    trainer, data = make_trainer(demonstrations, one_rank, steps=6)
    t = trainer.config.train
    reference = ReferenceVAT(trainer.vat.config)
    reference.load_state_dict(trainer.vat.state_dict())
    optimizer = torch.optim.AdamW(reference.parameters(), lr=t.lr, weight_decay=t.weight_decay)
    _, again = make_trainer(demonstrations, one_rank, steps=6)
    for step in range(trainer.total):
        result = trainer.train_step(data.train)
        batch = again.train.prepare(next(again.train))
        loss = (reference(batch["pixels"], batch["task_id"]) - batch["actions"]).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        set_learning_rate(optimizer, learning_rate(step, trainer.total, t.lr, t.warmup, t.final_lr))
        norm = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters() if p.grad is not None])
        optimizer.step()
        assert float(result.loss) == pytest.approx(loss.item(), rel=1e-4)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-3)


def test_the_same_seed_repeats_bit_for_bit(demonstrations: Path, one_rank: torch.device) -> None:
    """The diffusion head's noise included: it is keyed by its place and needs no saved generator."""
    made = []
    for _ in range(2):
        model = {"head": "diffusion", "diffusion_steps": 5}
        trainer, data = make_trainer(demonstrations, one_rank, steps=3, micro_batch=8, model=model)
        made.append([float(trainer.train_step(data.train).loss) for _ in range(3)])
        torch.manual_seed(len(made))  # nothing may depend on it
    assert made[0] == made[1]
    assert len(set(made[0])) == 3


def test_stage_0_reports_the_gradient_too(demonstrations: Path, one_rank: torch.device) -> None:
    norms = []
    for stage in (0, 1):
        trainer, data = make_trainer(demonstrations, one_rank, stage=stage)
        norms.append(trainer.train_step(data.train).grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "," not in name])
def test_recomputed_layers_have_the_same_gradients(variant: str) -> None:
    config = small_config("dinov2-large", variant)
    batch: Batch = random_batch(config, 2, 1)
    found = []
    for recompute in (False, True):
        vat = VAT(config)
        randomise(vat, 0)
        vat.recompute_layers = recompute
        loss = vat.loss(batch, torch.Generator().manual_seed(0))
        loss.backward()
        found.append((loss, {n: p.grad for n, p in vat.named_parameters() if p.grad is not None}))
    (plain_loss, plain), (loss, gradients) = found
    assert loss == plain_loss
    assert gradients.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_recomputing_keeps_less() -> None:
    """What autograd keeps for the backward, in bytes."""
    config = small_config("vit-small", "VAT")
    batch = random_batch(config, 2, 1)

    def kept(recompute: bool) -> int:
        vat = VAT(config)
        vat.recompute_layers = recompute
        storages: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = vat.loss(batch)
        for parameter in vat.parameters():
            storages.pop(parameter.untyped_storage().data_ptr(), None)
        assert loss.requires_grad
        return sum(storages.values())

    assert kept(True) < 0.6 * kept(False)


def test_rounds_of_one_robot_may_share_statistics(demonstrations: Path, tmp_path: Path) -> None:
    synthetic = {"demos": 4, "steps": 12, "image_size": 32, "seed": 9}
    second = prepare_paths(make_config(tmp_path, {}, synthetic=synthetic, pack={"name": "two"}), is_first=True)[0]
    paths = [demonstrations, second]

    def opened(statistics: str) -> RunData:
        config = make_config(tmp_path, {}, paths=[str(p) for p in paths], statistics=statistics)
        return open_data(config, build_model(config).config, paths, 0, 1)

    own, first = opened("own"), opened("first")
    assert list(own.statistics) == [s.dataset.name for s in own.train.samples]
    assert list(first.statistics) == list(own.statistics)
    assert (len(first.distinct_statistics()), len(own.distinct_statistics())) == (1, 2)
    raw = np.asarray(first.train.samples[1].dataset.actions)
    scale = first.train.samples[0].dataset.statistics.action
    shared = first.train.samples[1].actions(np.arange(3))
    np.testing.assert_allclose(shared[:, 0, :6], scale.normalize(raw)[first.train.samples[1].steps[:3], :6], atol=1e-6)
    assert np.abs(shared - own.train.samples[1].actions(np.arange(3))).max() > 1e-3
