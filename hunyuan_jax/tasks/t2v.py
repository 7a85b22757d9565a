"""Text to video, and to images: flow matching of latents under a prompt. Paper section 4.6.

latents = scaling_factor * z,  z ~ the VAE's posterior;   a tenth of the prompts is replaced by the empty one, so that the
loss = mean |DiT(x_t, t, prompt) - (noise - latents)|^2    model also learns the velocity that two-pass guidance leaves from
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray
from ml_collections import ConfigDict

from hunyuan_jax import flow
from hunyuan_jax.codec import Codec, load_codec
from hunyuan_jax.data.batch import VideoBatch
from hunyuan_jax.data.buckets import Bucket
from hunyuan_jax.data.dataset import Dataset
from hunyuan_jax.data.loader import Encode
from hunyuan_jax.data.records import Latent
from hunyuan_jax.data.transforms import pad_texts, to_uint8
from hunyuan_jax.errors import UserError
from hunyuan_jax.flops import dit_step_flops
from hunyuan_jax.models.dit import DiT, DiTConfig
from hunyuan_jax.models.vae import VAEConfig
from hunyuan_jax.parallel.sharding import gathered
from hunyuan_jax.sampling import SamplingConfig, euler, guided, time_grid
from hunyuan_jax.settings import build
from hunyuan_jax.tasks.task import Params, normal_like, sample_keys
from hunyuan_jax.text_towers import TowersConfig

Prediction = Literal["velocity", "data"]

MEASURED_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class T2VLossConfig:
    """How times are drawn, how often the prompt is dropped, and whether latents are drawn from the posterior or are its mean."""

    time_mean: float = 0.0
    time_std: float = 1.0
    time_shift: float = 1.0
    time_least: float = 0.0
    text_dropout: float = 0.1
    sample_posterior: bool = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.text_dropout <= 1.0:
            raise UserError(f"loss: text_dropout must lie in [0, 1], not {self.text_dropout}.")

    @property
    def time(self) -> flow.TimeConfig:
        return flow.TimeConfig(mean=self.time_mean, std=self.time_std, shift=self.time_shift, least=self.time_least)


@dataclasses.dataclass(frozen=True)
class Text:
    """The text side of a batch of prompts, as the DiT takes it."""

    txt: Float[Array, "B L D"]
    mask: Bool[Array, "B L"]
    pooled: Float[Array, "B P"]

    def dropped(self, where: Bool[Array, "B"], null: "Text") -> "Text":
        """The empty prompt in the rows that `where` marks; `null` has one row."""
        return Text(
            jnp.where(where[:, None, None], null.txt, self.txt),
            jnp.where(where[:, None], null.mask, self.mask),
            jnp.where(where[:, None], null.pooled, self.pooled),
        )


def encode_texts(codec: Codec, prompts: Sequence[str], *, length: int) -> Text:
    """Prompts through the text tower, padded to `length` tokens."""
    return Text(*pad_texts(codec.encode_prompts(prompts), length=length))


@dataclasses.dataclass(frozen=True)
class T2VTask:
    """`null` is the empty prompt, one row: encoded once, before anything is traced.

    `prediction` says what the DiT's output means: the velocity, as in all released models, or the data, from which the velocity
    follows. A token of many more values than a small model is wide can hold no noise, which a velocity is half of, but the data.
    """

    component: ClassVar[str] = "transformer"
    critic: ClassVar[None] = None

    model: DiTConfig
    prediction: Prediction
    loss_config: T2VLossConfig
    sampling: SamplingConfig
    codec: Codec
    codec_fingerprint: dict[str, str]
    null: Text
    video: dict[str, Any]  # what is generated where nothing else is asked for: frames, height, width, interval, fps

    @classmethod
    def from_config(cls, config: ConfigDict, dataset: Dataset) -> "T2VTask":
        model = build(DiTConfig, config.model, where="model")
        folder = dataset.folder / "codec"
        codec = load_codec(folder)
        here = model.text_dim, model.pooled_dim, model.in_channels
        there = codec.text.width, codec.text.pooled_width, codec.vae.latent_channels
        if here != there:
            raise UserError(
                "model: text_dim, pooled_dim and in_channels are {}, {} and {}, but the latents in {} were encoded with "
                "{}, {} and {}; set them alike.".format(*here, dataset.folder, *there)
            )
        prediction = config.get("prediction", "velocity")
        if prediction not in get_args(Prediction):
            raise UserError(f"prediction must be one of {', '.join(get_args(Prediction))}, not {prediction!r}.")
        loss, sampling = build(T2VLossConfig, config.loss, where="loss"), build(SamplingConfig, config.sampling, where="sampling")
        if model.guidance_embed and sampling.cfg_scale != 1.0:
            raise UserError(
                f"A model with guidance_embed is told its scale; sampling.cfg_scale {sampling.cfg_scale} would guide it "
                "a second time; set sampling.cfg_scale to 1."
            )
        places = {name: place for name, place in config.get("text", {}).items() if place}
        codec = codec.with_text(codec.text.at(places))
        first = dataset.first()
        if isinstance(first, Latent) and not all(text.is_encoded for text in first.texts):
            codec.load_encoder()  # now, where an error is clear, and not in a thread that reads ahead
        null = encode_texts(codec, [""], length=config.data.text_length)
        return cls(model, prediction, loss, sampling, codec, codec.fingerprint(folder), null, config.video.to_dict())

    @classmethod
    def planned(cls, config: ConfigDict) -> "T2VTask":
        model = build(DiTConfig, config.model, where="model")
        length = config.data.text_length
        null = Text(np.zeros((1, length, model.text_dim)), np.zeros((1, length), bool), np.zeros((1, model.pooled_dim)))  # type: ignore[arg-type]
        codec = Codec(vae=VAEConfig(), vae_params=None, text=TowersConfig(language="unread", clip="unread"))
        loss, sampling = build(T2VLossConfig, config.loss, where="loss"), build(SamplingConfig, config.sampling, where="sampling")
        return cls(model, config.get("prediction", "velocity"), loss, sampling, codec, {}, null, config.video.to_dict())

    @property
    def encode_prompts(self) -> Encode:
        return self.codec.encode_prompts

    def batch_shapes(self, bucket: Bucket) -> VideoBatch:
        def array(*sizes: int, dtype: Any = jnp.float32) -> Any:
            return jax.ShapeDtypeStruct((bucket.batch, *sizes), dtype)

        latent = array(*self.codec.vae.latent_shape(*bucket.shape)[:3], self.model.in_channels)
        _, length, text_width = self.null.txt.shape
        return VideoBatch(
            sample_id=array(dtype=jnp.uint32), mean=latent, logvar=latent, txt=array(length, text_width),
            txt_mask=array(length, dtype=jnp.bool_), pooled=array(self.null.pooled.shape[1]),
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        return {
            "task": "t2v",
            "model": dataclasses.asdict(self.model),
            "prediction": self.prediction,
            "sampling": dataclasses.asdict(self.sampling),
            "text_length": self.null.txt.shape[1],
            "video": self.video,
            "codec": self.codec_fingerprint,
        }

    def keep_beside(self, workdir: Path) -> None:
        if jax.process_index() == 0:
            self.codec.save(workdir / "codec")

    def init(self, key: PRNGKeyArray) -> Params:
        m = self.model
        latents = jnp.zeros((1, *m.patch_size, m.in_channels))
        txt, mask = jnp.zeros((1, 1, m.text_dim)), jnp.ones((1, 1), bool)
        guidance = jnp.ones(1) if m.guidance_embed else None
        return DiT(m).init(key, latents, jnp.ones(1), txt, mask, jnp.zeros((1, m.pooled_dim)), guidance)["params"]

    def text_of(self, batch: VideoBatch) -> Text:
        return Text(batch.txt, batch.txt_mask, batch.pooled)

    def velocity(self, params: Params, x: Float[Array, "B T Y X C"], t: Float[Array, "B"], text: Text) -> Float[Array, "B T Y X C"]:
        guidance = jnp.full_like(t, self.sampling.guidance) if self.model.guidance_embed else None
        out: Array = DiT(self.model).apply({"params": params}, x, t, text.txt, text.mask, text.pooled, guidance)  # type: ignore[assignment]
        return flow.velocity_from_data(x, out, t) if self.prediction == "data" else out

    def latents(self, batch: VideoBatch, keys: PRNGKeyArray) -> Float[Array, "B T Y X C"]:
        """Scaled latents of a batch, from the posterior where the loss says so."""
        z = batch.mean
        if self.loss_config.sample_posterior:
            z = z + jnp.exp(0.5 * batch.logvar) * normal_like(keys, z)
        return z * self.codec.vae.scaling_factor

    def loss(self, params: Params, batch: VideoBatch, *, key: PRNGKeyArray) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        keys = jax.vmap(lambda k: jax.random.split(k, 4), out_axes=1)(sample_keys(key, batch))
        drop = jax.vmap(lambda k: jax.random.uniform(k) < self.loss_config.text_dropout)(keys[0])
        text = self.text_of(batch).dropped(drop, self.null)
        losses = self._flow_loss(params, batch, flow.draw_times(keys[1], self.loss_config.time), text, keys[2], keys[3])
        return jnp.mean(losses), {}

    def _flow_loss(
        self, params: Params, batch: VideoBatch, t: Float[Array, "B"], text: Text, posterior_keys: PRNGKeyArray, noise_keys: PRNGKeyArray
    ) -> Float[Array, "B"]:
        data = self.latents(batch, posterior_keys)
        noise = normal_like(noise_keys, data)
        predicted = self.velocity(params, flow.at_time(data, noise, t), t, text)
        return flow.flow_loss(predicted, flow.velocity(data, noise))

    def flow_loss_at(self, params: Params, batch: VideoBatch, time: float | Float[Array, ""], *, key: PRNGKeyArray) -> Float[Array, "B"]:
        """The loss of each sample at one time, with the prompt; the same noise for the same key and sample."""
        keys = jax.vmap(lambda k: jax.random.split(k, 2), out_axes=1)(sample_keys(key, batch))
        t = jnp.full(batch.sample_id.shape, time)
        return self._flow_loss(params, batch, t, self.text_of(batch), keys[0], keys[1])

    def measure(self, params: Params, batch: VideoBatch, *, key: PRNGKeyArray) -> dict[str, Float[Array, "B"]]:
        """The flow loss of each sample, averaged over fixed times."""
        # A loop of the compiled program, not of Python: the model is compiled once and not once for each time.
        losses = jax.lax.map(lambda t: self.flow_loss_at(params, batch, t, key=key), jnp.asarray(MEASURED_TIMES))
        return gathered({"flow_loss": jnp.mean(losses, axis=0)})

    def sample(
        self, params: Params, text: Text, noise: Float[Array, "B T Y X C"], *, sampling: SamplingConfig
    ) -> Float[Array, "B T2 H W 3"]:
        """Frames from noise: latents by `sample_latents`, then the VAE's decoder."""
        return self.codec.decode(self.sample_latents(params, text, noise, sampling=sampling))

    def sample_latents(
        self, params: Params, text: Text, noise: Float[Array, "B T Y X C"], *, sampling: SamplingConfig
    ) -> Float[Array, "B T Y X C"]:
        """Scaled latents from noise: Euler steps along the guided velocity."""
        rows = len(noise)
        empty = Text(*(jnp.broadcast_to(x, (rows, *x.shape[1:])) for x in (self.null.txt, self.null.mask, self.null.pooled)))
        velocity = guided(
            lambda x, t: self.velocity(params, x, t, text), lambda x, t: self.velocity(params, x, t, empty), scale=sampling.cfg_scale
        )
        return euler(velocity, noise, time_grid(sampling.steps, shift=sampling.shift))

    # Compiled once for all previews.
    @functools.cached_property
    def _sample(self) -> Any:
        return jax.jit(lambda params, text, noise: self.sample_latents(params, Text(*text), noise, sampling=self.sampling))

    @functools.cached_property
    def _decode(self) -> Any:
        return jax.jit(lambda latents: gathered(self.codec.decode(latents)))

    def seen(self, batch: VideoBatch) -> np.ndarray:
        """The clips through the VAE."""
        return to_uint8(np.asarray(self._decode(batch.mean * self.codec.vae.scaling_factor)))

    def preview(self, params: Params, batch: VideoBatch, *, key: PRNGKeyArray) -> dict[str, np.ndarray]:
        """What the model makes of the clips' prompts."""
        noise = normal_like(sample_keys(key, batch), batch.mean)
        made = self._decode(self._sample(params, (batch.txt, batch.txt_mask, batch.pooled), noise))
        return {"generated": to_uint8(np.asarray(made))}

    def work(self, batch: VideoBatch) -> dict[str, float]:
        """Tokens are those of images and texts, padding included."""
        samples, *size, _ = batch.mean.shape
        image = math.prod(-(-n // p) for n, p in zip(size, self.model.patch_size, strict=True))
        frames, text = self.codec.vae.temporal_compression * (size[0] - 1) + 1, batch.txt.shape[1]
        flops = dit_step_flops(self.model, image, text).model
        return {"frames": samples * frames, "tokens": samples * (image + text), "model_flops": samples * flops}
