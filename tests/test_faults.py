"""A sample of benchmarks/faults.py: writers stopped at single calls, by a failure or by SIGKILL."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from benchmarks import faults, writers

ROOT = Path(__file__).parent.parent
SMALL = ["save_adapter", "fit --out", "JSON", "CSV", "bases", "sweep table"]


def stopped(names, share):
    done = faults.preloaded(["--share", str(share), "--seed", "3", "--writers", *names])
    return json.loads(done.stdout.splitlines()[-1])


def test_a_sample_of_stops():
    found = stopped(SMALL, 0.03)
    assert not found["faults"], "\n".join(found["faults"])
    assert {row["writer"] for row in found["rows"]} == set(SMALL)
    assert found["stops"] > 20
    for row in found["rows"]:
        assert row["calls"] >= 7, row  # open, write, flush, rename ...: the shim does see them


def test_a_wrong_writer_is_found_out():
    text = "\n".join(stopped([writers.WRONG], 0.5)["faults"])
    assert "neither the old nor the new result" in text
    assert "a foreign file was touched" in text


def command(*arguments, **options):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        **options.pop("environment", {}),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "residual_kernels.cli", *map(str, arguments)],
        env=environment,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    from residual_kernels.bundled.drawings import drawn_images

    folder = tmp_path_factory.mktemp("drawn")
    for number, image in enumerate(drawn_images(60, seed=1)):
        place = folder / "images" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{number:03d}.png")
    return folder


def test_a_signal_ends_a_command_with_one_line_and_the_next_goes_on(drawn, tmp_path):
    number = signal.SIGTERM
    arguments = [
        "encode",
        "--data",
        drawn / "images",
        "--out",
        tmp_path / "c",
        "--shard-images",
        "8",
        "--batch-size",
        "1",
    ]
    process = command(*arguments)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "c").glob("shard-0000[2-9]*")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    if process.returncode == 0:
        pytest.fail("the command was faster than the signal")
    assert process.returncode == 128 + number
    assert f"stopped by {number.name}; what was finished is kept" in errors
    assert "Traceback" not in errors
    kept = {path.name for path in (tmp_path / "c").iterdir()}
    assert len(kept) > 2
    assert not [name for name in kept if name.endswith(".part")]
    process = command(*arguments)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "images of an interrupted run" in " ".join(errors.split())


def test_ctrl_c_ends_a_fit_and_its_checkpoint_stays(drawn, tmp_path):
    cache, kept = tmp_path / "cache", tmp_path / "fit.safetensors"
    made = command("encode", "--data", drawn / "images", "--out", cache)
    assert made.wait(120) == 0, made.stderr.read()
    arguments = [
        "fit",
        "--method",
        "fine",
        "--data",
        cache,
        "--out",
        tmp_path / "run",
        "--checkpoint",
        kept,
        "--patience",
        "3000",
        "--epochs",
    ]
    process = command(*arguments, "3000")
    deadline = time.monotonic() + 120
    while not kept.exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.rstrip().endswith("stopped by SIGINT; what was finished is kept")
    assert "Traceback" not in errors
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "fit.safetensors"}
    from residual_kernels import files

    before = files.load_tensors(kept, "fit checkpoint")[1]["state"]["epoch"]
    assert 0 < before < 3000


def test_a_reader_that_goes_away_loses_no_file(drawn, tmp_path):
    process = command("doctor", "--json", tmp_path / "d.json")
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(60) == 2
    assert "the reader of the output has gone; the files are written" in errors
    assert "Traceback" not in errors
    assert "versions" in json.loads((tmp_path / "d.json").read_text())


KILLER = """
import os, signal
from PIL import Image
real, calls = Image.open, []
def opened(*arguments, **more):
    calls.append(1)
    if WHEN:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **more)
