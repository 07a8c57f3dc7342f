"""Files that were damaged, or made to harm: one clear ValueError, and never a wrong answer.

The variable DAMAGED_FILES says how many are tried, 300 by default: ``DAMAGED_FILES=1200 pytest tests/test_damaged.py``.
"""

import copy
import json
import os
import random
import shutil
import struct

import pytest
import torch
from test_towers import build, images_for

import residual_kernels as rk
from residual_kernels import files, schema
from residual_kernels.analysis import overview
from residual_kernels.train import checkpoints

TRIED = int(os.environ.get("DAMAGED_FILES", 300))
NASTY = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**400, 0.5, float("nan"), float("inf"), "", "x",
    "../x", "/etc/passwd", "\x1b[2J", "\ud800", "a" * 5000, [], [[]], {}, {"a": 1}, [1, "a"], {"schema": 1}, [None] * 3,
]  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with a file of every kind, and how each is read: name -> (files, read)."""
    root, tower = tmp_path_factory.mktemp("good"), build()
    images, labels = images_for(tower, 12), torch.arange(12) % 2
    bases = rk.fit_bases(tower, [images])
    head = rk.ZeroShotHead(torch.randn(bases.dim, 2), ["a", "b"], 1.5)
    adapter = rk.ResiDual(tower, bases.truncate(components=3), init="normal")
    rk.save_adapter(adapter, root / "adapter", head=head, class_names=["a", "b"])
    bases.save(root / "bases.safetensors", moments=True)
    rk.save_adapter(adapter, root / "reference", bases=root / "bases.safetensors")
    batches = [(images[start : start + 4], labels[start : start + 4]) for start in range(0, 12, 4)]
    cache = rk.encode(tower, batches, root / "cache", class_names="ab", shard_images=4)
    head.save(root / "head.safetensors")
    table = overview.analyze(tower, cache, head, bases, None, points=3, seeds=range(1))
    table.save(root / "analysis")
    identity = {"a": 1}
    task = {
        "best_epoch": 1,
        "best_score": 0.5,
        "stopped": False,
        "diverged": False,
        "history": [[0, None, 1.0]],
    }
    state = {"epoch": 1, "active": [0], "groups": [{"lr": 0.1}], "tasks": [task], "seconds": 1.0}
    checkpoints.save(root / "fit.safetensors", identity, state, {"0.best": torch.ones(1, 3)})

    def read_adapter(place):
        fresh = build()
        flags = [p.requires_grad for p in fresh.parameters()]
        try:
            kept = rk.AdapterFolder.open(place)
            found = kept.adapter(fresh)
        except ValueError:
            assert flags == [p.requires_grad for p in fresh.parameters()]
            raise
        return {
            "weight": found.weight.detach(), "classes": kept.class_names,
            "head": kept.head and kept.head.class_vectors,
        }  # fmt: skip

    def read_cache(place):
        found = rk.UnitCache.load(place)
        return {"ids": found.ids, "labels": found.labels, "names": found.class_names, "z": found.z["head"],
                "output": found.output, "checksum": found.checksum}  # fmt: skip

    def read_bases(place):
        found = rk.SpectralBases.load(place)
        return {
            "fingerprint": found.fingerprint(),
            "count": found.count,
            "moments": found.moments["head"].scatter,
        }

    def read_head(place):
        found = rk.ZeroShotHead.load(place)
        return {"vectors": found.class_vectors, "names": found.class_names}

    def read_analysis(place):
        return {"images": overview.Analysis.load(place).images}

    def read_checkpoint(place):
        found = checkpoints.load(place, identity)
        return {"weights": found[1].get("0.best"), "state": json.dumps(found[0])}

    readers = {
        "adapter": read_adapter, "reference": read_adapter, "cache": read_cache, "bases.safetensors": read_bases,
        "head.safetensors": read_head, "analysis": read_analysis, "fit.safetensors": read_checkpoint,
    }  # fmt: skip
    return root, readers


def nodes(value, path=()):
    """Where every value of a JSON text stands."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield from nodes(one, (*path, key))


def changed(value, rng):
    """A JSON value with one thing in it removed, added, exchanged or wrapped."""
    value = copy.deepcopy(value)
    path = rng.choice(list(nodes(value)))
    if not path:
        return rng.choice([*NASTY, [value]])
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    what = rng.randrange(5)
    if what == 0:
        del holder[path[-1]]
    elif what == 1 and isinstance(holder, list):
        holder.insert(path[-1], copy.deepcopy(rng.choice([*NASTY, holder[path[-1]]])))
    elif what == 2:
        deep = []
        for _ in range(rng.choice([3, 40, 500])):
            deep = [deep]
        holder[path[-1]] = deep
    elif what == 3 and type(holder[path[-1]]) is int:
        holder[path[-1]] += rng.choice([-1, 1, 10**6])
    else:
        holder[path[-1]] = copy.deepcopy(rng.choice(NASTY))
    return value


