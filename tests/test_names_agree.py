"""Class names agree wherever a head meets data.

Class vectors and prompts that cannot tell classes apart are named.
"""

import warnings

import pytest
import torch
from test_towers import build, images_for
from torch.utils.data import DataLoader, Dataset, Subset

import residual_kernels as rk

NAMES = ("cat", "apple_pie", "Dog")


def made(names=NAMES):
    tower = build()
    images, labels = images_for(tower, 12), torch.arange(12) % 3
    cache = rk.encode(tower, [(images, labels)], class_names=names)
    residual = rk.ResiDual(tower, rk.fit_bases(tower, cache).truncate(energy=0.9))
    return residual, cache, images, labels


def head_of(names, dim=32):
    vectors = torch.randn(dim, len(names), generator=torch.Generator().manual_seed(0))
    return rk.ZeroShotHead(vectors, names, 1.0)


def doors(residual, cache):
    return [
        lambda head: rk.evaluate(residual, head, cache),
        lambda head: rk.fit(residual, head, cache, epochs=1),
        lambda head: rk.analysis.own_accuracy(residual.tower, cache, head),
    ]


@pytest.mark.parametrize(
    "names", [NAMES, ("Cat", "apple pie", "dog"), ("0", "1", "2")], ids=["same", "spelling", "numbers"]
)
def test_the_same_names_go_on(names):
    residual, cache, _, _ = made()
    for door in doors(residual, cache):
        door(head_of(names))


def test_another_order_and_other_names_are_refused_with_the_pairing():
    residual, cache, _, _ = made()
    for door in doors(residual, cache):
        with pytest.raises(
            ValueError, match="another order, so 2 of 3 .*0 is 'Dog' in the head and 'cat' in the data"
        ):
            door(head_of(("Dog", "apple_pie", "cat")))
        with pytest.raises(
            ValueError, match="2 is 'horse' in the head and 'Dog' in the data.*data.class_names ="
        ):
            door(head_of(("cat", "apple_pie", "horse")))
        with pytest.raises(ValueError, match="0 is 'horse' in the head and 'cat' in the data"):
            door(head_of(("horse", *NAMES)))
        with pytest.raises(ValueError, match="2 is absent in the head and 'Dog' in the data"):
            door(head_of(NAMES[:2]))
        door(head_of((*NAMES, "horse")))  # a head may know more classes, behind those of the data
    cache.class_names = ("a kitten", "a pie", "a puppy")  # the same classes, by the words of a prompt
    rk.evaluate(residual, head_of(("a kitten", "a pie", "a puppy")), cache)


class Pictures(Dataset):
    """As torchvision's data sets are: names at `classes`."""

    def __init__(self, images, labels, classes):
        self.images, self.labels, self.classes = images, labels, classes

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], int(self.labels[index])


def test_names_of_a_loader():
    residual, _, images, labels = made()
    data = Pictures(images, labels, list(NAMES))
    for dataset in (data, Subset(data, [0, 1, 2, 3])):
        loader = DataLoader(dataset, batch_size=4)
        rk.evaluate(residual, head_of(NAMES), loader)
        rk.evaluate(residual, head_of(("kitten", "pie", "puppy")), loader)  # words of one's own
        with pytest.raises(ValueError, match="in another order"):
            rk.evaluate(residual, head_of(NAMES[::-1]), loader)


def test_labels_are_whole_numbers():
    tower = build()
    images = images_for(tower, 4)
    cache = rk.encode(tower, [(images, torch.tensor([0.0, 1.0, 2.0, 1.0]))])
    assert cache.labels.dtype == torch.int64
    with pytest.raises(ValueError, match="labels are whole numbers .* got 3.5"):
        rk.encode(tower, [(images, torch.tensor([0.0, 1.0, 3.5, 1.0]))])
    with pytest.raises(ValueError, match="labels are whole numbers .* got nan"):
        rk.encode(tower, [(images, torch.tensor([0.0, float("nan"), 3.0, 1.0]))])
    with pytest.raises(ValueError, match="got 0.5"):
        rk.ZeroShotHead.from_prototypes(images.flatten(1), torch.tensor([0.5, 0, 1, 1]))


