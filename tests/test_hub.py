"""Adapters on the Hugging Face hub, without one: a folder stands for it."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, hub_mixin
from test_towers import build, images_for

import residual_kernels as rk
from residual_kernels.adapters import hub
from residual_kernels.demo import DIGITS, digit_images


class FolderApi:
    """What push_to_hub asks of huggingface_hub.HfApi, on a folder."""

    root: Path
    commits: list[dict]

    def __init__(self, token=None):
        pass

    def create_repo(self, repo_id, **_):
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return type("Repo", (), {"repo_id": repo_id})

    def upload_folder(self, *, repo_id, folder_path, delete_patterns, **more):
        for name in delete_patterns:
            (self.root / repo_id / name).unlink(missing_ok=True)
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        self.commits.append({"repo_id": repo_id, **more})
        return f"https://hub/{repo_id}/commit/{len(self.commits)}"


@pytest.fixture
def api(tmp_path, monkeypatch):
    FolderApi.root, FolderApi.commits = tmp_path / "hub", []
    asked = []

    def snapshot(repo_id, **options):
        asked.append(options)
        return str(FolderApi.root / repo_id)

    def no_network(*_, **__):
        raise AssertionError("this test must not reach the network")

    monkeypatch.setattr(hub_mixin, "HfApi", FolderApi)
    monkeypatch.setattr(
        hub_mixin, "hf_hub_download", lambda repo_id, filename, **_: FolderApi.root / repo_id / filename
    )
    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.hf_api.HfApi, "create_commit", no_network)
    FolderApi.asked = asked
    return FolderApi


@pytest.fixture
def tower():
    return build()


@pytest.fixture
def bases(tower):
    return rk.fit_bases(tower, [images_for(tower, 20)])


def test_pushed_and_pulled(tower, bases, api):
    residual = rk.ResiDual(tower, bases.truncate(energy=0.9), init="normal")
    head = rk.ZeroShotHead(torch.randn(32, 2), ["cat", "dog | wolf"], 1.0)
    address = rk.push_adapter(
        residual,
        "me/pets",
        task="pets\nat home",
        tower="tiny",
        accuracy=0.91234,
        head=head,
        card={"license": "apache-2.0", "base_model": "someone/tiny"},
    )
    assert address == "https://hub/me/pets/commit/1"
    assert api.commits[0]["commit_message"] == "ResiDual: pets at home"
    files = {file.name for file in (api.root / "me/pets").iterdir()}
    assert files == {
        "adapter.json",
        "weights.safetensors",
        "bases.safetensors",
        "head.safetensors",
        "config.json",
        "README.md",
    }

    again, head_again = rk.pull_adapter(build(), "me/pets", revision="abc")
    assert api.asked[0]["revision"] == "abc"
    assert not any(name.endswith((".bin", ".pt", ".py", "*")) for name in api.asked[0]["allow_patterns"])
    images = images_for(tower)
    with torch.no_grad():
        assert torch.equal(again(images), residual(images))
        assert torch.equal(head_again(again(images)), head(residual(images)))
    assert head_again.class_names == ("cat", "dog | wolf")

    card = ModelCard.load(api.root / "me/pets" / "README.md")
    assert card.data.library_name == "residual-kernels"
    assert card.data.base_model == "someone/tiny"
    assert card.data.eval_results[0].metric_value == 0.9123
    assert card.data.eval_results[0].dataset_name == "pets at home"
    for said in (
        "# ResiDual adapter: pets at home",
        "| tower | tiny (open_clip.VisionTransformer: 2 layers, 32 outputs) |",
        f"| method | ResiDual (rest zero), {len(residual.weight)} learned numbers |",
        "| accuracy | 0.9123 |",
        "| classes | 2: cat, dog \\| wolf |",
        f"| library | residual_kernels {rk.__version__}, torch",
        'rk.pull_adapter(model.visual, "me/pets")',
    ):
        assert said in card.text


def test_by_reference_and_pushed_again(tower, bases, api):
    first = rk.CoarseHeads(tower, init="normal")
    residual = rk.ResiDual(tower, bases.truncate(energy=0.9), init="normal")
    head = rk.ZeroShotHead(torch.randn(32, 2), ["a", "b"])
    rk.push_adapter(residual, "me/pets", task="pets", tower="tiny", head=head)
    rk.push_adapter(residual, "me/pets", task="pets", tower="tiny", bases=False)
    assert not {"bases.safetensors", "head.safetensors"} & {f.name for f in (api.root / "me/pets").iterdir()}
    again, no_head = rk.pull_adapter(build(), "me/pets", bases=bases)
    assert no_head is None
    images = images_for(tower)
    with torch.no_grad():
        assert torch.equal(again(images), residual(images))
    text = (api.root / "me/pets/README.md").read_text()
    assert bases.truncate(energy=0.9).fingerprint() in text
    assert 'bases="bases.safetensors")' in text
    assert "accuracy" not in text
    with pytest.raises(FileNotFoundError, match="by reference"):
        rk.pull_adapter(build(), "me/pets")
    rk.push_adapter(first, "me/pets", task="pets", tower="tiny")
    again, _ = rk.pull_adapter(build(), "me/pets")
    assert isinstance(again, rk.CoarseHeads)


def test_a_local_folder_is_a_repository_too(tower, bases, tmp_path):
    residual = rk.ResiDual(tower, bases.truncate(energy=0.9), init="normal")
    hub.HubAdapter(residual, details={"task": "pets"}).save_pretrained(tmp_path / "pets")
    again, _ = rk.pull_adapter(build(), tmp_path / "pets")
    assert torch.equal(again.weight, residual.weight)
    kept = hub.HubAdapter.from_pretrained(tmp_path / "pets", tower=build())
    assert torch.equal(kept.adapter.weight, residual.weight)
    with pytest.raises(ValueError, match="other weights"):
        rk.pull_adapter(build(seed=4), tmp_path / "pets")


def test_refused_before_anything_is_sent(tower, bases, api):
    residual = rk.ResiDual(tower, bases.truncate(energy=0.9))
    cases = [
        (lambda: rk.push_adapter(residual, "me/a", task="t", tower="t", accuracy=91.0), "share of images"),
        (lambda: rk.push_adapter(residual, "me/a", task="t", tower="t", bases="file"), "bases is True"),
        (
            lambda: rk.push_adapter(rk.CoarseHeads(tower), "me/a", task="t", tower="t", bases=False),
            "no bases",
        ),
        (lambda: rk.push_adapter(tower, "me/a", task="t", tower="t"), "save_adapter keeps"),
    ]
    for run, message in cases:
        with pytest.raises(ValueError, match=message):
            run()
    assert not api.root.exists()


def test_a_classifier_pushed_and_pulled(api):
    """Labels, class vectors (the model's own too, where the fit moved them) and probabilities come back."""
    model, preprocess, tokenizer = rk.load_bundled()
    pictures, labels = digit_images()
    classifier = rk.Classifier(model, preprocess, tokenizer, templates=["the number {}"])
    with pytest.raises(ValueError, match="not fitted"):
        classifier.push("me/digits", task="digits", tower="bundled")
    classifier.fit(pictures[:200], [DIGITS[k] for k in labels[:200].tolist()])
    moved = classifier.head_
    classifier._base_head = rk.ZeroShotHead(
        moved.class_vectors.flip(1), moved.class_names, float(moved.logit_scale)
    )
    with pytest.raises(ValueError, match="accuracy"):
        classifier.push("me/digits", task="digits", tower="bundled", accuracy=93)
    assert not (api.root / "me/digits").exists()
    address = classifier.push("me/digits", task="digits", tower="the bundled model", accuracy=0.93)
    assert address == "https://hub/me/digits/commit/1"
    card = (api.root / "me/digits/README.md").read_text()
    assert "0.93" in card
    assert "the bundled model" in card
    expected = classifier.predict_proba(pictures[300:310])
    classifier.adapter_.detach()
    again = rk.Classifier.pull("me/digits", model, preprocess, tokenizer)
    assert again.classes_.tolist() == classifier.classes_.tolist()
    assert (again.predict_proba(pictures[300:310]) == expected).all()
    assert torch.equal(again._base_head.class_vectors, moved.class_vectors.flip(1))
    again.adapter_.detach()


def test_a_repository_without_class_vectors_is_no_classifier(api):
    model, preprocess, tokenizer = rk.load_bundled()
    bases = rk.fit_bases(model.visual, [torch.randn(20, 3, 32, 32)])
    adapter = rk.ResiDual(model.visual, bases)
    rk.push_adapter(adapter, "me/bare", task="none", tower="bundled")
    adapter.detach()
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="me/bare holds an adapter without class vectors"):
        rk.Classifier.pull("me/bare", model, preprocess, tokenizer)
    assert [p.requires_grad for p in model.parameters()] == flags
