"""What a name on the command line means: models, image folders, class names, templates."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from residual_kernels import sources


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
    one = sources.ImageFiles(folder / "train", pixels)
    other = sources.ImageFiles(archive / "train", pixels)
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
    flat = sources.ImageFiles(archive, pixels, labelled=False)
    assert len(flat) == 5
    assert flat[0][1] == -1
    assert flat.class_names is None


def test_linked_class_folders_are_followed(folder, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "cat").symlink_to(folder / "train" / "cat")
    assert sources.ImageFiles(tmp_path / "linked", pixels).names == ["cat/a.png", "cat/b.png"]


def test_layouts_that_cannot_be_labelled(folder, archive, tmp_path):
    for path in (folder, archive):
        with pytest.raises(ValueError, match="hold folders, not images; name one of them, such as .*train"):
            sources.ImageFiles(path, pixels)
    (folder / "train" / "bird").mkdir()
    with pytest.raises(ValueError, match="class without images .*: bird"):
        sources.ImageFiles(folder / "train", pixels)
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("train/bird/", b"")
    with pytest.raises(ValueError, match="class without images .*: bird"):
        sources.ImageFiles(archive / "train", pixels)
    with pytest.raises(ValueError, match=r"a\.png lies outside of any"):
        sources.ImageFiles(folder / "train" / "cat", pixels)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        sources.ImageFiles(tmp_path / "empty", pixels)
    with pytest.raises(ValueError, match="holds no images"):
        sources.ImageFiles(archive / "test", pixels)
    with pytest.raises(FileNotFoundError, match="nearest are data"):
        sources.ImageFiles(tmp_path / "dta", pixels)
    with pytest.raises(ValueError, match="neither a folder nor a zip"):
        sources.ImageFiles(folder / "train" / "cat" / "a.png", pixels)


def test_unreadable_files_are_named(folder, archive):
    (folder / "train" / "cat" / "a.png").write_bytes(b"this is no PNG")
    with pytest.raises(ValueError, match=r"cat/a\.png is not a readable image"):
        sources.ImageFiles(folder / "train", pixels)[0]
    whole = io.BytesIO()
    picture(7).resize((64, 64)).save(whole, "JPEG")
    (folder / "train" / "cat" / "a.png").write_bytes(whole.getvalue()[:-200])
    with pytest.raises(ValueError, match=r"cat/a\.png is not a readable image"):
        sources.ImageFiles(folder / "train", pixels)[0]
    archive.write_bytes(archive.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"data\.zip"):
        sources.ImageFiles(archive / "train", pixels)


def test_models_by_name(tmp_path):
    model, preprocess, _ = sources.load_model("bundled")
    assert preprocess(picture(9)).shape == (3, *model.visual.image_size)
    assert not model.training
    cases = [
        (("ViT-B32", None), "unknown model 'ViT-B32'; nearest are .*ViT-B-32"),
        (("bundeld", None), "nearest are bundled"),
        (("ViT-B-32", None), "say which weights of ViT-B-32: .*openai"),
        (("ViT-B-32", "opneai"), "no weights 'opneai' and no such file exists; nearest are openai"),
        (("bundled", "openai"), "has its own weights"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            sources.load_model(*arguments)


def test_a_local_checkpoint_is_loaded(tmp_path):
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(3)
    made = open_clip.create_model("ViT-S-32-alt")
    save_file(made.state_dict(), tmp_path / "own.safetensors")
    model, _, tokenizer = sources.load_model("ViT-S-32-alt", str(tmp_path / "own.safetensors"))
    assert torch.equal(model.visual.conv1.weight, made.visual.conv1.weight)
    assert tokenizer(["a"]).shape == (1, 77)


def test_class_names_and_templates(tmp_path):
    assert sources.class_names(None, ("a", "dog_house")) == ("a", "dog house")
    (tmp_path / "names.txt").write_text("one\n\n two \n")
    assert sources.class_names(str(tmp_path / "names.txt"), ("a", "b")) == ("one", "two")
    with pytest.raises(ValueError, match="2 class names, but there are 3"):
        sources.class_names(str(tmp_path / "names.txt"), ("a", "b", "c"))
    with pytest.raises(FileNotFoundError, match="no file of class names"):
        sources.class_names(str(tmp_path / "nothing"), ("a",))
    assert sources.templates(None, ("a {}",)) == ("a {}",)
    assert len(sources.templates("openai", ())) == 80
    (tmp_path / "t.txt").write_text("a {}\nthe {}\n")
    assert sources.templates(str(tmp_path / "t.txt"), ()) == ("a {}", "the {}")
    (tmp_path / "t.txt").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        sources.templates(str(tmp_path / "t.txt"), ())
