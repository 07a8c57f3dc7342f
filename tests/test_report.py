"""The report: its numbers are those of evaluate, nothing comes from outside,
and nothing in a name becomes markup."""

import base64
import csv
import hashlib
import json
import math
import re
import shlex
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.main import get_command

import residual_kernels as rk
from residual_kernels import cli
from residual_kernels.adapters.methods import identity
from residual_kernels.analysis import TextDictionary
from residual_kernels.analysis.ends import words_for_ends
from residual_kernels.analysis.words import bundled_phrases
from residual_kernels.cli import printing
from residual_kernels.data.images.dataset import Images
from residual_kernels.demo.story import DIGITS, digit_images
from residual_kernels.figures import style
from residual_kernels.report import charts, gather, page, sentences, tables, write_report
from residual_kernels.report.facts import CLASSES_SHOWN, Source
from residual_kernels.report.thumbnails import thumbnails
from residual_kernels.train import Evaluation

# the class that is named like a script is longer than the bundled model's context
pytestmark = pytest.mark.filterwarnings("ignore:the prompt")

SCRIPT = "<script>document.title='owned'</script>"
HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    SCRIPT,
    "a$b$c %{x} {{ 7 * 7 }}",
    '<b>bold</b> & "quoted"',
)
NAMES = (*HOSTILE, *DIGITS[4:])
PER_CLASS = 12


class Pictures(Images):
    """Images in memory, with names that would be trouble as markup."""

    class_names = NAMES

    def __init__(self, pictures, labels, preprocess):
        self.pictures, self.labels, self.preprocess = pictures, labels, preprocess
        self.names = [f"{index}<i onmouseover=alert(2)>.png" for index in range(len(pictures))]

    def _open(self, index):
        return self.pictures[index]


class World:
    """The bundled model, a few digits of every class under hostile names, and what a fit leaves."""

    def __init__(self):
        self.model, preprocess, self.tokenizer = rk.load_bundled()
        pictures, labels = digit_images()
        rows = torch.cat([(labels == k).nonzero().flatten()[:PER_CLASS] for k in range(10)])
        self.pictures = Pictures([pictures[i] for i in rows.tolist()], labels[rows], preprocess)
        images = torch.stack([preprocess(picture) for picture in self.pictures.pictures])
        self.tower = self.model.visual
        self.cache = rk.encode(self.tower, [(images, labels[rows])], kinds=("head", "mlp"), class_names=NAMES)
        text = rk.ZeroShotHead.from_text(self.model, self.tokenizer, DIGITS, ["the number {}"])
        self.head = rk.ZeroShotHead(text.class_vectors, NAMES, float(text.logit_scale))
        self.source = Source("bundled", f"photos/{SCRIPT}", "run")


@pytest.fixture(scope="module")
def world():
    return World()


def made_of(world):
    """The report's dictionary: what the bundled model's captions know,
    and a word that must not become code."""
    return TextDictionary.from_words(world.model, world.tokenizer, [*bundled_phrases(), SCRIPT])


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    """(facts, the page's path, files beside it, the adapter) of a ResiDual on heads and MLPs."""
    bases = rk.fit_bases(world.tower, world.cache, ("head", "mlp")).truncate(components=6)
    residual = rk.ResiDual(world.tower, bases, "sum", init="normal")
    dictionary = made_of(world)
    facts = gather(residual, world.head, world.cache, world.source, dictionary=dictionary)
    path = tmp_path_factory.mktemp("report") / "report.html"
    where, files = write_report(facts, path, world.cache, world.pictures)
    assert where == path
    return facts, path, files, residual


def outcome(confusion):
    return Evaluation.of(confusion.long(), 0.0)


def svgs(facts):
    return {name: charts.inline(figure, name) for name, figure in charts.on_page(facts).items()}


