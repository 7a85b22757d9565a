"""Laws of export: diffusers makes the same videos from what is written, and every layout holds the checkpoint's bits."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline  # noqa: E402

from configs import quickstart  # noqa: E402
from hunyuan_jax import convert, generate  # noqa: E402
from hunyuan_jax.checkpoint import Checkpoints, write_model  # noqa: E402
from hunyuan_jax.codec import Codec  # noqa: E402
from hunyuan_jax.errors import UserError  # noqa: E402
from hunyuan_jax.export import export  # noqa: E402
from hunyuan_jax.models.dit import DiTConfig  # noqa: E402
from hunyuan_jax.models.layouts import LAYOUTS  # noqa: E402
from hunyuan_jax.models.vae import VAEConfig  # noqa: E402
from hunyuan_jax.optimizer import OptimizerConfig, make_optimizer  # noqa: E402
from hunyuan_jax.parallel.mesh import MeshConfig, make_mesh  # noqa: E402
from hunyuan_jax.random_tower import RandomTowerConfig  # noqa: E402
from hunyuan_jax.sampling import SamplingConfig  # noqa: E402
from hunyuan_jax.settings import build  # noqa: E402
from hunyuan_jax.state import make_state  # noqa: E402
from hunyuan_jax.tasks.t2v import T2VLossConfig, T2VTask, encode_texts  # noqa: E402
from hunyuan_jax.tasks.vae import VAELossConfig, VAETask  # noqa: E402
from hunyuan_jax.train import check_start  # noqa: E402
from hunyuan_jax.train_step import TrainState  # noqa: E402
from hunyuan_jax.weights import open_weights  # noqa: E402

SIZE = (5, 32, 48)  # frames, height, width
TINY_VAE = VAEConfig(block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2, scaling_factor=0.7)


def random_like(tree, seed: int):
    """A tree of the same shapes in which also what starts at 0 is random."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    spread = [0.1 if leaf.ndim == 1 else float(np.prod(leaf.shape[-2:-1])) ** -0.5 for leaf in leaves]
    return structure.unflatten([jnp.asarray(s * rng.normal(size=x.shape), jnp.float32) for s, x in zip(spread, leaves, strict=True)])


def save_run(workdir: Path, task) -> None:
    """What a training run of `task` leaves, with random parameters."""
    abstract = jax.eval_shape(task.init, jax.random.key(0))
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(step=zero + 7, skipped=zero, params=random_like(abstract, 1), ema=random_like(abstract, 2), opt_state=())
    workdir.mkdir(parents=True, exist_ok=True)
    write_model(workdir, task.describe())
    task.keep_beside(workdir)
    checkpoints = Checkpoints(workdir)
    checkpoints.save(7, state, data={})
    checkpoints.close()


@pytest.fixture(scope="module")
def codec() -> Codec:
    vae_params = random_like(jax.eval_shape(VAETask(TINY_VAE, VAELossConfig()).init, jax.random.key(0)), 0)
    text = build(RandomTowerConfig, quickstart.get_config("encode").text, where="text")
    return Codec(TINY_VAE, vae_params, text)


def t2v_task(codec: Codec, **changes) -> T2VTask:
    width = codec.text.width
    model = DiTConfig(
        width=32, num_heads=2, num_double_blocks=1, num_single_blocks=2, text_dim=width, pooled_dim=width, rope_axes=(4, 6, 6),
        guidance_embed=True,
    )  # fmt: skip
    task = T2VTask(
        model=model,
        prediction="velocity",
        loss_config=T2VLossConfig(),
        sampling=SamplingConfig(steps=4, shift=5.0, guidance=3.0),
        codec=codec,
        codec_fingerprint={},
        null=encode_texts(codec, [""], length=9),
        video={"frames": SIZE[0], "height": SIZE[1], "width": SIZE[2], "fps": 8},
    )
    return dataclasses.replace(task, **changes)