def damaged_bytes(data, rng):
    """Bytes with some flipped, cut off, repeated or filled in."""
    data, at = bytearray(data), rng.randrange(len(data))
    what = rng.randrange(6)
    if what == 0:
        return bytes(data[:at])
    if what == 1:
        data[at] ^= 1 << rng.randrange(8)
    elif what == 2:
        data[at : at + rng.randrange(1, 64)] = bytes(rng.randrange(1, 64))
    elif what == 3:
        data[at:at] = data[at : at + rng.randrange(1, 64)]
    elif what == 4:
        data[:8] = struct.pack("<Q", rng.choice([0, 1, len(data), 2**31, 2**63, 2**64 - 1]))
    else:
        return bytes(data) + bytes(rng.randrange(1, 99))
    return bytes(data)


def damaged_header(data, rng):
    """A safetensors file whose header, or our header in it, has something exchanged; half the time with a right
    checksum, as one who means harm would write it."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if rng.random() < 0.3:
        header = changed(header, rng)
    else:
        ours = changed(json.loads(header["__metadata__"][files.METADATA]), rng)
        header["__metadata__"][files.METADATA] = json.dumps(ours)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def forged(path, rng):
    """Our own writer's file of exchanged tensors or header: its checksum is right."""
    what = json.loads(json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
                      ["__metadata__"][files.METADATA])["what"]  # fmt: skip
    tensors, header = files.map_tensors(path, what)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    rest = {key: value for key, value in header.items() if key not in ("schema", "what", "sha256")}
    name = rng.choice(sorted(tensors))
    change = rng.randrange(6)
    if change == 0:
        del tensors[name]
    elif change == 1:
        tensors[name] = tensors[name][:-1] if tensors[name].ndim else tensors[name][None]
    elif change == 2:
        tensors[name] = tensors[name].to(rng.choice([torch.int8, torch.float16, torch.bool]))
    elif change == 3:
        tensors[name] = torch.zeros(0, 2**40)
    elif change == 4:
        tensors[f"{name}.more"] = tensors[name]
    elif rest:
        found = changed(rest, rng)
        rest = found if isinstance(found, dict) else {}
    files.save_tensors(path, tensors, what, {str(key): value for key, value in rest.items()})


def same(a, b):
    return all(
        torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key] for key in a
    )


def test_damaged_files(good, tmp_path):
    root, readers = good
    rng = random.Random(5)
    wanted = {name: read(root / name) for name, read in readers.items()}
    faults, refused, kinds = [], 0, {}
    for number in range(TRIED):
        name = rng.choice(sorted(readers))
        place = tmp_path / "place"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if (root / name).is_dir():
            shutil.copytree(root / name, place / name)
        else:
            shutil.copy(root / name, place / name)
        if name == "reference":
            shutil.copy(root / "bases.safetensors", place)
        target = place / name
        if target.is_dir():
            target = rng.choice(sorted(path for path in target.iterdir() if path.suffix != ".csv"))
        kind = rng.randrange(3)
        before = target.read_bytes()
        if target.suffix == ".json":
            value = changed(json.loads(before), rng) if kind else None
            text = damaged_bytes(before, rng) if value is None else json.dumps(value).encode()
            target.write_bytes(text)
        elif kind == 0:
            target.write_bytes(damaged_bytes(before, rng))
        elif kind == 1:
            target.write_bytes(damaged_header(before, rng))
        else:
            forged(target, rng)
        what = f"{number}: {target.relative_to(place)}, {'structure' if kind else 'bytes'}"
        kinds[target.suffix] = kinds.get(target.suffix, 0) + 1
        if target.read_bytes() == before:
            continue
        try:
            found = readers[name](place / name)
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            if (
                "\n" in str(error)
                or len(str(error)) > 1500
                or type(error) not in (ValueError, FileNotFoundError)
            ):
                faults.append(f"{what}: {error!r:.300}")
        except Exception as error:  # what this test is there to find
            faults.append(f"{what}: {type(error).__name__}: {error!s:.200}")
        else:
            harmless = target.suffix == ".safetensors" and kind == 2 and target.parent.name == "place"
            if name != "analysis" and not harmless and not same(wanted[name], found):
                faults.append(f"{what}: accepted, and other numbers came out")
    assert not faults, f"{len(faults)} of {TRIED}:\n" + "\n".join(faults[:40])
    assert refused > TRIED * 0.7
    assert min(kinds.values()) > TRIED * 0.2


