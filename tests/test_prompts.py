"""What a class is called: names and templates."""

import pytest

from residual_kernels.data import prompts


def test_class_names_and_templates(tmp_path):
    assert prompts.class_names(None, ("a", "dog_house")) == ("a", "dog house")
    (tmp_path / "names.txt").write_text("one\n\n two \n")
    assert prompts.class_names(str(tmp_path / "names.txt"), ("a", "b")) == ("one", "two")
    with pytest.raises(ValueError, match="2 class names, but there are 3"):
        prompts.class_names(str(tmp_path / "names.txt"), ("a", "b", "c"))
    with pytest.raises(FileNotFoundError, match="no file of class names"):
        prompts.class_names(str(tmp_path / "nothing"), ("a",))
    assert prompts.templates(None, "bundled") == ("a {}",)
    assert prompts.templates(None, "ViT-B-32") == ("a photo of a {}.",)
    assert len(prompts.templates("openai", "")) == 80
    (tmp_path / "t.txt").write_text("a {}\nthe {}\n")
    assert prompts.templates(str(tmp_path / "t.txt"), "") == ("a {}", "the {}")
    (tmp_path / "t.txt").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        prompts.templates(str(tmp_path / "t.txt"), "")


def test_tables_of_clip_benchmark(monkeypatch):
    assert prompts.table_of_names("mnist") == tuple("0123456789")
    assert prompts.table_of_names("nothing") is None
    satellite = prompts.templates("clip_benchmark:eurosat", "")
    assert satellite[0] == "a centered satellite photo of {}."
    folders = tuple("abcdefghij")
    assert prompts.class_names("clip_benchmark:eurosat", folders)[1] == "forest"
    with pytest.raises(ValueError, match="10 class names, but there are 1"):
        prompts.class_names("clip_benchmark:eurosat", ("a",))
    with pytest.raises(ValueError, match="no such table as clip_benchmark:x; it has .*cifar10"):
        prompts.templates("clip_benchmark:x", "")
    monkeypatch.setattr(prompts, "_table", lambda file: None)
    assert prompts.table_of_names("mnist") is None
    with pytest.raises(ImportError, match=r"residual-kernels\[data\]"):
        prompts.templates("clip_benchmark:dtd", "")
