"""Laws of captions: prompts are one clean line, and what no caption may be is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_jax.data.captions import MAX_CHARACTERS, clean_text, make_prompt
from hunyuan_jax.errors import UserError

CAPTION = {"short": "a red circle", "style": " plain\n", "lighting": "", "background": None, "camera_motion": "pan left"}


def test_a_prompt_is_its_fields_in_the_order_asked_for():
    assert make_prompt(CAPTION, ("camera_motion", "short")) == "pan left, a red circle"


def test_missing_and_empty_fields_leave_no_trace():
    assert make_prompt(CAPTION, ("short", "lighting", "background", "dense", "style")) == "a red circle, plain"
    assert make_prompt({}, ("short",)) == ""


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=200))
def test_clean_text_is_one_printable_line_and_stays_so(text):
    clean = clean_text(text)
    assert len(clean.splitlines()) <= 1
    assert clean == clean.strip() == clean_text(clean)
    assert "  " not in clean


def test_control_characters_become_spaces():
    assert clean_text("a\x00red\r\n\x1b[31m  circle\u202e") == "a red [31m circle"


def test_a_field_no_caption_has_is_refused():
    with pytest.raises(UserError, match="no field 'shrot'"):
        make_prompt(CAPTION, ("shrot",))


@pytest.mark.parametrize("value", [7, ["a"], "x" * (MAX_CHARACTERS + 1)])
def test_a_value_that_is_no_short_text_is_refused(value):
    with pytest.raises(UserError, match="short"):
        make_prompt({"short": value}, ("short",))
