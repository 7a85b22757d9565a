"""Laws of the text side of the codec: tokens, the crop, statistics, and that a saved codec encodes as before."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import quickstart
from data_prep.shapes_world import ALL_TRIPLES
from hunyuan_jax.codec import Codec, load_codec
from hunyuan_jax.errors import UserError
from hunyuan_jax.models.vae import VAE, VAEConfig
from hunyuan_jax.random_tower import BOS, EOS, STATISTICS, RandomTowerConfig
from hunyuan_jax.settings import build
from hunyuan_jax.shape_detector import COLOURS, DIRECTIONS, SHAPES, short_caption

PROMPTS = ("a red circle moving left", "a blue square", "a green cross standing still", "something else: é")


@pytest.fixture(scope="module")
def codec() -> Codec:
    vae = VAEConfig(block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2)
    params = jax.jit(lambda key: VAE(vae).init(key, np.zeros((1, 5, 16, 16, 3), np.float32)))(jax.random.key(0))["params"]
    text = build(RandomTowerConfig, quickstart.get_config("encode").text, where="text")
    return Codec(vae, params, dataclasses.replace(text, tokens="bytes", pooled="last", max_bytes=36, max_tokens=36))


def test_tokens_are_the_bytes_of_the_template_and_the_states_before_the_prompt_are_cut_off(codec):
    tokens, mask = codec.text.tokenize(["é"])
    assert tokens[0, mask[0]].tolist() == [BOS, *b"Video: \xc3\xa9", EOS]
    (states,) = codec.encode_prompts(["é"])
    assert len(states.txt) == 3  # two bytes and the end of text
    np.testing.assert_array_equal(states.txt[-1], states.pooled)


def test_a_word_is_the_mean_of_its_bytes_and_of_the_space_after_it(codec):
    words = dataclasses.replace(codec, text=dataclasses.replace(codec.text, tokens="words", max_bytes=20, max_tokens=4))
    single = dataclasses.replace(codec, text=dataclasses.replace(codec.text, max_bytes=20))
    for prompt, spans in (
        ("four", [(0, 4), (4, 5)]),
        ("a red circle", [(0, 2), (2, 6), (6, 12), (12, 13)]),
        (" a  red circle too", [(0, 1), (1, 4), (4, 8), (8, 15)]),  # the fifth word and the end are cut
        ("a word that never ends", [(0, 2), (2, 7), (7, 12), (12, 18)]),
        ("", [(0, 1)]),
    ):
        (few,), (many,) = words.encode_prompts([prompt]), single.encode_prompts([prompt])
        states = many.txt.astype(np.float32)
        expected = np.stack([states[start:end].mean(axis=0) for start, end in spans])
        np.testing.assert_allclose(few.txt.astype(np.float32), expected, rtol=0.02, atol=0.02)
        np.testing.assert_array_equal(few.pooled, many.pooled)


def test_the_pooled_vector_is_the_last_state_or_the_mean_of_all(codec):
    mean = dataclasses.replace(codec, text=dataclasses.replace(codec.text, pooled="mean", max_tokens=2))
    (last,), (averaged,) = codec.encode_prompts(["a red circle"]), mean.encode_prompts(["a red circle"])
    np.testing.assert_array_equal(last.pooled, last.txt[-1])
    np.testing.assert_allclose(averaged.pooled.astype(np.float32), last.txt.astype(np.float32).mean(axis=0), rtol=0.02, atol=0.02)


def test_words_and_the_mean_say_the_same_of_a_word_in_every_prompt():
    """What the quickstart's text states rest on: nearly all their variance is a sum over the words, so that new combinations are near."""
    text = build(RandomTowerConfig, quickstart.get_config("encode").text, where="text")
    codec = Codec(VAEConfig(), None, text)
    captions = [short_caption(*t) for t in ALL_TRIPLES]
    states = codec.with_text(text.with_statistics(captions)).encode_prompts(captions)
    said = np.array(
        [[value == word for kinds, value in zip((COLOURS, SHAPES, DIRECTIONS), t, strict=True) for word in kinds] for t in ALL_TRIPLES]
    )
    for values in (np.stack([s.pooled for s in states]), np.stack([s.txt[1] for s in states]), np.stack([s.txt[2] for s in states])):
        centred = values.astype(np.float64) - values.astype(np.float64).mean(axis=0)
        sums = np.linalg.lstsq(said.astype(np.float64), centred, rcond=None)[0]
        assert np.var(centred - said @ sums) < 0.06 * np.var(centred)


def test_with_statistics_states_have_mean_0_and_variance_1_over_the_prompts(codec):
    states = codec.with_text(codec.text.with_statistics(PROMPTS)).encode_prompts(PROMPTS)
    for values in (np.concatenate([s.txt for s in states]), np.stack([s.pooled for s in states])):
        values = values.astype(np.float64)
        np.testing.assert_allclose(values.mean(axis=0), 0, atol=5e-3)  # bfloat16
        np.testing.assert_allclose(values.std(axis=0), 1, atol=5e-3)


def test_statistics_only_shift_and_scale(codec):
    plain, normal = codec.encode_prompts(PROMPTS), codec.with_text(codec.text.with_statistics(PROMPTS))
    said = {name: np.asarray(normal.text.statistics[name]) for name in STATISTICS}
    for before, after in zip(plain, normal.encode_prompts(PROMPTS), strict=True):
        undone = after.txt.astype(np.float64) * said["txt_std"] + said["txt_mean"]
        np.testing.assert_allclose(undone, before.txt.astype(np.float64), rtol=0.02, atol=0.02)


def test_a_saved_codec_encodes_as_before(codec, tmp_path):
    normal = codec.with_text(codec.text.with_statistics(PROMPTS))
    normal.save(tmp_path)
    there = load_codec(tmp_path)
    assert there.text.statistics == normal.text.statistics
    for a, b in zip(normal.encode_prompts(PROMPTS), there.encode_prompts(PROMPTS), strict=True):
        np.testing.assert_array_equal(a.txt, b.txt)
        np.testing.assert_array_equal(a.pooled, b.pooled)


def test_prompts_that_are_all_alike_have_no_statistics(codec):
    with pytest.raises(UserError, match="1 different prompts do not vary"):
        codec.with_text(codec.text.with_statistics(["a", "a"]))


@pytest.mark.parametrize("field", ["tokens", "pooled"])
def test_a_way_of_making_tokens_that_is_not_known_is_refused(codec, field):
    with pytest.raises(UserError, match=f"{field} must be one of .*, not 'syllables'"):
        dataclasses.replace(codec.text, **{field: "syllables"})


def test_statistics_of_another_width_are_refused(codec):
    with pytest.raises(UserError, match="of 64 values each"):
        dataclasses.replace(codec.text, statistics=dict.fromkeys(STATISTICS, [1.0] * 63))