class Page(HTMLParser):
    """What a browser would find: tags, addresses, text, and scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text, self.scripts, self.handlers = [], [], [], [], []
        self._script = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "action", "srcset")]
        self.handlers += [name for name, _ in attributes if name.startswith("on")]
        self._script = attributes if tag == "script" else None

    def handle_endtag(self, tag):
        self._script = None

    def handle_data(self, data):
        if self._script is None:
            self.text.append(data)
        elif self.scripts and self.scripts[-1][0] is self._script:
            self.scripts[-1] = (self._script, self.scripts[-1][1] + data)
        else:
            self.scripts.append((self._script, data))


@pytest.fixture(scope="module")
def html(made):
    return made[1].read_text(encoding="utf-8")


def data_of(html):
    (found,) = re.findall(r'<script type="application/json" id="facts">(.*?)</script>', html, flags=re.DOTALL)
    return json.loads(found, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_the_numbers_are_those_of_evaluate(world, made):
    facts, _, _, residual = made
    before, after = (
        rk.evaluate(adapter, world.head, world.cache) for adapter in (identity(world.tower), residual)
    )
    assert facts.before.accuracy == pytest.approx(before.accuracy)
    assert facts.after.accuracy == pytest.approx(after.accuracy)
    assert torch.equal(facts.after.class_accuracy, after.class_accuracy)
    assert facts.mended - facts.broken == round(120 * (after.accuracy - before.accuracy))
    assert facts.before.accuracy != facts.after.accuracy
    assert facts.counts.tolist() == [PER_CLASS] * 10
    assert facts.learned == residual.weight.numel()
    assert set(facts.unit_weight) == set(facts.unit_lost) == set(range(1, 55))
    assert facts.similarity.shape == (48, 48)
    assert len(facts.ends.indices) == len(set(facts.ends.indices)) == len(facts.words)
    assert max(len(side) for words in facts.words.values() for side in words) <= 3
    shown = words_for_ends(
        residual, world.cache, made_of(world), [facts.reading[j] for j in facts.ends.indices]
    )
    assert facts.words == {j: tuple(tuple(w for w, _ in end) for end in both) for j, both in shown.items()}
    assert any(side for words in facts.words.values() for side in words)


def test_the_page_needs_nothing_from_outside(html):
    found = Page(html)
    assert all(link.startswith(("data:", "#")) for link in found.links)
    assert not {"link", "iframe", "object", "embed", "base", "form"} & set(found.tags)
    assert not re.findall(r"@import|url\((?!#)", html[: html.index("</style>")])
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    assert policy.startswith("default-src &#39;none&#39;")
    for attributes, text in found.scripts:
        if not attributes:
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert f"sha256-{digest}" in policy.replace("&#43;", "+")


def test_names_never_become_markup(html):
    found = Page(html)
    assert len(found.scripts) == 2
    assert not found.handlers
    assert not {"img", "i", "b"} & set(found.tags)
    assert SCRIPT not in html
    assert HOSTILE[0] not in html
    text = "".join(found.text)
    for name in NAMES:
        assert name in text  # as text, whole
    data = data_of(html)
    labels = {label for _, label in data["images"].values()}
    assert labels <= set(NAMES)


def test_the_page_holds_what_its_script_draws(made, html):
    facts, _, _, residual = made
    data = data_of(html)
    shown = re.findall(r'data-chart="([^"]*)"[^>]*><svg', html)
    assert shown == [
        "classes",
        "confusion-without",
        "confusion-with",
        "spectra",
        "dimension",
        "similarity",
        "selection",
    ]
    ids = re.findall(r'<[^>]*\bid="([^"]*)"', html)
    used = re.findall(r'<[^>]*(?:href="#|url\(#)([^")]*)', html)
    assert set(used) <= set(ids)  # what a figure refers to is there
    assert len(set(ids)) == len(ids)  # and is its own
    assert len(data["units"]) == 54 == len(re.findall(r"data-unit=", html))
    first = data["units"][str(data["first"])]
    assert first["values"]["lost"] == pytest.approx(max(facts.unit_lost.values()), abs=1e-6)
    assert [m["key"] for m in data["measures"]] == ["weight", "effect", "lost"]
    for side, components in (("raised", facts.raised), ("faded", facts.faded)):
        assert len(components) == 6
        for (unit, place), component in zip(data["cards"][side], components, strict=True):
            shown = data["units"][str(unit)]["components"][place]
            assert shown["weight"] == pytest.approx(residual.weight[component.index].item(), abs=1e-4)
            assert [len(images) for images in shown["strip"]] == [8, 8]
            assert all(str(image) in data["thumbnails"] for images in shown["strip"] for image, _ in images)
            assert (tuple(shown["high"]), tuple(shown["low"])) == facts.words[component.index]


def test_every_figure_and_table_is_a_file_too(made):
    facts, path, files, residual = made
    folder = path.with_suffix("")
    assert sorted(files) == sorted(folder.iterdir())
    figures = {
        "classes",
        "confusion-without",
        "confusion-with",
        "weights",
        "reach",
        "lost",
        "spectra",
        "dimension",
        "similarity",
        "selection",
        *(f"{side}-{place}" for side in ("raised", "faded") for place in (1, 2, 3)),
    }
    assert {file.stem for file in files if file.suffix == ".png"} == figures
    assert {file.stem for file in files if file.suffix == ".svg"} == figures
    for name in figures:
        with Image.open(folder / f"{name}.png") as image:
            assert min(image.size) > 300
            assert len(image.convert("RGB").getcolors(2**24)) > 40
        assert "<script" not in (folder / f"{name}.svg").read_text(encoding="utf-8")

    def rows(name):
        with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    assert [row["class"] for row in rows("classes")] == [*NAMES, "(all)"]
    assert float(rows("classes")[-1]["accuracy_with"]) == pytest.approx(facts.after.accuracy, abs=1e-6)
    components = rows("components")
    assert len(components) == residual.weight.numel()
    assert float(components[7]["weight"]) == pytest.approx(residual.weight[7].item(), rel=1e-5)
    assert sum(int(row[name]) for row in rows("confusion-with") for name in NAMES) == 120
    assert len(rows("dimension")) == 48
    assert len(rows("weights")) == 54
    assert {row["heads_kept_by"] for row in rows("selection")} == {curve.name for curve in facts.curves}


def test_figures_of_the_page_follow_its_theme(html):
    """Colours of the palette are the style sheet's variables; a heat map keeps its own."""
    css = html[: html.index("</style>")]
    for colour, variable in charts.THEMED.items():
        if variable in ("blue", "orange", "green", "sky"):
            assert f"--{variable}: {colour.lower()};" in css
    svg = html[html.index('id="chart-dimension"') : html.index('id="similarity"')]
    for variable in ("blue", "green", "orange", "ink"):
        assert f"var(--{variable})" in svg
    assert style.BLUE.lower() not in svg
    assert "#ffffff" in html[html.index('id="chart-confusion-with"') : html.index('id="weights"')]


