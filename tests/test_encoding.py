"""The pass that makes a cache: what stops it, how it goes on, what it refuses, how much memory it takes."""

import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import processes
import pytest
import torch
from PIL import Image
from test_towers import build, images_for
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import residual_kernels as rk
from residual_kernels import cli
from residual_kernels.data.images import ImageFiles
from residual_kernels.units.cache import MANIFEST, kept_images, shards

KINDS = ("emb", "head", "mlp")
SHARD, BATCH = 24, 10  # batches that do not fit shards


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """As the processes that are compared with this one: another number of threads may round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tower():
    return build()


class Noise(Dataset):
    """Random images by number; counts those that are opened."""

    transform = "noise"

    def __init__(self, count: int, name: str | None = "noise", seed: int = 0, size=(16, 24)):
        self.count, self.name, self.seed, self.size = count, name, seed, size
        self.opened = []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.opened.append(index)
        generator = torch.Generator().manual_seed(self.seed + index)
        return torch.randn(3, *self.size, generator=generator), index % 3

    def fingerprint(self):
        return self.name


def loader(count=100, batch=BATCH, **options):
    return DataLoader(Noise(count, **options), batch_size=batch)


def stream(count=100, batch=BATCH, **options):
    """The same batches from something that can only be read in order."""
    return list(loader(count, batch, **options))


def contents(folder):
    """Names and bytes of a folder's files, but for the empty lock that a killed process leaves."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


def stopping(batches, progress):
    """A progress function that interrupts after this many batches."""

    def step(images):
        progress.append(images)
        if len(progress) == batches:
            raise KeyboardInterrupt

    return step


