"""The benchmark of a machine: every ready backend is in it, and its figures fit together."""

import json
import sys

import pytest
import torch

from residual_kernels import cli
from residual_kernels.experiments import bench
from residual_kernels.experiments.shapes import Shape
from residual_kernels.ops import backends

SMALL = Shape("small", units=4, coordinates=16, dim=32)


def test_every_ready_backend_is_measured():
    found = bench.measure(SMALL, 8, "full", rounds=2)
    ready = backends.available("cpu", torch.float32)
    assert {(speed.backend, speed.mode) for speed in found} == {(b, m) for b in ready for m in bench.MODES}
    J = 4 * 18
    for speed in found:
        work = 2 * 8 * J * (16 + 32) + (2 * 8 * J * 32 if speed.mode == "step" else 0)
        assert speed.flops * speed.seconds == pytest.approx(work)
        assert speed.share > 0
    forward = [speed.seconds for speed in found if speed.mode == "forward"]
    assert forward == sorted(forward)
    assert [speed.mode for speed in found] == sorted(speed.mode for speed in found)


def test_what_is_timed_is_what_a_fit_does():
    p = bench.problem(SMALL, 8, SMALL.components("ragged"))
    calls = bench._calls(p, "torch")
    assert calls["forward"]().shape == (8, 32)
    (dweight,) = calls["step"]()
    assert dweight.shape == p.weight.shape
    assert dweight.abs().sum() > 0


@pytest.mark.parametrize(
    "options, message",
    [
        (("--shape", "L/15"), "unknown shape 'L/15'; nearest are L/14"),
        (("--components", "0"), "components must be ragged, full or a number above 0; got '0'"),
    ],
)
def test_the_command_refuses(options, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["residual-kernels", "bench", *options])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_command(monkeypatch, capsys, tmp_path):
    options = [
        "--shape",
        "B/16",
        "--rows",
        "2",
        "--components",
        "3",
        "--rounds",
        "1",
        "--json",
        str(tmp_path / "b"),
    ]
    monkeypatch.setattr(sys, "argv", ["residual-kernels", "bench", *options])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert "GFLOP/s" in capsys.readouterr().out
    assert {row["mode"] for row in json.loads((tmp_path / "b").read_text())["rows"]} == set(bench.MODES)
    with pytest.raises(ValueError, match="at least 1; got 0"):
        bench.measure(SMALL, 0)
