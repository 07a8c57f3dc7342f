"""What a model's name means."""

import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from residual_kernels.data import downloads
from residual_kernels.data import models as sources


def test_models_by_name(tmp_path):
    model, preprocess, _ = sources.load_model("bundled")
    assert preprocess(Image.fromarray(np.zeros((8, 8, 3), np.uint8))).shape == (3, *model.visual.image_size)
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


@pytest.fixture
def made(tmp_path):
    """A small open_clip model's weights."""
    import open_clip

    torch.manual_seed(0)
    return open_clip.create_model("ViT-S-32-alt").state_dict()


def test_what_a_checkpoint_lacks_is_said_whole(made, tmp_path):
    """Another width, another architecture, lists, arrays, pointers, pages, folders:
    one line with the whole reason."""
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "other.safetensors")
    narrow = {key: value[:3] if key == "visual.proj" else value for key, value in made.items()}
    save_file({key: value.contiguous() for key, value in narrow.items()}, tmp_path / "narrow.safetensors")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    torch.save({}, tmp_path / "nothing.pt")
    np.savez(tmp_path / "arrays.npz", a=np.zeros(2))
    (tmp_path / "text.pt").write_text("a\n")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("cat/0.png", b"x")
    (tmp_path / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (tmp_path / "page.pt").write_text("<!doctype html><html></html>")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    cases = [
        (
            "other.safetensors",
            r"it lacks \d+ weights \(positional_embedding, .* \.\.\.\); it also has 2 weights \(a, b\)",
        ),
        (
            "narrow.safetensors",
            r"1 weight has another shape \(visual\.proj \[3, 256\] where the model has \[384, 256\]\)",
        ),
        ("list.pt", "it holds a list, not weights by name"),
        ("nothing.pt", "it holds no weights"),
        ("arrays.npz", "it is an archive of NumPy, as Big Vision's SigLIP models have them"),
        ("text.pt", "it is no checkpoint that PyTorch or safetensors wrote"),
        ("other.zip", "is a zip, but not one that PyTorch wrote"),
        ("pointer.pt", "is a Git LFS pointer"),
        ("page.pt", "is a web page"),
        ("empty.pt", "is empty"),
        ("folder", "is a folder; name the checkpoint file in it"),
    ]
    for name, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            sources.load_model("ViT-S-32-alt", str(tmp_path / name))
        assert len(str(caught.value).splitlines()) == 1


def test_code_in_a_checkpoint_is_named_and_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return (tmp_path / "ran").mkdir, ()

    torch.save({"state_dict": {}, "x": Code()}, tmp_path / "code.pt")
    with pytest.raises(
        ValueError, match=r"it holds more than tensors \(.*\), and loading that could run code"
    ):
        sources.load_model("ViT-S-32-alt", str(tmp_path / "code.pt"))
    assert not (tmp_path / "ran").exists()


def test_without_a_network_there_is_one_attempt_and_one_answer(monkeypatch, tmp_path):
    """Weights that exist and are not here are not weights that do not exist."""
    asked = []

    def refuse(request, timeout):
        asked.append(request.full_url)
        raise OSError("Name or service not known")

    monkeypatch.setattr(downloads.urllib.request, "urlopen", refuse)
    monkeypatch.setattr(downloads.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(downloads.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    message = (
        r"weights openai of ViT-B-32 .* exist, but not on this machine, and https://hub.* cannot be reached"
    )
    with pytest.raises(ValueError, match=message):
        sources.load_model("ViT-B-32", "openai")
    with pytest.raises(
        ValueError, match="hf:some/model cannot be loaded: .* not downloaded before, and https"
    ):
        sources.load_model("hf:some/model")
    with pytest.raises(ValueError, match="tokenizer of ViT-B-16-SigLIP .* cannot be reached"):
        sources.load_model("ViT-B-16-SigLIP", "none")
    assert asked == ["https://hub.example"] * 3


def test_what_is_here_is_loaded_without_a_network(made, monkeypatch, tmp_path):
    from safetensors.torch import save_file

    monkeypatch.setattr(
        downloads.urllib.request, "urlopen", lambda *_, **__: pytest.fail("the network was asked")
    )
    save_file({key: value.contiguous() for key, value in made.items()}, tmp_path / "own.safetensors")
    monkeypatch.setenv("WEIGHTS", str(tmp_path))
    model, _, _ = sources.load_model("ViT-S-32-alt", "$WEIGHTS/own.safetensors")
    assert torch.equal(model.visual.proj, made["visual.proj"])
