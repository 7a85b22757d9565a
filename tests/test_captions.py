"""Laws of captions: what no caption may be is refused, prompts are one clean line, and draws are as likely as the config says."""

import collections
import dataclasses
import html
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from data_prep import caption as curation
from data_prep.encode import EncodeConfig, prompts_of
from data_prep.report import Tables, page
from hunyuan_jax import report
from hunyuan_jax.data.captions import (
    FIELDS,
    MAX_CAPTION_CHARACTERS,
    MAX_CHARACTERS,
    MAX_JSON_CHARACTERS,
    MAX_TAG_CHARACTERS,
    MAX_TAGS,
    PROMPT_FIELDS,
    TAG_FIELDS,
    Caption,
    caption_json_schema,
    clean_text,
    parse_caption,
)
from hunyuan_jax.data.prompts import Length, PromptConfig, assemble_prompt, make_prompt, prompt_variants
from hunyuan_jax.errors import UserError
from hunyuan_jax.settings import build
from tests.commands import run_program

CAPTION = {"short": "a red circle", "style": " plain\n", "lighting": "", "background": None, "camera_motion": "pan left"}
NAMED = Caption(**{name: name for name in FIELDS}, **{name: (name,) for name in TAG_FIELDS})  # each field says its own name
MARKUP = "<b title='&lt;i&gt;'><script>alert(\"x\")</script></b>"
MIXED = PromptConfig(
    lengths={
        "short": Length(weight=0.25, fields=("short",)),
        "medium": Length(weight=0.25, fields=("short",), extras=("background", "style", "lighting"), extra_count=(1, 2)),
        "long": Length(weight=0.5, fields=("dense", *FIELDS[2:], *TAG_FIELDS)),
    },
    keep={"style": 0.5, "quality_tags": 0.2},
    permute=True,
    text_dropout=0.1,
)


# Text


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(st.characters(), max_size=200))
def test_clean_text_is_one_printable_line_and_stays_so(text):
    clean = clean_text(text)
    assert len(clean.splitlines()) <= 1
    assert clean == clean.strip() == clean_text(clean)
    assert "  " not in clean
    clean.encode()


def test_control_characters_become_spaces():
    assert clean_text("a\x00red\r\n\x1b[31m  circle\u202e") == "a red [31m circle"


def test_characters_without_width_and_turns_of_direction_leave_no_trace():
    assert clean_text("\ufeffre\u200bd \u202e\u2066circ\u00adle\u2069 \u200d \u2028") == "red circle"


# Captions


def test_a_caption_is_clean():
    value = {
        "short": " a\n\u202ered\tcircle ",
        "dense": None,
        "quality_tags": ["sharp", " sharp ", "\u200b", "8\u00a0bit"],
        "source_tags": None,
    }
    assert Caption.from_json(value) == Caption(short="a red circle", quality_tags=("sharp", "8 bit"))
    assert Caption.from_json({}) == Caption()


