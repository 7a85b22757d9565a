"""The tasks that `train.py` can run, by name: each says what is trained, by what loss, and how it is shown."""

from typing import Any

from ml_collections import ConfigDict

from hunyuan_jax.data.dataset import Dataset
from hunyuan_jax.errors import UserError, nearest
from hunyuan_jax.tasks.t2v import T2VTask
from hunyuan_jax.tasks.task import Task
from hunyuan_jax.tasks.vae import VAETask

TASKS: dict[str, Any] = {"vae": VAETask, "t2v": T2VTask}


def planned_task(config: ConfigDict) -> Task:
    """The task as far as its training step goes, without data or weights from files: to know what the step will take."""
    return _named(config).planned(config)


def make_task(config: ConfigDict, dataset: Dataset) -> Task:
    """The task that `config.task` names, from its own sections of the config; a task over latents also reads `dataset`'s codec."""
    return _named(config).from_config(config, dataset)


def _named(config: ConfigDict) -> Any:
    if config.task not in TASKS:
        raise UserError(f"Configuration task={config.task!r} is not known. {nearest(str(config.task), list(TASKS))}")
    return TASKS[config.task]
