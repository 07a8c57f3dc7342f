"""Bases: against an SVD of the units themselves, streaming, merging, truncating, files."""

import warnings

import pytest
import torch
from test_towers import build, images_for

import residual_kernels as rk
from residual_kernels.bases import principal


@pytest.fixture(scope="module")
def tower():
    return build().double()


@pytest.fixture(scope="module")
def images(tower):
    return images_for(tower, 40, torch.float64)


@pytest.fixture(scope="module")
def bases(tower, images):
    return rk.fit_bases(tower, images.split(11), kinds=("emb", "head", "mlp"))


def test_against_svd_of_the_units(tower, images, bases):
    """The textbook: one SVD of the centred N x D units of each head."""
    with torch.no_grad():
        units = rk.decompose(tower, images).units()
    for row in bases.layout:
        x = units[:, row.index]
        _, singular, vectors = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        variance = bases.explained_variance(row)
        held = min(len(variance), len(singular))
        expected = singular[:held].square() / (len(images) - 1)
        assert (bases.mean(row) - x.mean(0)).abs().max() < 1e-12
        assert (variance[:held] - expected).abs().max() < 1e-12 * max(1.0, float(expected[0]))
        if row.kind == "head":
            assert len(variance) == 18
            assert expected[17] > 1e-12  # the rank is C+2 and not less ...
            assert singular[18:].max() < 1e-10  # ... and not more
            k = 5
            phi = bases.components(row)[:k]
            assert (phi.T @ phi - vectors[:k].T @ vectors[:k]).abs().max() < 1e-8


def test_float32_keeps_the_small_eigenvalues_far_from_the_origin(tower, images, bases):
    """Sums about a provisional mean: raw float32 sums would lose them."""
    single = build()
    with torch.no_grad():  # move every head far from the origin
        for block in single.transformer.resblocks:
            block.attn.in_proj_bias[96:] += 30.0
    double = build().double()
    double.load_state_dict({k: v.double() for k, v in single.state_dict().items()})
    low = rk.fit_bases(single, images.float().split(11))
    high = rk.fit_bases(double, images.split(11))
    for row in low.layout.select("head"):
        a, b = low.explained_variance(row), high.explained_variance(row)
        assert (a - b).abs().max() < 2e-4 * b[0]
        assert abs(float(a[8] / b[8]) - 1) < 0.02


def test_cores_share_the_factorisations_and_change_nothing(tower, images, monkeypatch):
    """The same bits from one core and from three, one thread of torch each; the number is given back."""
    monkeypatch.setattr(principal, "GROUP_BYTES", 1)  # a unit to a group
    threads = []
    fix_signs = principal._fix_signs
    monkeypatch.setattr(
        principal, "_fix_signs", lambda c: threads.append(torch.get_num_threads()) or fix_signs(c)
    )
    before, found = torch.get_num_threads(), []
    try:
        for cores in (1, 3):
            torch.set_num_threads(1)
            moments = rk.fit_bases(tower, [images]).moments["head"]
            threads.clear()
            torch.set_num_threads(cores)
            found.append(principal.principal(moments))
            assert torch.get_num_threads() == cores
            assert set(threads) == {1}
    finally:
        torch.set_num_threads(before)
    one, three = found
    assert torch.equal(one.components, three.components)
    assert torch.equal(one.variance, three.variance)


def test_batching_does_not_matter(tower, images, bases):
    one = rk.fit_bases(tower, [images], kinds=("head",))
    many = rk.fit_bases(
        tower, [(x, torch.zeros(len(x))) for x in images.split(1)] + [images[:0]], kinds=("head",)
    )
    for row in one.layout.select("head"):
        assert torch.allclose(
            one.explained_variance(row), many.explained_variance(row), rtol=1e-9, atol=1e-14
        )
        assert (one.components(row)[:8] - many.components(row)[:8]).abs().max() < 1e-7