@pytest.fixture(scope="module")
def undisturbed(tower, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "c"
    rk.encode(tower, loader(), folder, KINDS, class_names="abc", shard_images=SHARD)
    files = contents(folder)
    assert list(files) == [MANIFEST, *(f"shard-{index:05d}.safetensors" for index in range(5))]
    return files


def test_a_run_repeats_byte_for_byte(tower, undisturbed, tmp_path):
    """Whatever reads the images; nothing in the files tells when, where or how."""
    options = {"class_names": "abc", "shard_images": SHARD}
    for index, source in enumerate((loader(), DataLoader(Noise(100), BATCH, num_workers=2))):
        rk.encode(tower, source, tmp_path / f"at{index}", KINDS, **options)
        assert contents(tmp_path / f"at{index}") == undisturbed
    rk.encode(tower, iter(stream()), tmp_path / "s", KINDS, preprocessing="'noise'", data="noise", **options)
    assert contents(tmp_path / "s") == undisturbed


@pytest.mark.parametrize("make", [loader, stream])
def test_a_resumed_run_is_an_undisturbed_one(tower, undisturbed, tmp_path, make):
    options = {"class_names": "abc", "shard_images": SHARD, "preprocessing": "'noise'", "data": "noise"}
    pieces = [10, 10, 4, 6, 10, 8, 2, 10, 10, 2, 8, 10, 6, 4]  # batches of 10, cut at multiples of 24
    for stop in (1, 3, 4, 9, 12, 14):
        folder, seen = tmp_path / str(stop), []
        with pytest.raises(KeyboardInterrupt):
            rk.encode(tower, make(), folder, KINDS, progress=stopping(stop, seen), **options)
        assert seen == pieces[:stop]
        finished = sum(seen) // SHARD
        assert folder.exists() == (finished > 0)
        if finished:
            with pytest.raises(FileNotFoundError, match="not finished; encode into the same folder again"):
                rk.UnitCache.load(folder)
            assert kept_images(folder) == finished * SHARD
        whole, seen = make(), []
        cache = rk.encode(tower, whole, folder, KINDS, progress=seen.append, **options)
        assert contents(folder) == undisturbed
        assert len(cache) == sum(seen) == 100
        if finished:
            assert seen[0] == finished * SHARD
        if finished and make is loader:
            assert whole.dataset.opened[:finished] == [shard * SHARD for shard in range(finished)]
            assert whole.dataset.opened[finished:] == list(range(finished * SHARD, 100))


def test_damaged_and_foreign_shards_are_made_again(tower, undisturbed, tmp_path):
    """On the way and in a finished cache: only what is wrong is made."""
    folder = tmp_path / "c"
    shard = [folder / f"shard-{index:05d}.safetensors" for index in range(5)]
    options = {"class_names": "abc", "shard_images": SHARD}
    rk.encode(tower, loader(), folder, KINDS, **options)
    for complete in (True, False):
        if not complete:
            shutil.rmtree(folder)
            with pytest.raises(KeyboardInterrupt):
                rk.encode(tower, loader(), folder, KINDS, progress=stopping(12, []), **options)
        shard[0].write_bytes(shard[0].read_bytes()[:-9])
        shutil.copy(shard[2], shard[1])
        (folder / ".shard-00003.safetensors.0123abcd.part").write_text("of a process that was killed")
        whole = loader()
        rk.encode(tower, whole, folder, KINDS, **options)
        assert contents(folder) == undisturbed
        made = [index for index in whole.dataset.opened if index not in (0, 2 * SHARD, 3 * SHARD, 4 * SHARD)]
        assert set(made) >= set(range(1, 2 * SHARD))
        if complete:
            assert set(made) == set(range(1, 2 * SHARD))


def test_a_finished_cache_is_returned_where_it_is_known_to_be_the_same(tower, undisturbed, tmp_path):
    folder = tmp_path / "c"
    rk.encode(tower, loader(), folder, KINDS, class_names="abc", shard_images=SHARD)
    again = loader()
    cache = rk.encode(tower, again, folder, KINDS, class_names="abc")
    assert len(cache) == 100
    assert again.dataset.opened == [0]
    assert contents(folder) == undisturbed
    with pytest.raises(FileExistsError, match="not empty: it holds a finished cache, and nothing says"):
        rk.encode(tower, loader(name=None), folder, KINDS, class_names="abc")
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors was made from another image 0"):
        rk.encode(tower, loader(seed=1), folder, KINDS, class_names="abc")


@pytest.mark.parametrize("finished", [False, True])
def test_another_run_is_refused_and_both_are_named(tower, tmp_path, finished):
    folder = tmp_path / "c"
    first = {"kinds": ("head",), "class_names": "abc", "shard_images": SHARD}
    if finished:
        rk.encode(tower, loader(), folder, **first)
    else:
        with pytest.raises(KeyboardInterrupt):
            rk.encode(tower, loader(), folder, progress=stopping(4, []), **first)
    files = contents(folder)
    other = build(seed=4)
    checksums = [rk.towers.checksum(one)[:12] for one in (tower, other)]
    doubles = [(images.double(), labels) for images, labels in loader()]
    cases = [
        (other, loader(), {}, f"other weights .*{checksums[0]}.*{checksums[1]}"),
        (build().double(), doubles, {}, "numbers of the tower .float32 there, float64 here"),
        (tower, loader(), {"preprocessing": "larger"}, "other preprocessing .'noise' there, larger here"),
        (tower, loader(name="sound"), {}, "other data .noise there, sound here"),
        (tower, loader(), {"kinds": ("head", "mlp")}, "kinds of units .head there, head, mlp here"),
        (tower, loader(), {"dtype": torch.bfloat16}, "other dtype .float32 there, bfloat16 here"),
        (tower, loader(), {"class_names": "abd"}, "other classes .a, b, c there, a, b, d here"),
        (tower, loader(), {"shard_images": 7}, "images in a shard .24 there, 7 here"),
    ]
    for its_tower, source, options, message in cases:
        with pytest.raises(ValueError, match=message):
            rk.encode(its_tower, source, folder, **(first | options))
        assert contents(folder) == files


@pytest.mark.parametrize("make", [loader, stream])
def test_changed_data_without_a_description_are_found_too(tower, tmp_path, make):
    folder = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        rk.encode(tower, make(name=None), folder, shard_images=SHARD, progress=stopping(6, []))
    cases = [(make(name=None, seed=1), r"shard-00000\.safetensors was made from another image 0")]
    cases += [(make(30, name=None), r"shard-00001\.safetensors holds 24 images where the data now have 6")]
    for source, message in cases:
        with pytest.raises(ValueError, match=message):
            rk.encode(tower, source, folder, shard_images=SHARD)
    assert len(rk.encode(tower, make(50, name=None), folder, shard_images=SHARD)) == 50


def test_a_changed_image_folder_is_refused(tmp_path):
    model, preprocess, _ = rk.load_bundled()
    root = tmp_path / "images"
    for index in range(6):
        path = root / ("cat", "dog")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (40 * index, 0, 0)).save(path)

    def run(**options):
        images = ImageFiles(root, preprocess)
        source = DataLoader(images, batch_size=2)
        return rk.encode(
            model.visual, source, tmp_path / "c", class_names=images.class_names, shard_images=2, **options
        )

    with pytest.raises(KeyboardInterrupt):
        run(progress=stopping(2, []))
    Image.new("RGB", (8, 9), (1, 2, 3)).save(root / "dog" / "6.png")
    with pytest.raises(ValueError, match=r"other data \(6 images .* there, 7 images .* here\)"):
        run()
    (root / "dog" / "6.png").unlink()
    before = (root / "cat" / "0.png").read_bytes()
    Image.effect_noise((8, 8), 50).convert("RGB").save(root / "cat" / "0.png")
    with pytest.raises(ValueError, match="other data"):
        run()
    (root / "cat" / "0.png").write_bytes(before)
    assert len(run()) == 6
    assert len(run()) == 6  # and once more, from the finished cache


