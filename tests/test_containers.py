"""Archives, links, devices and names that hold no images: read right, or called what they are."""

import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from test_reading import encoded, png, put, same, write_tar, write_zip

from residual_kernels.data.images import UnreadableImage, find_unreadable, open_images, without


def test_links_of_a_zip(tmp_path):
    members = [
        ("cat/0.png", "../dog/1.png"),
        ("cat/1.png", "0.png"),
        ("cat/2.png", "gone.png"),
        ("cat/3.png", "3.png"),
    ]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for name, target in members:
            info = zipfile.ZipInfo(name)
            info.external_attr, info.create_system = 0o120777 << 16, 3
            file.writestr(info, target)
        file.writestr("dog/1.png", png(9))
    images = open_images(tmp_path / "a.zip", same)
    values = [images.picture(row)[0].getpixel((0, 0))[0] for row in (0, 1, 4)]
    assert values == [9, 9, 9]
    bad = find_unreadable(images)
    assert list(bad) == [2, 3]
    assert all("it is a link to nothing in the archive" in reason for reason in bad.values())


def test_encrypted_members_of_a_zip(tmp_path):
    path = write_zip(tmp_path / "a.zip", [("cat/0.png", png()), ("dog/1.png", png(1))])
    plain = path.read_bytes()
    entry = plain.index(b"PK\1\2")
    for method in (0, 99):  # ZipCrypto; AES
        data = bytearray(plain)
        data[6] |= 1
        data[entry + 8] |= 1
        data[8], data[entry + 10] = method, method
        path.write_bytes(data)
        (reason,) = find_unreadable(open_images(path, same)).values()
        assert reason.endswith(
            "cat/0.png is not a readable image: it is encrypted, and no password is asked for"
        )


def test_zips_of_every_compression_and_zip64(tmp_path):
    for number, kind in enumerate((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, None)):
        path = tmp_path / f"{number}.zip"
        with zipfile.ZipFile(path, "w", compression=kind or zipfile.ZIP_STORED) as file:
            for value, name in enumerate(("cat/0.png", "dog/1.png")):
                with file.open(name, "w", force_zip64=kind is None) as member:
                    member.write(png(value))
        path.write_bytes(b"self-extracting" + path.read_bytes())
        images = open_images(path, same)
        assert [images.picture(row)[0].getpixel((0, 0))[0] for row in (0, 1)] == [0, 1]


def test_class_folders_that_differ_only_in_case_are_said(tmp_path):
    names = [("Cat/0.png", png()), ("cat/1.png", png(1)), ("dog/2.png", png(2))]
    found = open_images(write_zip(tmp_path / "a.zip", names), same)
    assert found.class_names == ("Cat", "cat", "dog")
    assert "differ only in case are different classes: Cat and cat" in " ".join(found.account.warnings())


def test_pipes_devices_sockets_and_links_to_themselves_are_named(tmp_path):
    import socket

    put(tmp_path / "d", "cat/0.png", "dog/1.png")
    cat = tmp_path / "d" / "cat"
    os.mkfifo(cat / "pipe.png")
    os.symlink("/dev/zero", cat / "zero.png")
    os.symlink("self.png", cat / "self.png")
    with socket.socket(socket.AF_UNIX) as one:
        folder = os.open(cat, os.O_RDONLY)  # a socket's path may not be long
        one.bind(f"/proc/self/fd/{folder}/sock.png")
        os.close(folder)
        images = open_images(tmp_path / "d", same)
        bad = find_unreadable(images)
    assert [images.names[row] for row in bad] == [
        "cat/pipe.png",
        "cat/self.png",
        "cat/sock.png",
        "cat/zero.png",
    ]
    assert without(images, bad).account.read == 2


def test_empty_images_and_both_pictures_of_a_stereo_camera(tmp_path):
    put(tmp_path, "cat/empty.png", data=b"")
    put(tmp_path, "cat/two.mpo", data=encoded(Image.new("RGB", (4, 4)), "MPO"))
    images = open_images(tmp_path, same)
    assert [reason.partition(": ")[2] for reason in find_unreadable(images).values()] == ["it is empty"]
    assert images.names == ["cat/empty.png", "cat/two.mpo"]


def add_link(file, name, target, kind=tarfile.SYMTYPE):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    file.addfile(member)


