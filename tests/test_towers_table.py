"""docs/TOWERS.md says what the library says, of every open_clip configuration and of the other lists."""

import open_clip
import pytest
import transformers
from towers_table import PAGE, open_clip_rows, page


@pytest.fixture(scope="module")
def rows():
    return {row.name: row for row in open_clip_rows()}


def test_every_open_clip_configuration_has_a_row(rows):
    assert set(rows) == set(open_clip.list_models())
    supported = [row for row in rows.values() if row.supported]
    assert len([row for row in supported if row.family == "open_clip.VisionTransformer"]) >= 56
    assert len([row for row in supported if row.family.startswith("timm.")]) >= 60
    assert {row.family for row in rows.values() if not row.supported} == {
        "ModifiedResNet",
        "ConvNeXt",
        "FastVit",
        "SwinTransformer",
    }


@pytest.mark.skipif(
    not hasattr(transformers, "PixioModel"), reason="the page has towers that came with transformers 5"
)
def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/towers_table.py"
