"""Every image, name and number that a user hands in is read right, or named: one contract for all sources."""

import errno
import io
import os
import struct
import sys
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from residual_kernels.data import prompts
from residual_kernels.data.images import (
    ImageFiles,
    ShardImages,
    UnreadableImage,
    find_unreadable,
    open_images,
    without,
)
from residual_kernels.data.images import webdataset as webdataset_source
from residual_kernels.data.images.decode import MAX_BYTES, decode, formats, image_endings, reading
from residual_kernels.data.images.patterns import MAX_SHARDS
from residual_kernels.data.user_text import user_path

RAMP = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (4, 1))


def same(picture):
    return picture


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(value=0, size=(4, 4)):
    return encoded(Image.new("RGB", size, (value, value, value)))


def put(root, *names, data=None):
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number) if data is None else data)
    return root


def write_zip(path, members):
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members:
            file.writestr(name, data)
    return path


def write_tar(path, members):
    with tarfile.open(path, "w") as file:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


# --- one decoder --------------------------------------------------------------------------------------------


def test_grey_images_of_many_bits_keep_their_levels():
    deep = Image.fromarray(RAMP.astype(np.uint16) * 257)
    for kind, options in (("PNG", {}), ("TIFF", {}), ("PPM", {}), ("JPEG2000", {})):
        found = np.asarray(decode(encoded(deep, kind, **options)))
        assert found.shape == (4, 16, 3)
        assert np.abs(found.astype(int) - RAMP[..., None]).max() <= 1, kind
    # 12 bits: the same ramp in 0 ... 4095; white as zero: the same ramp turned over
    for tags, values in (
        ({258: 12}, (RAMP.astype(int) * 4095 // 255).astype(np.uint16)),
        ({262: 0}, (255 - RAMP).astype(np.uint16) * 257),
    ):
        data = bytearray(encoded(Image.fromarray(values), "TIFF"))
        for tag, value in tags.items():
            at = data.index(struct.pack("<HH", tag, 3))
            data[at + 8 : at + 10] = struct.pack("<H", value)
        if 258 in tags:  # packed as 12 bits are, two numbers in three bytes
            packed = bytearray()
            for a, b in values.reshape(-1, 2).tolist():
                packed += bytes((a >> 4, (a & 15) << 4 | b >> 8, b & 255))
            offset = struct.unpack_from("<I", data, data.index(struct.pack("<HH", 273, 4)) + 8)[0]
            data = data[:offset] + packed
        assert np.abs(np.asarray(decode(bytes(data)))[..., 0].astype(int) - RAMP).max() <= 1, tags


@pytest.mark.parametrize("values", [RAMP.astype(np.float32) / 255, RAMP.astype(np.int32) * 1000])
def test_numbers_without_a_range_are_refused_by_name(values, tmp_path):
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(
        UnreadableImage, match=r"x\.tif is not a readable image: it holds .* whose range is not known"
    ):
        ImageFiles(tmp_path, same, labelled=False).picture(0)


def test_orientation_is_applied_or_not_and_part_of_the_identity(tmp_path):
    exif = Image.Exif()
    picture = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10).convert("RGB")
    truth = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: np.rot90,
    }
    for value, turned in truth.items():
        exif[274] = value
        data = encoded(picture, "PNG", exif=exif)
        assert np.array_equal(np.asarray(decode(data)), turned(np.asarray(picture))), value
        assert np.array_equal(np.asarray(decode(data, exif=False)), np.asarray(picture)), value
    put(tmp_path, "a.png", data=data)
    upright, stored = (ImageFiles(tmp_path, same, labelled=False, exif=exif) for exif in (True, False))
    assert (upright.picture(0)[0].size, stored.picture(0)[0].size) == ((4, 6), (6, 4))
    assert upright.fingerprint() != stored.fingerprint()
    broken = data.replace(exif.tobytes()[6:], b"MM\0\x2a\xff\xff\xff\xff" + bytes(len(exif.tobytes()) - 14))
    at = broken.index(b"eXIf")
    size = struct.unpack(">I", broken[at - 4 : at])[0]
    broken = (
        broken[: at + 4 + size]
        + struct.pack(">I", zlib.crc32(broken[at : at + 4 + size]))
        + broken[at + 8 + size :]
    )
    assert decode(broken).size == (6, 4)  # a broken block turns nothing and hides nothing


def test_every_error_of_a_decoder_names_the_image_and_none_of_the_machine_does():
    about_it = (
        zlib.error("x"),
        RuntimeError("File 'x' is encrypted, password required"),
        NotImplementedError("compression"),
        SyntaxError("x"),
        EOFError(),
        struct.error("x"),
        IndexError("x"),
        ValueError("x"),
        OSError("cut short"),
        FileNotFoundError(errno.ENOENT, "No such file"),
        PermissionError(errno.EACCES, "denied"),
        OSError(errno.ELOOP, "too many links"),
        zipfile.BadZipFile("x"),
        OverflowError("x"),
        Image.DecompressionBombError("x"),
    )
    for error in about_it:
        with pytest.raises(UnreadableImage, match="^its name is not a readable image: "), reading("its name"):
            raise error
    for error in (
        *(OSError(number, "x") for number in (errno.EMFILE, errno.ENOMEM, errno.EIO)),
        MemoryError(),
        RuntimeError("cuda"),
    ):
        with pytest.raises(type(error)) as caught, reading("its name"):
            raise error
        assert caught.value is error