@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_the_longest_caption_survives_json(ensure_ascii):
    value = dict.fromkeys(FIELDS[: MAX_CAPTION_CHARACTERS // MAX_CHARACTERS], "\N{FILM FRAMES}" * MAX_CHARACTERS)
    caption = Caption.from_json(value)
    text = json.dumps(dataclasses.asdict(caption), ensure_ascii=ensure_ascii)
    assert len(text.encode()) <= MAX_JSON_CHARACTERS
    assert parse_caption(text) == caption == Caption.from_json(dataclasses.asdict(caption))
    with pytest.raises(
        UserError, match=f"{MAX_CAPTION_CHARACTERS} characters in all its fields together, not {MAX_CAPTION_CHARACTERS + 1}"
    ):
        Caption.from_json({**value, "source_tags": ["x"]})


VALUES = [
    (None, "object of text fields, not null"),
    ([{"short": "a"}], "object of text fields, not a list"),
    ("a red circle", "object of text fields, not text"),
    ({"short": 7}, "'short' must be text, not a number"),
    ({"short": math.nan}, "'short' must be text, not a number"),
    ({"short": True}, "'short' must be text, not a boolean"),
    ({"dense": ["a"]}, "'dense' must be text, not a list"),
    ({"dense": {"short": "a"}}, "'dense' must be text, not an object"),
    ({"source": 1}, "'source' must be text, not a number"),
    ({"style": "x" * 2**20}, f"'style' may have {MAX_CHARACTERS} characters, not 1048576"),
    ({"style": " " * (MAX_CHARACTERS + 1)}, f"'style' may have {MAX_CHARACTERS} characters"),
    ({"source": "x" * (MAX_TAG_CHARACTERS + 1)}, f"'source' may have {MAX_TAG_CHARACTERS} characters"),
    ({"quality_tags": "sharp"}, "'quality_tags' must be a list of short texts, not text"),
    ({"quality_tags": ["sharp", None]}, "'quality_tags' must be a list of short texts; it holds null"),
    ({"source_tags": [["film"]]}, "'source_tags' must be a list of short texts; it holds a list"),
    ({"source_tags": ["x"] * (MAX_TAGS + 1)}, f"'source_tags' may have {MAX_TAGS} tags, not {MAX_TAGS + 1}"),
    ({"source_tags": ["x" * (MAX_TAG_CHARACTERS + 1)]}, f"'source_tags' may have {MAX_TAG_CHARACTERS} characters"),
    ({"shot_typ": "close-up"}, "no field 'shot_typ'. Did you mean 'shot_type'?"),
    ({"quality tags": []}, "no field 'quality tags'. Did you mean 'quality_tags'?"),
    ({"\u202e" + "x" * 2**20: ""}, "no field '\\u202exxx"),
    ({3: "a"}, "text as names, not a number"),
    ({"short": "a \ud800"}, "'short' must be text; its character 2 is half of a surrogate pair"),
    ({"source_tags": ["\udfff"]}, "'source_tags' must be text; its character 0 is half"),
]


@pytest.mark.parametrize(("value", "says"), VALUES, ids=[says[:40] for _, says in VALUES])
def test_a_value_that_is_no_caption_is_refused(value, says):
    assert says in refusal(Caption.from_json, value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "this is no JSON"),
        ('{"short": "a"', "this is no JSON"),
        ('{"short": "a"} {}', "this is no JSON"),
        ('{"short": "a\nb"}', "this is no JSON"),
        ("9" * 5000, "this is no JSON"),
        ("7", "object of text fields, not a number"),
        ('{"short": NaN}', "strict JSON, which has no NaN"),
        ('{"short": -Infinity}', "strict JSON, which has no -Infinity"),
        ('{"short": 1e999}', "'short' must be text, not a number"),
        ('{"short": "a", "short": "b"}', "each field once; 'short' came twice"),
        ('{"short": {"a": 1, "a": 1}}', "each field once; 'a' came twice"),
        ('{"short": "\\ud83d"}', "half of a surrogate pair"),
        ("[" * 100_000, "nested too deeply"),
        ('{"short":' * 20_000, "nested too deeply"),
        (json.dumps({"short": "x" * 2**20}), f"JSON may have {MAX_JSON_CHARACTERS} characters, not 1048589"),
    ],
    ids=lambda value: value[:30],
)
def test_text_that_is_no_caption_is_refused(text, says):
    assert says in refusal(parse_caption, text)


def test_text_that_is_too_long_is_refused_unread(monkeypatch):
    monkeypatch.setattr(json, "loads", None)
    refusal(parse_caption, "[" * (MAX_JSON_CHARACTERS + 1))


def test_a_field_that_cannot_be_is_refused_unread(monkeypatch):
    monkeypatch.setattr("hunyuan_jax.data.captions.clean_text", None)
    refusal(Caption.from_json, {"short": "x" * (MAX_CHARACTERS + 1)})


def refusal(make, value):
    """The message of the one error that `make(value)` may raise: a short line that can be printed anywhere."""
    with pytest.raises(UserError) as caught:
        make(value)
    said = str(caught.value)
    assert len(said.encode()) < 400
    assert len(said.splitlines()) == 1
    return said