NO_LABELS = {
    float("inf"): "got inf",
    float("-inf"): "got -inf",
    float("nan"): "got nan",
    0.5: "got 0.5",
    1 + 1j: r"got \(1\+1j\)",
    "cat": "got 'cat': give the place of each name",
    None: "got NoneType",
}


@pytest.mark.parametrize("label", NO_LABELS)
def test_what_is_no_label(label):
    said = f"labels are whole numbers that count classes from 0; {NO_LABELS[label]}"
    residual, cache, images, _ = made()
    head = head_of(NAMES)
    for labels in ([label] * 4, [label, 1, 0, 1] if not isinstance(label, str) else (label,) * 4):
        with pytest.raises(ValueError, match=said):
            rk.encode(residual.tower, [(images[:4], labels)])
        with pytest.raises(ValueError, match=said):
            rk.evaluate(residual, head, [(images[:4], labels)])
        with pytest.raises(ValueError, match=said):
            rk.ZeroShotHead.from_prototypes(torch.randn(4, 8), labels)
    with pytest.raises(ValueError, match=said):
        rk.fit_many(residual, head, cache, labels=[[label] * 12], epochs=1)
    with pytest.raises(ValueError, match="prototypes need images"):
        rk.ZeroShotHead.from_prototypes(torch.zeros(0, 8), torch.zeros(0))


def test_class_vectors_that_are_alike_and_prompts_that_are_cut():
    model, _, tokenizer = rk.load_bundled()
    with pytest.warns(UserWarning, match=r"'Turkey' and 'turkey' \(cosine 1.000000\) are equal or nearly so"):
        head = rk.ZeroShotHead.from_text(model, tokenizer, ["Turkey", "turkey", "cat"], ["a {}"])
    assert [pair[:2] for pair in head.alike()] == [("Turkey", "turkey")]
    told = r"class vectors of 'Turkey' and 'turkey' \(cosine 1.000000\) are equal"
    for make in (
        lambda: rk.ZeroShotHead(head.class_vectors, head.class_names),
        lambda: rk.ZeroShotHead.from_prototypes(
            torch.eye(3)[[0, 0, 1]], torch.tensor([0, 1, 2]), ["Turkey", "turkey", "cat"]
        ),
    ):
        with pytest.warns(UserWarning, match=told) as seen:
            make()
        assert [each.filename for each in seen] == [__file__]
    many = torch.randn(4, 2001)
    many[:, 2000] = many[:, 7]
    with pytest.warns(UserWarning, match=r"of '7' and '2000' \(cosine 1.000000\) are equal"):
        rk.ZeroShotHead(many, [str(number) for number in range(2001)])
    with pytest.warns(UserWarning, match="exceeds the .* tokens of the context, so its end is not read"):
        rk.ZeroShotHead.from_text(model, tokenizer, ["cat", "dog"], ["very " * 100 + "{}"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rk.ZeroShotHead.from_text(model, tokenizer, ["cat", "dog"], ["a {}"]).alike() == []


def test_class_names_that_repeat_are_named():
    tower = build()
    images = images_for(tower, 4)
    said = r"class names repeat: 'cat' \(0, 2\)"
    names = ["cat", "dog", "cat"]
    with pytest.warns(UserWarning, match=said) as seen:
        cache = rk.encode(tower, [(images, torch.tensor([0, 1, 2, 1]))], class_names=names)
    assert [each.filename for each in seen] == [__file__]
    with pytest.warns(UserWarning, match=said):
        rk.ZeroShotHead(torch.randn(8, 3), names)
    with pytest.warns(UserWarning, match=said):
        rk.ZeroShotHead.from_prototypes(cache)
    model, _, tokenizer = rk.load_bundled()
    with pytest.raises(ValueError, match=said):
        rk.ZeroShotHead.from_text(model, tokenizer, names)
