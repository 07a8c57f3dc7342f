"""In other people's stacks: DDP, FSDP2, GradScaler, checkpointing, DataLoader workers, CUDA graphs,
and the examples.

torch.compile, autocast, deepcopy, casts and meta construction are in test_modules.py.
"""

import re
import runpy
from pathlib import Path

import pytest
import torch
from test_towers import build, images_for, relative
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import residual_kernels as rk
from residual_kernels.bundled.drawings import drawn_images

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("with_*.py"))


def made(tower=None, **options) -> tuple[rk.ResiDual, torch.Tensor]:
    tower = build() if tower is None else tower
    bases = rk.fit_bases(tower, [images_for(tower, 20, seed=5)]).truncate(energy=0.9)
    return rk.ResiDual(tower, bases, init="normal", **options), images_for(tower, 4)


def steps(module, images, count=3, lr=0.05) -> None:
    """Plain gradient descent on a loss that is a mean over rows."""
    weights = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=lr)
    for _ in range(count):
        optimizer.zero_grad()
        module(images).square().sum(1).mean().backward()
        optimizer.step()


def times_the_mean(mesh, rank: int) -> float:
    """By how much FSDP2 itself is off from the mean gradient over gloo: torch 2.8 adds up instead, by 2."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    layer, rows = torch.nn.Linear(4, 4), torch.randn(4, 4)
    (mean,) = torch.autograd.grad(layer(rows).square().sum(1).mean(), layer.weight)
    fully_shard(layer, mesh=mesh)
    layer(rows.chunk(2)[rank]).square().sum(1).mean().backward()
    return round(float(layer.weight.grad.full_tensor().norm() / mean.norm()), 4)


def distributed_worker(rank: int, store: str) -> None:
    """Both kinds of data parallelism take the same steps as one process on the whole batch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    alone, images = made()
    steps(alone, images)
    expected, start = alone.weight.detach(), made()[0].weight.detach()
    assert relative(expected, start) > 1e-3
    mine = images.chunk(2)[rank]

    replicated = DistributedDataParallel(made()[0])
    steps(replicated, mine)
    assert relative(replicated.module.weight, expected) < 1e-5

    mesh = init_device_mesh("cpu", (2,))
    factor = times_the_mean(mesh, rank)
    assert factor in (1, 2)
    for per_block in (False, True):
        sharded, _ = made()
        if per_block:
            sharded.set_grad_checkpointing(True)
            for block in sharded.tower.transformer.resblocks:
                fully_shard(block, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        steps(sharded, mine, lr=0.05 / factor)
        assert type(sharded.weight).__name__ == "DTensor"
        assert relative(sharded.weight.full_tensor(), expected) < 1e-5
        # through the frozen, sharded blocks to the images
        leaf, other = mine.clone().requires_grad_(), mine.clone().requires_grad_()
        sharded(leaf).square().sum().backward()
        alone(other).square().sum().backward()
        assert relative(leaf.grad, other.grad) < 1e-4
    distributed.destroy_process_group()


def test_two_processes_under_ddp_and_fsdp2(tmp_path):
    torch.multiprocessing.spawn(distributed_worker, (str(tmp_path / "store"),), nprocs=2)


def test_grad_scaler():
    """Under autocast the scaled gradient is the gradient, and a step whose gradient overflows is left out."""
    residual, images = made()
    (expected,) = torch.autograd.grad(residual(images).square().mean(), residual.weight)
    optimizer = torch.optim.SGD([residual.weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for dtype in (torch.bfloat16, torch.float16):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = residual(images).float().square().mean()
        scaler.scale(loss).backward()
        assert relative(residual.weight.grad, 2.0**10 * expected) < 0.05
        scaler.unscale_(optimizer)
        assert relative(residual.weight.grad, expected) < 0.05
        scaler.update()
    before = residual.weight.detach().clone()
    residual.weight.grad[0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(residual.weight, before)
    assert scaler.get_scale() < 2.0**10
    optimizer.zero_grad()
    scaler.scale(residual(images).square().mean()).backward()
    scaler.step(optimizer)
    assert not torch.equal(residual.weight, before)


def test_gradient_checkpointing_of_a_training_tower():
    """The same gradients, with every block run once more on the way back."""
    tower = build()
    for name, p in tower.named_parameters():
        p.requires_grad_(not ("out_proj" in name or name.startswith("ln_post") or name == "proj"))
    residual, images = made(tower, train_tower=True)
    calls = []
    tower.transformer.resblocks[0].ln_1.register_forward_hook(lambda *_: calls.append(1))
    residual(images)  # the check of a tower that has a hook now
    grads = []
    for checkpointing in (False, True):
        residual.set_grad_checkpointing(checkpointing)
        calls.clear()
        residual.zero_grad()
        residual(images).square().sum().backward()
        grads.append({name: p.grad for name, p in residual.named_parameters() if p.requires_grad})
        assert len(calls) == 1 + checkpointing
    assert len(grads[0]) > 10
    for name, grad in grads[0].items():
        assert relative(grads[1][name], grad) < 1e-6, name


class Embeds:
    """A collate function that carries an adapter into a worker."""

    def __init__(self, residual):
        self.residual = residual.eval()

    @torch.no_grad()
    def __call__(self, rows):
        return self.residual(torch.stack([image for (image,) in rows]))


def test_in_a_dataloader_worker():
    residual, images = made()
    loader = DataLoader(
        TensorDataset(images),
        batch_size=2,
        num_workers=1,
        collate_fn=Embeds(residual),
        multiprocessing_context="spawn",
    )
    with torch.no_grad():
        assert relative(torch.cat(list(loader)), residual(images)) < 1e-6


def test_retrieval_needs_the_mean_that_was_removed():
    """y lacks the adapted units' means: with them back, and weights of one, y is the tower's output again."""
    model, preprocess, _ = rk.load_bundled()
    images = torch.stack([preprocess(drawing) for drawing in drawn_images(80, seed=2)])
    bases = rk.fit_bases(model.visual, [images], kinds=("head", "mlp"))
    with torch.no_grad():
        output = model.visual(images)
        for adapter in (
            rk.ResiDual(model.visual, bases.of("head"), "sum"),
            rk.ResiDual(model.visual, bases, "sum"),
            rk.OutputSpectral(model.visual, bases),
            rk.CoarseHeads(model.visual, "sum"),
        ):
            y = adapter(images)
            assert relative(y + adapter.removed_mean, output) < 1e-3
            if not isinstance(adapter, rk.CoarseHeads):
                assert relative(y, output) > 0.05
        moved = rk.ResiDual(model.visual, bases.of("head")).double()
        assert moved.removed_mean.dtype == torch.float64
        linear = rk.OutputLinear(model.visual)
        assert linear.removed_mean.abs().sum() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_training_step_in_a_cuda_graph():
    """Captured once and replayed on new images: the same weights as without a graph."""
    tower = build().cuda()
    residual, images = made(tower)
    twin, batches = made(tower)[0], [images_for(tower, 4, seed=seed).cuda() for seed in range(4)]
    optimizers = [torch.optim.SGD([module.weight], lr=0.05) for module in (residual, twin)]
    place = batches[0].clone()

    def step(module, optimizer, x):
        optimizer.zero_grad(set_to_none=True)
        module(x).square().sum(1).mean().backward()
        optimizer.step()

    start = residual.weight.detach().clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(residual, optimizers[0], place)
    torch.cuda.current_stream().wait_stream(side)
    with torch.no_grad():
        residual.weight.copy_(start)
    graph = torch.cuda.CUDAGraph()
    optimizers[0].zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        step(residual, optimizers[0], place)
    with torch.no_grad():
        residual.weight.copy_(start)
    for batch in batches:
        place.copy_(batch)
        graph.replay()
        step(twin, optimizers[1], batch)
    assert relative(twin.weight, start) > 1e-3
    assert relative(residual.weight, twin.weight) < 1e-5


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example, tmp_path, monkeypatch, capsys):
    """Offline, in a few seconds; each prints what it started from and what it reached."""
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(example), run_name="__main__")
    printed = capsys.readouterr().out
    before, after = map(float, re.search(r"(0\.\d+) -> (0\.\d+)", printed).groups())
    assert after > before
    assert len(example.read_text().splitlines()) < 60