NAMES = st.sampled_from([*PROMPT_FIELDS, "source", "shrot"]) | st.text(st.characters(), max_size=8)
ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=120)
JSON = st.recursive(ATOMS, lambda inner: st.lists(inner, max_size=40) | st.dictionaries(NAMES, inner, max_size=6), max_leaves=12)
TAGS = st.lists(st.text(max_size=12) | st.text(st.characters(), max_size=100), max_size=MAX_TAGS + 2)
TEXTS = st.text(max_size=120) | JSON
VALID = st.fixed_dictionaries(
    {}, optional={**dict.fromkeys(TAG_FIELDS, st.lists(st.text(max_size=12), max_size=4)), **dict.fromkeys(FIELDS, st.text(max_size=60))}
)
NEARLY = st.fixed_dictionaries({}, optional={**dict.fromkeys(TAG_FIELDS, TAGS | JSON), **dict.fromkeys((*FIELDS, "source"), TEXTS)})


def accepted(make, value):
    """What `make` makes of a value, or None if it refuses it; any error but a `UserError` is let through."""
    try:
        return make(value)
    except UserError as error:
        said = str(error)
    assert len(said.encode()) < 400
    return None


@settings(max_examples=250, deadline=None, derandomize=True)
@given(JSON | NEARLY | VALID)
def test_any_json_value_is_a_clean_caption_or_one_user_error(value):
    caption = accepted(Caption.from_json, value)
    parsed = accepted(parse_caption, json.dumps(value))
    if caption is not None:
        assert parsed == caption
        assert Caption.from_json(dataclasses.asdict(caption)) == caption
        assert all(caption.words(name) == clean_text(caption.words(name)) for name in PROMPT_FIELDS)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(st.text(max_size=60) | st.text('{}[]":,\\u0dsefh\n -1', max_size=60))
def test_any_text_is_a_caption_or_one_user_error(text):
    accepted(parse_caption, text)


def fits(schema, value):
    """Whether a value is valid, for the keywords that the schema of captions uses."""
    said = {"type", "maxLength", "items", "maxItems", "properties", "additionalProperties", "$schema", "title"}
    assert set(schema) <= said
    kinds = {"object": dict, "array": list, "string": str, "null": type(None)}
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not isinstance(value, tuple(kinds[kind] for kind in types)):
        return False
    if isinstance(value, str):
        return len(value) <= schema["maxLength"]
    if isinstance(value, list):
        return len(value) <= schema["maxItems"] and all(fits(schema["items"], item) for item in value)
    if isinstance(value, dict):
        assert schema["additionalProperties"] is False
        return all(name in schema["properties"] and fits(schema["properties"][name], item) for name, item in value.items())
    return value is None


def is_unicode(value):
    return not any("\ud800" <= letter <= "\udfff" for letter in json.dumps(value, ensure_ascii=False))


@settings(max_examples=250, deadline=None, derandomize=True)
@given(JSON | NEARLY | VALID)
def test_the_schema_accepts_what_captions_accept(value):
    assert (accepted(Caption.from_json, value) is not None) == (fits(caption_json_schema(), value) and is_unicode(value))


def test_the_schema_refuses_what_captions_refuse():
    refused = [value for value, says in VALUES if "half" not in says]
    assert not any(fits(caption_json_schema(), value) for value in refused)


def test_the_schema_is_plain_json_and_names_every_field():
    schema = caption_json_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert list(schema["properties"]) == [field.name for field in dataclasses.fields(Caption)]
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_what_curation_writes_is_a_caption():
    written = curation.template({"motion_mean": 0.5, "luma": 20.0, "seconds": 3.0})
    caption = Caption.from_json({**written, "source": "template"})
    assert (caption.source, caption.lighting) == ("template", "dim light")


def test_curation_takes_every_field_of_a_sidecar_clean_and_leaves_out_what_is_no_field(tmp_path):
    said = {**{name: f" {name}\n" for name in FIELDS}, "quality_tags": ["sharp", ""], "mood": "x", "source": "someone"}
    (tmp_path / "1.json").write_text(json.dumps({"shots": [{"start_seconds": 0, "end_seconds": 1, "caption": said}]}))
    (entry,) = curation.read_sidecar(tmp_path / "1.json")
    assert entry.caption == {**{name: name for name in FIELDS}, "quality_tags": ("sharp",)}