def test_a_figure_keeps_the_text_of_names_that_look_like_markup():
    figure = charts.figures.class_changes(
        ['id="x" url(#y) #0072b2', "$a$"], torch.tensor([0.5, 0.5]), torch.tensor([0.7, 0.6])
    )
    svg = charts.inline(figure, "classes")
    assert ">id=&quot;x&quot; url(#y) #0072b2<" in svg or '>id="x" url(#y) #0072b2<' in svg
    assert ">$a$<" in svg
    assert 'id="classes-' in svg
    assert svg.startswith("<svg")


def test_sentences_say_what_happened(made):
    facts = made[0]
    said = " ".join(sentences.findings(facts))
    assert f"{facts.mended:,} images that were misread" in said
    assert f"{100 * facts.before.accuracy:.1f}%" in said
    same = replace(facts, after=facts.before, mended=0, broken=0, unit_weight={})
    said = sentences.findings(same)
    assert "stays at" in said[0]
    assert "(0.0 points)" in said[0]
    assert said[1:] == ["No class has changed."]
    kept = sentences.findings(replace(same, learned=0))
    assert kept[0].startswith("The fit kept the untouched model: accuracy on these 120 images is ")
    worse = replace(facts, before=outcome(torch.eye(10) * 12), after=outcome(torch.full((10, 10), 3)))
    assert "falls from 100.0% to 10.0% (−90.0 points)" in sentences.findings(worse)[0]


def test_advice_follows_the_numbers(made):
    facts = replace(made[0], source=Source("bundled", "data", "my run"))

    def advice(before, after, **given):
        return sentences.advice(replace(facts, before=outcome(before), after=outcome(after), **given))

    right = torch.eye(10) * 12
    worse = right.clone()
    worse[2, 2], worse[2, 7], worse[2, 1] = 6, 5, 1
    said = advice(right, worse)
    assert said[0].startswith("Accuracy fell: on images like these, use the untouched model.")
    assert "lost 50.0 points" in said[1]
    assert "misread in 6 images" in said[1]
    assert f"most often for “{facts.class_names[7]}”" in said[1]
    assert not any("predict" in one for one in said)
    said = advice(worse, right, mended=6, broken=0)
    assert said[0].startswith("Only 6 images changed")
    assert any("predict 'my run' --data" in one for one in said)
    assert "untouched model is the simpler choice" in advice(right, right)[0]
    for one in said:  # every command is one that the program takes
        for command, rest in re.findall(r"residual-kernels (\w+) (.*?\.(?:csv|onnx|html))", one):
            get_command(cli.app).commands[command].make_context(command, shlex.split(rest))


