"""The processes of a run on several hosts: how one finds out that it is one of them, and joins the others.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID    set by hand, by launch/local.py or by a manifest of launch/render.py
    SLURM_...                                                     a step of several tasks; jax reads its variables
    a TPU slice of several hosts, or several slices               jax asks the environment or the metadata server about them

The first of these that is there counts. Where none is, the run has one process.
"""

import atexit
import functools
import logging
import os
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any

import jax
from jax._src.distributed import global_state  # the store that processes share at the start has no public name

from hunyuan_jax import errors
from hunyuan_jax.errors import UserError
from hunyuan_jax.parallel.lifeline import HELLO_SECONDS, LOST, Lifeline

START_SECONDS = 300  # that processes wait for the others at the start: images are pulled and disks mounted meanwhile
HEARTBEAT_SECONDS = 50  # without a sign of life, after which JAX ends all others; `lifeline.py` comes before it
SHUTDOWN_SECONDS = 30  # that a process which is done waits for the others
PARTING_SECONDS = 2  # that a process which failed stays: others with the same mistake can say it, before they lose this one
FAILED = (1, 2)  # exit codes of a process whose end the others do not share
TOGETHER_SECONDS = 10  # that a process which was asked to end waits for the others, which were asked too

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
KEY = "hunyuan_jax/lifeline"
METADATA = "http://{host}/computeMetadata/v1/instance/attributes/{key}"


