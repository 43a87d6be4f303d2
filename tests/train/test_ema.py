"""The moving average: its arithmetic, its shares, and that it gives the weights back."""

import pytest
import torch
from torch import nn

from vat_fast.train.ema import MovingAverage


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    made[0].bias.requires_grad_(False)
    return made


def test_arithmetic() -> None:
    net = model()
    ema = MovingAverage(net, 0.9)
    expected = net[1].weight.detach().double().clone()
    for update in range(30):
        with torch.no_grad():
            net[1].weight.add_(torch.randn(2, 4))
        ema.update()
        decay = min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * net[1].weight.detach().double()
    torch.testing.assert_close(ema.state_dict()["1.weight"].double(), expected, rtol=1e-5, atol=1e-6)
    assert "0.bias" not in ema.state_dict()


def test_applied_and_given_back_bit_for_bit() -> None:
    net = model().bfloat16()
    ema = MovingAverage(net, 0.5)
    with torch.no_grad():
        net[0].weight.mul_(3)
    ema.update()
    own = {name: p.detach().clone() for name, p in net.named_parameters()}
    with ema.applied():
        assert not torch.equal(net[0].weight, own["0.weight"])
        torch.testing.assert_close(net[0].weight.detach(), ema.state_dict()["0.weight"].bfloat16(), rtol=0, atol=0)
    assert all(torch.equal(p, own[name]) for name, p in net.named_parameters())


def test_ranks_share_and_another_number_of_ranks_goes_on() -> None:
    net = model()
    parts = [MovingAverage(net, 0.9, rank, 2) for rank in range(2)]
    for part in parts:
        part.update()
    names = [set(part.state_dict()) - {"updates"} for part in parts]
    assert not names[0] & names[1]
    assert names[0] | names[1] == {"0.weight", "1.weight", "1.bias"}
    alone = MovingAverage(model(), 0.9)
    with pytest.raises(ValueError, match="same number of ranks"):
        alone.load_state_dict(parts[0].state_dict())
    alone.load_state_dict({**parts[0].state_dict(), **parts[1].state_dict()})
    assert alone.updates == 1


def test_impossible_decay() -> None:
    with pytest.raises(ValueError, match="decay"):
        MovingAverage(model(), 1.0)
