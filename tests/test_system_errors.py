"""What a system refuses: one file or folder is named, and an error of the machine blames no image."""

import errno
import os
import sys
import tarfile
import zipfile

import pytest
from PIL import Image

from residual_kernels import cli
from residual_kernels.cli import inputs, printing
from residual_kernels.data.images import UnreadableImage, find_unreadable, open_images

ONE_FILE = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ELOOP, errno.ENAMETOOLONG)
MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ENOSPC, errno.ESTALE)


def same(picture):
    return picture


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(root / name / f"{number}.png")
    return root


def in_zip(root, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for path in sorted(root.rglob("*.png")):
            file.write(path, path.relative_to(root))
    return tmp_path / "a.zip"


def in_tar(root, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for number, path in enumerate(sorted(root.rglob("*.png"))):
            file.add(path, f"{number}.png")
            (tmp_path / "label").write_text("0")
            file.add(tmp_path / "label", f"{number}.cls")
    return tmp_path / "a.tar"


def raises(number):
    def refuse(*arguments, **options):
        raise OSError(number, os.strerror(number))

    return refuse


def broken(images, number, monkeypatch):
    """Makes the system raise this error where a source asks it for the second image's bytes."""
    if getattr(images, "archive", None) is not None:
        images.picture(0)  # opens the zip
        read = images._handle[1].read
        monkeypatch.setattr(
            images._handle[1],
            "read",
            lambda member: raises(number)() if member is images._entries[1] else read(member),
        )
        return
    if hasattr(images, "shards"):
        file = images._file(0)
        place = images._places[1][1]

        class Broken:
            def seek(self, at):
                self.at = at
                file.seek(at)

            def read(self, size):
                return raises(number)() if self.at == place else file.read(size)

        images._handles[0] = Broken()
        return
    opened = os.open
    monkeypatch.setattr(
        os,
        "open",
        lambda path, *rest: raises(number)() if str(path).endswith(images.names[1]) else opened(path, *rest),
    )


@pytest.mark.parametrize("source", ["folder", "zip", "tar"])
def test_a_file_that_may_not_be_read_is_named_and_a_failing_machine_blames_none(
    photos, tmp_path, monkeypatch, source
):
    path = {"folder": lambda *_: photos, "zip": in_zip, "tar": in_tar}[source](photos, tmp_path)
    for number in (*ONE_FILE, *MACHINE):
        images = open_images(path, same)
        with monkeypatch.context() as patch:
            broken(images, number, patch)
            if number in ONE_FILE:
                (reason,) = find_unreadable(images).values()
                assert reason == f"{images.where(1)} is not a readable image: {os.strerror(number)}"
                with pytest.raises(UnreadableImage):
                    images.picture(1)
            else:
                for read in (lambda images: images.picture(1), find_unreadable):
                    with pytest.raises(OSError) as caught:
                        read(images)
                    assert caught.value.errno == number
                    assert not isinstance(caught.value, ValueError)


def test_no_memory_blames_no_image(photos, monkeypatch):
    images = open_images(photos, same)
    monkeypatch.setattr(Image, "open", lambda *_, **__: (_ for _ in ()).throw(MemoryError("no memory")))
    with pytest.raises(MemoryError):
        find_unreadable(images)


def test_a_folder_that_may_not_be_listed_is_named_or_left_out(photos, monkeypatch):
    (photos / "dog" / "locked").mkdir()
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match=r"the folder .*dog/locked may not be listed, so its images"):
        open_images(photos, same)
    found = open_images(photos, same, skip=True)
    assert (len(found), found.account.found, found.account.read) == (4, 5, 4)
    assert found.account.left_out == {"dog/locked": "the folder may not be listed (Permission denied)"}


# --- outputs ------------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setattr(printing.err, "width", 300)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["residual-kernels", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0, capsys.readouterr().err

    return call


PLACES = ["/dev/full", "/dev/full/x", "/proc/x", "/proc/x/y", "/proc/self/x", "/sys/x", "/sys/kernel/x/y"]


@pytest.mark.parametrize("place", PLACES)
def test_places_that_take_no_file_are_noticed_before_work(run, photos, monkeypatch, place):
    """Modes and root's rights allow all of these; only making a file tells."""
    if not os.path.isdir("/proc/self") or not os.path.isdir("/sys/kernel"):
        pytest.fail("this system has no /proc or /sys; choose other places that take no file")
    monkeypatch.setattr(inputs.sources, "load_model", lambda *_: pytest.fail("work was begun"))
    data, adapter = ("--data", photos), ("--adapter", photos)
    for command in (
        ("encode", *data, "--out", place),
        ("encode", *data, "--out", photos.parent / "c", "--json", place),
        ("bases", *data, "--out", place),
        ("fit", *data, "--out", place),
        ("predict", *adapter, *data, "--out", place),
        ("report", photos, *data, "--out", f"{place}-r.html"),
        ("analyze", *data, "--out", place),
        ("sweep", photos.parent / "plan.yaml", "--out", place),
    ):
        if command[0] == "report" and place == "/dev/full":  # /dev/full-r.html is a place like another
            continue
        code, err = run(*command)
        assert code == 2, command
        assert err.startswith(f"error: cannot write {'into ' if 'into' in err else ''}/"), (command, err)
        assert len(err.splitlines()) == 1, err


def test_a_full_disk_is_noticed_before_work(run, photos, monkeypatch):
    monkeypatch.setattr(inputs.sources, "load_model", lambda *_: pytest.fail("work was begun"))
    monkeypatch.setattr("tempfile.TemporaryFile", raises(errno.ENOSPC))
    code, err = run("encode", "--data", photos, "--out", photos.parent / "c")
    assert code == 2
    assert "no file can be made in" in err
    assert "No space left" in err


def test_probing_leaves_nothing_and_changes_no_time(photos, tmp_path):
    from residual_kernels.cli import outputs

    place = tmp_path / "o"
    place.mkdir()
    os.utime(place, ns=(5, 5))
    outputs.new_file(place / "x.csv")
    outputs.new_folder(place)
    assert list(place.iterdir()) == []
    assert place.stat().st_mtime_ns == 5