def test_what_only_looks_like_an_image_is_not_opened(tmp_path):
    """Content decides, not the ending: Pillow would start Ghostscript for PostScript in a .jpg."""
    assert "EPS" not in formats()
    assert {".jfif", ".avif", ".jp2", ".tga", ".webp", ".tiff"} <= image_endings()
    assert not {".eps", ".pdf", ".mp4", ".h5"} & image_endings()
    put(tmp_path, "a.jpg", data=b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink("nowhere", tmp_path / "dangling.png")
    os.symlink("self.png", tmp_path / "self.png")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    put(tmp_path, "good.png")
    images = ImageFiles(tmp_path, same, labelled=False)
    bad = find_unreadable(images)
    reasons = {
        images.names[row]: text.partition(" is not a readable image: ")[2] for row, text in bad.items()
    }
    assert set(reasons) == {"a.jpg", "pipe.png", "dangling.png", "self.png", "huge.png"}
    assert reasons["pipe.png"] == "it is not a regular file"
    assert "No such file" in reasons["dangling.png"]
    kept = without(images, bad)
    assert kept.names == ["good.png"]
    assert (kept.account.found, kept.account.read, len(kept.account.left_out)) == (6, 1, 5)
    assert images.fingerprint() != kept.fingerprint()


def test_members_of_a_zip_that_cannot_be_read_are_named(tmp_path):
    path = write_zip(
        tmp_path / "a.zip",
        [("cat/a.png", png()), ("cat/b.png", png(9)), ("cat/c.png", png(7)), ("cat/d.png", png(8))],
    )
    data = bytearray(path.read_bytes())

    def edit(name, offset_local, offset_central, value, size):
        """Changes a field in both headers of a member."""
        for mark, offset in ((b"PK\x03\x04", offset_local), (b"PK\x01\x02", offset_central)):
            start = data.index(name, data.index(mark)) - (30 if mark == b"PK\x03\x04" else 46)
            if mark == b"PK\x01\x02":
                start = data.rindex(name) - 46
            data[start + offset : start + offset + size] = value

    edit(b"cat/b.png", 6, 8, b"\x01\x00", 2)  # encrypted
    edit(b"cat/c.png", 8, 10, b"\x63\x00", 2)  # a compression nobody knows
    edit(b"cat/d.png", 22, 24, struct.pack("<I", 2**31), 4)  # 2 GiB, it says
    path.write_bytes(data)
    images = open_images(path, same, labelled=False)
    bad = find_unreadable(images)
    assert [images.names[row] for row in bad] == ["cat/b.png", "cat/c.png", "cat/d.png"]
    for text, word in zip(bad.values(), ("encrypted", "compression", "2,147,483,648 bytes"), strict=True):
        assert word in text


# --- one listing --------------------------------------------------------------------------------------------


def test_images_may_lie_deeper_than_their_class(tmp_path):
    put(tmp_path, "n01/images/a.png", "n01/images/b.png", "n02/images/c.png", "n02/extra/d.png")
    found = open_images(tmp_path, same)
    assert (found.class_names, found.labels.tolist()) == (("n01", "n02"), [0, 0, 1, 1])
    for names in (
        ("train/cat/a.png", "val/cat/b.png"),
        ("photos/cat/a.png", "photos/dog/b.png"),
        ("train/cat/a.png", "test/b.png"),
    ):
        root = put(tmp_path / names[-1].replace("/", "-"), *names)
        with pytest.raises(ValueError, match="hold folders, not images; name one of them"):
            open_images(root, same)


def test_links_end_and_every_folder_is_listed_once(tmp_path):
    root = put(tmp_path / "data", "cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png")
    put(tmp_path / "outside", "2.png")
    os.symlink("..", root / "cat" / "up")
    os.symlink("../..", root / "dog" / "above")
    os.symlink("../cat", root / "dog" / "across")
    os.symlink("../../outside", root / "cat" / "more")
    found = ImageFiles(root, same)
    assert found.names == ["cat/0.png", "cat/1.png", "cat/more/2.png", "dog/0.png", "dog/1.png"]
    assert set(found.account.duplicates) == {"cat/up", "dog/above", "dog/across"}
    assert found.account.found == 5


def test_pictures_that_pillow_cannot_read_are_said_aloud(tmp_path):
    names = [f"cat/a{ending}" for ending in (".wmf", ".emf", ".heic", ".svg", ".cr2", ".ps")]
    images = open_images(put(tmp_path, "cat/0.png", *names, "cat/b.txt"), same)
    (text,) = images.account.warnings()
    assert all(f"1 {name.partition('.')[2]}" in text.replace(" .", " ") for name in names)
    assert ".txt" not in text


def test_an_account_reads_as_english(tmp_path):
    put(tmp_path, "cat/0.png", "dog/1.png")
    put(tmp_path, "cat/a.png", "cat/b.png", data=encoded(Image.effect_noise((40, 40), 90))[:300])
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "dog" / "f.tif")
    images = open_images(tmp_path, same)
    text = without(images, find_unreadable(images)).account.summary()
    assert text.endswith(
        "5 images found, 2 read, 3 left out (image file is truncated: 2; "
        "it holds float numbers whose range is not known: 1; cat/a.png, cat/b.png, dog/f.tif)"
    )