def test_what_the_loader_may_not_give(tower, tmp_path):
    """Everything is refused in one sentence, and leaves nothing behind."""
    folder = tmp_path / "c"
    images, labels = images_for(tower, 60), torch.arange(60) % 3
    nan = images.clone()
    nan[33] = float("nan")
    huge = images.clone()
    huge[33] = 1e30

    def interrupted():
        yield images[:20], labels[:20]
        raise KeyboardInterrupt

    divided = DataLoader(Noise(9), sampler=DistributedSampler(Noise(9), 2, 0))
    cases = [
        ([(nan[:30], labels[:30]), (nan[30:], labels[30:])], {}, ValueError, "index 33"),
        ([(huge, labels)], {}, ValueError, "the tower gives NaN or Inf as .* of image 33"),
        ([], {}, ValueError, "no images"),
        ([(images[:0], labels[:0])], {}, ValueError, "no images"),
        (DataLoader(Noise(0)), {}, ValueError, "no images"),
        (DataLoader(Noise(9), batch_size=10, drop_last=True), {}, ValueError, "no images"),
        ([(images, labels[:-1])], {}, ValueError, "60 images but labels"),
        ([(images, labels - 1)], {}, ValueError, "from -1 to 1"),
        ([(images, labels)], {"class_names": "ab"}, ValueError, "there are 2 classes"),
        ([(images, labels), images], {}, ValueError, "for all or for none"),
        ([{"image": images}], {}, ValueError, "under 'pixel_values'; got image"),
        ([(images, labels)], {"dtype": torch.int64}, ValueError, "dtype must be"),
        ([(images, labels)], {"shard_images": 0}, ValueError, "at least one image"),
        (interrupted(), {}, KeyboardInterrupt, "^$"),
        (DataLoader(Noise(9), shuffle=True), {}, ValueError, "the loader shuffles"),
        (divided, {}, ValueError, "DistributedSampler gives this process a part"),
    ]
    for source, options, error, message in cases:
        with pytest.raises(error, match=message):
            rk.encode(tower, source, folder, **options)
        assert not folder.exists()
    wide = build()
    wide.transformer.resblocks[0].attn.in_proj_weight.data[96:] *= 1e5  # values, and so z
    with pytest.raises(ValueError, match=r"Inf as z\.head of image 0 in torch\.float16; .*bfloat16"):
        rk.encode(wide, [images], folder, dtype=torch.float16)
    assert not folder.exists()
    rk.encode(wide, [images], folder, dtype=torch.bfloat16)
    assert len(rk.encode(tower, DataLoader(Noise(9), shuffle=True))) == 9  # in memory any order will do


