"""Display in Python: reprs, small HTML, rows and figures of what the library returns."""

import ast
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from test_towers import build, images_for
from three_classes import cache_of, head_of

import residual_kernels as rk
from residual_kernels import display
from residual_kernels.analysis import analyze
from residual_kernels.analysis.weights import read_weights

NASTY = ("<script>alert(1)</script>", "b & c", "\x1b[31mred")


@pytest.fixture(scope="module")
def tower():
    return build()


@pytest.fixture(scope="module")
def cache(tower):
    return cache_of(tower, (30, 18, 12), NASTY)


@pytest.fixture(scope="module")
def bases(tower, cache):
    return rk.fit_bases(tower, cache, kinds=("head", "mlp"))


@pytest.fixture
def head():
    return head_of(NASTY)


@pytest.fixture
def made():
    """What a test builds; taken off the shared tower at its end."""
    adapters = []
    yield lambda adapter: adapters.append(adapter) or adapter
    for adapter in adapters:
        adapter.detach()


class Balanced(HTMLParser):
    """Fails on tags that do not close in order; keeps the text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.tags = [], "", set()
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def saved(figure, tmp_path):
    assert isinstance(figure, Figure)
    figure.savefig(tmp_path / "figure.png")
    return figure


def test_adapters_say_what_they_are(tower, cache, bases, head, made):
    fine = made(rk.build("fine", tower, bases, seed=4))
    assert repr(fine) == (
        f"ResiDual(method='fine', rest='zero', kinds=('head',), J={len(fine.weight)}, "
        "tower='VisionTransformer', fitted=False)"
    )
    rk.fit(fine, head, cache, epochs=1)
    assert "fitted=True" in repr(fine)
    anchored = made(rk.ResiDual(tower, bases, rest="all"))
    assert "method='anchored', rest='all', kinds=('head', 'mlp')" in repr(anchored)
    assert "method=" not in repr(made(rk.ResiDual(tower, bases)))  # none of the methods by name
    assert repr(made(rk.CoarseHeads(tower))).startswith("CoarseHeads(method='coarse', rest='zero'")
    assert f"J={len(anchored.component_weight())}, numbers=" in repr(made(rk.build("shared", tower, bases)))
    assert "method='base', numbers=0" in repr(made(rk.build("base", tower)))
    two = made(rk.AdapterSet(tower, {"a": anchored, "b": fine}))
    assert repr(two) == "AdapterSet(['a', 'b'], active='a', tower='VisionTransformer')"


@pytest.mark.parametrize("method", ["fine", "coarse", "output", "linear", "shared"])
def test_weights_that_moved_count_as_fitted(tower, bases, made, method):
    adapter = made(rk.build(method, tower, bases, seed=7))
    assert "fitted=False" in repr(adapter)
    with torch.no_grad():
        adapter.trainable()[0].view(-1)[1] += 0.5
    assert "fitted=True" in repr(adapter)


def test_a_given_start_is_not_a_fit_and_meta_is_not_read(tower, bases, made):
    start = torch.full((len(bases.parts["head"].components),), 0.3)
    adapter = made(rk.ResiDual(tower, bases.of("head"), init=start))
    assert "fitted=False" in repr(adapter)
    start += 1  # the caller's tensor is the caller's
    assert "fitted=False" in repr(adapter)
    meta = made(rk.ResiDual(build(), rk.fit_bases(build(), [images_for(build(), 20)]))).to("meta")
    assert "fitted" not in repr(meta)


def test_what_fitting_found_is_fitted(tower, cache, bases, head, tmp_path, made):
    adapter = made(rk.ResiDual(tower, bases, rest="all"))
    result = rk.fit(adapter, head, cache)
    assert result.freedom > 0
    rk.save_adapter(adapter, tmp_path / "kept")
    adapter.detach()
    loaded = made(rk.load_adapter(tower, tmp_path / "kept"))
    assert "method='anchored'" in repr(loaded)
    assert "fitted=True" in repr(loaded)


def test_heads_and_attachments_say_what_they_are(bases, tower, head):
    assert repr(head).startswith("ZeroShotHead(K=3 ('<script>")
    assert repr(head).endswith("D=32, logit_scale=2.303)")
    assert "\x1b" not in repr(head)
    model = torch.nn.Module()
    model.visual = tower
    with rk.attach(model, bases.of("head")) as handle:
        assert repr(handle).startswith("Attachment(ResiDual(rest='zero'")
        assert repr(handle).endswith("attached to Module)")
    assert repr(handle).endswith("detached from Module)")


def test_rows_are_the_weights(tower, bases, made):
    adapter = made(rk.build("fine", tower, bases, seed=4))
    rows = adapter.table()
    assert [row["component"] for row in rows] == list(range(len(adapter.weight)))
    for unit in adapter.layout.select("head"):
        own = [row for row in rows if row["unit"] == unit.index]
        assert [row["weight"] for row in own] == adapter.weight_of(unit).tolist()
        assert {(row["layer"], row["head"]) for row in own} == {(unit.layer, unit.head)}
        ratio = bases.explained_variance_ratio(unit)[: len(own)].tolist()
        assert [row["explained"] for row in own] == ratio
    assert {row["kind"] for row in rows} == {"head"}
    frame = rows.to_pandas()
    assert list(frame.columns) == list(rows[0])
    assert frame["weight"].tolist() == [row["weight"] for row in rows]
    assert len(repr(rows)) < 200


@pytest.mark.parametrize("method", ["coarse", "output", "shared", "full"])
def test_every_weight_has_a_row_and_a_figure(tower, bases, made, method, tmp_path):
    adapter = made(rk.build(method, tower, bases))
    assert [row["weight"] for row in adapter.table()] == adapter.component_weight().double().tolist()
    saved(adapter.plot(), tmp_path)


def test_the_stream_form_and_units_without_layers(tower, made, tmp_path):
    images = images_for(tower, 20)
    inside = rk.fit_bases(tower, [images], placement="stream").truncate(components=3)
    stream = made(rk.ResiDual(tower, inside, placement="stream", layers=[1]))
    rows = stream.table()
    assert {row["layer"] for row in rows} == {1}
    assert all(row["explained"] is not None for row in rows)
    assert "method='stream', kinds=" in repr(stream)
    saved(stream.plot(), tmp_path)
    of_embedding = rk.fit_bases(tower, [images], kinds=("emb",))
    saved(made(rk.ResiDual(tower, of_embedding)).plot(), tmp_path)
    saved(of_embedding.plot(), tmp_path)


def test_what_has_no_components_says_so(tower, made):
    linear = made(rk.OutputLinear(tower))
    for call in (linear.table, linear.plot):
        with pytest.raises(ValueError, match="OutputLinear reweights no components"):
            call()


def test_the_map_shows_mean_weights(tower, bases, made):
    adapter = made(rk.build("fine", tower, bases, seed=4))
    texts = [text.get_text() for text in adapter.plot().axes[0].texts]
    wanted = []
    for unit in adapter.layout.select("head"):
        weight = adapter.weight_of(unit)
        wanted.append(f"{weight.mean():.2f}\n({len(weight)})".replace("-", "−"))
    assert texts == wanted


def test_results_draw_what_they_hold(tower, cache, bases, head, made, tmp_path):
    convex = rk.fit(made(rk.ResiDual(tower, bases, rest="all")), head, cache)
    figure = saved(convex.plot(), tmp_path)
    line = next(line for line in figure.axes[1].lines if line.get_label() == "fitted")
    assert line.get_ydata().tolist() == [one.accuracy for one in convex.path[1:]]
    assert [row["freedom"] for row in convex.table()] == [one.freedom for one in convex.path]
    adapter = made(rk.build("fine", tower, bases, seed=4))
    trained = rk.fit(adapter, head, cache, cache, epochs=3)
    figure = saved(trained.plot(), tmp_path)
    line = next(line for line in figure.axes[1].lines if line.get_label() == "validation")
    assert line.get_ydata().tolist() == [row.val_accuracy for row in trained.history]
    assert trained.to_pandas()["epoch"].tolist() == [row.epoch for row in trained.history]
    alone = rk.fit(adapter, head, cache, epochs=2)
    assert len(saved(alone.plot(), tmp_path).axes) == 1
    for result in (convex, trained, alone):
        Balanced(result._repr_html_())
    evaluation = rk.evaluate(adapter, head, cache)
    saved(evaluation.plot(NASTY), tmp_path)
    with pytest.raises(ValueError, match="must hold 3 names, one per class; got 2"):
        evaluation.plot(("a", "b"))


def test_comparisons_and_many_fits(tower, cache, bases, head, made, tmp_path):
    adapter = made(rk.build("fine", tower, bases, seed=4))
    many = rk.fit_many(adapter, head, cache, cache, lrs=[0.1, 0.5], epochs=2)
    assert [row["lr"] for row in many.table()] == [0.1, 0.5]
    assert [row["val_accuracy"] for row in many.table()] == [one.val_accuracy for one in many.results]
    many.put(adapter, many.best())
    compared = rk.train.compare(adapter, head, cache)
    labels = saved(compared.plot(), tmp_path).axes[0].get_yticklabels()
    assert {label.get_text() for label in labels} == {"0", "1", "2"}
    with pytest.raises(ValueError, match="must hold 3 names"):
        compared.plot(("a",))


def test_a_reading_of_weights_is_a_table(tower, cache, bases, made):
    reading = read_weights(made(rk.build("fine", tower, bases, seed=4)), cache)
    rows = reading.table()
    assert [row["effect"] for row in rows] == reading.effect.tolist()
    assert [row["unit"] for row in rows] == reading.unit.tolist()
    assert {row["kind"] for row in rows} == {"head"}


def test_the_logger_tells_of_bases_and_caches(tower, tmp_path, caplog):
    images = images_for(tower, 20)
    with caplog.at_level("INFO", "residual_kernels"):
        rk.fit_bases(tower, [images])
        rk.encode(tower, [images], tmp_path / "cache")
    assert "bases of head from 20 images" in caplog.text
    assert f"cache of 20 images at {tmp_path / 'cache'}" in caplog.text


def test_candidates_are_drawn_and_listed(tower, cache, bases, head, made, tmp_path):
    found = rk.tune(tower, bases, head, cache)
    made(found.adapter)
    assert "fitted=True" in repr(found.adapter)
    axes = saved(found.plot(), tmp_path).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [one.accuracy for one in reversed(found.table)]
    assert found.to_pandas()["name"].tolist() == [one.name for one in found.table]
    page = Balanced(found._repr_html_())
    assert found.why in page.text
    assert all(one.name in page.text for one in found.table)


@pytest.mark.parametrize("kind", [None, "head", "mlp", "output"])
def test_spectra_of_every_kind(bases, kind, tmp_path):
    figure = saved(bases.plot(kind, energy=0.8), tmp_path)
    part = bases.parts["head" if kind is None else kind]
    curves = [line.get_ydata() for line in figure.axes[0].lines if len(line.get_ydata()) > 2]
    assert len(curves) == len(part.mean)
    torch.testing.assert_close(torch.as_tensor(curves[-1]), part.ratio(len(part.mean) - 1).cumsum(0))
    with pytest.raises(ValueError, match="these bases hold head, mlp, output, not 'pool'"):
        bases.plot("pool")


def test_analyses_are_tables_and_figures(tower, cache, bases, head, tmp_path):
    found = analyze(tower, cache, head, bases, seeds=range(2), points=50)
    rows = found.table()
    assert [row["accuracy"] for row in rows] == [unit.accuracy for unit in (*found.units, found.output)]
    assert len(found.table("components").to_pandas()) == len(found.components)
    assert {row["of"] for row in found.table("selection")} == {"units", "components"}
    with pytest.raises(ValueError, match="tables of units, components, selection; got 'heads'"):
        found.table("heads")
    for of in ("dimension", "similarity", "selection", "accuracy", "two_nn"):
        saved(found.plot(of), tmp_path)
    page = Balanced(found._repr_html_())
    assert f"{found.output.accuracy:.4g}" in page.text
    part = analyze(tower, cache, bases=bases, kind="mlp", tables=())
    saved(part.plot("share"), tmp_path)
    with pytest.raises(
        ValueError, match="this analysis can draw variance, share, participation; got 'similarity'"
    ):
        part.plot("similarity")


def test_small_pages_are_escaped(tower, cache, bases, head, made):
    adapter = made(rk.build("fine", tower, bases))
    shown = (
        bases,
        bases.layout,
        cache,
        rk.evaluate(adapter, head, cache),
        adapter.table(),
        rk.train.compare(adapter, head, cache),
    )
    for one in shown:
        page = one._repr_html_()
        assert len(page) < 8000
        assert Balanced(page).tags <= {"div", "b", "table", "thead", "tbody", "tr", "th", "td"}
    told = Balanced(display.card(NASTY[0], {NASTY[1]: NASTY[2]}, NASTY, [NASTY] * 40, notes=(NASTY[0], None)))
    assert "script" not in told.tags
    assert "<script>" in told.text
    assert "b & c" in told.text
    assert "\x1b" not in told.text
    assert "and 10 more rows" in told.text
    assert "60" in Balanced(cache._repr_html_()).text


def test_a_missing_library_is_named(bases, monkeypatch):
    rows = display.Table([{"a": 1}])
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(
        ImportError, match=r"a data frame needs the library `pandas`; .*residual-kernels\[pandas\]"
    ):
        rows.to_pandas()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"drawing figures needs the library `matplotlib`; .*\[plot\]"):
        bases.plot()


def test_an_empty_table_keeps_its_columns():
    rows = display.Table([], ("a", "b"))
    assert list(rows.to_pandas().columns) == ["a", "b"]
    assert "<th>a</th>" in rows._repr_html_()


def test_the_library_does_not_print():
    root = Path(rk.__file__).parent
    printed = []
    for path in root.rglob("*.py"):
        if "cli" in path.relative_to(root).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                printed.append(f"{path.name}:{node.lineno}")
    assert not printed