def test_what_systems_leave_behind_is_treated_alike_everywhere(tmp_path):
    junk = (
        "__MACOSX/cat/._0.png",
        ".ipynb_checkpoints/0.png",
        "cat/.ipynb_checkpoints/0-checkpoint.png",
        "cat/@eaDir/0.png",
        "cat/Thumbs.db",
        "@eaDir/0.png",
        "$RECYCLE.BIN/0.png",
    )
    root = put(tmp_path / "d", "cat/0.png", "dog/1.png", "cat/notes.txt", "cat/film.mp4", "cat/a.heic", *junk)
    members = [(str(p.relative_to(root)), p.read_bytes()) for p in sorted(root.rglob("*")) if p.is_file()]
    zipped = ImageFiles(write_zip(tmp_path / "d.zip", [(f"./{name}", data) for name, data in members]), same)
    folder = ImageFiles(root, same)
    assert folder.names == zipped.names == ["cat/0.png", "dog/1.png"]
    assert folder.class_names == zipped.class_names == ("cat", "dog")
    assert folder.account.ignored == zipped.account.ignored == {".txt": 1, ".mp4": 1, ".heic": 1}
    assert "1 .heic ignored: Pillow does not read them here" in " ".join(folder.account.warnings())
    tar = [(f"./{name.replace('cat/', '')}", data) for name, data in members if name.startswith("cat")]
    shard = ShardImages([write_tar(tmp_path / "d.tar", tar)], same, labelled=False)
    assert shard.names == ["d.tar/0"]
    assert shard.account.ignored == {".txt": 1, ".mp4": 1, ".heic": 1}


def test_names_inside_a_zip(tmp_path):
    """Backslashes, absolute and repeated names, UTF-8 without its flag, an unknown encoding, a way out."""
    path = write_zip(
        tmp_path / "a.zip",
        [
            ("cat\\a.png", png(1)),
            ("/cat/b.png", png(2)),
            ("C:\\cat\\c.png", png(3)),
            ("../cat/out.png", png()),
            ("kXXX/d.png", png(4)),
            ("gXXX/e.png", png(5)),
            ("cat/./a.png", png(6)),
        ],
    )
    data = path.read_bytes().replace(b"kXXX", "ké1".encode()).replace(b"gXXX", b"\xc3\xa8\xd6\xd0")
    path.write_bytes(data)
    images = open_images(path, same)
    assert images.class_names == ("cat", "ké1", b"\xc3\xa8\xd6\xd0".decode("cp437"))
    assert images.names[:3] == ["cat/a.png", "cat/b.png", "cat/c.png"]
    assert images.picture(0)[0].getpixel((0, 0)) == (6, 6, 6)  # of two members with one name, the last
    account = images.account
    assert list(account.duplicates) == ["cat/a.png"]
    assert account.left_out == {"../cat/out.png": "its name leads out of the archive"}
    assert (account.found, account.read) == (6, 5)
    assert "unknown encoding" in " ".join(account.warnings())


def test_the_unicode_name_that_a_zip_carries_beside_another(tmp_path):
    raw = "中".encode("gbk") + b"/a.png"
    info = zipfile.ZipInfo("ab/a.png")
    text = "中/a.png".encode()
    info.extra = struct.pack("<HHBL", 0x7075, 5 + len(text), 1, zlib.crc32(raw)) + text
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr(info, png())
    (tmp_path / "a.zip").write_bytes((tmp_path / "a.zip").read_bytes().replace(b"ab/a.png", raw))
    assert open_images(tmp_path / "a.zip", same).class_names == ("中",)


def test_one_class_in_two_unicode_forms(tmp_path):
    put(tmp_path, "caf\u00e9/a.png", "cafe\u0301/b.png", "tea/c.png")
    found = open_images(tmp_path, same)
    assert found.class_names == ("caf\u00e9", "tea")
    assert sorted(found.labels.tolist()) == [0, 0, 1]
    assert "differ only in Unicode form" in " ".join(found.account.warnings())