def test_encoding_draws_a_clips_prompts_by_its_id_or_takes_the_fields_that_are_named():
    rows = [{"id": name, "caption": json.dumps({**dataclasses.asdict(NAMED), "source": "sidecar"})} for name in "abc"]
    drawn = EncodeConfig(buckets=(), text=None, assemble=dataclasses.asdict(MIXED), variants=3, seed=5)
    prompts = prompts_of(rows, drawn)
    assert [prompts[n] for n in range(3)] == [list(prompt_variants(NAMED, MIXED, seed=5, sample_id=name, count=3)) for name in "abc"]
    assert len({tuple(variants) for variants in prompts.values()}) == 3
    named = EncodeConfig(buckets=(), text=None, prompts=(("short",), ("dense", "style")))
    assert prompts_of(rows, named)[2] == ["short", "dense, style"]


def test_markup_stays_text_and_reports_escape_it(tmp_path):
    caption = parse_caption(json.dumps({"short": MARKUP, "source": MARKUP}))
    assert caption.short == MARKUP
    row = {"id": "1", "source": "1.mp4", "caption": json.dumps(dataclasses.asdict(caption)), "num_frames": 8, "fps": 8.0}
    tables = Tables(manifest=[row], features=[{"id": "1", "thumbnail": b""}], rejected=[], files=[], errors=[])
    (tmp_path / "videos").mkdir()
    prompt = make_prompt(dataclasses.asdict(caption), ("short",))
    (tmp_path / "videos" / "index.json").write_text(json.dumps([{"file": "0.mp4", "prompt": prompt}]))
    report.write_report(tmp_path)
    for shown in (page(tables, seconds={}), (tmp_path / "report.html").read_text()):
        assert html.escape(MARKUP) in shown
        assert MARKUP not in shown
        assert "alert(" not in shown.replace(html.escape(MARKUP), "")


# Prompts of named fields


def test_a_prompt_is_its_fields_in_the_order_asked_for():
    assert make_prompt(CAPTION, ("camera_motion", "short")) == "pan left, a red circle"


def test_missing_and_empty_fields_leave_no_trace():
    assert make_prompt(CAPTION, ("short", "lighting", "background", "dense", "style")) == "a red circle, plain"
    assert make_prompt({}, ("short",)) == ""


def test_after_a_sentence_stands_no_comma():
    caption = {"short": "A red circle moves.", "style": "plain", "lighting": "dim?", "source_tags": ["film", "16 mm"]}
    assert make_prompt(caption, ("short", "style", "lighting", "source_tags")) == "A red circle moves. plain, dim? film, 16 mm"


def test_a_field_no_caption_has_is_refused():
    with pytest.raises(UserError, match=r"no field 'shrot'. Did you mean 'short'\?"):
        make_prompt(CAPTION, ("shrot",))


@pytest.mark.parametrize("value", [7, ["a"], "x" * (MAX_CHARACTERS + 1)])
def test_a_value_that_is_no_short_text_is_refused(value):
    with pytest.raises(UserError, match="short"):
        make_prompt({"short": value}, ("short",))


# Prompts that are drawn


def one_length(*fields, **options):
    return PromptConfig(lengths={"only": {"weight": 1, "fields": fields}}, **options)


def drawn(config, caption=NAMED):
    """10,000 prompts over seeds, samples and epochs, as tuples of fields."""
    every = itertools.product(range(10), range(100), range(10))
    prompts = (assemble_prompt(caption, config, seed=seed, sample_id=f"clip {n}", epoch=epoch) for seed, n, epoch in every)
    return [tuple(prompt.split(", ")) if prompt else () for prompt in prompts]


def share_agrees(hits, expected, trials=10_000):
    """Whether a share is within four standard errors of what is expected."""
    return abs(hits / trials - expected) <= 4 * math.sqrt(expected * (1 - expected) / trials)