def test_merge_equals_one_fit_on_both(tower, images, bases):
    a = rk.fit_bases(tower, images[:13].split(5), kinds=("emb", "head", "mlp"))
    b = rk.fit_bases(tower, images[13:].split(9), kinds=("emb", "head", "mlp"))
    merged = a.merge(b)
    assert merged.count == 40
    for row in bases.layout:
        assert torch.allclose(merged.mean(row), bases.mean(row), atol=1e-12)
        assert torch.allclose(merged.explained_variance(row), bases.explained_variance(row), atol=1e-12)
    assert not torch.allclose(a.explained_variance((0, 0)), bases.explained_variance((0, 0)), rtol=1e-3)


def test_merging_three_in_any_order(tower, images, bases, tmp_path):
    """Pairs in either order, through files or not: the moments and eigenvalues of one fit, to 1e-10."""
    parts = [rk.fit_bases(tower, x.split(6), kinds=("emb", "head", "mlp")) for x in images.split(14)]
    for index, part in enumerate(parts):
        part.save(tmp_path / str(index), moments=True)
    a, b, c = (rk.SpectralBases.load(tmp_path / str(index)) for index in range(3))
    for merged in (a.merge(b).merge(c), c.merge(a).merge(b), a.merge(b.merge(c)), parts[1].merge(c).merge(a)):
        assert merged.count == 40
        for kind, part in bases.parts.items():
            assert (merged.parts[kind].variance - part.variance).abs().max() < 1e-10 * part.variance.max()
            assert (merged.moments[kind].scatter - bases.moments[kind].scatter).abs().max() < 1e-10


def test_merge_refuses_what_cannot_be_merged(tower, images, bases):
    with pytest.raises(ValueError, match="moments"):
        bases.merge(bases.truncate(energy=0.9))
    with pytest.raises(ValueError, match="different kinds"):
        bases.merge(bases.of("head"))
    with pytest.raises(ValueError, match="two different towers"):
        bases.merge(rk.fit_bases(build(seed=5).double(), [images], kinds=("emb", "head", "mlp")))


def test_truncate(bases):
    for energy in (0.5, 0.9, 0.999):
        kept = bases.truncate(energy=energy)
        for row in bases.layout:
            ratio = bases.explained_variance_ratio(row)
            k = len(kept.components(row))
            assert ratio[:k].sum() > energy or k == len(ratio)
            assert k == 1 or ratio[: k - 1].sum() <= energy
            assert torch.equal(kept.components(row), bases.components(row)[:k])
            assert torch.equal(kept.explained_variance_ratio(row), ratio[:k])
    capped = bases.truncate(energy=0.999, max_components=3)
    assert max(len(capped.components(row)) for row in bases.layout) == 3
    assert len(bases.truncate(max_components=16).components((0, 0))) == 16
    assert torch.equal(
        bases.truncate(energy=0.5).parts["output"].components, bases.parts["output"].components
    )


def test_components_past_the_rank_are_clamped_and_said_once(bases):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        kept = bases.of("head").truncate(components=99)
    assert len(seen) == 1
    assert "components=99 is more than 6 units hold" in str(seen[0].message)
    assert len(kept.components((1, 2))) == 18


def test_constant_unit_keeps_one_component_without_variance():
    tower = build().double()
    with torch.no_grad():
        tower.proj.zero_()
        tower.ln_post.bias.zero_()
    bases = rk.fit_bases(tower, [images_for(tower, 9, torch.float64)])
    assert bases.explained_variance_ratio((0, 1)).abs().max() == 0
    assert len(bases.truncate(energy=0.9).components((0, 1))) == 1


BAD_TRUNCATIONS = [
    ({}, "give energy or components"),
    ({"energy": 0.9, "components": 3}, "give energy or components"),
    ({"energy": 0.0}, r"\(0, 1\]"),
    ({"energy": 1.5}, r"\(0, 1\]"),
    ({"components": 0}, "at least 1"),
    ({"energy": 0.9, "max_components": 0}, "at least 1"),
]