def test_a_folder_is_what_it_is_whatever_its_name(tmp_path):
    for name in ("run{1}", "a::b", "x{0..2}"):
        assert open_images(put(tmp_path / name, "cat/0.png", "dog/1.png"), same).class_names == ("cat", "dog")
    write_tar(
        put(tmp_path / "mixed", "cat/0.png", "dog/1.png") / "stray.tar", [("0.png", png()), ("0.cls", b"0")]
    )
    mixed = open_images(tmp_path / "mixed", same)
    assert isinstance(mixed, ImageFiles)
    assert mixed.account.ignored == {".tar": 1}
    (tmp_path / "s{1}").mkdir()
    for number in range(3):
        write_tar(tmp_path / "s{1}" / f"p-{number}.tar", [("0.png", png()), ("0.cls", b"0")])
    assert len(open_images(tmp_path / "s{1}", same)) == 3
    assert len(open_images(f"{tmp_path}/s{{1}}/p-{{0..1}}.tar", same)) == 2
    with pytest.raises(ValueError, match=rf"stands for .* shards; the most is {MAX_SHARDS:,}"):
        open_images("p-{0..999999999}{0..9}.tar", same)
    with pytest.raises(FileNotFoundError, match="no folder or zip at .*nothing"):
        open_images(tmp_path / "nothing{1}", same)


def test_paths_are_expanded_unless_they_exist_as_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path / "data"))
    put(tmp_path / "data", "0.png")
    for name in ("~/data", "$PLACE", "${PLACE}"):
        assert len(open_images(name, same, labelled=False)) == 1
    put(tmp_path / "data" / "~", "0.png", "1.png")
    monkeypatch.chdir(tmp_path / "data")
    assert len(open_images("~", same, labelled=False)) == 2


def test_a_flat_folder_has_no_labels_where_none_are_asked(tmp_path):
    flat = open_images(put(tmp_path / "flat", "0.png", "1.png"), same, labelled=None)
    assert (flat.class_names, flat.labels.tolist()) == (None, [-1, -1])
    nested = open_images(put(tmp_path / "nested", "cat/0.png", "dog/1.png"), same, labelled=None)
    assert nested.class_names == ("cat", "dog")
    with pytest.raises(ValueError, match=r"0\.png lies outside of any"):
        open_images(tmp_path / "flat", same)
    put(tmp_path / "bare", "a", "b.txt")
    with pytest.raises(ValueError, match=r"holds no images .*1 \(no ending\), 1 \.txt"):
        open_images(tmp_path / "bare", same)


# --- shards -------------------------------------------------------------------------------------------------


