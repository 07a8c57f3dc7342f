"""Where images come from: folders, zips, what cannot be read."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from residual_kernels.images import ImageFiles


def picture(value: int) -> Image.Image:
    return Image.fromarray(np.full((8, 8, 3), value, np.uint8))


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


@pytest.fixture
def folder(tmp_path):
    """train/{cat,dog_house} with 2 and 3 images, one of them nested, one grey, and a file that is no image."""
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
    assert flat[0][1] == -1
    assert flat.class_names is None


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
    with pytest.raises(ValueError, match="holds no images"):
        ImageFiles(archive / "test", pixels)
    with pytest.raises(FileNotFoundError, match="nearest are data"):
        ImageFiles(tmp_path / "dta", pixels)
    with pytest.raises(ValueError, match="neither a folder nor a zip"):
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