def test_many_classes_are_cut_to_those_that_changed_most(made):
    facts, count = made[0], 60
    before = torch.eye(count, dtype=torch.float64) * 4
    after = before.clone()
    after[7] = 0
    after[7, 8] = 4  # the class that changed
    before[50:], after[50:] = 0, 0  # classes without images
    names = tuple(f"class {k}" for k in range(count))
    many = replace(facts, class_names=names, before=outcome(before), after=outcome(after))
    shown = many.classes_shown
    assert len(shown) == CLASSES_SHOWN
    assert 7 in shown
    assert shown == sorted(shown)
    assert max(shown) < 50
    drawn = charts.on_page(many)
    assert [tick.get_text() for tick in drawn["confusion-with"].axes[0].get_yticklabels()] == [
        names[k] for k in shown
    ]
    matrix = drawn["confusion-with"].axes[0].images[0].get_array()
    assert matrix.shape == (CLASSES_SHOWN, CLASSES_SHOWN)
    assert matrix[shown.index(7), shown.index(7)] == 0
    assert matrix[0, 0] == 1
    assert math.isnan(tables.tables(many)[0].rows[55][2])
    assert ",0,,\r\n" in tables.as_text(tables.tables(many)[0])


def test_thumbnails_stop_at_their_limit(world):
    held, kept = thumbnails(world.pictures, [[0, 1], [1, 2], [3, 4], [0]], most=4)
    assert kept == 2
    assert set(held) == {0, 1, 2}
    assert held[0].startswith("data:image/jpeg;base64,")


def test_where_class_vectors_moved_the_analysis_is_of_the_model(world):
    """Selection learns nothing, so it reads heads as the model does; moved vectors count as learned."""
    few = world.cache.subset(torch.arange(0, 120, 6))
    moved = rk.ZeroShotHead(
        world.head.class_vectors.flip(1), world.head.class_names, float(world.head.logit_scale)
    )
    own, after, plain = (
        gather(rk.CoarseHeads(world.tower), head, few, world.source, base_head=base)
        for head, base in ((world.head, None), (moved, world.head), (moved, moved))
    )
    assert after.curves == own.curves
    assert plain.curves != own.curves
    assert after.before.accuracy == own.before.accuracy
    assert after.learned == own.learned + moved.class_vectors.numel()
    assert plain.learned == own.learned


@pytest.mark.parametrize("method", ["coarse", "output", "linear"])
def test_adapters_without_components(world, method):
    bases = rk.fit_bases(world.tower, world.cache, ())
    adapter = {
        "coarse": lambda: rk.CoarseHeads(world.tower, init="normal"),
        "output": lambda: rk.OutputSpectral(world.tower, bases, init="normal"),
        "linear": lambda: rk.OutputLinear(world.tower),
    }[method]()
    few = world.cache.subset(torch.arange(0, 120, 3))
    facts = gather(adapter, world.head, few, world.source)
    assert facts.reading is None
    text = page._render(facts, few.ids.tolist(), None, svgs(facts), tables.tables(facts), "report")
    assert ('class="grid' in text) == (method == "coarse")
    assert 'id="components"' not in text
    assert data_of(text)["thumbnails"] == {}
    assert "components" not in {table.name for table in tables.tables(facts)}


def test_hardly_any_images(world):
    """Three images of one picture: nothing varies, nothing is NaN on the page,
    and no map where no unit has a layer."""
    one = world.pictures.preprocess(world.pictures.pictures[0]).expand(3, -1, -1, -1)
    cache = rk.encode(world.tower, [(one, torch.zeros(3))], kinds=("emb", "head"), class_names=NAMES)
    bases = rk.fit_bases(world.tower, cache, ("emb",))
    facts = gather(rk.ResiDual(world.tower, bases, "sum"), world.head, cache, world.source)
    text = page._render(
        facts, cache.ids.tolist(), world.pictures, svgs(facts), tables.tables(facts), "report"
    )
    assert 'class="grid' not in text
    assert "nan" not in " ".join((*sentences.findings(facts), *sentences.captions(facts).values()))
    assert list(data_of(text)["units"]) == ["0"]