@pytest.fixture(scope="module")
def run(codec, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("t2v")
    codec.save(workdir / "codec")
    save_run(workdir, t2v_task(codec, codec_fingerprint=codec.fingerprint(workdir / "codec")))
    return workdir


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_diffusers_pipeline_makes_the_same_velocity_and_frames_from_an_exported_run(run, tmp_path, weights):
    assert export(run, tmp_path, layout="diffusers", weights=weights, dtype="keep") == 7
    absent = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipeline = HunyuanVideoPipeline.from_pretrained(tmp_path, local_files_only=True, **absent)
    pipeline.set_progress_bar_config(disable=True)
    model = generate.load_model(run, weights=weights)
    prompts = ["a red circle moving left", "a square"]
    text = encode_texts(model.task.codec, prompts, length=9)
    noise = generate.noise_for([0, 1], TINY_VAE.latent_shape(*SIZE), seed=0)
    as_torch = lambda x: torch.from_numpy(np.array(x, np.float32))  # noqa: E731

    t = np.array([0.3, 0.8], np.float32)
    ours = np.asarray(model.task.velocity(model.params, noise, jnp.asarray(t), text))
    with torch.no_grad():
        theirs = pipeline.transformer(
            hidden_states=as_torch(noise).permute(0, 4, 1, 2, 3),
            timestep=1000 * torch.from_numpy(t),
            encoder_hidden_states=as_torch(text.txt),
            encoder_attention_mask=torch.from_numpy(np.array(text.mask)),
            pooled_projections=as_torch(text.pooled),
            guidance=torch.full((2,), 3000.0),
        ).sample.permute(0, 2, 3, 4, 1)
    assert np.linalg.norm(ours - theirs.numpy()) <= 1e-5 * np.linalg.norm(ours)

    frames = pipeline(
        prompt_embeds=as_torch(text.txt),
        prompt_attention_mask=torch.from_numpy(np.array(text.mask)),
        pooled_prompt_embeds=as_torch(text.pooled),
        latents=as_torch(noise).permute(0, 4, 1, 2, 3),
        num_frames=SIZE[0],
        height=SIZE[1],
        width=SIZE[2],
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="np",
    ).frames
    ours = np.asarray(model.task.sample(model.params, text, noise, sampling=model.task.sampling))
    assert ours.std() > 0.05  # there is something to see
    np.testing.assert_allclose(2 * frames - 1, np.clip(ours, -1, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["keep", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_checkpoint(run, tmp_path, layout, dtype):
    export(run, tmp_path, layout=layout, weights="ema", dtype=dtype)
    model = generate.load_model(run)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32) if dtype == "bf16" else x, model.params)
    config, params = convert.load(tmp_path / "transformer")
    assert config == model.task.model
    jax.tree.map(np.testing.assert_array_equal, params, rounded)
    assert open_weights(tmp_path / "transformer").metadata["step"] == "7"
    assert open_weights(tmp_path / "transformer").metadata["guidance_distilled"] == "true"
    assert convert.load(tmp_path / "vae", component="vae")[0].scaling_factor == TINY_VAE.scaling_factor


def test_an_exported_vae_run_is_read_by_diffusers(tmp_path):
    task = VAETask(TINY_VAE, VAELossConfig())
    save_run(tmp_path / "run", task)
    export(tmp_path / "run", tmp_path / "vae", layout="diffusers", weights="raw", dtype="keep")
    theirs = AutoencoderKLHunyuanVideo.from_pretrained(tmp_path / "vae", local_files_only=True)
    expected = random_like(jax.eval_shape(task.init, jax.random.key(0)), 1)["decoder"]["conv_out"]["conv"]["kernel"]
    ours = theirs.decoder.conv_out.conv.weight.detach().numpy()
    np.testing.assert_array_equal(np.moveaxis(ours, (0, 1), (-1, -2)), expected)


def test_a_model_that_predicts_the_data_is_exported_to_the_native_layout_alone(codec, tmp_path):
    codec.save(tmp_path / "run" / "codec")
    save_run(tmp_path / "run", t2v_task(codec, prediction="data"))
    for layout in set(LAYOUTS) - {"native"}:
        with pytest.raises(UserError, match=r"predicts data.*--to native"):
            export(tmp_path / "run", tmp_path / "out", layout=layout, weights="ema", dtype="keep")
    assert not (tmp_path / "out").exists()
    export(tmp_path / "run", tmp_path / "out", layout="native", weights="ema", dtype="keep")
    assert open_weights(tmp_path / "out" / "transformer").metadata["prediction"] == "data"


def test_a_run_whose_checkpoint_is_of_another_model_is_refused(run, tmp_path):
    said = json.loads((run / "model.json").read_text())
    said["model"]["width"] = 64
    said["model"]["rope_axes"] = [8, 12, 12]
    (tmp_path / "model.json").write_text(json.dumps(said))
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    with pytest.raises(UserError, match=r"of another model than its model\.json says"):
        export(tmp_path, tmp_path / "out", layout="diffusers", weights="ema", dtype="keep")
    with pytest.raises(UserError, match=r"python -m hunyuan_jax\.export"):
        open_weights(run)


@pytest.mark.parametrize(
    ("changes", "asked", "said"),
    [
        ({"guidance_embed": True}, {"cfg_scale": 6.0}, "--guide_twice"),
        ({"guidance_embed": False}, {"guidance": 6.0}, "Use --cfg_scale"),
    ],
)
def test_a_model_is_guided_in_the_way_it_was_trained_for(codec, changes, asked, said):
    model = dataclasses.replace(t2v_task(codec).model, **changes)
    sampling = SamplingConfig(**asked)
    with pytest.raises(UserError, match=said):
        generate.check_guidance(model, asked, sampling, twice=False)
    other = dataclasses.replace(model, guidance_embed=not model.guidance_embed)
    generate.check_guidance(other, asked, sampling, twice=False)
    if model.guidance_embed:
        generate.check_guidance(model, asked, sampling, twice=True)


@pytest.mark.parametrize("layout", ["native", "comfyui"])
def test_training_starts_from_exported_weights(run, tmp_path, layout):
    export(run, tmp_path, layout=layout, weights="ema", dtype="keep")
    model, start = generate.load_model(run), str(tmp_path / "transformer")
    check_start(model.task, start)
    state = make_state(
        model.task, make_optimizer(OptimizerConfig(learning_rate=1e-3)), key=jax.random.key(0), mesh=make_mesh(MeshConfig()), start=start
    )
    jax.tree.map(np.testing.assert_array_equal, state.params, model.params)
    jax.tree.map(np.testing.assert_array_equal, state.ema, model.params)
    assert state.step == 0


def test_training_does_not_start_from_weights_of_another_model(run, codec, tmp_path):
    export(run, tmp_path, layout="diffusers", weights="ema", dtype="keep")
    start, task = str(tmp_path / "transformer"), t2v_task(codec)
    check_start(dataclasses.replace(task, model=dataclasses.replace(task.model, remat="full", dtype="bfloat16")), start)
    with pytest.raises(UserError, match="num_single_blocks is 2 there and 3 here, guidance_embed is True there and False here"):
        check_start(dataclasses.replace(task, model=dataclasses.replace(task.model, num_single_blocks=3, guidance_embed=False)), start)
    with pytest.raises(UserError, match="predict velocity, and the config says prediction='data'"):
        check_start(dataclasses.replace(task, prediction="data"), start)
    with pytest.raises(UserError, match="holds a vae, where a transformer was expected"):
        check_start(task, str(tmp_path / "vae"))
