"""Several processes, as torchrun starts them."""

import os
import time

import processes
import pytest
import torch
import torch.distributed as dist

from residual_kernels import distributed


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
