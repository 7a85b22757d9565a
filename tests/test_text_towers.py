"""Prompts through encoders with weights: the states are those of the released pipeline, and no others are ever taken for them."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import t2v_13b
from data_prep.encode import EncodeConfig, identity, prompts_of
from hunyuan_jax.codec import Codec, load_codec, text_config
from hunyuan_jax.data.buckets import Bucket
from hunyuan_jax.errors import UserError
from hunyuan_jax.models.vae import VAE, VAEConfig
from hunyuan_jax.models.vae_tiling import Tiling
from hunyuan_jax.settings import build
from hunyuan_jax.templates import released_template
from hunyuan_jax.text_towers import LENGTH_STEP, TowersConfig
from tests.commands import run_program
from tests.tiny_towers import make_towers, save_towers

PROMPTS = ["a red circle moves left", "", "a blue square stands still " * 40, "green"]
OWN = "A video is described here: {} <end>"


@pytest.fixture(scope="module")
def models():
    return make_towers()


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_towers(models, root)
    return root


@pytest.fixture(scope="module")
def config(folders):
    return TowersConfig(language=str(folders / "language"), clip=str(folders / "clip"), dtype="float32", prompts_at_once=3)


@pytest.fixture(scope="module")
def encoded(config):
    return config.load().encode(PROMPTS)


def relative_error(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours, np.float32) - theirs).max() / np.abs(theirs).max())


def theirs_of(models, template, crop_start: int, kept: int):
    """The released pipeline's own functions on these models: states, mask, and CLIP's vectors."""
    import torch
    from diffusers import HunyuanVideoPipeline

    pipeline = HunyuanVideoPipeline.__new__(HunyuanVideoPipeline)
    for name, suffix in (("language", ""), ("clip", "_2")):
        for part, value in zip(("text_encoder", "tokenizer"), models[name], strict=True):
            object.__setattr__(pipeline, part + suffix, value)
    how = {"device": torch.device("cpu"), "dtype": torch.float32}
    with torch.no_grad():
        states, mask = pipeline._get_llama_prompt_embeds(
            PROMPTS, {"template": template, "crop_start": crop_start}, max_sequence_length=kept, **how
        )
        pooled = pipeline._get_clip_prompt_embeds(PROMPTS, max_sequence_length=16, **how)
    return states.numpy(), mask.numpy().astype(bool), pooled.numpy()


def test_states_and_mask_are_those_of_the_released_pipeline(models, config, encoded):
    """Also of a prompt that is cut, of the empty one, and of a batch of different lengths. Ours are kept in bfloat16."""
    template = released_template("t2v_video")
    states, mask, pooled = theirs_of(models, template.text, template.crop_start, template.max_tokens - template.crop_start)
    lengths = [len(ours.txt) for ours in encoded]
    assert lengths == mask.sum(axis=1).tolist()
    assert max(lengths) == template.max_tokens - template.crop_start == config.kept_tokens
    for ours, txt, valid, vector in zip(encoded, states, mask, pooled, strict=True):
        assert relative_error(ours.txt, txt[valid]) <= 2**-8
        assert relative_error(ours.pooled, vector) <= 2**-8


def test_before_they_are_rounded_states_are_the_pipelines_to_float32(models, config):
    towers = config.load()
    template = towers.template
    states, mask, pooled = theirs_of(models, template.text, template.crop_start, config.kept_tokens)
    tokens = towers.tokenize(PROMPTS)
    ours, vectors = towers._states(tokens, towers.tokenize_for_clip(PROMPTS), template.max_tokens)
    for row, text in enumerate(tokens):
        assert relative_error(ours[row, template.crop_start : len(text)], states[row][mask[row]]) <= 1e-5
    assert relative_error(vectors, pooled) <= 1e-5


SPREAD = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
import numpy as np
from hunyuan_jax.text_towers import TowersConfig
towers = TowersConfig(language=FOLDERS + "/language", clip=FOLDERS + "/clip", dtype="float32", prompts_at_once=3).load()
kernel = towers._params[0]["layers_0"]["q_proj"]["kernel"]
assert kernel.addressable_shards[0].data.shape == (8, 32), kernel.sharding
for states in towers.encode(["a red circle moves left", "green"]):
    print(len(states.txt), *np.round(states.txt.astype(np.float32)[-1, :4], 2), *np.round(states.pooled.astype(np.float32)[:4], 2))
"""


