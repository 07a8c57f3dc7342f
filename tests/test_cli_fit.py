"""bases, fit and eval on the command line: several data sets, many fits, few images, several processes."""

import csv
import json
import sys

import processes
import pytest
import torch
from PIL import Image
from test_cli import run  # noqa: F401 (a fixture)

import residual_kernels as rk
from residual_kernels import cli
from residual_kernels.demo import story as demo

NAMES = ("four", "one", "zero")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Folders of real digits of three classes, 16, 12 and 8 of them, and caches of both in c/."""
    root = tmp_path_factory.mktemp("digits")
    images, labels = demo.digit_images()
    model, preprocess, _ = rk.load_bundled()
    for part, start in (("train", 0), ("test", 20)):
        chosen = []
        for number, (digit, count) in enumerate(zip((4, 1, 0), (16, 12, 8), strict=True)):
            rows = (labels == digit).nonzero().flatten()[start : start + count].tolist()
            folder = root / part / NAMES[number]
            folder.mkdir(parents=True)
            for row in rows:
                images[row].save(folder / f"{row:04d}.png")
            chosen += [(images[row], number) for row in rows]
        batch = torch.stack([preprocess(Image.open(p)) for p in sorted((root / part).rglob("*.png"))])
        truth = torch.tensor([number for _, number in chosen])
        rk.encode(model.visual, [(batch, truth)], root / "c" / part, class_names=NAMES)
    return root


def test_many_fits_and_a_checkpoint(run, digits, tmp_path):  # noqa: F811
    fit = (
        "fit",
        "--data",
        digits / "c" / "train",
        "--val",
        digits / "c" / "test",
        "--lr",
        0.1,
        "--lr",
        0.4,
        "--seeds",
        2,
        "--seed",
        3,
        "--epochs",
        3,
        "--method",
        "fine",
    )
    found = []
    for name in ("a", "b"):  # the second goes on from the first one's checkpoint, which is finished
        code, out, err = run(
            *fit, "--out", tmp_path / name, "--json", tmp_path / "f.json", "--checkpoint", tmp_path / "state"
        )
        assert code == 0, err
        found.append(json.loads((tmp_path / "f.json").read_text()))
    assert found[0] == found[1]
    assert "All fits on validation" in out
    fits = found[0]["fits"]
    assert [(one["lr"], one["seed"]) for one in fits] == [(0.1, 3), (0.4, 3), (0.1, 4), (0.4, 4)]
    best = max(fits, key=lambda one: one["val_accuracy"])
    assert found[0]["val_accuracy"] == best["val_accuracy"]
    model, _, _ = rk.load_bundled()
    kept = rk.load_adapter(model.visual, tmp_path / "a")
    head = rk.ZeroShotHead.load(tmp_path / "a" / "head.safetensors")
    seen = rk.evaluate(kept, head, rk.UnitCache.load(digits / "c" / "test"))
    assert seen.accuracy == pytest.approx(best["val_accuracy"])
    code, out, err = run(*fit, "--shrink", 0.1, "--out", tmp_path / "c", "--checkpoint", tmp_path / "state")
    assert code == 2
    assert "shrink differ" in err
    assert not (tmp_path / "c").exists()


def test_few_images(run, digits, tmp_path):  # noqa: F811
    fit = (
        "fit",
        "--data",
        digits / "c" / "train",
        "--val",
        digits / "c" / "test",
        "--method",
        "fine",
        "--epochs",
        2,
    )
    code, out, err = run(
        *fit,
        "--shots",
        4,
        "--balanced",
        "--shrink",
        0.05,
        "--out",
        tmp_path / "a",
        "--json",
        tmp_path / "f.json",
    )
    assert code == 0, err
    assert "12 images" in out
    assert 0 < json.loads((tmp_path / "f.json").read_text())["val_balanced_accuracy"] <= 1
    code, out, err = run(
        "eval",
        "--adapter",
        tmp_path / "a",
        "--data",
        digits / "test",
        "--confusion",
        tmp_path / "m.csv",
        "--json",
        tmp_path / "e.json",
    )
    assert code == 0, err
    assert "balanced" in out
    seen = json.loads((tmp_path / "e.json").read_text())
    confusion = torch.tensor(seen["confusion"])
    assert confusion.sum(1).tolist() == [16, 12, 8]
    recalls = confusion.diagonal() / confusion.sum(1)
    assert seen["balanced_accuracy"] == pytest.approx(float(recalls.mean()), rel=1e-6)
    assert list(seen["class_accuracy"].values()) == pytest.approx(recalls.tolist())
    with (tmp_path / "m.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["true class", *NAMES]
    assert [[int(x) for x in row[1:]] for row in rows[1:]] == seen["confusion"]
    code, out, err = run(*fit, "--shots", 9, "--out", tmp_path / "b")
    assert code == 2
    assert "class zero has 8 images, fewer than shots=9" in err


def test_bases_of_several_folders_and_files(run, digits, tmp_path):  # noqa: F811
    parts = [
        tmp_path / name for name in ("a.safetensors", "b.safetensors", "ab.safetensors", "m.safetensors")
    ]
    train, test = digits / "train", digits / "c" / "test"  # a folder and a cache
    for path, data in zip(parts, ((train,), (test,), (train, test)), strict=False):
        options = [option for one in data for option in ("--data", one)]
        code, out, err = run("bases", *options, "--moments", "--out", path)
        assert code == 0, err
    code, out, err = run("bases", "--merge", parts[0], parts[1], "--out", parts[3])
    assert code == 0, err
    assert "components of 72 images" in out
    a, b, both, merged = (rk.SpectralBases.load(path) for path in parts)
    for other in (both, a.merge(b)):
        difference = merged.parts["head"].variance - other.parts["head"].variance
        assert difference.abs().max() < 1e-10 * merged.parts["head"].variance.max()
    for arguments, message in (
        (("--merge", parts[0], parts[3]), "merging needs the moments of both"),
        (("--merge",), "give --data, or --merge and the files"),
        ((), "give --data, or --merge and the files"),
        ((parts[0],), "give --data, or --merge and the files"),
    ):
        code, out, err = run("bases", *arguments, "--out", tmp_path / "no")
        assert code == 2
        assert message in err
        assert not (tmp_path / "no").exists()


def _program(*arguments):
    sys.argv = ["residual-kernels", *map(str, arguments)]
    cli.main()


def test_under_torchrun(run, digits, tmp_path):  # noqa: F811
    """Two processes: the bases of one, and the fit of one."""
    fit = (
        "fit",
        "--data",
        digits / "c" / "train",
        "--val",
        digits / "c" / "test",
        "--method",
        "fine",
        "--epochs",
        2,
        "--lr",
        0.1,
    )
    bases = ("bases", "--data", digits / "train", "--moments")
    for name, call in (("one", lambda *a: run(*a)[0]), ("two", _in_two)):
        assert not call(*bases, "--out", tmp_path / f"{name}.safetensors")
        assert not call(*fit, "--bases", tmp_path / f"{name}.safetensors", "--out", tmp_path / name)
    one, two = (rk.SpectralBases.load(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert one.count == two.count == 36
    a, b = one.parts["head"].variance, two.parts["head"].variance
    assert (a - b).abs().max() < 1e-5 * a.max()
    weights = []
    for name in ("one", "two"):
        model, _, _ = rk.load_bundled()
        weights.append(rk.load_adapter(model.visual, tmp_path / name).weight.detach())
    assert len(weights[0]) == len(weights[1])
    assert (weights[0] - weights[1]).abs().mean() < 1e-3
    assert (weights[0] - weights[0][0]).abs().max() > 0.1
    data = ("--data", digits / "train")
    assert processes.exit_codes(
        processes.start_ranks(2, _program, "fit", *data, "--out", tmp_path / "x")
    ) == [2, 2]


def _in_two(*arguments):
    return any(processes.exit_codes(processes.start_ranks(2, _program, *arguments)))


def test_auto_is_the_default_and_says_why(run, digits, tmp_path):  # noqa: F811
    code, out, err = run(
        "fit", "--data", digits / "train", "--out", tmp_path / "a", "--json", tmp_path / "f.json"
    )
    assert code == 0, err
    found = json.loads((tmp_path / "f.json").read_text())
    assert [one["name"] for one in found["candidates"]] == [
        "base",
        "anchored",
        "fine",
        "full",
        "anchored + class vectors",
        "probe",
    ]
    assert (found["judged_by"], found["images"]) == ("folds", 36)
    assert found["accuracy"] >= found["base_accuracy"]
    assert found["why"] in out
    assert "only 36 training images judged the candidates" in err
    code, out, err = run(
        "eval", "--adapter", tmp_path / "a", "--data", digits / "test", "--json", tmp_path / "e.json"
    )
    assert code == 0, err
    model, preprocess, _ = rk.load_bundled()
    kept = rk.load_adapter(model.visual, tmp_path / "a")
    head = rk.ZeroShotHead.load(tmp_path / "a" / "head.safetensors")
    paths = sorted((digits / "test").rglob("*.png"))
    images = torch.stack([preprocess(Image.open(path)) for path in paths])
    labels = torch.tensor([NAMES.index(path.parent.name) for path in paths])
    seen = json.loads((tmp_path / "e.json").read_text())["accuracy"]
    assert seen == pytest.approx(rk.evaluate(kept, head, [(images, labels)]).accuracy)


def test_auto_keeps_the_model_where_nothing_is_better(run, digits, tmp_path):  # noqa: F811
    """Labels by chance: nothing can be learned, the adapter is the model, and that is no error."""
    images = [Image.open(path) for path in sorted((digits / "train").rglob("*.png"))]
    names = torch.randint(3, (len(images),), generator=torch.Generator().manual_seed(1)).tolist()
    for number, (image, name) in enumerate(zip(images, names, strict=True)):
        folder = tmp_path / "data" / NAMES[name]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number}.png")
    code, out, err = run(
        "fit", "--data", tmp_path / "data", "--out", tmp_path / "a", "--json", tmp_path / "f.json"
    )
    assert code == 0, err
    assert json.loads((tmp_path / "f.json").read_text())["winner"] == "base"
    assert "so the model stays as it is" in out
    model, _, _ = rk.load_bundled()
    cache = rk.UnitCache.load(digits / "c" / "test")
    kept = rk.load_adapter(model.visual, tmp_path / "a")
    assert torch.equal(kept.from_units(cache.terms(slice(0, 5))), cache.output[:5])


def test_probe_by_name_and_with_validation(run, digits, tmp_path):  # noqa: F811
    code, out, err = run(
        "fit",
        "--data",
        digits / "c" / "train",
        "--val",
        digits / "c" / "test",
        "--method",
        "probe",
        "--balanced",
        "--out",
        tmp_path / "a",
        "--json",
        tmp_path / "f.json",
    )
    assert code == 0, err
    found = json.loads((tmp_path / "f.json").read_text())
    assert [one["name"] for one in found["candidates"]] == ["base", "probe"]
    assert found["judged_by"] == "validation"
    code, _, err = run(
        "fit", "--data", digits / "c" / "train", "--lr", 0.1, "--epochs", 3, "--out", tmp_path / "b"
    )
    assert code == 2
    assert "--lr and --epochs belong to single methods, and --method auto does not read such options" in err
    assert not (tmp_path / "b").exists()


def test_prototypes_use_no_label_beyond_the_shots(run, digits, tmp_path, monkeypatch):  # noqa: F811
    """Class vectors come from the N images of each class, also where the rest of a class lies elsewhere."""
    seen = []
    made = rk.ZeroShotHead.from_prototypes

    def spy(embeddings, labels=None, class_names=None):
        seen.append(torch.bincount(labels).tolist())
        return made(embeddings, labels, class_names)

    monkeypatch.setattr(rk.ZeroShotHead, "from_prototypes", spy)
    for method, more in (
        ("auto", ()),
        ("fine", ("--epochs", 1)),
        ("stream", ("--epochs", 1, "--components", 2)),
    ):
        data = digits / ("train" if method == "stream" else "c/train")
        code, _, err = run(
            "fit",
            "--data",
            data,
            "--val",
            digits / ("test" if method == "stream" else "c/test"),
            "--method",
            method,
            "--prototypes",
            "--shots",
            3,
            *more,
            "--out",
            tmp_path / method,
        )
        assert code == 0, err
    assert seen == [[3, 3, 3]] * 3


def test_stream_takes_rates_seeds_shots_and_balance(run, digits, tmp_path):  # noqa: F811
    code, out, err = run(
        "fit",
        "--data",
        digits / "train",
        "--val",
        digits / "test",
        "--method",
        "stream",
        "--components",
        2,
        "--epochs",
        1,
        "--lr",
        0.1,
        "--lr",
        0.3,
        "--seeds",
        2,
        "--shots",
        4,
        "--balanced",
        "--out",
        tmp_path / "a",
        "--json",
        tmp_path / "f.json",
    )
    assert code == 0, err
    fits = json.loads((tmp_path / "f.json").read_text())["fits"]
    assert [(one["lr"], one["seed"]) for one in fits] == [(0.1, 0), (0.3, 0), (0.1, 1), (0.3, 1)]
    assert "12 images" in out


def test_an_adapter_below_the_model_is_said(run, digits, tmp_path):  # noqa: F811
    """eval, and predict where folders name the classes, warn; a better adapter is no matter for a warning."""
    model, _, _ = rk.load_bundled()
    cache = rk.UnitCache.load(digits / "c" / "train")
    bases = rk.fit_bases(model.visual, cache)
    _, _, tokenizer = rk.load_bundled()
    head = rk.ZeroShotHead.from_text(model, tokenizer, NAMES, ("the digit {}",))
    for name, weight in (("bad", -3.0), ("same", 1.0)):
        init = torch.full((len(bases.parts["head"].components),), weight)
        adapter = rk.ResiDual(model.visual, bases, "all", init=init)
        rk.save_adapter(adapter, tmp_path / name, head=head, class_names=NAMES)
        adapter.detach()
        for command, more in (("eval", ()), ("predict", ("--out", tmp_path / f"{name}.csv"))):
            code, _, err = run(command, "--adapter", tmp_path / name, "--data", digits / "test", *more)
            assert code == 0, err
            assert ("The adapter is below the model on these 36 images" in " ".join(err.split())) is (
                name == "bad"
            )
