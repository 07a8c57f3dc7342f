"""The checksum of a tower: the same on any device, from few copies."""

import hashlib
import importlib

import torch
from torch import nn

# The function of this name hides the module.
module = importlib.import_module("residual_kernels.towers.checksum")


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False)])
        self.register_buffer("nothing", torch.zeros(0, 3))


def by_hand(tower):
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        value = tensor.to(torch.bfloat16).view(torch.int16) if tensor.is_floating_point() else tensor
        digest.update(value.contiguous().numpy().data)
    return digest.hexdigest()


def test_it_is_what_it_was():
    torch.manual_seed(0)
    tower = Small()
    found = module.checksum(tower)
    assert found == by_hand(tower) == module.checksum(tower)
    with torch.no_grad():
        tower.layers[0].weight[0, 0] += 1
    assert module.checksum(tower) != found


class Elsewhere:
    """A tensor that says it lies on a device, as far as `on_cpu` asks."""

    def __init__(self, held):
        self.held, self.device = held, torch.device("cuda:0")
        self.nbytes, self.dtype, self.shape = held.nbytes, held.dtype, held.shape

    def reshape(self, *shape):
        return self.held.reshape(*shape)


def test_tensors_of_a_device_travel_together(monkeypatch):
    """`torch.cat` stands for the one copy: as many of them as there are journeys."""
    given = [
        torch.arange(5),
        torch.zeros(0, 3),
        torch.tensor(7),
        torch.randn(2, 3).to(torch.bfloat16),
        torch.randn(4),
    ]
    journeys = []
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda parts: (journeys.append(len(parts)), cat(parts))[1])
    for most, wanted in ((1 << 20, [5]), (50, [3, 2]), (0, [1] * 5)):
        journeys.clear()
        monkeypatch.setattr(module, "TOGETHER", most)
        moved = list(module.on_cpu([Elsewhere(x) for x in given]))
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(moved, given, strict=True))
        assert journeys == wanted
    # The CPU's stay where they are.
    assert all(a is b for a, b in zip(module.on_cpu(given), given, strict=True))
