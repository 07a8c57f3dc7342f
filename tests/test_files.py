"""Files on disk: modes, links, devices, foreign neighbours, and the bytes of safetensors' own writer."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from test_towers import build, images_for

import residual_kernels as rk
from residual_kernels import files
from residual_kernels.train import checkpoints

HEX = "0123abcd"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(scope="module")
def adapters():
    tower = build()
    bases = rk.fit_bases(tower, [images_for(tower, 20)])
    return [rk.ResiDual(tower, bases.truncate(components=k), init="normal") for k in (2, 3)]


def test_tensors_are_written_as_safetensors_writes_them(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"a{index}": torch.randint(0, 2, (index % 4, 3), generator=generator).to(dtype).T
        for index, dtype in enumerate(files._DTYPES)
    } | {"scalar": torch.tensor(2.5), "ü": torch.randn(7, generator=generator)}
    header = files.save_tensors(tmp_path / "x", tensors, "test", {"names": ['"é\n']})
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert (tmp_path / "x").read_bytes() == save(plain, metadata={files.METADATA: json.dumps(header)})
    loaded, _ = files.load_tensors(tmp_path / "x", "test")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_modes_follow_the_umask_and_what_is_there(adapters, tmp_path):
    old = os.umask(0o027)
    try:
        rk.save_adapter(adapters[0], tmp_path / "new" / "a")
        files.write_json(tmp_path / "new.json", {})
        assert {mode(path) for path in (tmp_path / "new" / "a").iterdir()} == {0o640}
        assert mode(tmp_path / "new") == mode(tmp_path / "new" / "a") == 0o750
        assert mode(tmp_path / "new.json") == 0o640
        (tmp_path / "new.json").chmod(0o400)
        files.write_json(tmp_path / "new.json", {"again": True})
        assert mode(tmp_path / "new.json") == 0o400
        (tmp_path / "new" / "a").chmod(0o701)
        rk.save_adapter(adapters[1], tmp_path / "new" / "a")
        assert mode(tmp_path / "new" / "a") == 0o701
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(old)


def test_neighbours_are_neither_touched_nor_opened(adapters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [
        "weights.safetensors",
        "head.safetensors",
        ".tmpAbCdEf",
        ".notes.part",
        ".x.0123abcd.part",
        "weights-1.safetensors",
    ]
    for name in names:
        (tmp_path / name).write_text("precious")
        (tmp_path / name).chmod(0o000)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "code.py").write_text("precious")
    before = {path: (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in tmp_path.rglob("*")}
    for adapter in (*adapters, adapters[0]):
        rk.save_adapter(adapter, ".")
        again = rk.load_adapter(build(), ".")
        assert torch.equal(again.weight, adapter.weight)
        after = {path: (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in before}
        assert after == before
        own = {path.name for path in tmp_path.iterdir()} - {path.name for path in before}
        listed = json.loads((tmp_path / "adapter.json").read_text())["files"]
        assert own == {"adapter.json", *(entry["name"] for entry in listed.values())}


def test_an_adapter_of_the_first_version_is_read_and_replaced(adapters, tmp_path):
    rk.save_adapter(adapters[0], tmp_path)
    config = json.loads((tmp_path / "adapter.json").read_text())
    del config["files"]
    (tmp_path / "adapter.json").write_text(json.dumps(config))
    assert torch.equal(rk.load_adapter(build(), tmp_path).weight, adapters[0].weight)
    rk.save_adapter(adapters[1], tmp_path)
    assert torch.equal(rk.load_adapter(build(), tmp_path).weight, adapters[1].weight)
    assert len(list(tmp_path.iterdir())) == 3
    for text in ("{}", "[" * 100, '{"schema": 1, "what": "adapter"}', "mine"):
        (tmp_path / "adapter.json").write_text(text)
        with pytest.raises(FileExistsError, match="was not written by this library"):
            rk.save_adapter(adapters[1], tmp_path)
        assert (tmp_path / "adapter.json").read_text() == text


@pytest.mark.parametrize(
    "name", ["../weights.safetensors", "/etc/passwd", "weights-zz.safetensors", "adapter.json", 5]
)
def test_a_config_names_only_files_of_ours(adapters, tmp_path, name):
    rk.save_adapter(adapters[0], tmp_path / "a")
    file = tmp_path / "a" / "adapter.json"
    config = json.loads(file.read_text())
    config["files"]["weights.safetensors"]["name"] = name
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the file that it names|must be a text"):
        rk.load_adapter(build(), tmp_path / "a")


def test_links_and_devices_and_full_names(adapters, tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    rk.save_adapter(adapters[0], tmp_path / "link")
    rk.save_adapter(adapters[1], tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert torch.equal(rk.load_adapter(build(), real).weight, adapters[1].weight)

    (tmp_path / "there.json").write_text("{}")
    (tmp_path / "through.json").symlink_to(tmp_path / "there.json")
    files.write_json(tmp_path / "through.json", {"a": 1})
    assert (tmp_path / "through.json").is_symlink()
    assert json.loads((tmp_path / "there.json").read_text()) == {"a": 1}

    files.write_json("/dev/null", {"a": 1})
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    code = (
        "from residual_kernels.files import write_json; write_json('/dev/stdout', {'a': 1}); print('after')"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told == '{\n  "a": 1\n}\nafter\n'

    files.write_json(tmp_path / ("é" * 127), {})  # 254 bytes, which ext4 takes
    with pytest.raises(OSError, match="cannot write .*: it is a folder"):
        files.write_json(real, {})


def test_what_a_failed_writer_left_goes_with_the_next_in_the_same_process(tmp_path, monkeypatch):
    """The failed one must not hold its lock for as long as the process lives."""
    place = tmp_path / "x.json"
    files.write_json(place, {"a": 1})
    for name in ("chmod", "replace"):
        with monkeypatch.context() as broken:
            broken.setattr(os, name, lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
            broken.setattr(
                Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EIO, "broken"))
            )
            with pytest.raises(OSError, match="broken"):
                files.write_json(place, {"a": 2})
        assert len(list(tmp_path.iterdir())) == 2
        files.write_json(place, {"a": 3})
        assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="a system without /dev/shm")
def test_a_plain_file_in_shared_memory_is_replaced_not_written_into():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        place = Path(folder) / "x.json"
        files.write_json(place, {"a": 1})
        with place.open() as before:
            files.write_json(place, {"a": 2})
            assert json.load(before) == {"a": 1}
        assert json.loads(place.read_text()) == {"a": 2}


def test_a_checkpoint_is_read_into_memory(tmp_path):
    place, identity = tmp_path / "fit.safetensors", {"a": 1}
    state = {"epoch": 1, "active": [], "groups": [], "tasks": [], "seconds": 1.0}
    checkpoints.save(place, identity, state, {"best": torch.ones(99)})
    held = checkpoints.load(place, identity)
    with place.open("r+b") as file:  # as a copying tool writes over a file
        file.write(bytes(place.stat().st_size))
    assert torch.equal(held[1]["best"], torch.ones(99))


def test_what_a_killed_writer_left_goes_and_a_living_one_keeps_its_own(tmp_path):
    target = tmp_path / "x.json"
    dead = tmp_path / f".x.json.{HEX}.part"
    dead.write_text("half")
    with files.atomic_path(target) as first:
        assert not dead.exists()
        first.write_text("1")
        with files.atomic_path(target) as second:
            assert first.exists()
            second.write_text("2")
        assert target.read_text() == "2"
    assert target.read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("step", ["link", "replace", "unlink"])
def test_kill_at_every_step_of_saving_over_an_adapter(adapters, tmp_path, step):
    """SIGKILL just before and just after the n-th call, for every n."""
    tower = build()
    for after in (False, True):
        for n in range(20):
            folder = tmp_path / f"{step}-{after}-{n}"
            rk.save_adapter(adapters[0], folder)
            (folder / "mine.txt").write_text("x")
            pid = os.fork()
            if pid == 0:
                torch.set_num_threads(1)
                calls, real = iter(range(1000)), getattr(os, step)

                def counted(*args, **more):
                    last = next(calls) == n  # noqa: B023
                    if last and not after:  # noqa: B023
                        os.kill(os.getpid(), signal.SIGKILL)
                    real(*args, **more)  # noqa: B023
                    if last:
                        os.kill(os.getpid(), signal.SIGKILL)

                setattr(os, step, counted)
                rk.save_adapter(adapters[1], folder)
                os._exit(0)
            killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
            found = rk.load_adapter(tower, folder)
            assert any(torch.equal(found.weight, adapter.weight) for adapter in adapters)
            found.detach()
            rk.save_adapter(adapters[1], folder)
            assert len(list(folder.iterdir())) == 4
            assert (folder / "mine.txt").read_text() == "x"
            if not killed:
                break
        assert not killed
        assert n > 0


def test_two_writers_and_a_reader_at_once(adapters, tmp_path):
    """A reader always finds one of the two adapters, whole."""
    rk.save_adapter(adapters[0], tmp_path)
    children = []
    for adapter in adapters:
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)
            for _ in range(30):
                rk.save_adapter(adapter, tmp_path)
            os._exit(0)
        children.append(pid)
    tower, seen = build(), 0
    while any(os.waitpid(pid, os.WNOHANG) == (0, 0) for pid in children[-1:]):
        found = rk.load_adapter(tower, tmp_path)
        assert any(torch.equal(found.weight, adapter.weight) for adapter in adapters)
        found.detach()
        seen += 1
    os.waitpid(children[0], 0)
    assert seen > 3
    assert len(list(tmp_path.iterdir())) == 3


def test_a_failed_save_says_what_and_leaves_nothing(adapters, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"^cannot write .*/b/c/bases.safetensors: No space left on device$"
    ) as caught:
        rk.save_adapter(adapters[0], tmp_path / "b" / "c")
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "b").exists()