@pytest.mark.parametrize("arguments, message", BAD_TRUNCATIONS)
def test_bad_truncations(bases, arguments, message):
    with pytest.raises(ValueError, match=message):
        bases.truncate(**arguments)


def test_too_few_images(tower, images):
    for batches, count in (([], 0), ([images[:1]], 1)):
        with pytest.raises(ValueError, match=f"at least 2 images .* gave {count}"):
            rk.fit_bases(tower, batches)


def test_nan_is_named_by_its_place_in_the_whole_data(tower, images):
    spoilt = images.clone()
    spoilt[17, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="index 17"):
        rk.fit_bases(tower, spoilt.split(11))


def test_names_of_units(bases):
    assert torch.equal(bases.mean((1, 0)), bases.mean(4))
    assert torch.equal(bases.mean(bases.layout[4]), bases.mean(4))
    with pytest.raises(ValueError, match="hold head"):
        bases.of("head").mean(0)
    with pytest.raises(IndexError, match="outside"):
        bases.mean((5, 0))
    with pytest.raises(ValueError, match="not emb"):
        bases.of("head").of("emb")


def test_file_round_trip(bases, tmp_path):
    path = tmp_path / "bases.safetensors"
    bases.save(path, moments=True, dtype=torch.float64)
    again = rk.SpectralBases.load(path)
    assert (again.checksum, again.count, again.kinds) == (bases.checksum, 40, bases.kinds)
    for row in bases.layout:
        assert torch.equal(again.components(row), bases.components(row))
        assert torch.equal(again.explained_variance_ratio(row), bases.explained_variance_ratio(row))
    assert torch.allclose(again.merge(bases).mean(3), bases.mean(3), atol=1e-14)
    small = bases.of("head").truncate(energy=0.9)
    small.save(path)
    again = rk.SpectralBases.load(path)
    assert (again.components((0, 0)) - small.components((0, 0))).abs().max() < 1e-7  # stored in float32
    with pytest.raises(ValueError, match="no moments to save"):
        small.save(path, moments=True)
    assert [p.name for p in tmp_path.iterdir()] == ["bases.safetensors"]


def test_damaged_files(bases, tmp_path):
    path = tmp_path / "bases.safetensors"
    with pytest.raises(FileNotFoundError, match="no spectral bases file"):
        rk.SpectralBases.load(path)
    bases.save(path)
    whole = path.read_bytes()
    for spoilt, message in (
        (whole[: len(whole) // 2], "truncated"),
        (whole[:-9] + b"\x07" + whole[-8:], "corrupted"),
        (b"not tensors at all", "truncated or not"),
        (b"", "truncated or not"),
    ):
        path.write_bytes(spoilt)
        with pytest.raises(ValueError, match=message):
            rk.SpectralBases.load(path)
    head = rk.ZeroShotHead(torch.ones(32, 2), ("a", "b"))
    head.save(path)
    with pytest.raises(ValueError, match="holds a zero-shot head"):
        rk.SpectralBases.load(path)


def test_the_tower_is_left_bitwise_as_it_was(images):
    tower = build().double()
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    flags = [p.requires_grad for p in tower.parameters()]
    rk.fit_bases(tower, [images])
    assert all(torch.equal(before[name], value) for name, value in tower.state_dict().items())
    assert flags == [p.requires_grad for p in tower.parameters()]
    assert not tower.training


def test_in_inference_mode_several_cores_find_the_same(tower, images, bases):
    """Modes belong to a thread: those that factorise take over their caller's."""
    with torch.inference_mode():
        found = rk.fit_bases(tower, images.split(11), kinds=("emb", "head", "mlp"))
    for kind, part in bases.parts.items():
        assert torch.equal(found.parts[kind].components, part.components)