def test_other_files_are_left_alone(tower, tmp_path):
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="not empty and holds no cache .mine.txt"):
        rk.encode(tower, loader(), folder)
    assert contents(folder) == {"mine.txt": b"keep"}
    with pytest.raises(FileExistsError, match="is a file"):
        rk.encode(tower, loader(), folder / "mine.txt")


def test_an_interrupt_at_the_very_end_loses_nothing(tower, undisturbed, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    options = {"class_names": "abc", "shard_images": SHARD}
    with monkeypatch.context() as patched:
        patched.setattr("residual_kernels.units.cache.resume.write_json", stop)
        with pytest.raises(KeyboardInterrupt):
            rk.encode(tower, loader(), tmp_path / "c", KINDS, **options)
    whole = loader()
    rk.encode(tower, whole, tmp_path / "c", KINDS, **options)
    assert whole.dataset.opened == [0, 24, 48, 72, 96]
    assert contents(tmp_path / "c") == undisturbed


# the command line


def test_the_command_goes_on_where_it_was_stopped(tmp_path, capsys, monkeypatch):
    model, preprocess, _ = rk.load_bundled()
    for index in range(20):
        path = tmp_path / "images" / ("cat", "dog")[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), 5.0 * index).save(path)
    folder = tmp_path / "c"

    def command(*more):
        arguments = ["--data", tmp_path / "images", "--out", folder, "--batch-size", 4, "--shard-images", 8]
        monkeypatch.setattr(sys, "argv", ["residual-kernels", "encode", *map(str, (*arguments, *more))])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        seen = capsys.readouterr()
        return stop.value.code or 0, seen.out, " ".join(seen.err.split())

    images = ImageFiles(tmp_path / "images", preprocess)
    with pytest.raises(KeyboardInterrupt):
        rk.encode(
            model.visual,
            DataLoader(images, batch_size=4),
            folder,
            class_names=images.class_names,
            shard_images=8,
            progress=stopping(3, []),
        )
    code, _, err = command("--dtype", "bfloat16")
    assert code == 2
    assert "holds a cache of other dtype (float32 there, bfloat16 here)" in err
    code, out, err = command()
    assert code == 0, err
    assert "20 images of 2 classes" in out
    assert "holds about 8 images of an interrupted run; going on from there" in err
    files = contents(folder)
    assert command()[0] == 0  # finished: nothing is left to do
    assert contents(folder) == files
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "cat" / "new.png")
    code, _, err = command()
    assert code == 2
    assert "other data (20 images" in err


# memory


def _deep():
    """A tower of little work and many units: 12 KB of z an image."""
    return build(embed_dim=16, layers=24, width=64, mlp_ratio=0.5, patch_size=16, image_size=16)


def _peak(folder, count, report):
    """How far the peak rises over what the process has at its start,
    for encode and for passes over the cache."""
    shards.MAPPED_BYTES = 2**22
    source = DataLoader(Noise(count, size=(16, 16)), batch_size=100)
    rk.encode(_deep(), stream(100, 100, size=(16, 16)), kinds=KINDS)  # what torch takes once
    peaks = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]
    cache = rk.encode(_deep(), source, folder, KINDS, shard_images=100)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    cache = rk.UnitCache.load(folder)
    for batch in cache.batches(100):
        batch.z["head"].sum()
    for rows in torch.randperm(count).split(100):
        cache.terms(rows)
    for batch in cache.subset(torch.arange(0, count, 2)).batches(100):
        batch.z["mlp"].sum()
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    report.write_text(f"{(peaks[1] - peaks[0]) * 1024} {(peaks[2] - peaks[1]) * 1024} {cache.nbytes}")


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_memory_does_not_grow_with_the_images(tmp_path):
    """Neither in encode nor in passes over its cache: in order, shuffled, and of a subset."""
    seen = []
    for count in (1000, 4000):
        report = tmp_path / f"{count}.txt"
        assert processes.exit_codes([processes.start(_peak, tmp_path / f"{count}", count, report)]) == [0]
        seen.append([int(number) for number in report.read_text().split()])
    (small_encode, small_pass, small_bytes), (large_encode, large_pass, large_bytes) = seen
    more = large_bytes - small_bytes
    assert more > 35e6
    assert large_encode - small_encode < more / 5
    assert large_pass - small_pass < more / 5