def initialize() -> None:
    """Joins the other processes of this run, if there are any. Nothing may have touched a device before.

    From then on a process that fails ends at once with its own exit code, and the others within a minute of losing it.
    Raises `UserError` where the variables that say so are incomplete or wrong.
    """
    found = find(os.environ)
    if found is None:
        return
    said, arguments = found
    print(f"Joining a run of several processes ({said}); they have {START_SECONDS} s to come.", file=sys.stderr, flush=True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Its handler would take SIGTERM for itself, and a process that is told to end would train on until it is killed.
    jax.config.update("jax_enable_preemption_service", False)
    errors.leave = os._exit  # Python's own end would wait for JAX, which waits for the others
    joining: Future[None] = Future()
    threading.Thread(target=_join, args=(arguments, joining), name="joining", daemon=True).start()
    try:
        joining.result(timeout=START_SECONDS)  # here Ctrl-C is heard; within JAX it is not
    except TimeoutError:
        print(
            f"error: not all processes of this run came within {START_SECONDS} s (this is {said}). "
            "Their logs say why, if they were started; the same command tries again.",
            file=sys.stderr,
            flush=True,
        )
        errors.leave(LOST)
    lifeline = _hold_on()
    # A process that ends as usual waits for the others, which wait for it in the middle of a step.
    errors.leave = functools.partial(_end_at_once, lifeline)
    sys.excepthook = functools.partial(_say_and_end, lifeline)


def _join(arguments: Mapping[str, Any], joining: Future[None]) -> None:
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=START_SECONDS + 30,  # what JAX says then is a trace of C++
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
        joining.set_result(None)
    except BaseException as error:
        joining.set_exception(error)


def _hold_on() -> Lifeline:
    """The connections over which processes notice the loss of one."""
    number, count, client = global_state.process_id, global_state.num_processes, global_state.client
    assert number is not None
    assert count is not None
    assert client is not None
    assert global_state.coordinator_address is not None
    lifeline = Lifeline(number, count)
    try:
        if number == 0:
            client.key_value_set(KEY, lifeline.listen())
        else:
            host = global_state.coordinator_address.rpartition(":")[0].strip("[]")
            lifeline.connect(host, client.blocking_key_value_get(KEY, int(1000 * HELLO_SECONDS)))
    except OSError as error:
        logging.getLogger("absl").warning(
            "No connection to process 0 beside JAX's own (%s): the loss of a process is noticed after %d s.", error, HEARTBEAT_SECONDS
        )
    atexit.register(lifeline.part)
    return lifeline


def find(environment: Mapping[str, str]) -> tuple[str, dict[str, Any]] | None:
    """How this process is one of several, in words and as arguments of `jax.distributed.initialize`; None for a single process."""
    explicit = [name for name in (ADDRESS, COUNT, NUMBER) if environment.get(name)]
    if explicit:
        return _from_variables(environment, explicit)
    if all(name in environment for name in SLURM) and environment["SLURM_NTASKS"] != "1":
        return f"task {environment['SLURM_PROCID']} of {environment['SLURM_NTASKS']} of SLURM", {"cluster_detection_method": "slurm"}
    if (hosts := tpu_hosts(environment)) > 1:
        return f"one of {hosts} hosts with TPUs", {}
    return None


def _from_variables(environment: Mapping[str, str], given: list[str]) -> tuple[str, dict[str, Any]] | None:
    missing = [name for name in (ADDRESS, COUNT, NUMBER) if name not in given]
    if missing:
        raise UserError(
            f"A run of several processes needs {ADDRESS}, {COUNT} and {NUMBER}, but only {' and '.join(given)} is set; "
            f"set {' and '.join(missing)} too, or none of them for a run of one process."
        )
    address = environment[ADDRESS]
    host, _, port = address.rpartition(":")
    if not re.fullmatch(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]", host) or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise UserError(f"{ADDRESS} must be HOST:PORT of process 0, such as 10.0.0.1:8476, not {address!r}.")
    count, number = (_whole_number(environment, name) for name in (COUNT, NUMBER))
    if count < 1:
        raise UserError(f"{COUNT} must be at least 1, not {count}.")
    if not 0 <= number < count:
        raise UserError(f"{NUMBER} must lie between 0 and {count - 1}, since {COUNT} is {count}, and not be {number}.")
    if count == 1:
        return None
    arguments = {"coordinator_address": address, "num_processes": count, "process_id": number, "cluster_detection_method": "deactivate"}
    return f"process {number} of {count}, coordinator {address}", arguments


def _whole_number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise UserError(f"{name} must be a whole number, not {environment[name]!r}.") from None


def tpu_hosts(environment: Mapping[str, str]) -> int:
    """How many hosts share the TPU slices that this machine belongs to; 1 where jax has no TPU to use."""
    platforms = getattr(jax.config, "jax_platforms", None) or ""
    if "tpu" not in platforms.split(","):  # jax puts it there on import where it finds one
        return 1
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    slices = environment.get("MEGASCALE_NUM_SLICES")
    if not workers and "TPU_SKIP_MDS_QUERY" not in environment:
        workers = _metadata(environment, "worker-network-endpoints")
        in_metadata = re.search(r"^\s*MEGASCALE_NUM_SLICES\s*:\s*'?(\d+)", _metadata(environment, "tpu-env"), re.MULTILINE)
        slices = slices or (in_metadata[1] if in_metadata else None)
    return len((workers or "").split(",")) * int(slices or 1)


def _metadata(environment: Mapping[str, str], key: str) -> str:
    """An attribute of this virtual machine; empty where there is no such attribute and where no server answers."""
    url = METADATA.format(host=environment.get("GCE_METADATA_IP", "metadata.google.internal"), key=key)
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}), timeout=10) as answer:
            return answer.read().decode()
    except urllib.error.URLError:
        return ""


def _end_at_once(lifeline: Lifeline, code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    if code in FAILED:
        time.sleep(PARTING_SECONDS)
    else:
        leaving = threading.Thread(target=_leave_together, args=(lifeline,), daemon=True)
        leaving.start()
        leaving.join(TOGETHER_SECONDS)
    os._exit(code)


def _leave_together(lifeline: Lifeline) -> None:
    jax.distributed.shutdown()  # waits for the others; who comes by here is missed by none of them
    lifeline.part()


def _say_and_end(lifeline: Lifeline, kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    time.sleep(PARTING_SECONDS)  # a sum fails where another process is lost, and the lifeline says that in fewer words
    sys.__excepthook__(kind, error, where)
    _end_at_once(lifeline, 1)