def test_lengths_come_as_often_as_their_weights_say():
    weights = {"short": 1, "dense": 3.0, "style": 0, "lighting": 1}
    config = PromptConfig(lengths={f"only {name}": Length(weight=weight, fields=(name,)) for name, weight in weights.items()})
    counts = collections.Counter(drawn(config))
    for name, weight in weights.items():
        assert share_agrees(counts[name,], weight / 5), name


def test_fields_are_kept_as_often_as_the_config_says_and_each_on_its_own():
    keep = {"style": 0.2, "lighting": 0.5, "source_tags": 0.9, "atmosphere": 0.0}
    prompts = drawn(one_length("short", *keep, keep=keep))
    for name, probability in keep.items():
        assert share_agrees(sum(name in prompt for prompt in prompts), probability), name
    for one, other in itertools.combinations(keep, 2):
        assert share_agrees(sum(one in prompt and other in prompt for prompt in prompts), keep[one] * keep[other]), (one, other)
    assert all("short" in prompt for prompt in prompts)


def test_prompts_are_dropped_as_often_as_the_config_says_whatever_else_is_drawn():
    lengths = {name: Length(weight=1, fields=(name, "style")) for name in ("short", "dense")}
    prompts = drawn(PromptConfig(lengths=lengths, keep={"style": 0.5}, text_dropout=0.1))
    assert share_agrees(sum(not prompt for prompt in prompts), 0.1)
    for name in lengths:
        assert share_agrees(sum(name in prompt for prompt in prompts), 0.9 * 0.5), name
        assert share_agrees(sum(prompt == (name, "style") for prompt in prompts), 0.9 * 0.25), name


def test_all_orders_of_fields_are_equally_likely():
    counts = collections.Counter(drawn(one_length("short", "style", "lighting", permute=True)))
    assert set(counts) == set(itertools.permutations(("short", "style", "lighting")))
    assert all(share_agrees(count, 1 / 6) for count in counts.values())
    kept = collections.Counter(drawn(one_length("short", "style", keep={"style": 0.5}, permute=True)))
    assert share_agrees(kept["style", "short"], 1 / 4)
    assert share_agrees(kept["short", "style"], 1 / 4)


def test_extras_are_drawn_evenly_in_number_and_kind():
    extras = ("style", "lighting", "background")
    config = PromptConfig(lengths={"medium": Length(weight=1, fields=("short",), extras=extras, extra_count=(0, 2))})
    prompts = drawn(config)
    counts = collections.Counter(map(len, prompts))
    assert set(counts) == {1, 2, 3}
    assert all(share_agrees(count, 1 / 3) for count in counts.values())
    pairs = collections.Counter(prompt for prompt in prompts if len(prompt) == 3)
    assert set(pairs) == {("short", "style", "lighting"), ("short", "style", "background"), ("short", "lighting", "background")}
    assert all(share_agrees(count, 1 / 9) for count in pairs.values())


def test_seeds_samples_and_epochs_draw_independently():
    config = one_length("short", text_dropout=0.5)
    dropped = np.array([not prompt for prompt in drawn(config)]).reshape(10, 100, 10)
    for axis in range(3):
        same = dropped == np.roll(dropped, 1, axis)
        assert share_agrees(same.sum(), 0.5), axis


def test_fields_stand_in_the_order_of_the_config_where_they_are_not_permuted():
    lengths = {"medium": Length(weight=1, fields=("style", "short"), extras=("lighting", "background", "dense"), extra_count=(2, 3))}
    order = ("style", "short", "lighting", "background", "dense")
    for prompt in drawn(PromptConfig(lengths=lengths))[:500]:
        assert list(prompt) == [name for name in order if name in prompt]


def test_one_option_changes_nothing_about_the_others():
    still = dataclasses.replace(MIXED, permute=False)
    never = dataclasses.replace(MIXED, text_dropout=0.0)
    for epoch in range(300):
        mixed, kept, every = (assemble_prompt(NAMED, c, seed=0, sample_id=7, epoch=epoch) for c in (MIXED, still, never))
        assert sorted(mixed.split(", ")) == sorted(kept.split(", "))
        assert mixed in ("", every)