def test_spread_over_devices_encoders_give_the_same(folders, encoded):
    lines = run_program(SPREAD.replace("FOLDERS", repr(str(folders)))).splitlines()
    for line, states in zip(lines, (encoded[0], encoded[3]), strict=True):
        length, *values = line.split()
        assert int(length) == len(states.txt)
        here = [*states.txt.astype(np.float32)[-1, :4], *states.pooled.astype(np.float32)[:4]]
        np.testing.assert_allclose([float(value) for value in values], here, rtol=2**-7, atol=0.006)


def test_a_prompts_states_do_not_depend_on_its_company(config, encoded):
    towers = dataclasses.replace(config, template=OWN, max_tokens=200).load()
    assert len({len(text) // LENGTH_STEP for text in towers.tokenize(PROMPTS)}) > 1
    for prompt, beside in zip(PROMPTS, towers.encode(PROMPTS), strict=True):
        (alone,) = towers.encode([prompt])
        np.testing.assert_array_equal(alone.txt, beside.txt)
        np.testing.assert_array_equal(alone.pooled, beside.pooled)
    assert [states.prompt for states in encoded] == PROMPTS


def test_an_own_template_is_cut_where_the_prompt_begins(models, config):
    own = dataclasses.replace(config, template=OWN, max_tokens=20)
    towers = own.load()
    tokenizer = models["language"][1]
    crop = towers.template.crop_start
    for prompt, tokens in zip(PROMPTS, towers.tokenize(PROMPTS), strict=True):
        assert tokenizer.decode(tokens[:crop]).endswith("described here:")
        whole = tokenizer.decode(tokenizer(OWN.replace("{}", prompt))["input_ids"][crop:])
        assert whole.startswith(tokenizer.decode(tokens[crop:]))
    assert max(len(states.txt) for states in towers.encode(PROMPTS)) == 20 == own.kept_tokens


@pytest.mark.parametrize("wrong", [{"template": "no place"}, {"template": OWN}, {"max_tokens": 5}, {"prompts_at_once": 0}, {"clip": ""}])
def test_impossible_configs_are_refused(config, wrong):
    with pytest.raises(UserError, match="text: "):
        dataclasses.replace(config, **wrong)


def test_missing_parts_are_named_with_where_they_were_looked_for(config, folders, tmp_path):
    with pytest.raises(UserError, match=f"language is missing: {tmp_path}/nowhere does not exist"):
        dataclasses.replace(config, language=str(tmp_path / "nowhere")).load()
    with pytest.raises(UserError, match=f"clip is missing: {tmp_path} holds none of"):
        dataclasses.replace(config, clip=str(tmp_path)).load()
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folders / "clip" / "config.json", bare)
    with pytest.raises(UserError, match=f"no tokenizer can be read from {bare}"):
        dataclasses.replace(config, clip_tokenizer=str(bare)).load()


def test_other_weights_or_tokenizers_are_never_taken_for_those_before(config, folders, tmp_path):
    resolved = config.resolved()
    assert (resolved.width, resolved.pooled_width) == (32, 24)
    for part, changed in (("language", "model.safetensors"), ("clip", "tokenizer.json")):
        other = shutil.copytree(folders / part, tmp_path / part)
        moved = dataclasses.replace(resolved, **{part: str(other)})
        assert moved.resolved().identity() == resolved.identity()  # the same content elsewhere
        data = bytearray((other / changed).read_bytes())
        data[-1] ^= 1
        (other / changed).write_bytes(data)
        with pytest.raises(UserError, match=f"does not hold the {part}"):
            moved.resolved()
        again = dataclasses.replace(config, **{part: str(other)})
        assert identity(EncodeConfig(buckets=(), text=fields(again))) != identity(EncodeConfig(buckets=(), text=fields(config)))


def fields(config: TowersConfig) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def test_a_codec_is_read_without_its_towers_until_a_prompt_needs_them(config, encoded, tmp_path, folders):
    vae = VAEConfig(block_out_channels=(4,), layers_per_block=1, norm_num_groups=2, spatial_compression=1, temporal_compression=1)
    params = jax.jit(lambda key: VAE(vae).init(key, jnp.zeros((1, 1, 4, 4, 3))))(jax.random.key(0))["params"]
    moved = shutil.copytree(folders, tmp_path / "models")
    places = {"language": str(moved / "language"), "clip": str(moved / "clip")}
    codec = Codec(vae, params, dataclasses.replace(config, **places).resolved())
    codec.save(tmp_path / "codec")
    identified = codec.fingerprint(tmp_path / "codec")
    shutil.rmtree(moved)

    read = load_codec(tmp_path / "codec")
    (empty,) = read.encode_prompts([""])
    np.testing.assert_array_equal(empty.txt, encoded[1].txt)
    np.testing.assert_array_equal(empty.pooled, encoded[1].pooled)
    assert read.fingerprint(tmp_path / "codec") == identified
    with pytest.raises(UserError, match="language is missing"):
        read.encode_prompts(["a red circle"])
    here = read.with_text(read.text.at({name: str(folders / name) for name in places}))
    assert here.fingerprint(tmp_path / "codec") == identified
    (states,) = here.encode_prompts(PROMPTS[:1])
    np.testing.assert_array_equal(states.pooled, encoded[0].pooled)
    with pytest.raises(UserError, match="measure_text"):
        here.text.with_statistics(PROMPTS)


def test_states_that_were_kept_are_found_without_the_encoders_and_damaged_ones_are_made_again(config, encoded, tmp_path):
    codec = Codec(VAEConfig(), None, config.resolved(), kept_states=tmp_path / "kept")
    made = codec.encode_prompts([*PROMPTS[:1], *PROMPTS])
    assert [states.prompt for states in made] == [*PROMPTS[:1], *PROMPTS]
    files = sorted((tmp_path / "kept").iterdir())
    assert len(files) == len(PROMPTS)

    gone = dataclasses.replace(codec.text, language="nowhere", clip="nowhere")
    found = dataclasses.replace(codec, text=gone).encode_prompts(PROMPTS)
    for ours, first in zip(found, made[1:], strict=True):
        np.testing.assert_array_equal(ours.txt, first.txt)
        np.testing.assert_array_equal(ours.pooled, first.pooled)
        assert ours.txt.dtype == first.txt.dtype
    other = dataclasses.replace(gone, fingerprints={**gone.fingerprints, "clip": "0"})
    with pytest.raises(UserError, match="is missing"):
        dataclasses.replace(codec, text=other).encode_prompts(PROMPTS)

    data = files[0].read_bytes()
    files[0].write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="is missing"):
        dataclasses.replace(codec, text=gone).encode_prompts(PROMPTS)
    codec.encode_prompts(PROMPTS)
    assert files[0].read_bytes() == data


