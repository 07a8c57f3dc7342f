"""sweep --check and --plan: names looked up offline, hours and bytes, and the paper's plan."""

import importlib.util
import json
import socket
import sys
from pathlib import Path

import pytest
import torch

from residual_kernels import cli
from residual_kernels.experiments import foresee
from residual_kernels.experiments.sweep_plan import SweepPlan, TowerSpec

PAPER = Path(__file__).resolve().parents[1] / "examples" / "paper"

PLAN = """
towers:
  - {model: bundled}
  - {model: ViT-B-16, pretrained: opnai}
  - {model: ViT-B-61, pretrained: openai}
  - {model: "hf:nobody/nothing at all"}
  - {model: "hf:somebody/something"}
data:
  - {name: here, train: FOLDER/train, test: FOLDER/test, templates: "clip_benchmark:gtsbr"}
  - name: by name
    train: "torchvision:CIFAR11@train"
    test: "torchvision:CIFAR10@tset"
    class_names: names.txt
methods: [base, fine]
"""


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def plan(tmp_path):
    for part, count in (("train", 3), ("test", 2)):
        for number in range(count):
            file = tmp_path / part / "a" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        (tmp_path / part / "a" / "notes.txt").touch()
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN.replace("FOLDER", str(tmp_path)))
    return path


def test_every_name_has_a_verdict(plan, no_network):
    found = {(one.what, one.name): one for one in foresee.check(SweepPlan.read(plan))}
    verdicts = {key[1].rpartition("/")[2]: one.verdict for key, one in found.items()}
    assert verdicts["bundled"] == verdicts["train"] == verdicts["test"] == foresee.KNOWN
    assert verdicts["something"] == foresee.OPEN
    why = {key[1]: one.why for key, one in found.items() if one.verdict == foresee.UNKNOWN}
    assert "nearest are openai" in why["ViT-B-16 (opnai)"]
    assert "ViT-B-16" in why["ViT-B-61 (openai)"]
    assert "no name the hub can have" in why["hf:nobody/nothing at all"]
    assert "CIFAR10" in why["torchvision:CIFAR11@train"]
    assert "@train or torchvision:CIFAR10@test" in why["torchvision:CIFAR10@tset"]
    assert "clip_benchmark:gtsbr" in why
    assert why["names.txt"] == "no such file: names.txt"
    assert len(why) == 7


def test_the_paper_names_nothing_unknown(no_network):
    plan = SweepPlan.read(PAPER / "plan.yaml")
    assert (len(plan.towers), len(plan.data), len(plan.methods)) == (7, 10, 6)
    names = foresee.check(plan)
    assert [one for one in names if one.verdict == foresee.UNKNOWN] == []
    assert sum(one.verdict == foresee.OPEN for one in names) == 3 + 2 * 4


def test_costs_follow_sizes_and_counts(plan):
    chosen = SweepPlan.read(plan)
    rows = {(one.tower, one.data): one for one in foresee.estimate(chosen, 1e9)}
    here = rows["bundled", "here"]
    assert here.images == 5
    assert here.bytes == 5 * (6 * 128 * 4 + 128 * 4 + 8)  # heads, output, scale and mean
    shape = foresee.TowerSize(6, 128, 17, 128)
    assert shape.flop == 6 * (24 * 17 * 128**2 + 4 * 17**2 * 128)
    assert here.hours > 5 * shape.flop / foresee.TOWER_SHARE / 1e9 / 3600
    faster = {(one.tower, one.data): one for one in foresee.estimate(chosen, 4e9)}
    assert faster["bundled", "here"].hours == pytest.approx(here.hours / 4)
    assert rows["bundled", "by name"].hours is None
    assert "CIFAR11" in rows["bundled", "by name"].why
    assert rows["hf:somebody/something", "here"].why == "the tower's sizes"


def test_flop_are_those_of_the_model():
    """Products counted by torch on the bundled tower, but for what is no product."""
    from torch.utils.flop_counter import FlopCounterMode

    import residual_kernels as rk

    model = rk.load_bundled()[0]
    with FlopCounterMode(
        display=False
    ) as counter:  # with gradients, since it does not see inference's fused blocks
        model.visual.train()(torch.zeros(1, 3, 32, 32))
    assert counter.get_total_flops() == pytest.approx(foresee.TowerSize(6, 128, 17, 128).flop, rel=0.1)


def test_the_command(plan, tmp_path, monkeypatch, capsys, no_network):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["residual-kernels", "sweep", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0, capsys.readouterr()

    monkeypatch.setattr("residual_kernels.cli.foresee.speed", lambda device: 1e12)
    code, said = run(plan, "--check", "--json", tmp_path / "names.json")
    assert code == 2
    assert "7 names are unknown" in said.err
    assert len(json.loads((tmp_path / "names.json").read_text())["names"]) == 11
    code, said = run(PAPER / "plan.yaml", "--plan", "--json", tmp_path / "costs.json")
    assert code == 0
    assert "hours and" in said.out
    costs = json.loads((tmp_path / "costs.json").read_text())["costs"]
    assert len(costs) == 77
    assert [one for one in costs if one["hours"] is None or one["bytes"] is None] == []
    code, said = run(plan)
    assert code == 2
    assert "--out FOLDER" in said.err


def test_speed_is_measured():
    assert foresee.speed(torch.device("cpu"), 0.01) > 1e8


def test_the_paper_s_layout(tmp_path):
    spec = importlib.util.spec_from_file_location("paper_table", PAPER / "table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "table.csv").write_text(
        "tower,method,learned numbers,GTSRB,Cars,average,GTSRB (deviation)\n"
        "A,base,0,0.5,0.25,0.375,0\nA,fine,8300,0.75,0.5,0.625,0\n"
    )
    published = json.loads((PAPER / "published.json").read_text())
    assert published["cells"] == {}
    text = module.layout(*module.rows_of(tmp_path), published)
    assert "| tower | method | learned | GTSRB | Cars |" in text
    assert "|  | fine | 8,300 | 0.750 | 0.500 |" in text
    assert "0.90 to 0.92" in text
    published["cells"] = {"A": {"fine": {"Cars": 0.625}}}
    assert "| 0.500 [0.625] |" in module.layout(*module.rows_of(tmp_path), published)


def test_no_code_of_a_model_s_folder_runs_for_an_estimate(tmp_path, monkeypatch):
    """transformers asks on standard input whether it may run it, where it is not told."""
    import io
    import sys

    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(
        '{"architectures": ["CLIPModel"], "model_type": "mine", "auto_map": {"AutoConfig": "evil.C"}}'
    )
    (tmp_path / "evil.py").write_text(
        f"open({str(tmp_path / 'RAN')!r}, 'w')\n"
        "from transformers import CLIPConfig\nclass C(CLIPConfig):\n    pass\n"
    )
    asked = io.StringIO("y\n" * 9)
    monkeypatch.setattr(sys, "stdin", asked)
    assert foresee.shape_of(TowerSpec(f"hf:{tmp_path}")) is None
    assert not (tmp_path / "RAN").exists()
    assert asked.tell() == 0


def test_a_data_set_that_does_not_classify_is_unknown_but_for_bases():
    with pytest.raises(ValueError, match="its labels are attributes of faces"):
        foresee._data("torchvision:CelebA@train")
    assert foresee._data("torchvision:CelebA@train", labelled=False) is None
