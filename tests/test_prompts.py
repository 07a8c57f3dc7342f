"""What a class is called: names and templates."""

import pytest

from residual_kernels import prompts


def test_class_names_and_templates(tmp_path):
    assert prompts.class_names(None, ("a", "dog_house")) == ("a", "dog house")
    (tmp_path / "names.txt").write_text("one\n\n two \n")
    assert prompts.class_names(str(tmp_path / "names.txt"), ("a", "b")) == ("one", "two")
    with pytest.raises(ValueError, match="2 class names, but there are 3"):
        prompts.class_names(str(tmp_path / "names.txt"), ("a", "b", "c"))
    with pytest.raises(FileNotFoundError, match="no file of class names"):
        prompts.class_names(str(tmp_path / "nothing"), ("a",))
    assert prompts.templates(None, ("a {}",)) == ("a {}",)
    assert len(prompts.templates("openai", ())) == 80
    (tmp_path / "t.txt").write_text("a {}\nthe {}\n")
    assert prompts.templates(str(tmp_path / "t.txt"), ()) == ("a {}", "the {}")
    (tmp_path / "t.txt").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        prompts.templates(str(tmp_path / "t.txt"), ())