PROGRAM = """
import json
from hunyuan_jax.data.captions import FIELDS, Caption
from hunyuan_jax.data.prompts import PromptConfig, assemble_prompt, prompt_variants
config = PromptConfig(lengths={"some": {"weight": 1, "fields": FIELDS}, "two": {"weight": 1, "fields": ("dense", "style")}},
                      keep=dict.fromkeys(FIELDS, 0.5), permute=True, text_dropout=0.1)
caption = Caption(**{name: name for name in FIELDS})
prompts = [assemble_prompt(caption, config, seed=3, sample_id=i, epoch=e) for i in ("a/b", "\\u00e9\\ud800", 5) for e in range(50)]
said = json.dumps([hash("text"), prompts, prompt_variants(caption, config, seed=3, sample_id="a/b", count=6)])
"""


def test_every_process_draws_the_same():
    here = {}
    exec(PROGRAM, here)
    runs = [json.loads(here["said"]), *(json.loads(run_program(f"{PROGRAM}\nprint(said)")) for _ in range(2))]
    hashes, prompts, variants = zip(*runs, strict=True)
    assert len(set(hashes)) == 3  # Python's own hashes do differ
    assert prompts[0] == prompts[1] == prompts[2]
    assert variants[0] == variants[1] == variants[2]


def test_draws_stay_what_they_are():
    config = one_length("short", "style", "lighting", keep={"style": 0.5}, permute=True)
    assert [assemble_prompt(NAMED, config, seed=1, sample_id="clip", epoch=epoch) for epoch in range(4)] == [
        "lighting, short",
        "style, short, lighting",
        "lighting, short",
        "lighting, short",
    ]


def test_samples_are_named_by_text_or_by_any_whole_number():
    def prompts(sample_id):
        return [assemble_prompt(NAMED, MIXED, seed=0, sample_id=sample_id, epoch=epoch) for epoch in range(50)]

    assert prompts(5) == prompts(np.uint32(5)) != prompts("5")
    assert prompts("1/2") != prompts("1")
    with pytest.raises(TypeError):
        prompts(5.0)


# What a caption lacks


@pytest.mark.parametrize(
    ("fields", "given", "prompt"),
    [
        (("short", "style"), {"dense": "dense", "style": "style"}, "dense, style"),
        (("dense", "style"), {"short": "short", "style": "style"}, "short, style"),
        (("short", "dense"), {"dense": "dense"}, "dense"),
        (("short", "style"), {"lighting": "lighting", "source_tags": ["film"]}, "lighting"),
        (("style",), {"short": "short", "dense": "dense", "lighting": "lighting"}, "short"),
        (("style",), {"quality_tags": ["sharp", "steady"]}, "sharp, steady"),
        (("style",), {"source": "template"}, ""),
    ],
)
def test_a_field_that_is_missing_is_replaced(fields, given, prompt):
    assert assemble_prompt(Caption(**given), one_length(*fields), seed=0, sample_id=0, epoch=0) == prompt


def test_where_every_field_is_dropped_the_first_drawn_one_stays():
    config = one_length("lighting", "style", keep={"lighting": 0, "style": 0}, permute=True)
    assert set(drawn(config)[:200]) == {("lighting",)}


def test_extras_are_drawn_from_those_that_the_caption_has():
    lengths = {"medium": Length(weight=1, fields=("short",), extras=("style", "lighting", "dense", "background"), extra_count=(1, 1))}
    assert set(drawn(PromptConfig(lengths=lengths), Caption(short="short", lighting="lighting"))) == {("short", "lighting")}
    assert set(drawn(PromptConfig(lengths=lengths), Caption(dense="dense", lighting="lighting"))[:200]) == {("dense", "lighting")}