def test_links_of_a_shard_lead_to_members_before_or_behind_them(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as file:
        add_link(file, "x/first.png", "../y/late.png")
        add_link(file, "x/second.png", "y/late.png", tarfile.LNKTYPE)
        add_link(file, "x/chain.png", "first.png")
        add_link(file, "x/folder.png", "../z/late.png")
        add_link(file, "z", "y")
        member = tarfile.TarInfo("y/late.png")
        member.size = len(png(7))
        file.addfile(member, io.BytesIO(png(7)))
    found = open_images(path, same, labelled=False)
    assert [name.removeprefix("a.tar/") for name in found.names] == [
        "x/first",
        "x/second",
        "x/chain",
        "x/folder",
        "y/late",
    ]
    assert {found.picture(row)[0].getpixel((0, 0))[0] for row in range(5)} == {7}
    assert (found.account.found, found.account.read) == (5, 5)


@pytest.mark.parametrize("target", ["gone.png", "../../out.png", "/etc/a.png", "loop.png"])
def test_a_link_to_nothing_in_a_shard_fails_or_is_left_out_and_named(tmp_path, target):
    path = write_tar(tmp_path / "a.tar", [("0.png", png()), ("0.cls", b"0"), ("loop.cls", b"0")])
    with tarfile.open(path, "a") as file:
        add_link(file, "loop.png", target)
    with pytest.raises(UnreadableImage, match=r"a\.tar/loop\.png is not a readable image: it is a link to"):
        open_images(path, same)
    found = open_images(path, same, skip=True)
    assert found.names == ["a.tar/0"]
    assert (found.account.found, found.account.read) == (2, 1)
    assert list(found.account.left_out) == ["a.tar/loop.png"]


def test_an_image_whose_name_leads_out_of_a_shard_is_counted(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("../0.png", png()), ("1.png", png(1))])
    account = open_images(path, same, labelled=False).account
    assert account.left_out == {"a.tar/../0.png": "its name leads out of the archive"}
    assert (account.found, account.read) == (2, 1)


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.zip", "cut", "a zip that is cut short"),
        ("a.tar.gz", b"\x1f\x8b\x08\0", "compressed by gzip; .*`tar -xzf .*a.tar.gz -C FOLDER`"),
        ("a.tgz", b"\x1f\x8b\x08\0", "compressed by gzip"),
        ("a.tar", b"\x1f\x8b\x08\0", "compressed by gzip"),
        ("a.tar.bz2", b"BZh9", "compressed by bzip2"),
        ("a.tar.xz", b"\xfd7zXZ\0", "compressed by xz"),
        ("a.tar.zst", b"\x28\xb5\x2f\xfd", "compressed by zstd"),
        ("a.7z", b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
        ("a.rar", b"Rar!\x1a\x07\0", "a RAR archive; unpack it"),
        ("a.zip", b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        ("a.zip", b"<!DOCTYPE html>", "a web page"),
        ("a.zip", b"", "empty"),
        ("a.bin", "tar", "give it a name that ends with .tar"),
        ("a.png", "png", "a single image; name the folder"),
    ],
)
def test_a_file_that_is_no_source_is_called_what_it_is(tmp_path, name, data, told):
    path = tmp_path / name
    if data == "cut":
        whole = write_zip(tmp_path / "whole.zip", [("cat/0.png", png()), ("dog/1.png", png())])
        data = whole.read_bytes()[:-30]
    elif data == "tar":
        data = write_tar(tmp_path / "whole.tar", [("0.png", png())]).read_bytes()
    path.write_bytes(png() if data == "png" else data)
    with pytest.raises(ValueError, match=told) as caught:
        open_images(path, same)
    assert str(path) in str(caught.value)


def test_long_lists_of_names_are_cut(tmp_path):
    put(tmp_path, "cat/0.png", "dog/0.png")
    for number in range(40):
        (tmp_path / f"empty {number:02d}").mkdir()
    with pytest.raises(ValueError, match=r"empty 00, empty 01, empty 02, empty 03, empty 04 and 35 more$"):
        open_images(tmp_path, same)


def test_an_empty_path_is_no_path():
    with pytest.raises(ValueError, match="an empty path names nothing"):
        open_images("", same)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("hf:", "names no data set; write its name after the colon, such as hf:"),
        ("torchvision:", "names no data set"),
        ("https://example.com/a.zip", "an address in a network"),
        ("s3://bucket/{00..11}.tar", "an address in a network"),
        ("torchvision:FakeData", "draws noise"),
        ("torchvision:VOCDetection@train", "is not a classification data set: its labels are boxes"),
        ("torchvision:CelebA@train", "its labels are attributes of faces"),
    ],
)
def test_names_that_name_no_images(source, told):
    with pytest.raises(ValueError, match=told):
        open_images(source, same)


@pytest.mark.parametrize("address", ["https://example.com/a.zip", "s3://bucket/photos"])
def test_an_address_that_was_made_a_path_is_an_address(address, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=f"^{address} is an address in a network"):
        open_images(Path(address), same)  # Path makes one slash of two
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "ab:" / "photos", "cat/0.png")
    assert len(open_images(Path("ab:/photos"), same)) == 1


def test_folders_of_other_things_say_what_to_do(tmp_path):
    for name, hint in (
        ("a.parquet", "is named hf:"),
        ("b.tar.gz", "unpack the archives"),
        ("c.zip", "unpack the"),
    ):
        put(tmp_path / name, f"x/{name}", data=b"x")
        with pytest.raises(ValueError, match=hint):
            open_images(tmp_path / name, same)
    with pytest.raises(FileNotFoundError, match="write a range"):
        open_images(tmp_path / "s-*.tar", same)


def test_a_data_set_of_the_hub_is_not_asked_for_unless_download_is(monkeypatch):
    datasets = pytest.importorskip("datasets")
    from huggingface_hub import constants

    seen = []

    def load(*_, **__):
        seen.append((constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE))
        raise ValueError("not there")

    monkeypatch.setattr(datasets, "load_dataset", load)
    before = (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
    for download in (False, True):
        with pytest.raises(ValueError, match="cannot be read here"):
            open_images("hf:nobody/nothing", same, download=download)
    assert seen == [(True, True), before]
    assert before == (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