def test_samples_of_a_shard(tmp_path):
    """Dots in keys, keys that come again, two images of one key, labels apart from their images, links."""
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("0001.v1.jpg", png(1)),
            ("0001.v2.jpg", png(2)),
            ("0001.cls", b"1"),  # one key, by webdataset's rule
            ("img.7.png", png(3)),
            ("img.7.cls", b"2"),
            ("img.8.png", png(4)),
            ("img.8.cls", b"3"),
            ("k.png", png(5)),
            ("k.cls", b"4"),
            ("m.png", png(6)),
            ("m.cls", b"5"),
            ("k.png", png(7)),
            ("k.cls", b"6"),  # the key again: another sample
            ("late.png", png(8)),
            ("other.png", png(9)),
            ("late.cls", b"\xef\xbb\xbf7\n"),
            ("other.cls", b"8"),
        ],
    )
    with tarfile.open(path, "a") as file:
        for kind, name in ((tarfile.LNKTYPE, "hard.png"), (tarfile.SYMTYPE, "soft.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "late.png"
            file.addfile(member)
            label = tarfile.TarInfo(f"{name[:4]}.cls")
            label.size = 1
            file.addfile(label, io.BytesIO(b"9"))
    images = open_images(path, same)
    assert [name.split("/")[1] for name in images.names] == [
        "0001.v1",
        "0001.v2",
        "img.7",
        "img.8",
        "k",
        "m",
        "k#2",
        "late",
        "other",
        "hard",
        "soft",
    ]
    assert images.labels.tolist() == [1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9]
    values = [images.picture(row)[0].getpixel((0, 0))[0] for row in range(len(images))]
    assert values == [1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 8]


def test_a_shard_cut_short_is_named_or_read_up_to_there(tmp_path):
    members = [
        (f"{i}.{kind}", png(i, (40, 40)) if kind == "png" else b"0")
        for i in range(3)
        for kind in ("png", "cls")
    ]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as file:
        starts = [member.offset for member in file]
    joined = whole + whole
    damaged = bytearray(whole)
    damaged[starts[4] : starts[4] + 512] = b"x" * 512
    cases = [
        (whole[: starts[4]], "is cut short: it ends at byte", 2),  # between two members
        (whole[: starts[4] + 100], "cut short|not a readable", 2),  # inside a header
        (whole[: starts[4] + 600], "cut short|not a readable", 3),  # inside an image
        (joined, "holds more after its end mark, at byte", 3),
        (bytes(damaged), "is damaged at byte", 2),
    ]
    for number, (data, message, images) in enumerate(cases):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            open_images(path, same, labelled=False)
        found = open_images(path, same, labelled=False, skip=True)
        assert 0 <= images - len(found) <= 1, number
        kept = without(found, find_unreadable(found))
        assert len(kept) == min(images, 3 if number == 3 else 2)
        assert "what stands before is read" in " ".join(found.account.warnings())


@pytest.mark.parametrize("labelled", [True, None])
def test_an_image_whose_label_lies_behind_the_cut_is_left_out(tmp_path, labelled):
    members = [
        (f"{i}.{kind}", png(i) if kind == "png" else b"0") for i in range(3) for kind in ("png", "cls")
    ]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as file:
        start = file.getmembers()[-1].offset
    for end in (start, start + 100):
        (tmp_path / "cut.tar").write_bytes(whole[:end])
        found = open_images(tmp_path / "cut.tar", same, labelled=labelled, skip=True)
        assert found.labels.tolist() == [0, 0]
        assert (found.account.found, found.account.read) == (3, 2)
        assert found.account.left_out == {"cut.tar/2": "its label is lost: the shard is damaged before it"}
        assert len(open_images(tmp_path / "cut.tar", same, labelled=False, skip=True)) == 3
    images = [(f"{i}.png", png(i)) for i in range(3)]  # a shard without labels loses none
    whole = write_tar(tmp_path / "bare.tar", images).read_bytes()
    (tmp_path / "bare.tar").write_bytes(whole[: 3 * 1024])
    assert len(open_images(tmp_path / "bare.tar", same, labelled=None, skip=True)) == 3


def test_a_lost_label_is_accounted_for_among_whole_shards(tmp_path):
    """The damaged shard has one image, none of its labels is left, or it holds nothing that can be read."""
    write_tar(tmp_path / "a.tar", [("0.png", png()), ("0.cls", b"0")])
    whole = write_tar(tmp_path / "b.tar", [("1.png", png(1)), ("1.cls", b"1")]).read_bytes()
    for data, left in (
        (whole[:1024], {"b.tar/1": "its label is lost: the shard is damaged before it"}),
        (b"", {}),
    ):
        (tmp_path / "b.tar").write_bytes(data)
        for labelled in (True, None):
            with pytest.raises(ValueError, match=r"b\.tar is "):
                open_images(tmp_path, same, labelled=labelled)
            found = open_images(tmp_path, same, labelled=labelled, skip=True)
            assert (found.names, found.labels.tolist()) == (["a.tar/0"], [0])
            assert found.account.left_out == left
            assert (found.account.found, found.account.read) == (1 + len(left), 1)
            assert "b.tar is " in found.account.warnings()[0]
        unlabelled = open_images(tmp_path, same, labelled=False, skip=True)
        assert len(unlabelled) == 1 + len(left)
    with pytest.raises(ValueError, match=r"hold no images: .*b\.tar is empty"):
        open_images(tmp_path / "b.tar", same, skip=True)


def test_links_of_a_shard_to_nothing_have_one_reason(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for number in range(4):
            link = tarfile.TarInfo(f"{number}.png")
            link.type, link.linkname = tarfile.SYMTYPE, f"gone-{number}.png"
            file.addfile(link)
        whole = tarfile.TarInfo("9.png")
        whole.size = len(png(9))
        file.addfile(whole, io.BytesIO(png(9)))
    account = open_images(tmp_path / "a.tar", same, labelled=False, skip=True).account
    assert account.reasons() == {"it is a link to nothing in the archive": 4}
    assert account.left_out["a.tar/2.png"] == "it is a link to nothing in the archive (gone-2.png)"


def test_text_in_place_of_an_image_is_called_what_it_is(tmp_path):
    texts = {
        "a.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer"),
        "b.jpg": (b"\n<!DOCTYPE HTML><html>", "a web page"),
        "c.jpg": (b"<html><body>404", "a web page"),
        "d.jpg": (b"neither", "its format is unknown"),
    }
    (tmp_path / "x").mkdir()
    for name, (data, _) in texts.items():
        (tmp_path / "x" / name).write_bytes(data)
    bad = find_unreadable(open_images(tmp_path, same))
    for text, (_, reason) in zip(bad.values(), texts.values(), strict=True):
        assert reason in text


def test_more_shards_than_open_files(tmp_path, monkeypatch):
    import resource

    for number in range(90):
        write_tar(tmp_path / f"{number:02d}.tar", [("a.png", png(number)), ("a.cls", b"0")])
    images = open_images(tmp_path, same)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + webdataset_source.OPEN_FILES + 8, hard))
    try:
        values = [images.picture(row)[0].getpixel((0, 0))[0] for row in range(90)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert values == list(range(90))


def test_a_class_number_is_a_number_of_a_class(tmp_path):
    for text in (b"-1", b"999999999", "٣".encode(), b"1.0"):
        path = write_tar(tmp_path / "a.tar", [("a.png", png()), ("a.cls", text)])
        with pytest.raises(ValueError, match="must be a class number"):
            open_images(path, same)
    path = write_tar(tmp_path / "b.tar", [("a.png", png()), ("a.cls", b"0"), ("b.png", png())])
    with pytest.raises(ValueError, match="some images of .* have labels and b.tar/b has none"):
        open_images(path, same, labelled=None)


# --- names --------------------------------------------------------------------------------------------------


def test_folders_that_are_numbers_are_in_number_order(tmp_path):
    put(tmp_path, *(f"{number}/0.png" for number in range(12)))
    found = open_images(tmp_path, same)
    assert found.class_names == tuple(map(str, range(12)))
    assert found.labels.tolist() == [int(name.split("/")[0]) for name in found.names]
    put(tmp_path, "x/0.png")
    assert open_images(tmp_path, same).class_names[:4] == ("0", "1", "10", "11")


def test_files_of_names_from_any_editor(tmp_path):
    for encoding in (
        "utf-8",
        "utf-8-sig",
        "utf-16",
        "utf-16-le",
        "utf-16-be",
        "utf-32",
        "utf-32-le",
        "utf-32-be",
    ):
        (tmp_path / "names.txt").write_bytes("café\r\n\r\nthé\r\n".encode(encoding))
        assert prompts.class_names(str(tmp_path / "names.txt"), ("a", "b")) == ("café", "thé"), encoding
    (tmp_path / "names.txt").write_bytes("ok\nth\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"names\.txt is not UTF-8 text: byte 0xe9 in line 2"):
        prompts.class_names(str(tmp_path / "names.txt"), ("a", "b"))


def test_names_that_are_no_names_are_refused(tmp_path):
    """Zeros in a text, and lines that would keep a tokenizer for hours."""
    path = tmp_path / "names.txt"
    path.write_bytes(b"a\nb\0c\n")
    with pytest.raises(ValueError, match=r"names\.txt is not UTF-8 text: it holds a zero byte in line 2"):
        prompts.class_names(str(path), ("a", "b"))
    path.write_bytes(b"a\n" + b"x" * 100_000)
    with pytest.raises(
        ValueError, match=r"names\.txt: number 2 has 100,000 characters \(xxxx.*the most is 1,000"
    ):
        prompts.class_names(str(path), ("a", "b"))
    with pytest.raises(ValueError, match="the classes: number 1 has 2,000 characters"):
        prompts.class_names(None, ("x" * 2000, "b"))


def test_large_images_make_no_noise(tmp_path, recwarn):
    put(tmp_path, "a.png", data=encoded(Image.new("L", (10_000, 9_000))))
    assert open_images(tmp_path, same, labelled=False).picture(0)[0].size == (10_000, 9_000)
    assert not list(recwarn)


def test_a_shard_that_is_a_link_to_nothing_is_named(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.png", png()), ("0.cls", b"0")])
    os.symlink("gone.tar", tmp_path / "b.tar")
    with pytest.raises(FileNotFoundError, match=r"there is no shard .*b\.tar"):
        open_images(tmp_path, same)
    found = open_images(tmp_path, same, skip=True)
    assert len(found) == 1
    assert "b.tar is a link to nothing" in found.account.warnings()[0]


def test_folders_and_names_in_one_file(tmp_path):
    path = tmp_path / "names.tsv"
    path.write_text("n02\ttench, Tinca\nn03\tunused\nn01\tgold fish\ncafe\u0301\tcoffee\n")
    assert prompts.class_names(str(path), ("n01", "n02", "caf\u00e9")) == (
        "gold fish",
        "tench, Tinca",
        "coffee",
    )
    cases = [
        ("n01\ta\n", "has no name for n02"),
        ("n01\ta\nn02\n", r"line 2 is 'n02', where others are folder<TAB>name"),
        ("n01\ta\nn02\tb\nn01\tc\n", "names the folder n01 twice: a and c"),
    ]
    for text, message in cases:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            prompts.class_names(str(path), ("n01", "n02"))


# --- identity -----------------------------------------------------------------------------------------------


def containers(tmp_path, value):
    data = encoded(Image.new("RGB", (4, 4), (value, 0, 0)), "BMP")
    put(tmp_path / "d", "cat/0.bmp", "dog/1.bmp", data=data)
    write_zip(tmp_path / "d.zip", [("cat/0.bmp", data), ("dog/1.bmp", data)])
    write_tar(tmp_path / "d.tar", [("0.bmp", data), ("0.cls", b"0")])
    return [tmp_path / name for name in ("d", "d.zip", "d.tar")]


@pytest.mark.parametrize("identity", ["auto", "stat", "digest"])
def test_an_image_replaced_by_one_of_the_same_size_is_noticed(tmp_path, identity):
    seen = [open_images(path, same, identity=identity).fingerprint() for path in containers(tmp_path, 1)]
    again = [
        open_images(path, same, identity=identity).fingerprint()
        for path in (tmp_path / "d", tmp_path / "d.zip", tmp_path / "d.tar")
    ]
    assert again == seen
    for path, before in zip(containers(tmp_path, 2), seen, strict=True):
        assert open_images(path, same, identity=identity).fingerprint() != before


def test_a_digest_knows_content_and_stat_knows_times(tmp_path):
    path = containers(tmp_path, 1)[0]
    before = {
        kind: open_images(path, same, identity=kind).fingerprint() for kind in ("auto", "stat", "digest")
    }
    for file in path.rglob("*.bmp"):
        os.utime(file, ns=(1, 1))
    after = {kind: open_images(path, same, identity=kind).fingerprint() for kind in before}
    assert after["digest"] == before["digest"] == before["auto"] == after["auto"]
    assert after["stat"] != before["stat"]
    with pytest.raises(ValueError, match="identity must be one of auto, stat, digest"):
        open_images(path, same, identity="name")


# --- data sets by name --------------------------------------------------------------------------------------


@pytest.fixture
def rows():
    """A Hugging Face data set of three rows, made from columns: (name, feature, values)."""
    datasets = pytest.importorskip("datasets")

    def make(folder, *columns):
        features = datasets.Features({name: feature for name, feature, _ in columns})
        datasets.Dataset.from_dict(
            {name: values for name, _, values in columns}, features=features
        ).save_to_disk(str(folder))
        return f"hf:{folder}"

    return make


def test_columns_of_hugging_face_data_sets(rows, tmp_path):
    from datasets import ClassLabel, Sequence, Value
    from datasets import Image as Picture

    photo = ("photo", Picture(), [Image.new("RGB", (4, 6), (i, i, i)) for i in range(3)])
    raw = ("raw", Value("binary"), [png(i) for i in range(3)])
    coarse, fine = (
        ("coarse", ClassLabel(names=["a", "b"]), [0, 1, 1]),
        ("fine", ClassLabel(names=["x", "y", "z"]), [2, 1, 0]),
    )
    text, number = ("label", Value("string"), ["dog", "cat", "dog"]), ("target", Value("int64"), [10, 2, 10])
    both = rows(tmp_path / "both", photo, coarse, fine)
    with pytest.raises(ValueError, match="it has several: coarse, fine; say which with --label-column"):
        open_images(both, same)
    unsure = open_images(both, same, labelled=None)
    assert unsure.class_names is None
    (note,) = unsure.account.warnings()
    assert "read without labels, for several columns may hold them: coarse, fine" in note
    found = open_images(both, same, label_column="fine")
    assert (found.class_names, found.labels.tolist()) == (("x", "y", "z"), [2, 1, 0])
    assert found.picture(2)[0].size == (4, 6)
    found = open_images(rows(tmp_path / "text", raw, text), same)
    assert (found.class_names, found.labels.tolist()) == (("cat", "dog"), [1, 0, 1])
    assert found.picture(2)[0].getpixel((0, 0)) == (2, 2, 2)
    found = open_images(rows(tmp_path / "number", photo, number), same)
    assert (found.class_names, found.labels.tolist()) == (("2", "10"), [1, 0, 1])
    bare = rows(tmp_path / "bare", photo, ("note", Value("string"), ["p", "q", "p"]))
    unlabelled = open_images(bare, same, labelled=None)
    assert (unlabelled.class_names, unlabelled.account.notes) == (None, [])
    assert open_images(bare, same, label_column="note").class_names == ("p", "q")
    several = rows(tmp_path / "several", photo, ("label", Sequence(ClassLabel(names=["a"])), [[0], [0], [0]]))
    empty = rows(tmp_path / "empty", photo, ("label", ClassLabel(names=["a"]), [0, -1, 0]))
    cases = [
        (bare, {"label_column": "nots"}, "has no column nots; it has photo, note"),
        (bare, {"label_column": "photo"}, "not one label an image"),
        (bare, {"image_column": "note"}, "not images or bytes of images"),
        (several, {}, "it has none"),
        (several, {"label_column": "label"}, "not one label an image"),
        (empty, {}, "1 images have no label in column label, the first of them image 1"),
    ]
    for source, options, message in cases:
        with pytest.raises(ValueError, match=message):
            open_images(source, same, **options)
    with pytest.raises(ValueError, match="can only be said of a Hugging Face data set"):
        open_images(tmp_path, same, label_column="x")
    exif = Image.Exif()
    exif[274] = 6
    turned = (
        "raw",
        Value("binary"),
        [encoded(Image.new("RGB", (4, 6)), "JPEG", exif=exif), b"no image", None],
    )
    images = open_images(rows(tmp_path / "turned", turned), same, labelled=False)
    assert images.picture(0)[0].size == (6, 4)
    assert list(find_unreadable(images)) == [1, 2]


def test_torchvision_sets_that_do_not_classify_are_refused_by_name(tmp_path):
    cases = [
        ("CocoDetection", "also needs annFile"),
        ("ImageFolder", "name the folder itself"),
        ("CocoDetections", "no data set 'CocoDetections'"),
    ]
    for name, message in cases:
        with pytest.raises(ValueError, match=message):
            open_images(f"torchvision:{name}", same, root=tmp_path)
    voc = tmp_path / "VOCdevkit" / "VOC2012"
    put(voc, "JPEGImages/a.jpg", data=encoded(Image.new("RGB", (4, 4)), "JPEG"))
    put(voc, "SegmentationClass/a.png")
    put(voc, "ImageSets/Segmentation/train.txt", data=b"a\n")
    import torchvision

    made = torchvision.datasets.VOCSegmentation
    assert len(made(str(tmp_path), image_set="train")) == 1
    with pytest.raises(ValueError, match="torchvision:VOCSegmentation is not a classification data set"):
        open_images("torchvision:VOCSegmentation", same, root=tmp_path)


def test_torchvision_sets_are_refused_by_name_before_anything_is_fetched(tmp_path, monkeypatch):
    import inspect

    import torchvision

    def fetched(self, root, **options):
        raise AssertionError("it was fetched")

    fits = ("CIFAR10@test", "GTSRB@train", "EMNIST@letters-test", "OxfordIIITPet@trainval", "USPS@train")
    unfit = {
        "CelebA@test": "attributes of faces",
        "Kitti@train": "boxes",
        "VOCDetection@train": "boxes",
        "WIDERFace@val": "boxes of faces",
        "SBU": "captions",
        "SBDataset": "boundaries",
        "Cityscapes@train": "masks",
        "LFWPairs@test": "pairs of images",
        "PhotoTour@train": "patches",
        "MovingMNIST@test": "films",
        "Middlebury2014Stereo@train": "pairs of images",
        "FlyingChairs@train": "pairs of images",
        "UCF101": "films",
        "EMNIST@letters": "say which part",
        "VisionDataset": "no data set 'VisionDataset'",
    }
    for name in (*fits, *unfit):
        made = getattr(torchvision.datasets, name.partition("@")[0])
        original = inspect.signature(made.__init__)
        monkeypatch.setattr(made, "__init__", fetched)
        vars(fetched)["__signature__"] = original
        said = unfit.get(name)
        with pytest.raises(AssertionError if said is None else ValueError, match=said or "it was fetched"):
            open_images(f"torchvision:{name}", same, root=tmp_path, download=True)
        monkeypatch.undo()
    with pytest.raises(ValueError, match="holds films"):
        open_images("torchvision:MovingMNIST@train", same, root=tmp_path, labelled=None)
    assert list(tmp_path.iterdir()) == []


def test_torchvision_sets_know_their_labels_and_content(tmp_path):
    put(tmp_path / "country211" / "test", "FR/a.png", "IT/b.png", "IT/c.png")
    found = open_images("torchvision:Country211@test", same, root=tmp_path)
    assert found.labels.tolist() == [0, 1, 1]
    assert [row[2] for row in found.account.classes] == [1, 2]
    before = found.fingerprint()
    put(tmp_path / "country211" / "test", "IT/c.png", data=png(77))
    os.utime(tmp_path / "country211" / "test" / "IT" / "c.png", ns=(5, 5))
    assert open_images("torchvision:Country211@test", same, root=tmp_path).fingerprint() != before


def test_names_that_are_no_unicode_are_kept(tmp_path):
    if sys.platform != "linux":
        pytest.fail("this system's file names are not bytes; choose another case for it")
    name = os.fsdecode(b"caf\xe9.png")
    put(tmp_path, f"cat/{name}")
    found = open_images(tmp_path, same)
    assert found.names == [f"cat/{name}"]
    assert found.fingerprint().startswith("1 images")


def test_lab_is_refused_by_name(tmp_path):
    Image.new("LAB", (4, 4)).save(tmp_path / "a.tif")
    (tmp_path / "c").mkdir()
    (tmp_path / "a.tif").rename(tmp_path / "c" / "a.tif")
    with pytest.raises(ValueError, match=r"c/a.tif is not a readable image: .*CIELAB"):
        open_images(tmp_path, lambda picture: picture)[0]


@pytest.mark.parametrize("path", ["a\0b", "\ud800", "x/\udfff/y"])
def test_text_that_no_file_is_called_is_named(path):
    with pytest.raises(ValueError, match=r"holds (signs that no|a zero byte, which no) file name has"):
        open_images(path, same)


@pytest.mark.parametrize("path", ["$NOT_SET_ANYWHERE/o", "${NOT_SET_ANYWHERE}", "~nobody_of_this_name/o"])
def test_a_path_with_an_unknown_name_is_no_folder_to_make(path):
    with pytest.raises(ValueError, match="which is not set here"):
        user_path(path)
