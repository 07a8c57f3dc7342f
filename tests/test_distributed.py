"""Several processes, as torchrun starts them."""

import os
import subprocess
import sys
import time

import processes
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from test_encoding import KINDS, SHARD, build, contents, loader, stream
from torch.utils.data import DataLoader

import residual_kernels as rk
from residual_kernels import distributed
from residual_kernels.data.images import ImageFiles
from residual_kernels.units.cache import MANIFEST


def test_one_process_needs_no_group():
    assert not distributed.initialise()
    assert (distributed.rank(), distributed.world(), distributed.is_distributed()) == (0, 1, False)
    assert distributed.gather("x") == ["x"]
    distributed.finish()


def _meets(folder):
    assert distributed.initialise()
    assert distributed.initialise()  # a second call changes nothing
    values = distributed.gather({"rank": distributed.rank()})
    total = torch.ones(1, dtype=torch.float64) * (1 + distributed.rank())
    dist.all_reduce(total)
    (folder / str(distributed.rank())).write_text(f"{values} {total.item()}")
    distributed.finish()
    assert not distributed.is_distributed()


def test_two_processes_meet(tmp_path):
    assert processes.exit_codes(processes.start_ranks(2, _meets, tmp_path)) == [0, 0]
    expected = "[{'rank': 0}, {'rank': 1}] 3.0"
    assert [(tmp_path / name).read_text() for name in "01"] == [expected] * 2


def _one_is_missing(folder, how):
    distributed.initialise()
    distributed.gather(None)
    if distributed.rank() == 1:
        if how == "dies":
            os._exit(9)
        time.sleep(60)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="process 0 of 2 waited for the others"):
        distributed.gather(None, timeout=2)
    (folder / "seconds").write_text(str(time.monotonic() - start))
    os._exit(3)


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_missing_process_is_noticed(tmp_path, how):
    ranks = processes.start_ranks(2, _one_is_missing, tmp_path, how)
    ranks[0].join(30)
    ranks[1].kill()
    assert ranks[0].exitcode == 3
    assert float((tmp_path / "seconds").read_text()) < 10


def _fails_first(folder, error):
    distributed.initialise()

    def make():
        raise error

    expected = (type(error), "no") if distributed.rank() == 0 else (RuntimeError, "process 0 stopped: no")
    with pytest.raises(expected[0], match=expected[1]):
        distributed.from_first(make)
    assert distributed.from_first(lambda: [distributed.rank()]) == [0]
    (folder / str(distributed.rank())).touch()
    distributed.finish()


def test_what_the_first_process_cannot_do_stops_all(tmp_path):
    ranks = processes.start_ranks(2, _fails_first, tmp_path, ValueError("no"))
    assert processes.exit_codes(ranks) == [0, 0]
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


# encode

OPTIONS = {"class_names": "abc", "shard_images": SHARD, "preprocessing": "'noise'", "data": "noise"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """As the processes that are compared with this one: another number of threads may round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "c"
    rk.encode(build(), loader(), folder, KINDS, **OPTIONS)
    return contents(folder)


def _encodes(folder, make, report):
    distributed.initialise()
    seen = []
    cache = rk.encode(build(), make(), folder, KINDS, progress=seen.append, **OPTIONS)
    (report / str(distributed.rank())).write_text(f"{len(cache)} {sum(seen)} {cache.output.sum()}")
    distributed.finish()


@pytest.mark.parametrize("world, make", [(2, loader), (3, stream)])
def test_processes_share_the_shards(undisturbed, tmp_path, world, make):
    ranks = processes.start_ranks(world, _encodes, tmp_path / "c", make, tmp_path)
    assert processes.exit_codes(ranks) == [0] * world
    assert contents(tmp_path / "c") == undisturbed
    reports = [(tmp_path / str(rank)).read_text().split() for rank in range(world)]
    assert {length for length, _, _ in reports} == {"100"}
    assert [int(own) for _, own, _ in reports] == {2: [52, 48], 3: [48, 28, 24]}[world]
    assert len({total for _, _, total in reports}) == 1


def _dies(folder, report):
    distributed.initialise()
    seen = []

    def step(images):
        seen.append(images)
        if distributed.rank() == 1 and len(seen) == 4:
            os._exit(9)  # in its second shard

    try:
        rk.encode(build(), loader(), folder, KINDS, progress=step, **OPTIONS)
    except RuntimeError as error:
        (report / "error").write_text(str(error))
        os._exit(3)


def test_a_process_that_dies_leaves_a_cache_to_go_on_with(undisturbed, tmp_path):
    """The other finishes its own shards and ends with an error.

    The next run makes what is missing, alone or not.
    """
    start = time.monotonic()
    ranks = processes.start_ranks(2, _dies, tmp_path / "c", tmp_path)
    assert processes.exit_codes(ranks) == [3, 9]
    assert time.monotonic() - start < 60
    assert "one has died or hangs" in (tmp_path / "error").read_text()
    left = contents(tmp_path / "c")
    kept = {name for name in left if name.startswith("shard-")}
    assert {"shard-00000.safetensors", "shard-00002.safetensors", "shard-00004.safetensors"} <= kept
    assert len(kept) < 5
    assert all(left[name] == undisturbed[name] for name in kept)
    with pytest.raises(FileNotFoundError, match="not finished"):
        rk.UnitCache.load(tmp_path / "c")
    ranks = processes.start_ranks(2, _encodes, tmp_path / "c", loader, tmp_path)
    assert processes.exit_codes(ranks) == [0, 0]
    assert contents(tmp_path / "c") == undisturbed


def _different_data(folder):
    distributed.initialise()
    with pytest.raises(
        (ValueError, RuntimeError), match="loaders gave 100, 90 images; give each the same data"
    ):
        rk.encode(build(), loader(100 - 10 * distributed.rank()), folder, KINDS, **OPTIONS)
    with pytest.raises((ValueError, RuntimeError), match="other dtype .float32 there, bfloat16 here"):
        rk.encode(build(), loader(), folder, KINDS, torch.bfloat16, **OPTIONS)
    distributed.finish()


def test_processes_with_different_data_are_refused(tmp_path):
    ranks = processes.start_ranks(2, _different_data, tmp_path / "c")
    assert processes.exit_codes(ranks) == [0, 0]
    assert b'"complete": false' in (tmp_path / "c" / MANIFEST).read_bytes()


def test_torchrun_on_the_command_line(tmp_path):
    """The line that README gives, against one process."""
    for index in range(20):
        path = tmp_path / "images" / ("cat", "dog")[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), 5.0 * index).save(path)
    arguments = ["--data", tmp_path / "images", "--batch-size", 4, "--shard-images", 8, "--device", "cpu"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "residual_kernels.cli",
            "encode",
            *map(str, arguments),
            "--out",
            tmp_path / "two",
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("20 images of 2 classes") == 1
    model, preprocess, _ = rk.load_bundled()
    images = ImageFiles(tmp_path / "images", preprocess)
    rk.encode(
        model.visual,
        DataLoader(images, batch_size=4),
        tmp_path / "one",
        class_names=images.class_names,
        shard_images=8,
    )
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
