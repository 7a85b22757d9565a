"""Laws of records: what goes in comes out, equal records are equal bytes, and damaged bytes are said to be damaged."""

import dataclasses

import ml_dtypes
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_jax.data.records import Clip, Latent, TextStates, from_bytes, to_bytes
from hunyuan_jax.errors import UserError

RNG = np.random.default_rng(0)
CLIP = Clip(
    id="a1b2",
    video=b"\x00\xff mp4",
    fps=24.0,
    num_frames=9,
    height=64,
    width=48,
    caption={"short": "ein roter Kreis läuft"},
    camera="static shot",
    source="in/a.mp4",
    start_seconds=0.5,
    end_seconds=0.875,
    scores={"motion": 1.25},
)
TEXTS = tuple(
    TextStates(prompt=prompt, txt=RNG.normal(size=(length, 4)).astype(ml_dtypes.bfloat16), pooled=np.zeros(4, ml_dtypes.bfloat16))
    for prompt, length in (("a red circle", 3), ("", 0))
)
LATENT = Latent(
    id="a1b2/9x64x48",
    bucket=(9, 64, 48),
    fps=24.0,
    source="in/a.mp4",
    mean=RNG.normal(size=(3, 8, 6, 4)).astype(ml_dtypes.bfloat16),
    logvar=RNG.normal(size=(3, 8, 6, 4)).astype(np.float32),
    texts=TEXTS,
)


def assert_same(a: Clip | Latent | TextStates, b: Clip | Latent | TextStates) -> None:
    assert type(a) is type(b)
    for field in dataclasses.fields(a):
        here, there = getattr(a, field.name), getattr(b, field.name)
        if field.name == "texts":
            for one, other in zip(here, there, strict=True):
                assert_same(one, other)
        elif isinstance(here, np.ndarray):
            assert here.dtype == there.dtype
            assert here.shape == there.shape
            assert here.tobytes() == there.tobytes()
        else:
            assert here == there


@pytest.mark.parametrize("record", [CLIP, LATENT])
def test_a_record_comes_back_as_it_was(record):
    assert_same(from_bytes(to_bytes(record)), record)


@pytest.mark.parametrize("record", [CLIP, LATENT])
def test_equal_records_are_equal_bytes(record):
    assert to_bytes(record) == to_bytes(from_bytes(to_bytes(record)))


def test_an_array_that_lies_otherwise_in_memory_is_stored_as_it_reads():
    turned = dataclasses.replace(LATENT, mean=np.asfortranarray(LATENT.mean))
    assert to_bytes(turned) == to_bytes(LATENT)


def test_arrays_of_other_kinds_are_our_mistake():
    with pytest.raises(TypeError, match="float64"):
        to_bytes(dataclasses.replace(LATENT, mean=np.zeros((1, 1, 1, 1))))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=64))
def test_bytes_that_are_no_record_are_refused(data):
    with pytest.raises(UserError):
        from_bytes(data)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from([CLIP, LATENT]), st.data())
def test_a_cut_record_is_refused(record, data):
    whole = to_bytes(record)
    with pytest.raises(UserError):
        from_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.sampled_from([CLIP, LATENT]), st.data())
def test_a_changed_byte_is_read_or_refused_but_never_breaks_the_reader(record, data):
    damaged = bytearray(to_bytes(record))
    damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        read = from_bytes(bytes(damaged))
    except UserError:
        return
    assert isinstance(read, Clip | Latent)


@pytest.mark.parametrize(
    "change",
    [{"v": 2}, {"kind": "Audio"}, {"mean": 3}, {"mean": ["float64", [1], b"\0" * 8]}, {"mean": ["float32", [2], b"\0" * 4]}, {"new": 1}],
)
def test_fields_of_another_version_are_refused(change):
    fields = msgpack.unpackb(to_bytes(LATENT)) | change
    with pytest.raises(UserError, match="record"):
        from_bytes(msgpack.packb(fields))