def test_refusals(world, made, tmp_path, monkeypatch):
    facts, _, _, residual = made
    unlabelled = rk.encode(world.tower, [torch.rand(4, 3, 32, 32)], kinds=("head", "mlp"))
    with pytest.raises(ValueError, match="needs labelled images"):
        gather(residual, world.head, unlabelled, world.source)
    with pytest.raises(ValueError, match="at least 3 images"):
        gather(residual, world.head, world.cache.subset(torch.arange(2)), world.source)
    with pytest.raises(ValueError, match=r"an \.html file"):
        write_report(facts, tmp_path / "report", world.cache)
    (tmp_path / "r").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        write_report(facts, tmp_path / "r.html", world.cache)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"residual-kernels\[report\]"):
        write_report(facts, tmp_path / "new.html", world.cache)
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the program in this process: (exit code, stdout, stderr). Still pictures are not drawn again."""
    for console in (printing.out, printing.err):
        monkeypatch.setattr(console, "width", 200)
    monkeypatch.setattr("residual_kernels.figures.save", lambda *_: [])

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["residual-kernels", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        seen = capsys.readouterr()
        return stop.value.code or 0, seen.out, seen.err

    return call


def test_on_the_command_line(world, run, tmp_path):
    """fit, report on images, report on a cache with and without its images, and what is refused."""
    for index, name in enumerate(DIGITS):
        for row in range(PER_CLASS * index, PER_CLASS * index + 5):
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            world.pictures.pictures[row].save(tmp_path / "data" / name / f"{row}.png")
    data, adapter, cache = tmp_path / "data", tmp_path / "run", tmp_path / "cache"
    code, _, err = run("fit", "--data", data, "--method", "fine", "--epochs", 2, "--out", adapter)
    assert code == 0, err
    (tmp_path / "words.txt").write_text("a ring\n# a note\n\na line\n")
    code, out, err = run(
        "report",
        adapter,
        "--data",
        data,
        "--dictionary",
        tmp_path / "words.txt",
        "--json",
        tmp_path / "r.json",
    )
    assert code == 0, err
    assert f"{adapter / 'report.html'} (" in out
    seen = json.loads((tmp_path / "r.json").read_text())
    assert seen["images"] == 50
    assert rk.load_adapter(world.tower, adapter).detach() is world.tower  # the run is what it was
    written = data_of((adapter / "report.html").read_text(encoding="utf-8"))
    assert written["thumbnails"]
    assert "a ring" in json.dumps(written["units"])
    code, _, err = run("encode", "--data", data, "--out", cache)
    assert code == 0, err
    for images, shown in (((), False), (("--images", data), True)):
        code, _, err = run("report", adapter, "--data", cache, *images, "--out", tmp_path / "c.html")
        assert code == 0, err
        html = (tmp_path / "c.html").read_text(encoding="utf-8")
        assert bool(data_of(html)["thumbnails"]) == shown
    (tmp_path / "few" / "one").mkdir(parents=True)
    world.pictures.pictures[0].save(tmp_path / "few" / "one" / "0.png")
    for arguments, message in (
        ((adapter, "--data", cache, "--images", tmp_path / "few"), "does not hold the images"),
        ((adapter, "--data", data, "--images", data), "is for a cache"),
        ((tmp_path / "nowhere", "--data", data), "no adapter"),
        ((adapter, "--data", data, "--out", tmp_path / "page"), "an .html file"),
        ((adapter, "--data", data, "--dictionary", tmp_path / "nothing.txt"), "nothing.txt"),
    ):
        code, _, err = run("report", *arguments)
        assert code == 2, message
        assert message in err
        assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize("name", ["GALLERY.md", "STORY.md"])
def test_the_gallery_is_whole(name):
    """Pictures are there and small, links lead somewhere, and the commands are ones that the program has."""
    docs = Path(__file__).parent.parent / "docs"
    text = (docs / name).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!http)([^)]+)\)", text)
    assert len(links) > 8
    for link in links:
        assert 0 < (docs / link).stat().st_size < 200_000, link
    commands = re.findall(r"^residual-kernels (\w+) (.*)$", text, flags=re.MULTILINE)
    assert {"fit", "report"} <= {command for command, _ in commands}
    known = get_command(cli.app).commands
    for command, rest in commands:
        options = {option for parameter in known[command].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= options
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        compile(block, name, "exec")