LENGTHS = st.builds(
    lambda weight, names, split: Length(
        weight=weight, fields=names[: max(split, 1)], extras=names[max(split, 1) :], extra_count=(0, len(names[max(split, 1) :]))
    ),
    st.floats(0.01, 100),
    st.lists(st.sampled_from(PROMPT_FIELDS), min_size=1, unique=True),
    st.integers(1, 10),
)
CONFIGS = st.builds(
    PromptConfig,
    lengths=st.dictionaries(st.text(max_size=3), LENGTHS, min_size=1, max_size=3),
    keep=st.dictionaries(st.sampled_from(PROMPT_FIELDS), st.floats(0, 1)),
    permute=st.booleans(),
    max_characters=st.integers(1, 60),
)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(VALID.map(Caption.from_json), CONFIGS, st.integers(0, 2**63))
def test_a_prompt_is_one_clean_line_and_empty_only_where_the_caption_says_nothing(caption, config, seed):
    prompt = assemble_prompt(caption, config, seed=seed, sample_id="clip", epoch=0)
    assert prompt == clean_text(prompt)
    assert len(prompt) <= config.max_characters
    assert bool(prompt) == any(caption.words(name) for name in PROMPT_FIELDS)


@pytest.mark.parametrize(
    ("limit", "prompt"),
    [(19, "a red circle, plain"), (18, "a red circle"), (13, "a red circle"), (12, "a red circle"), (11, "a red"), (1, "a")],
)
def test_a_prompt_that_is_too_long_ends_at_a_whole_word(limit, prompt):
    config = one_length("short", "style", max_characters=limit)
    assert assemble_prompt(Caption.from_json(CAPTION), config, seed=0, sample_id=0, epoch=0) == prompt


@pytest.mark.parametrize(("text", "limit", "prompt"), [("circle, red", 3, "cir"), (", , b", 2, ","), (",,,", 1, ",")])
def test_a_beginning_without_a_whole_word_is_cut_and_not_empty(text, limit, prompt):
    assert assemble_prompt(Caption(short=text), one_length("short", max_characters=limit), seed=0, sample_id=0, epoch=0) == prompt


# Variants


def test_variants_are_different_and_those_that_training_would_draw():
    variants = prompt_variants(NAMED, MIXED, seed=0, sample_id="clip", count=8)
    never = dataclasses.replace(MIXED, text_dropout=0.0)
    draws = [assemble_prompt(NAMED, never, seed=0, sample_id="clip", epoch=epoch) for epoch in range(100)]
    assert variants == tuple(dict.fromkeys(draws))[:8]
    assert len(set(variants)) == 8


def test_fewer_variants_are_the_beginning_of_more():
    eight = prompt_variants(NAMED, MIXED, seed=0, sample_id="clip", count=8)
    for count in range(1, 8):
        assert prompt_variants(NAMED, MIXED, seed=0, sample_id="clip", count=count) == eight[:count]


def test_variants_are_never_dropped_and_only_as_many_as_there_are():
    config = one_length("short", "style", keep={"style": 0.5}, text_dropout=1.0)
    assert assemble_prompt(NAMED, config, seed=0, sample_id=0, epoch=0) == ""
    assert sorted(prompt_variants(NAMED, config, seed=0, sample_id=0, count=8)) == ["short", "short, style"]
    assert prompt_variants(Caption(), config, seed=0, sample_id=0, count=8) == ("",)
    with pytest.raises(UserError, match="At least 1 prompt variant is needed, not 0"):
        prompt_variants(NAMED, config, seed=0, sample_id=0, count=0)


# Configs


def test_a_section_of_a_config_file_becomes_a_prompt_config():
    medium = {"weight": 1, "fields": ["short"], "extras": ["style", "lighting"], "extra_count": [1, 2]}
    section = ConfigDict({"lengths": {"short": {"weight": 2.0, "fields": ["short"]}, "medium": medium}, "keep": {"style": 0.5}})
    config = build(PromptConfig, section, where="prompts")
    lengths = {
        "medium": Length(weight=1, fields=("short",), extras=("style", "lighting"), extra_count=(1, 2)),
        "short": Length(weight=2.0, fields=("short",)),
    }
    assert config == PromptConfig(lengths=lengths, keep={"style": 0.5})
    assert build(PromptConfig, json.loads(json.dumps(dataclasses.asdict(config))), where="prompts") == config