Image.open = opened
"""


def site(folder, when):
    """Variables of a process that ends itself when it opens an image and the condition holds."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(KILLER.replace("WHEN", when))
    return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def test_a_killed_worker_ends_the_command(drawn, tmp_path):
    """The process that reads images ends itself at one of them."""
    mark = tmp_path / "mark"
    when = "os.path.exists(os.environ['MARK']) and os.getpid() != int(open(os.environ['MARK']).read())"
    process = command(
        "encode",
        "--data",
        drawn / "images",
        "--out",
        tmp_path / "c",
        "--workers",
        "2",
        environment={**site(tmp_path / "site", when), "MARK": str(mark)},
    )
    mark.write_text(str(process.pid))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "error: DataLoader worker" in errors
    assert "Traceback" not in errors


def test_a_rank_that_is_killed_ends_torchrun_and_its_shards_are_kept(drawn, tmp_path):
    encode = [
        "encode",
        "--data",
        drawn / "images",
        "--batch-size",
        "4",
        "--shard-images",
        "8",
        "--device",
        "cpu",
    ]
    first = tmp_path / "c" / "shard-00001.safetensors"  # of the rank that is killed where it reads on
    variables = site(
        tmp_path / "site", "os.environ.get('RANK') == '1' and os.path.exists(os.environ['FIRST'])"
    )
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "residual_kernels.cli",
    ]
    done = subprocess.run(
        [sys.executable, *torchrun, *map(str, encode), "--out", str(tmp_path / "c")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "FIRST": str(first), **variables},
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
    )
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr, done.stderr
    kept = {path.name: path.read_bytes() for path in (tmp_path / "c").glob("shard-*")}
    assert first.name in kept
    process = command(*encode, "--out", tmp_path / "c")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert all((tmp_path / "c" / name).read_bytes() == data for name, data in kept.items())


def test_hostile_images_are_refused_in_bounded_memory(tmp_path):
    from residual_kernels.data.images import open_images

    folder = tmp_path / "a"
    folder.mkdir()
    os.mkfifo(folder / "pipe.png")
    images = open_images(tmp_path, lambda image: image)
    with pytest.raises(ValueError, match="not a regular file"):
        images.picture(0)
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/x.png", bytes(2**20))
    data = bytearray((tmp_path / "b.zip").read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = (2**32 - 2).to_bytes(4, "little")  # the size that it claims
    (tmp_path / "b.zip").write_bytes(data)
    with pytest.raises(ValueError, match="would take 4,294,967,294 bytes"):
        open_images(tmp_path / "b.zip", lambda image: image).picture(0)
    for pattern in (
        "x-{000000000..99999999}.tar",
        "x-{0..99999}{0..99999}.tar",
        "x-{0..99999999999999999999}{a,b}.tar",
    ):
        start = time.monotonic()
        with pytest.raises(ValueError, match=r"shards"):
            open_images(pattern, lambda image: image)
        assert time.monotonic() - start < 5


def test_no_code_of_a_model_s_folder_runs(tmp_path):
    from residual_kernels.data.models import load_model

    (tmp_path / "config.json").write_text(
        json.dumps(
            {"architectures": ["CLIPModel"], "model_type": "mine", "auto_map": {"AutoConfig": "evil.C"}}
        )
    )
    (tmp_path / "evil.py").write_text(
        f"open({str(tmp_path / 'RAN')!r}, 'w')\n"
        "from transformers import CLIPConfig\n"
        "class C(CLIPConfig):\n"
        "    pass\n"
    )
    with pytest.raises(ValueError, match="brings code of its own, and this library runs none"):
        load_model(f"hf:{tmp_path}")
    assert not (tmp_path / "RAN").exists()


def test_a_checkpoint_that_could_run_code_is_refused_without_advice_to_run_it(tmp_path, monkeypatch):
    import open_clip
    import torch

    from residual_kernels.data.models import load_model

    torch.save({"a": Path("x")}, tmp_path / "w.pt")
    monkeypatch.setattr(
        open_clip,
        "create_model_and_transforms",
        lambda name, pretrained: torch.load(pretrained, weights_only=True),
    )
    # Torch blocks modules such as os by name.
    (tmp_path / "command.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    for name in ("w.pt", "command.pt"):
        with pytest.raises(
            ValueError, match=r"does not hold weights of ViT-B-32: it holds more than tensors"
        ) as caught:
            load_model("ViT-B-32", str(tmp_path / name))
        assert "weights_only" not in str(caught.value)
    assert "os.system" in str(caught.value)