def test_forms(tmp_path):
    """The reader of JSON itself: what it takes, and how it says what is wrong."""
    form = schema.Count | None
    assert schema.typed(3, form, "f") == 3
    assert schema.typed(None, form, "f") is None
    for value in (-1, True, 1.0, "1", 2**63, [1]):
        with pytest.raises(ValueError, match=r"^f: the whole must be .*whole number"):
            schema.typed(value, form, "f")
    assert schema.typed({"a": [1, 2.5]}, dict[str, tuple[float, ...]], "f") == {"a": (1, 2.5)}
    with pytest.raises(ValueError, match=r"f: a\[1\] must be a finite number, not 'x'"):
        schema.typed({"a": [1, "x"]}, dict[str, list[float]], "f")
    for text in (
        "[" * 100_000,
        "[" * 40 + "]" * 40,
        "1" * 5000,
        "{",
        '{"a": 1',
        "\xff".encode("latin-1"),
        "",
        '{"a": 1, "a": 2}',
        '{"b": {"a": 1, "b": 1, "a": 1}}',
        "9" * 10_000,
    ):
        with pytest.raises(ValueError, match="^here: "):
            schema.parse(text, "here")
    for value in (float("nan"), float("inf"), -float("inf"), 10**400, json.loads("1e999")):
        with pytest.raises(ValueError, match="f: the whole must be a finite number"):
            schema.typed(value, float, "f")
    assert schema.typed(float("-inf"), schema.Measured, "f") == float("-inf")  # a loss that diverged
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="a device or a pipe"):
        schema.read_bytes(tmp_path / "pipe", 10)
    (tmp_path / "long").write_bytes(bytes(11))
    with pytest.raises(ValueError, match="more than 10 bytes"):
        schema.read_bytes(tmp_path / "long", 10)


def test_what_a_manifest_must_not_say(good, tmp_path):
    """Rows that are missing, columns that are missing, files elsewhere: never fewer images in silence."""
    root, _ = good
    manifest = json.loads((root / "cache" / "manifest.json").read_text())

    def case(change, message):
        place = tmp_path / "cache"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(root / "cache", place)
        held = copy.deepcopy(manifest)
        change(held)
        (place / "manifest.json").write_text(json.dumps(held))
        for verify in ("full", "size"):
            with pytest.raises(ValueError, match=message):
                rk.UnitCache.load(place, verify=verify)

    case(lambda m: m["shards"].pop(), "counts 12 images, and its shards 8")
    case(lambda m: (m["shards"].pop(), m.update(images=8)), "which its manifest does not name")
    case(lambda m: m["run"]["columns"].pop("labels"), "do not hold the same columns|not the shard")
    case(
        lambda m: m["shards"][0].update(file="../cache/shard-00000.safetensors"),
        "where shard-00000.safetensors belongs",
    )
    case(lambda m: m["shards"].reverse(), "belongs")
    case(lambda m: m["run"].update(class_names=["a"]), "not the shard")
    case(lambda m: m["run"].update(shard_images=10**12), "a shard does not hold")
    case(lambda m: m["run"]["columns"]["output"].update(shape=[2**50]), "cannot be")


def test_names_are_shown_harmless(tmp_path, capsys):
    from residual_kernels.cli.printing import _Plain

    for stderr in (False, True):
        console = _Plain(stderr=stderr, markup=False, width=200)
        from rich.table import Table

        table = Table("\x1b]0;owned\x07", "b")
        table.add_row("\x1b[2Jx", "\u202egnp.exe [bold]")
        console.print("a \x1b[31mred\x1b[0m name", table)
        with console.status("working on \x1b[2J [red]x"):
            pass
    shown = capsys.readouterr()
    for text in shown:
        assert "\x1b[2J" not in text
        assert "\x1b[31m" not in text
        assert "\x07" not in text
        assert "\u202e" not in text
        assert "\\x1b[31mred" in text
        assert "[bold]" in text
    files.write_csv(tmp_path / "t.csv", [["=cmd()", "+1", "-2.5e3", "@x", "-a", " =b", "plain", 3, "\ud800"]])
    text = (tmp_path / "t.csv").read_text()
    assert text == "'=cmd(),+1,-2.5e3,'@x,'-a,' =b,plain,3,\\ud800\n"
