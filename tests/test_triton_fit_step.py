"""The kernels of a fit's step against float64: plain autograd and schedulefree's own optimizer."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("triton", reason="the package triton is not installed")
pytest.importorskip("schedulefree", reason="the package schedulefree is not installed")
import schedulefree

from residual_kernels.ops.triton import fit_step
from residual_kernels.ops.triton.tiles import INTERPRETED

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and TRITON_INTERPRET=0"),
]
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=NEEDS_GPU)]
SHAPES = {  # images, components, outputs, classes of each head, batch, tasks, orders
    "one": (40, 37, 24, [5], 16, 1, 1),
    "short last batch, two classes": (21, 8, 16, [2], 8, 1, 1),
    "tasks": (30, 150, 70, [9], 20, 3, 2),
    "heads of their own": (23, 11, 40, [70, 33], 23, 2, 1),
    "one image": (3, 5, 17, [3], 1, 1, 1),
}
LR, DECAY = 0.05, 0.01


@pytest.fixture(params=DEVICES)
def device(request):
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is full of NaN
    yield request.param
    torch.use_deterministic_algorithms(False)


def made(shape, *, weighted, rest, shift, dtype=torch.float64):
    """Operands in `dtype` on the CPU, and the epoch's orders."""
    images, components, dim, classes, batch, tasks, orders = shape
    generator = torch.Generator().manual_seed(3)

    def normal(*size):
        return torch.randn(*size, generator=generator).to(dtype)

    most, heads = max(classes), len(classes)
    labels = torch.stack([torch.randint(size, (images,), generator=generator) for size in classes])
    order = torch.stack([torch.randperm(images, generator=generator) for _ in range(orders)])
    x = {
        "c": normal(images, components),
        "basis": normal(components, dim) / components**0.5,
        "rest": {"row": normal(images, dim), "all": normal(1, dim), None: None}[rest],
        "shift": shift,
        "vectors": normal(heads, dim, most),
        "scale": torch.tensor([3.0, 5.0][:heads]).to(dtype),
        "classes": torch.tensor(classes),
        "labels": labels,
        "class_weight": 0.5 + torch.rand(heads, most, generator=generator).to(dtype) if weighted else None,
        "weight": 1 + 0.3 * normal(tasks, components),
        "which": torch.arange(tasks) % heads,
        "order_of": torch.arange(tasks) % orders,
    }
    return x, order, batch


def expected(x, order, batch):
    """Weights and mean losses after an epoch, in float64: torch's operators, one task after another."""
    weights, z, losses = [], [], []
    for task in range(len(x["weight"])):
        which, rows_of = int(x["which"][task]), order[x["order_of"][task]]
        classes = int(x["classes"][which])
        weight = nn.Parameter(x["weight"][task].clone())
        optimizer = schedulefree.AdamWScheduleFree([weight], lr=LR * (1 + task), weight_decay=DECAY)
        optimizer.train()
        total = 0.0
        for rows in rows_of.split(batch):
            y = (x["c"][rows] * (weight - x["shift"])) @ x["basis"]
            if x["rest"] is not None:
                y = y + (x["rest"][rows] if len(x["rest"]) > 1 else x["rest"])
            logits = F.normalize(y, dim=-1) @ x["vectors"][which, :, :classes] * x["scale"][which]
            of_class = None if x["class_weight"] is None else x["class_weight"][which, :classes]
            loss = F.cross_entropy(logits, x["labels"][which, rows], of_class)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(rows)
        weights.append(weight.detach())
        z.append(optimizer.state[weight]["z"])
        losses.append(total / order.shape[1])
    return torch.stack(weights), torch.stack(z), torch.tensor(losses, dtype=torch.float64)


def rates(steps, tasks):
    """What TaskWeights.advance gives for learning rates LR, 2 LR, 3 LR ..."""
    rows = []
    for k in range(steps):
        of_tasks = []
        for task in range(tasks):
            lr, average = LR * (1 + task), 1 / (k + 1)
            of_tasks.append((average, lr, 1 - 0.999 ** (k + 1), lr * (0.9 * (1 - average) - 1)))
        rows.append(of_tasks)
    return torch.tensor(rows, dtype=torch.float32)


