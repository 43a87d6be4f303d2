"""How closely VAT computes what ReferenceVAT computes, for every preset family and variant.

    python -m benchmarks.parity                    # prints the table and writes docs/parity.md
    python -m benchmarks.parity --full siglip2-so400m   # one preset at its real size too (about 20 GB, minutes)

Forward: largest difference of the actions (of the noise prediction, with the diffusion head) over the largest.
Gradient: |difference| / |gradient| in the 2-norm, of all parameters together and of the worst one. Both models
have the same random weights; the yardstick for rounding is ReferenceVAT in float64.
"""

from __future__ import annotations

import argparse
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.variants import FAMILIES, VARIANTS, random_batch, randomise, small_config
from vat_fast.config import VATConfig
from vat_fast.model import VAT
from vat_fast.reference import ReferenceVAT
from vat_fast.without_values import without_values

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Parity:
    """Errors of one variant; see the module's docstring."""

    forward: float
    gradient: float
    worst_gradient: float
    forward_vs_fp64: float
    reference_vs_fp64: float


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest expected value."""
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


def reference_loss(model: ReferenceVAT, batch: dict[str, Tensor], seed: int) -> Tensor:
    """The training loss written from the spec: L1, or mean squared error of the predicted noise."""
    c, actions = model.config, batch["actions"]
    inputs = (batch.get("task_id"), batch.get("proprio"))
    if c.head == "l1":
        return F.l1_loss(model(batch["pixels"], *inputs), actions)
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(actions.shape, generator=g, dtype=actions.dtype)
    t = torch.randint(c.diffusion_steps, (len(actions),), generator=g)
    abar = torch.tensor(model.alphas_cumprod(), dtype=actions.dtype)[t][:, None, None]
    noisy = abar.sqrt() * actions + (1 - abar).sqrt() * noise
    return F.mse_loss(model.predict_noise(batch["pixels"], noisy, t, *inputs), noise)


def gradient_errors(errors: dict[str, float], norms: dict[str, float]) -> tuple[float, float]:
    """Relative error of the whole gradient and of its worst parameter, from 2-norms by parameter."""
    whole = sum(e**2 for e in errors.values()) ** 0.5 / sum(n**2 for n in norms.values()) ** 0.5
    return whole, max(errors[name] / norms[name] for name in norms)


def network(model: VAT | ReferenceVAT, batch: dict[str, Tensor], seed: int) -> Tensor:
    """One evaluation of the network: actions, or the diffusion head's noise prediction."""
    c, inputs = model.config, (batch.get("task_id"), batch.get("proprio"))
    if c.head == "l1":
        return model(batch["pixels"], *inputs)
    t = torch.randint(c.diffusion_steps, (len(batch["actions"]),), generator=torch.Generator().manual_seed(seed))
    return model.predict_noise(batch["pixels"], batch["actions"], t, *inputs)


def measure(config: VATConfig, batch_size: int = 2, seed: int = 0) -> Parity:
    """Forward and gradient errors of VAT against ReferenceVAT with the same random weights."""
    vat, reference = VAT(config), ReferenceVAT(config)
    randomise(vat, seed)
    reference.load_state_dict(vat.state_dict())
    batch = random_batch(config, batch_size, seed + 1)
    with torch.no_grad():
        actual, expected = network(vat, batch, seed), network(reference, batch, seed)
    vat.loss(batch, torch.Generator().manual_seed(seed)).backward()
    reference_loss(reference, batch, seed).backward()
    theirs = dict(reference.named_parameters())
    errors, norms = {}, {}
    for name, p in vat.named_parameters():
        if not p.requires_grad:
            continue
        expected_gradient = theirs[name].grad
        assert p.grad is not None, f"{name} got no gradient"
        assert expected_gradient is not None, f"{name} got no gradient in ReferenceVAT"
        errors[name] = float((p.grad - expected_gradient).norm())
        norms[name] = float(expected_gradient.norm())
    gradient, worst = gradient_errors(errors, norms)
    reference.double()
    exact_batch = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    with torch.no_grad():
        exact = network(reference, exact_batch, seed)
    return Parity(relative(actual, expected), gradient, worst, relative(actual, exact), relative(expected, exact))


def measure_full_size(preset: str, seed: int = 0) -> tuple[float, float, float]:
    """Error of the forward, of the whole gradient and of its worst parameter, of one preset at its real size.

    Both models hold the same parameters, and the reference's gradient is subtracted from VAT's in place, so that
    the memory needed is weights + one set of gradients.
    """
    config = VATConfig.from_preset(preset)
    vat = VAT(config)
    randomise(vat, seed)
    with without_values():
        reference = ReferenceVAT(config)
    reference.load_state_dict(dict(vat.named_parameters()), assign=True)
    batch = random_batch(config, 1, seed + 1)
    loss = vat.loss(batch)
    with torch.no_grad():
        expected = reference(batch["pixels"], batch["task_id"])
        forward = relative(vat(batch["pixels"], batch["task_id"]), expected)
    loss.backward()
    norms = {name: float(p.grad.norm()) for name, p in vat.named_parameters() if p.grad is not None}
    assert len(norms) == len(list(vat.parameters())), "a parameter got no gradient"
    (-reference_loss(reference, batch, seed)).backward()
    theirs = dict(reference.named_parameters())
    shared = all(p is theirs[name] for name, p in vat.named_parameters())
    assert shared, "both models must accumulate into the same gradients"
    errors = {name: float(p.grad.norm()) for name, p in vat.named_parameters() if p.grad is not None}
    return forward, *gradient_errors(errors, norms)


def main() -> None:
    """Measure everything and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="append", default=[], metavar="PRESET", help="also at its real size")
    parser.add_argument("--out", type=Path, default=Path("docs/parity.md"))
    args = parser.parse_args()
    header = (
        "preset family",
        "variant",
        "forward",
        "gradient",
        "worst parameter",
        "VAT fp32 against fp64",
        "reference fp32 against fp64",
    )
    rows = []
    cases = [(preset, variant) for preset in FAMILIES for variant in VARIANTS]
    for preset, variant in tqdm(cases, desc="parity", unit="variant"):
        p = measure(small_config(preset, variant))
        errors = (p.forward, p.gradient, p.worst_gradient, p.forward_vs_fp64, p.reference_vs_fp64)
        rows.append((preset, variant, *(f"{e:.1e}" for e in errors)))
    for preset in args.full:
        start = time.perf_counter()
        errors = measure_full_size(preset)
        tqdm.write(f"{preset} at full size: {time.perf_counter() - start:.0f} s")
        rows.append((f"{preset}, full size", "VAT", *(f"{e:.1e}" for e in errors), "", ""))
    lines = [
        "# Parity of VAT with ReferenceVAT",
        "",
        "Written by `python -m benchmarks.parity" + "".join(f" --full {preset}" for preset in args.full) + "`.",
        "Random weights and inputs, fp32, batch 2 (full size: 1). Forward: largest difference over largest value",
        "of the actions or, with the diffusion head, of the predicted noise.",
        "Gradient: |difference| / |gradient|, of all parameters together and of the worst one. The last two columns",
        "show the rounding of each model by itself. Families run at small width with the preset's head width, prefix",
        "tokens and LayerScale.",
        "",
        f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads, seed 0.",
        "",
        "| " + " | ".join(header) + " |",
        "| " + " | ".join(["---"] * len(header)) + " |",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
