"""What a task is: a way to initialise parameters, a loss, metrics on held-out data, and a preview."""

from pathlib import Path
from typing import Any, ClassVar, Protocol

import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from ml_collections import ConfigDict

from hunyuan_jax.data.batch import VideoBatch
from hunyuan_jax.data.buckets import Bucket
from hunyuan_jax.data.dataset import Dataset
from hunyuan_jax.data.loader import Encode

Params = Any


class Task(Protocol):
    """The interface that `train.py` runs; tasks are pure, all state lives in the training state.

    `component` is what weights of the model are called in files, `model` its config.
    """

    component: ClassVar[str]

    @property
    def model(self) -> Any: ...

    @property
    def critic(self) -> Any:
        """How a critic is trained beside the model (`CriticConfig`), None where there is none."""

    @property
    def encode_prompts(self) -> Encode | None:
        """Makes the text states of records that have none; None for a task without prompts."""

    @classmethod
    def from_config(cls, config: ConfigDict, dataset: Dataset) -> "Task":
        """The task from its sections of a config; raises `UserError` for what cannot be."""

    @classmethod
    def planned(cls, config: ConfigDict) -> "Task":
        """The same as far as the training step goes, with zeros for what comes from data and files."""

    def batch_shapes(self, bucket: Bucket) -> VideoBatch:
        """A batch of the bucket without memory, float32, sharded nowhere."""

    def describe(self) -> dict[str, Any]:
        """What the parameters mean, as JSON values: kept beside checkpoints, compared on resume, read by `generate`."""

    def keep_beside(self, workdir: Path) -> None:
        """Writes beside the checkpoints what using the parameters takes besides them."""

    def init(self, key: PRNGKeyArray) -> Params:
        """Fresh parameters, float32."""

    def loss(self, params: Params, batch: VideoBatch, *, key: PRNGKeyArray) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The loss of a batch and what is logged beside it."""

    def measure(self, params: Params, batch: VideoBatch, *, key: PRNGKeyArray) -> dict[str, Float[Array, "B"]]:
        """Metrics of each held-out sample."""

    def seen(self, batch: VideoBatch) -> np.ndarray:
        """The clips of a batch as the model sees them, uint8 [N T H W 3]."""

    def preview(self, params: Params, batch: VideoBatch, *, key: PRNGKeyArray) -> dict[str, np.ndarray]:
        """Named videos, uint8 [N T H W 3], that show what the parameters make of these clips; always the same for the same key."""

    def work(self, batch: VideoBatch) -> dict[str, float]:
        """What a step of such a batch, of which shapes suffice, goes through: `frames`, `tokens` if there are any, `model_flops`."""


def sample_keys(key: PRNGKeyArray, batch: VideoBatch) -> PRNGKeyArray:
    """One key for each sample, by its id: the noise of a sample does not depend on where in a batch it stands."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(batch.sample_id)


def normal_like(keys: PRNGKeyArray, x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """Standard normal noise in the shape of `x`, a key for each sample."""
    return jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(keys)
