"""Where images come from: folders, zips, shards, data sets by name, and what cannot be read."""

import io
import pickle
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from residual_kernels.data.images import ImageFiles, ShardImages, find_unreadable, open_images, without


def picture(value: int) -> Image.Image:
    return Image.fromarray(np.full((8, 8, 3), value, np.uint8))


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


@pytest.fixture
def folder(tmp_path):
    """train/{cat,dog_house} with 2 and 3 images, one of them nested, one grey,
    and a file that is no image."""
    root = tmp_path / "data" / "train"
    for index, name in enumerate(
        ["cat/a.png", "cat/b.png", "dog_house/c.png", "dog_house/in/d.PNG", "dog_house/e.jpg"]
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = picture(40 * index)
        (image.convert("L") if name == "cat/b.png" else image).save(path)
    (root / "cat" / "notes.txt").write_text("no image")
    (root / "cat" / ".hidden.png").write_bytes(b"")
    return tmp_path / "data"


@pytest.fixture
def archive(folder, tmp_path):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as file:
        for image in sorted(folder.rglob("*")):
            file.write(image, image.relative_to(folder))
        file.writestr("__MACOSX/train/cat/._a.png", b"")
    return path


def test_a_folder_and_a_zip_of_it_read_the_same(folder, archive):
    one = ImageFiles(folder / "train", pixels)
    other = ImageFiles(archive / "train", pixels)
    assert (
        one.names
        == other.names
        == ["cat/a.png", "cat/b.png", "dog_house/c.png", "dog_house/e.jpg", "dog_house/in/d.PNG"]
    )
    assert one.class_names == other.class_names == ("cat", "dog_house")
    assert one.labels.tolist() == other.labels.tolist() == [0, 0, 1, 1, 1]
    for index in range(5):
        assert torch.equal(one[index][0], other[index][0])
        assert one[index][1] == one.labels[index]
    assert one[0][0].unique().tolist() == [0.0]
    assert one[1][0].shape == (3, 8, 8)
    assert pickle.loads(pickle.dumps(other))[4][1] == 1
    loader = torch.utils.data.DataLoader(other, batch_size=2, num_workers=2)
    assert [len(images) for images, _ in loader] == [2, 2, 1]
    flat = ImageFiles(archive, pixels, labelled=False)
    assert len(flat) == 5
    assert flat.picture(0)[1] == -1
    assert flat.class_names is None
    assert flat[0].shape == (3, 8, 8)


def test_linked_class_folders_are_followed(folder, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "cat").symlink_to(folder / "train" / "cat")
    assert ImageFiles(tmp_path / "linked", pixels).names == ["cat/a.png", "cat/b.png"]


def test_layouts_that_cannot_be_labelled(folder, archive, tmp_path):
    for path in (folder, archive):
        with pytest.raises(ValueError, match="hold folders, not images; name one of them, such as .*train"):
            ImageFiles(path, pixels)
    (folder / "train" / "bird").mkdir()
    with pytest.raises(ValueError, match="class without images .*: bird"):
        ImageFiles(folder / "train", pixels)
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("train/bird/", b"")
    with pytest.raises(ValueError, match="class without images .*: bird"):
        ImageFiles(archive / "train", pixels)
    with pytest.raises(ValueError, match=r"a\.png lies outside of any"):
        ImageFiles(folder / "train" / "cat", pixels)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        ImageFiles(tmp_path / "empty", pixels)
    with pytest.raises(FileNotFoundError, match="there is no folder .* in .*; it holds "):
        ImageFiles(archive / "test", pixels)
    with pytest.raises(FileNotFoundError, match="nearest are data"):
        ImageFiles(tmp_path / "dta", pixels)
    with pytest.raises(ValueError, match="neither a folder nor a readable zip: it is a single image"):
        ImageFiles(folder / "train" / "cat" / "a.png", pixels)


def test_unreadable_files_are_named(folder, archive):
    (folder / "train" / "cat" / "a.png").write_bytes(b"this is no PNG")
    with pytest.raises(ValueError, match=r"cat/a\.png is not a readable image"):
        ImageFiles(folder / "train", pixels)[0]
    whole = io.BytesIO()
    picture(7).resize((64, 64)).save(whole, "JPEG")
    (folder / "train" / "cat" / "a.png").write_bytes(whole.getvalue()[:-200])
    with pytest.raises(ValueError, match=r"cat/a\.png is not a readable image"):
        ImageFiles(folder / "train", pixels)[0]
    archive.write_bytes(archive.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"data\.zip"):
        ImageFiles(archive / "train", pixels)


def test_one_name_for_every_kind_of_data(folder):
    assert isinstance(open_images(folder / "train", pixels), ImageFiles)
    with pytest.raises(ValueError, match="no data set 'cifar11'; nearest are CIFAR10"):
        open_images("torchvision:cifar11", pixels)


# --- WebDataset shards --------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def write_shard(path, samples) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in samples:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    """Two shards of three samples, written as webdataset's own writer orders them."""
    root = tmp_path / "shards"
    (root / "train").mkdir(parents=True)
    for shard in range(2):
        samples = []
        for i in range(3):
            number = 3 * shard + i
            samples += [
                (f"{number:06d}.cls", str(number % 2).encode()),
                (f"{number:06d}.png", encoded(picture(10 * number))),
                (f"{number:06d}.json", b"{}"),
            ]
        write_shard(root / "train" / f"photos-{shard:03d}.tar", samples)
    return root


def test_shards_read_as_webdataset_reads_them(shards):
    import webdataset

    folder = shards / "train"
    ours = open_images(folder, pixels)
    assert isinstance(ours, ShardImages)
    assert ours.class_names == ("0", "1")
    theirs = webdataset.WebDataset([str(p) for p in sorted(folder.glob("*.tar"))], shardshuffle=False)
    seen = list(theirs.decode("pil").to_tuple("__key__", "png", "cls"))
    assert [name.split("/")[1] for name in ours.names] == [key for key, _, _ in seen]
    for index, (_, image, label) in enumerate(seen):
        assert torch.equal(ours[index][0], pixels(image))
        assert ours[index][1] == label
    pattern = open_images(str(folder / "photos-{000..001}.tar"), pixels)
    assert pattern.names == ours.names
    one = open_images(folder / "photos-001.tar", pixels, labelled=False)
    assert one.names == ours.names[3:]
    assert (one.picture(0)[1], one.class_names) == (-1, None)
    loader = torch.utils.data.DataLoader(pickle.loads(pickle.dumps(ours)), batch_size=4, num_workers=2)
    assert [labels.tolist() for _, labels in loader] == [[0, 1, 0, 1], [0, 1]]
    (shards / "classnames.txt").write_text("cat\ndog\n")
    assert open_images(folder, pixels).class_names == ("cat", "dog")
    (shards / "classnames.txt").write_text("cat\n")
    with pytest.raises(ValueError, match="1 names, but the shards hold class 1"):
        open_images(folder, pixels)


def test_shards_that_cannot_be_used(tmp_path):
    good = ("a.png", encoded(picture(1)))
    cases = [
        ([good], "sample a has no label"),
        ([good, ("a.cls", b"cat")], "holds 'cat'; it must be a class number"),
        ([("a.cls", b"0")], "hold no images"),
    ]
    for number, (samples, message) in enumerate(cases):
        write_shard(tmp_path / f"{number}.tar", samples)
        with pytest.raises(ValueError, match=message):
            open_images(tmp_path / f"{number}.tar", pixels)
    with pytest.raises(FileNotFoundError, match="no shard .*nothing.tar"):
        open_images(tmp_path / "nothing.tar", pixels)
    (tmp_path / "0.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(ValueError, match="not a readable .* tar"):
        open_images(tmp_path / "0.tar", pixels)


def test_a_pipeline_of_webdataset_is_a_loader(shards):
    """Shards that must be streamed: encode takes the user's own pipeline."""
    import webdataset

    import residual_kernels as rk

    model, preprocess, _ = rk.load_bundled()
    urls = [str(p) for p in sorted((shards / "train").glob("*.tar"))]

    def pipeline():
        data = webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("png", "cls")
        return data.map_tuple(preprocess, int).batched(4)

    ours = torch.utils.data.DataLoader(open_images(shards / "train", preprocess), batch_size=4)
    streamed, indexed = rk.encode(model.visual, pipeline()), rk.encode(model.visual, ours)
    assert torch.equal(streamed.output, indexed.output)
    assert torch.equal(streamed.labels, indexed.labels)


# --- data sets by name --------------------------------------------------------------------------------------


@pytest.fixture
def torchvision_root(tmp_path):
    """Country211 (parts by `split`, classes from folders) and GTSRB's test part
    (no class names of its own)."""
    for place, name in (("FR", "a"), ("IT", "b"), ("IT", "c")):
        path = tmp_path / "country211" / "test" / place / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(50).save(path)
    test = tmp_path / "gtsrb" / "GTSRB" / "Final_Test" / "Images"
    test.mkdir(parents=True)
    picture(90).save(test / "00000.ppm")
    (tmp_path / "gtsrb" / "GT-final_test.csv").write_text("Filename;ClassId\n00000.ppm;14\n")
    return tmp_path


def test_torchvision_by_name(torchvision_root):
    country = open_images("torchvision:country211@test", pixels, root=torchvision_root)
    assert (len(country), country.class_names) == (3, ("FR", "IT"))
    assert [country[i][1] for i in range(3)] == [0, 1, 1]
    assert country[0][0].unique().tolist() == [50.0]
    signs = open_images("torchvision:GTSRB@test", pixels, root=torchvision_root)
    assert len(signs.class_names) == 43
    assert signs.class_names[signs[0][1]] == "stop"
    plain = open_images("torchvision:GTSRB@test", pixels, root=torchvision_root, labelled=False)
    assert (plain.picture(0)[1], plain.class_names) == (-1, None)


def test_torchvision_says_what_is_missing(torchvision_root):
    cases = [
        ("torchvision:CIFAR10@test", "torchvision:CIFAR10@test is not in .*--download"),
        ("torchvision:CIFAR10", "say which part of torchvision:CIFAR10: .*@train or"),
        ("torchvision:CIFAR10@val", "@train or .*got 'val'"),
        ("torchvision:Country211", "say which part"),
        ("torchvision:Country211@tset", "tset"),
        ("torchvision:EuroSAT@test", "comes in one part; leave @test out"),
    ]
    for name, message in cases:
        with pytest.raises(ValueError, match=message):
            open_images(name, pixels, root=torchvision_root)
    with pytest.raises(ValueError, match="cannot download ImageNet"):
        open_images("torchvision:ImageNet@val", pixels, root=torchvision_root, download=True)


@pytest.fixture
def saved(tmp_path):
    """A data set as Hugging Face's library saves it, with a column that is neither image nor label."""
    import datasets

    features = datasets.Features(
        {
            "photo": datasets.Image(),
            "kind": datasets.ClassLabel(names=["cat", "dog"]),
            "note": datasets.Value("string"),
        }
    )
    rows = {"photo": [picture(20 * i) for i in range(3)], "kind": [0, 1, 1], "note": ["", "", ""]}
    part = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": part, "test": part.select([2])}).save_to_disk(str(tmp_path / "both"))
    part.save_to_disk(str(tmp_path / "one"))
    part.remove_columns("kind").save_to_disk(str(tmp_path / "bare"))
    part.add_column("again", rows["kind"], feature=features["kind"]).save_to_disk(str(tmp_path / "twice"))
    return tmp_path


def test_hugging_face_data_sets(saved):
    train = open_images(f"hf:{saved / 'both'}@train", pixels)
    assert (len(train), train.class_names) == (3, ("cat", "dog"))
    assert [train[i][1] for i in range(3)] == [0, 1, 1]
    assert train[2][0].unique().tolist() == [40.0]
    assert len(open_images(f"hf:{saved / 'both'}@test", pixels)) == 1
    assert len(open_images(f"hf:{saved / 'one'}", pixels)) == 3
    assert open_images(f"hf:{saved / 'bare'}", pixels, labelled=False)[0].shape == (3, 8, 8)
    cases = [
        ("both", "say which part of hf:.*both: .*@train, .*@test"),
        ("both@val", "say which part"),
        ("one@train", "comes in one part"),
        ("bare", "exactly one column of labels .*it has none"),
        ("twice", "it has several: kind, again"),
        ("nothing", "cannot be read here .*find any data file"),
    ]
    for name, message in cases:
        with pytest.raises(ValueError, match=message):
            open_images(f"hf:{saved / name}", pixels)


@pytest.mark.parametrize("library, name", [("datasets", "hf:x"), ("webdataset", "a-{0..1}.tar")])
def test_a_missing_library_names_the_extra(monkeypatch, library, name):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, f"{library}.shardlists", None)
    with pytest.raises(ImportError, match=r"pip install 'residual-kernels\[data\]'"):
        open_images(name, pixels)


# --- what cannot be read ------------------------------------------------------------------------------------


def test_unreadable_images_are_found_and_left_out(folder, shards):
    (folder / "train" / "cat" / "b.png").write_bytes(b"this is no PNG")
    images = open_images(folder / "train", pixels)
    counted = []
    bad = find_unreadable(images, workers=2, progress=counted.append)
    assert sum(counted) == 5
    assert list(bad) == [1]
    assert "cat/b.png is not a readable image: its format is unknown" in bad[1]
    rest = without(images, bad)
    assert rest.names == [name for name in images.names if name != "cat/b.png"]
    assert torch.equal(rest[1][0], images[2][0])
    assert rest.class_names == images.class_names
    assert without(images, {}) is images
    with pytest.raises(ValueError, match="none of the images"):
        without(images, dict.fromkeys(range(5), ""))
    write_shard(
        shards / "bad.tar", [("k.jpg", encoded(picture(3).resize((64, 64)), "JPEG")[:-200]), ("k.cls", b"0")]
    )
    assert "bad.tar/k is not a readable image" in find_unreadable(open_images(shards / "bad.tar", pixels))[0]
