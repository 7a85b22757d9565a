"""The tasks that `train.py` can run, by name: each says what is trained, by what loss, and how it is shown."""

from typing import Any

from ml_collections import ConfigDict

from hunyuan_jax.data.dataset import Dataset
from hunyuan_jax.errors import UserError, nearest
from hunyuan_jax.tasks.t2v import T2VTask
from hunyuan_jax.tasks.task import Task
from hunyuan_jax.tasks.vae import VAETask

TASKS: dict[str, Any] = {"vae": VAETask, "t2v": T2VTask}


def make_task(config: ConfigDict, dataset: Dataset) -> Task:
    """The task that `config.task` names, from its own sections of the config; a task over latents also reads `dataset`'s codec."""
    if config.task not in TASKS:
        raise UserError(f"Configuration task={config.task!r} is not known. {nearest(str(config.task), list(TASKS))}")
    return TASKS[config.task].from_config(config, dataset)
