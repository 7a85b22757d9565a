"""Released templates are found, are exactly the released ones, and nothing else is taken for them."""

import importlib.util
import sys
from pathlib import Path

import pytest

from hunyuan_jax.errors import UserError
from hunyuan_jax.templates import RELEASED, released_template

IN_DIFFUSERS = [name for name, known in RELEASED.items() if known.module]


@pytest.mark.parametrize("name", IN_DIFFUSERS)
def test_a_template_is_that_of_diffusers_pipeline(name):
    module = RELEASED[name].module.removesuffix(".py")
    theirs = importlib.import_module(f"diffusers.pipelines.hunyuan_video.{module}").DEFAULT_PROMPT_TEMPLATE
    ours = released_template(name)
    assert (ours.text, ours.crop_start) == (theirs["template"], theirs["crop_start"])
    assert ours.text.count("{}") == 1


def test_reading_a_template_runs_nothing_of_diffusers(monkeypatch, tmp_path):
    folder = tmp_path / "diffusers/pipelines/hunyuan_video"
    folder.mkdir(parents=True)
    (tmp_path / "diffusers/__init__.py").write_text("raise SystemError('it ran')\n")
    text = released_template("t2v_video").text
    source = f"raise SystemError('it ran')\nDEFAULT_PROMPT_TEMPLATE = {{'template': {text!r}, 'crop_start': 95}}\n"
    (folder / RELEASED["t2v_video"].module).write_text(source)
    for name in [name for name in sys.modules if name.split(".")[0] == "diffusers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    assert released_template("t2v_video").text == text
    (folder / RELEASED["t2v_video"].module).write_text("DEFAULT_PROMPT_TEMPLATE = {'template': print('it ran')}\n")
    with pytest.raises(UserError, match="has no DEFAULT_PROMPT_TEMPLATE"):
        released_template("t2v_video")


def test_a_template_comes_from_a_file_too_and_every_other_text_is_refused(tmp_path):
    file = tmp_path / "template.txt"
    text = released_template("t2v_video").text
    file.write_text(text)
    assert released_template("t2v_video", file=file) == released_template("t2v_video")
    for wrong in (text + "\n", text.replace("video", "movie", 1), ""):
        file.write_text(wrong)
        with pytest.raises(UserError, match="not the released t2v_video"):
            released_template("t2v_video", file=file)


def test_what_cannot_be_read_is_one_clear_error(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="there are t2v_video"):
        released_template("video")
    with pytest.raises(UserError, match="cannot be read"):
        released_template("t2v_video", file=tmp_path / "missing.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="not UTF-8"):
        released_template("t2v_video", file=tmp_path / "bytes.txt")
    with pytest.raises(UserError, match="does not have the template t2v_image"):
        released_template("t2v_image")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed"):
        released_template("t2v_video")


def test_no_released_template_is_kept_in_the_project():
    head = released_template("t2v_video").text[60:120]
    for path in Path(__file__).parents[1].rglob("*.py"):
        if ".venv" not in path.parts:
            assert head not in path.read_text(), path