@pytest.mark.parametrize("stage", t2v_13b.STAGES)
def test_every_stage_of_the_ladder_can_be_encoded_for(stage, config, folders):
    section = t2v_13b.get_config(f"encode_{stage}")
    section.text.update({"language": config.language, "clip": config.clip})
    encode = build(EncodeConfig, section, where="encode")
    train = t2v_13b.get_config(stage)
    trained = [build(Bucket, bucket, where="bucket") for bucket in train.data.buckets]
    assert [bucket.shape for bucket in trained] == [build(Bucket, bucket, where="bucket").shape for bucket in encode.buckets]
    assert text_config(encode.text).kept_tokens == train.data.text_length
    build(Tiling, encode.tiling, where="tiling").check(VAEConfig())
    caption = {"short": "A dog runs.", "dense": "A brown dog runs over wet sand.", "lighting": "evening sun", "style": "documentary"}
    prompts = prompts_of([{"id": str(n), "caption": caption} for n in range(20)], encode)
    assert {len(variants) for variants in prompts.values()} <= {1, 2, 3, 4}
    assert {"A dog runs.", "A brown dog runs over wet sand. documentary, evening sun"} <= {p for found in prompts.values() for p in found}
    section.text.clip = ""
    with pytest.raises(UserError, match="language and clip must name"):
        text_config(section.text)


def test_only_what_lies_somewhere_can_be_moved(config):
    with pytest.raises(UserError, match="Did you mean 'language_tokenizer'"):
        config.at({"language_tokeniser": "x"})


def test_a_section_with_a_language_model_is_one_with_weights(config):
    assert text_config(fields(config)) == config