# processes


def _encode(folder, pause=0.0):
    rk.encode(
        build(),
        loader(),
        folder,
        KINDS,
        class_names="abc",
        shard_images=SHARD,
        progress=lambda _: time.sleep(pause),
    )


def test_killed_at_twenty_random_moments(undisturbed, tmp_path):
    """No finished shard is lost or made again, and in the end every file is that of an undisturbed run."""
    chance = random.Random(0)
    folder, kills = tmp_path / "c", 0
    for _ in range(2):  # the first also waits for the server that forks
        start = time.monotonic()
        assert processes.exit_codes([processes.start(_encode, tmp_path / "timed", 0.01)]) == [0]
        whole = time.monotonic() - start
        shutil.rmtree(tmp_path / "timed")
    while kills < 20:
        before = {path: path.stat() for path in folder.glob("shard-*")}
        process = processes.start(_encode, folder, 0.01)
        process.join(chance.uniform(0, 1.1 * whole))
        process.kill()
        process.join()
        for path, stat in before.items():
            assert (path.stat().st_ino, path.stat().st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
        if process.exitcode == 0:
            assert contents(folder) == undisturbed
            shutil.rmtree(folder)
        else:
            assert process.exitcode == -9
            kills += 1
    rk.encode(build(), loader(), folder, KINDS, class_names="abc", shard_images=SHARD)
    assert contents(folder) == undisturbed


def test_a_second_process_is_refused_until_the_first_is_dead(tower, undisturbed, tmp_path):
    folder = tmp_path / "c"
    first = processes.start(_encode, folder, 5.0)
    deadline = time.monotonic() + 60
    while not (folder / MANIFEST).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(BlockingIOError, match="another process is encoding into .*name another folder"):
        rk.encode(tower, loader(), folder, KINDS, class_names="abc", shard_images=SHARD)
    first.kill()
    first.join()
    rk.encode(tower, loader(), folder, KINDS, class_names="abc", shard_images=SHARD)
    assert contents(folder) == undisturbed


def _refused(folder, message):
    with pytest.raises(OSError, match=message) as caught:
        _encode(folder)
    assert len(str(caught.value).splitlines()) == 1


def _with_small_files(folder):
    """The system refuses what goes past a size, as a quota does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    _refused(folder, r"cannot write .*shard-00000\.safetensors: .*[Ff]ile too large")
    assert not folder.exists()


def _as_nobody(folder):
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    _refused(folder, "cannot write to .*: Permission denied")
    _refused(folder / "deeper", "cannot write to .*: Permission denied")


def test_a_folder_that_cannot_be_written_to():
    place = Path(tempfile.mkdtemp())
    try:
        place.chmod(0o755)  # nobody must get as far as the folder
        folder = place / "locked"
        folder.mkdir(mode=0o555)
        assert processes.exit_codes([processes.start(_as_nobody, folder)]) == [0]
        assert not list(folder.iterdir())
    finally:
        shutil.rmtree(place)


def test_a_file_that_grows_too_large(tmp_path):
    assert processes.exit_codes([processes.start(_with_small_files, tmp_path / "c")]) == [0]


def test_a_full_disk(tower, undisturbed, tmp_path):
    """A file system of 256 KiB that holds three shards: the rest is encoded when there is room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(160_000))
        with pytest.raises(
            OSError, match=r"cannot write .*shard-0000\d\.safetensors: .*[Nn]o space left"
        ) as caught:
            rk.encode(tower, loader(), disk / "c", KINDS, class_names="abc", shard_images=SHARD)
        assert len(str(caught.value).splitlines()) == 1
        left = contents(disk / "c")
        kept = [name for name in left if name.startswith("shard-")]
        assert 0 < len(kept) < 5
        assert all(left[name] == undisturbed[name] for name in kept)
        assert not list((disk / "c").glob(".*.part"))
        ballast.unlink()
        rk.encode(tower, loader(), disk / "c", KINDS, class_names="abc", shard_images=SHARD)
        assert contents(disk / "c") == undisturbed
    finally:
        subprocess.run(["umount", disk], check=True)