def operands(x, order, steps, device):
    (tasks, components), (images, _) = x["weight"].shape, x["c"].shape
    found = {
        key: value.float() if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in x.items()
    }
    basis, classes = found["basis"], found["vectors"].shape[2]
    found["c"] = F.pad(found["c"], (0, -components % 8))
    found["basis"] = F.pad(basis, (0, -basis.shape[1] % 8, 0, -components % 8))
    found["vectors"] = F.pad(found["vectors"], (0, -classes % 8))
    here = {
        key: value.to(device).contiguous() if torch.is_tensor(value) else value
        for key, value in found.items()
    }
    weight, one_head = here["weight"], len(here["vectors"]) == 1
    return fit_step.StepOperands(
        **here,
        z=weight.clone(),
        square=torch.zeros_like(weight),
        head=torch.zeros_like(here["which"]) if one_head else here["which"],
        order=torch.empty(order.shape, dtype=torch.int64, device=device),
        rates=torch.empty(steps, tasks, fit_step.RATES, device=device),
        losses=torch.empty(tasks, images, device=device),
        place=torch.zeros(3, dtype=torch.int64, device=device),
    )


def run(x, order, batch, device, more=0):
    """Weights, z and mean losses after an epoch by the kernels; `more` steps than there are batches."""
    steps = -(-order.shape[1] // batch)
    given = operands(x, order, steps, device)
    step = fit_step.FitStep(given, batch, 0.999, 1e-8, DECAY)
    step()  # no epoch has begun
    assert given.weight.cpu().equal(x["weight"].float()) or x["weight"].isnan().any()
    given.begin(order, rates(steps, len(given.weight)))
    for _ in range(steps + more):
        step()
    return given.weight.cpu(), given.z.cpu(), given.losses.double().mean(1).cpu()


OPTIONS = [
    {"weighted": False, "rest": None, "shift": 0.0},
    {"weighted": True, "rest": "row", "shift": 1.0},
    {"weighted": False, "rest": "all", "shift": 0.0},
]


CASES = [
    ("one", 0),
    ("short last batch, two classes", 1),
    ("tasks", 1),
    ("tasks", 2),
    ("heads of their own", 1),
    ("one image", 2),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_an_epoch_is_that_of_float64(device, name, options):
    x, order, batch = made(SHAPES[name], **OPTIONS[options])
    truth = expected(x, order, batch)
    found = run(x, order, batch, device, more=2)
    for mine, right in zip(found, truth, strict=True):
        assert (mine - right).abs().max() < 5e-6, (mine, right)


def test_a_step_too_few_is_noticed(device):
    """The negative case: the tolerance tells one step from the next."""
    x, order, batch = made(SHAPES["one"], **OPTIONS[0])
    truth = expected(x, order, batch)
    found = run(x, order[:, :-batch], batch, device)
    assert (found[0] - truth[0]).abs().max() > 1e-3


def test_the_same_bits_every_time(device):
    x, order, batch = made(SHAPES["tasks"], **OPTIONS[1])
    first, second = (run(x, order, batch, device) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_an_embedding_of_nothing_has_no_gradient(device):
    """y = 0 for one image: torch holds its length at 1e-12, and so does the kernel."""
    x, order, batch = made(SHAPES["one"], **OPTIONS[0])
    x["c"][5] = 0
    truth, found = expected(x, order, batch), run(x, order, batch, device)
    assert (found[0] - truth[0]).abs().max() < 5e-6
    assert found[2].isfinite().all()


def test_a_loss_that_is_not_a_number_is_told(device):
    x, order, batch = made(SHAPES["tasks"], **OPTIONS[0])
    x["weight"][1, 3] = float("nan")
    _, _, losses = run(x, order, batch, device)
    assert losses.isnan().tolist() == [False, True, False]