def test_the_order_in_which_a_config_is_written_changes_nothing():
    turned = dataclasses.replace(MIXED, lengths=dict(reversed(MIXED.lengths.items())), keep=dict(reversed(MIXED.keep.items())))
    for epoch in range(50):
        mixed, other = (assemble_prompt(NAMED, config, seed=0, sample_id=7, epoch=epoch) for config in (MIXED, turned))
        assert mixed == other


SHORT = {"weight": 1, "fields": ("short",)}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lengths": {}}, "a length with a weight above 0; the lengths are none"),
        ({"lengths": {"short": {**SHORT, "weight": 0}}}, "a length with a weight above 0; the lengths are ['short']"),
        ({"lengths": ("short",)}, "a section as lengths, not ('short',)"),
        ({"lengths": {"short": ("short",)}}, "a section as lengths.short, not ('short',)"),
        ({"lengths": {"short": {**SHORT, "wieght": 1}}}, "lengths.short.wieght is not known. Did you mean 'weight'?"),
        ({"lengths": {"short": {"weight": 1}}}, "lengths.short.fields is missing"),
        ({"lengths": {"short": {**SHORT, "weight": -1}}}, "a weight between 0 and 1000000, not -1"),
        ({"lengths": {"short": {**SHORT, "weight": math.nan}}}, "a weight between 0 and 1000000, not nan"),
        ({"lengths": {"short": {**SHORT, "weight": math.inf}}}, "a weight between 0 and 1000000, not inf"),
        ({"lengths": {"short": {**SHORT, "weight": "1"}}}, "a weight between 0 and 1000000, not '1'"),
        ({"lengths": {"short": {**SHORT, "fields": ("shrot",)}}}, "no field 'shrot'. Did you mean 'short'?"),
        ({"lengths": {"short": {**SHORT, "fields": "short"}}}, "a list as fields, not 'short'"),
        ({"lengths": {"short": {**SHORT, "fields": ()}}}, "at least one of fields"),
        ({"lengths": {"short": {**SHORT, "fields": ("short", "short")}}}, "each field once"),
        ({"lengths": {"short": {**SHORT, "extras": ("short",), "extra_count": (1, 1)}}}, "each field once"),
        ({"lengths": {"short": {**SHORT, "extras": ("source",), "extra_count": (1, 1)}}}, "no field 'source'"),
        ({"lengths": {"short": {**SHORT, "extras": ("style",)}}}, "never drawn; set extra_count"),
        ({"lengths": {"short": {**SHORT, "extra_count": (0, 1)}}}, "(least, most), at most the 0 extras, not (0, 1)"),
        ({"lengths": {"short": {**SHORT, "extras": ("style", "dense"), "extra_count": (2, 1)}}}, "(least, most)"),
        ({"lengths": {"short": {**SHORT, "extras": ("style", "dense"), "extra_count": (0.5, 1)}}}, "(least, most)"),
        ({"lengths": {"short": {**SHORT, "extras": ("style", "dense"), "extra_count": (1,)}}}, "(least, most)"),
        ({"keep": {"styel": 0.5}}, "no field 'styel'. Did you mean 'style'?"),
        ({"keep": {"style": 1.5}}, "keep.style between 0 and 1, not 1.5"),
        ({"keep": {"style": math.nan}}, "keep.style between 0 and 1, not nan"),
        ({"keep": {"style": "0.5"}}, "keep.style between 0 and 1, not '0.5'"),
        ({"keep": {"style": True}}, "keep.style between 0 and 1, not True"),
        ({"keep": 0.5}, "a section as keep, not 0.5"),
        ({"text_dropout": -0.1}, "text_dropout between 0 and 1, not -0.1"),
        ({"text_dropout": None}, "text_dropout between 0 and 1, not None"),
        ({"permute": 1}, "permute to be True or False, not 1"),
        ({"max_characters": 0}, "max_characters of at least 1, not 0"),
        ({"max_characters": 9.5}, "max_characters of at least 1, not 9.5"),
        ({"kepe": {}}, "prompts.kepe is not known. Did you mean 'keep'?"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config_that_cannot_be_is_refused(changes, says):
    assert says in refusal(lambda section: build(PromptConfig, section, where="prompts"), {"lengths": {"short": SHORT}, **changes})
