"""Laws of runs on several hosts: who a process is, that all end when one is lost, and that two processes train as one does."""

import contextlib
import dataclasses
import http.server
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from jax._src.clusters import SlurmCluster
from ml_collections import ConfigDict

from configs import quickstart
from hunyuan_jax.errors import UserError
from hunyuan_jax.metrics import read_metrics, repeatable
from hunyuan_jax.parallel import distributed, lifeline
from hunyuan_jax.parallel.distributed import ADDRESS, COUNT, NUMBER, find, tpu_hosts
from hunyuan_jax.parallel.mesh import MeshConfig, make_mesh
from hunyuan_jax.train import train
from tests.commands import ROOT
from tests.test_vae_training import MODEL, write_clips
from tests.tiny_trainings import flip_in_records

EXPLICIT = {ADDRESS: "10.0.0.1:8476", COUNT: "4", NUMBER: "3"}
TASK = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1"}
LOCAL = [sys.executable, "-m", "launch.local"]


def test_a_process_that_is_told_nothing_is_alone():
    assert find({}) is None
    assert find({"SLURM_JOB_ID": "7", "TPU_WORKER_HOSTNAMES": "a,b"}) is None


def test_variables_say_who_a_process_is():
    told = {"coordinator_address": "10.0.0.1:8476", "num_processes": 4, "process_id": 3}
    assert find(EXPLICIT)[1] == told | {"cluster_detection_method": "deactivate"}  # jax looks no further
    assert find(EXPLICIT | {COUNT: "1", NUMBER: "0"}) is None
    assert find(EXPLICIT | TASK) == find(EXPLICIT)


@pytest.mark.parametrize("given", [names for n in (1, 2) for names in itertools.combinations(EXPLICIT, n)])
def test_an_incomplete_set_of_variables_is_an_error_that_names_the_missing(given):
    with pytest.raises(UserError) as error:
        find({name: EXPLICIT[name] for name in given} | {name: "" for name in EXPLICIT if name not in given} | TASK)
    only, then = str(error.value).split("but only")[1].split(";")
    assert all((name in only) == (name in given) and (name in then) != (name in given) for name in EXPLICIT)


@pytest.mark.parametrize(
    "address", ["10.0.0.1", "host:", ":8476", "host:port", "host:0", "host:65536", "http://host:80", "a b:80", "::1:80"]
)
def test_an_address_is_a_host_and_a_port(address):
    with pytest.raises(UserError, match="must be HOST:PORT of process 0"):
        find(EXPLICIT | {ADDRESS: address})


@pytest.mark.parametrize("address", ["localhost:1", "first-node-0-0.first:8476", "[::1]:65535"])
def test_names_and_both_kinds_of_numbers_are_hosts(address):
    assert find(EXPLICIT | {ADDRESS: address})[1]["coordinator_address"] == address


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({NUMBER: "4"}, "JAX_PROCESS_ID must lie between 0 and 3, since JAX_NUM_PROCESSES is 4, and not be 4"),
        ({NUMBER: "-1"}, "between 0 and 3"),
        ({NUMBER: "first"}, "JAX_PROCESS_ID must be a whole number, not 'first'"),
        ({COUNT: "4.0"}, "JAX_NUM_PROCESSES must be a whole number, not '4.0'"),
        ({COUNT: "0", NUMBER: "0"}, "JAX_NUM_PROCESSES must be at least 1, not 0"),
    ],
)
def test_a_number_out_of_range_is_an_error_that_says_the_range(wrong, says):
    with pytest.raises(UserError, match=says):
        find(EXPLICIT | wrong)


def test_slurm_is_what_jax_takes_for_slurm(monkeypatch):
    for missing in (None, *TASK):
        task = {name: value for name, value in TASK.items() if name != missing}
        for name in TASK:
            monkeypatch.delenv(name, raising=False)
        for name, value in task.items():
            monkeypatch.setenv(name, value)
        assert (find(task) is not None) == SlurmCluster.is_env_present()
    assert find(TASK)[1] == {"cluster_detection_method": "slurm"}
    assert find(TASK | {"SLURM_NTASKS": "1"}) is None


@pytest.fixture
def tpu(monkeypatch):
    """As if jax had found a TPU."""
    monkeypatch.setattr(distributed, "jax", SimpleNamespace(config=SimpleNamespace(jax_platforms="tpu,cpu")))


@contextlib.contextmanager
def metadata_server(attributes: dict[str, str]):
    """The address of a server that answers as a virtual machine's does."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = attributes.get(self.path.removeprefix("/computeMetadata/v1/instance/attributes/"))
            self.send_response(200 if found is not None and self.headers["Metadata-Flavor"] == "Google" else 404)
            self.end_headers()
            self.wfile.write((found or "").encode())

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_tpu_hosts_are_counted_over_all_slices(tpu):
    assert tpu_hosts({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}) == 4
    assert tpu_hosts({"TPU_PROCESS_ADDRESSES": "a:1,b:1", "MEGASCALE_NUM_SLICES": "3"}) == 6
    assert tpu_hosts({"TPU_WORKER_HOSTNAMES": "localhost"}) == 1
    assert tpu_hosts({"TPU_SKIP_MDS_QUERY": "1"}) == 1
    endpoints = "a:1:10.0.0.2,b:2:10.0.0.3"
    for attributes, hosts in (
        ({"worker-network-endpoints": endpoints, "tpu-env": "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\n"}, 4),
        ({"worker-network-endpoints": endpoints, "tpu-env": "ZONE: 'z'\n"}, 2),
        ({"worker-network-endpoints": "a"}, 1),
        ({}, 1),
    ):
        with metadata_server(attributes) as address:
            assert tpu_hosts({"GCE_METADATA_IP": address}) == hosts
    assert find({"TPU_WORKER_HOSTNAMES": "a,b"})[1] == {}


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the order of a mesh asks of a device of TPU v6e."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v6 lite"
    core_on_chip: int = 0
    process_index: int = 0


def test_slices_of_tpus_share_the_data_and_nothing_else(monkeypatch):
    chips = [Chip(64 * s + 8 * y + x, s, (x, y, 0)) for s in range(2) for y in range(8) for x in range(8)]
    monkeypatch.setattr("hunyuan_jax.parallel.mesh.Mesh", lambda devices, *_, **__: devices)  # a real one holds real devices alone
    mesh = make_mesh(MeshConfig(data=4, fsdp=-1, sequence=2), chips)
    assert mesh.shape == (4, 16, 2, 1)
    assert {chip.id for chip in mesh.flat} == set(range(128))
    for part, half in enumerate(np.split(mesh, 2)):
        assert {chip.slice_index for chip in half.flat} == {part}
    neighbours = [abs(a.coords[0] - b.coords[0]) + abs(a.coords[1] - b.coords[1]) for a, b in mesh.reshape(-1, 2)]
    assert set(neighbours) == {1}
    with pytest.raises(UserError, match=r"mesh\.data=1 cannot be spread over 2 slices"):
        make_mesh(MeshConfig(data=1, fsdp=-1), chips)


def run_local(*arguments: str, processes: int = 2, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [*LOCAL, "--processes", str(processes), "--", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=300, check=False)


def test_local_processes_are_told_who_they_are():
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    told = f"import os; os.write(1, ('|'.join(os.environ[n] for n in {names}) + chr(10)).encode())"  # all at once, into one pipe
    done = run_local(sys.executable, "-c", told, processes=3)
    rows = sorted(line.split("|") for line in done.stdout.splitlines())
    assert done.returncode == 0
    assert [row[1:] for row in rows] == [["3", str(n)] for n in range(3)]
    assert len({row[0] for row in rows}) == 1
    for row in rows:
        assert find(dict(zip((ADDRESS, COUNT, NUMBER), row, strict=True))) is not None


def test_what_would_be_started_locally_is_shown():
    done = subprocess.run([*LOCAL, "--processes=2", "--port=99", "--dry-run", "--", "a", "b c"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        f"JAX_COORDINATOR_ADDRESS=127.0.0.1:99 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID={n} a 'b c'" for n in range(2)
    ]
    assert subprocess.run([*LOCAL, "--processes=0", "--", "a"], capture_output=True, check=False).returncode == 2
    missing = run_local("nothing-of-this-name")
    assert (missing.returncode, "Traceback" in missing.stderr) == (2, False)


# Process 0 waits, whatever SIGTERM says; process 1 does what it is told.
WAITS = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path(sys.argv[1], "told").touch(), sys.exit(0)))
if os.environ["JAX_PROCESS_ID"] == "1":
    while not pathlib.Path(sys.argv[1], "0").exists(): time.sleep(0.01)
    exec(sys.argv[2])
pathlib.Path(sys.argv[1], os.environ["JAX_PROCESS_ID"]).touch()
time.sleep(60)
"""


@pytest.mark.parametrize(("does", "code"), [("sys.exit(7)", 7), ("os.kill(os.getpid(), signal.SIGKILL)", 137)])
def test_the_local_process_that_fails_first_ends_the_others_and_gives_its_code(tmp_path, does, code):
    start = time.monotonic()
    assert run_local(sys.executable, "-c", WAITS, str(tmp_path), does).returncode == code
    assert (tmp_path / "told").exists()
    assert time.monotonic() - start < 15


@pytest.mark.parametrize(("first", "later", "code"), [(lifeline.LOST, 2, 2), (lifeline.LOST, lifeline.LOST, lifeline.LOST)])
def test_a_local_process_that_lost_another_may_end_before_it(first, later, code):
    late = "int(os.environ['JAX_PROCESS_ID'])"
    does = f"import os, sys, time; time.sleep(0.3 * {late}); sys.exit(({first}, {later})[{late}])"
    assert run_local(sys.executable, "-c", does).returncode == code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_reach_local_processes_and_none_is_left_behind(tmp_path, number):
    launcher = subprocess.Popen(
        [*LOCAL, "--processes", "2", "--", sys.executable, "-c", WAITS, str(tmp_path), ""], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 30
    while not ((tmp_path / "0").exists() and (tmp_path / "1").exists()) and time.monotonic() < deadline:
        time.sleep(0.02)
    children = psutil.Process(launcher.pid).children()
    assert len(children) == 2
    launcher.send_signal(number)
    assert launcher.wait(timeout=30) in (128 + number, -number)
    assert psutil.wait_procs(children, timeout=10)[1] == []


@pytest.fixture
def lifelines(monkeypatch):
    """Those of three processes, in one, and what each would have ended with."""
    monkeypatch.setattr(lifeline, "BEAT_SECONDS", 0.05)
    ends: list[list[str]] = [[], [], []]
    lines = [lifeline.Lifeline(n, 3, end=ends[n].append) for n in range(3)]
    told = lines[0].listen()
    for line in lines[1:]:
        line.connect("127.0.0.1", told)
    wait_until(lambda: len(lines[0]._names) == 2)
    yield lines, ends
    for line in lines:
        line.part()


def wait_until(what) -> None:
    deadline = time.monotonic() + 20
    while not what() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert what()


def test_all_are_told_which_process_was_lost(lifelines):
    lines, ends = lifelines
    (there,) = lines[2]._names
    there.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: ends[0] and ends[1])
    assert all(said.startswith("process 2 of 3 (") for said in (*ends[0], *ends[1]))


def test_a_process_that_has_done_its_part_is_not_missed(lifelines):
    lines, ends = lifelines
    lines[1].part()
    wait_until(lambda: len(lines[0]._names) == 1)
    lines[0].part()
    wait_until(lambda: not lines[2]._names)
    time.sleep(0.2)
    assert ends == [[], [], []]


def test_at_the_end_nobody_is_lost_who_only_goes_first():
    """Who has parted tells nobody of an end, and who was told a bye hears of none that comes after it."""
    ends: list[str] = []
    (here, one), (there, other) = socket.socketpair(), socket.socketpair()
    first = lifeline.Lifeline(0, 3, end=ends.append)
    first._add(here, "process 1 of 3")
    first._add(there, "process 2 of 3")
    first.part()
    one.close()
    first._hear(here)
    assert other.recv(100) == lifeline.BYE
    second = lifeline.Lifeline(2, 3, end=ends.append)
    second._add(other, "process 0 of 3")
    there.send(lifeline.BEAT + lifeline.BYE + lifeline.GONE + b"process 1 of 3 has ended\n")
    second._hear(other)
    assert ends == []


def test_silence_is_a_loss(lifelines, monkeypatch):
    lines, ends = lifelines
    monkeypatch.setattr(lifeline, "SILENT_SECONDS", 1.0)
    send, still = lifeline._send, set(lines[1]._names)
    monkeypatch.setattr(lifeline, "_send", lambda there, said: None if there in still else send(there, said))
    wait_until(lambda: ends[0] and ends[2])
    assert ends[0] == ends[2] == [f"process 1 of 3 ({socket.gethostname()}) has given no sign of life for 1 s"]


def test_a_process_that_stood_still_itself_takes_no_other_for_silent(lifelines, monkeypatch):
    lines, ends = lifelines
    stands, awake = [2.0], threading.Event()

    def stand_still(there):  # and reads nothing of what came meanwhile
        if stands:
            time.sleep(stands.pop())
            awake.set()

    monkeypatch.setattr(lifeline, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(lines[2], "_hear", stand_still)
    awake.wait(20)
    time.sleep(0.3)
    assert ends[2] == []


def test_who_does_not_know_the_word_is_turned_away(lifelines):
    lines, ends = lifelines
    with socket.create_connection(lines[0]._listener.getsockname()[:2], timeout=10) as stranger:
        stranger.sendall(b"mallory 1 here\n")
        assert stranger.recv(1) == b""
    assert (len(lines[0]._names), ends) == (2, [[], [], []])


def test_processes_add_over_all_devices_and_read_the_rows_that_their_devices_hold():
    done = run_local(sys.executable, "-m", "tests.several_processes", "share", JAX_NUM_CPU_DEVICES="2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(f"process {n} is content" in done.stdout for n in (0, 1))


@pytest.mark.parametrize(("processes", "case"), [(2, "1x1x4x1, heads 2"), (4, "1x1x2x2, heads 2")])
def test_processes_that_share_tokens_and_heads_find_the_loss_and_gradients_of_one_device(processes, case):
    devices = str(4 // processes)
    done = run_local(sys.executable, "-m", "tests.several_processes", "equal", processes=processes, JAX_NUM_CPU_DEVICES=devices)
    assert done.returncode == 0, done.stderr[-3000:]
    for n in range(processes):
        assert re.search(rf"process {n}: .*{case}", done.stdout), done.stdout[-3000:]  # wherever in a line: the transport writes there too


def test_a_process_that_fails_ends_with_its_code_and_takes_the_others_along():
    done = run_local(sys.executable, "-m", "tests.several_processes", "mistake")
    assert done.returncode == 2, done.stderr[-3000:]
    assert "error: this is the mistake" in done.stderr


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize(
    ("what", "lost", "how"), [("stopped", 1, "has given no sign of life for 4 s"), ("killed", 0, "has ended or can no longer be reached")]
)
def test_a_host_that_is_lost_ends_the_others_within_a_minute_with_a_line_that_names_it(tmp_path, what, lost, how):
    """With four seconds of silence in the place of the real ones. JAX's own service runs in process 0, the one that is killed."""
    processes, port = [], free_port()
    logs = [tmp_path / str(n) for n in range(2)]
    for n in range(2):
        command = [sys.executable, "-m", "tests.several_processes", what]
        environment = os.environ | {ADDRESS: f"127.0.0.1:{port}", COUNT: "2", NUMBER: str(n)}
        with logs[n].open("w") as log:
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=log))
    gone = {psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE}
    try:
        deadline = time.monotonic() + 60
        while psutil.Process(processes[lost].pid).status() not in gone and time.monotonic() < deadline:
            time.sleep(0.05)
        since = time.monotonic()
        assert processes[1 - lost].wait(timeout=60) == lifeline.LOST
        assert time.monotonic() - since < 24
        if what == "stopped":
            processes[lost].send_signal(signal.SIGCONT)
            assert processes[lost].wait(timeout=60) in (lifeline.LOST, -signal.SIGABRT)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    *_, said = logs[1 - lost].read_text().splitlines()
    assert said.startswith(f"error: process {lost} of 2 (")
    assert f") {how}" in said
    assert said.endswith("the same command continues from the newest checkpoint.")
    assert lifeline.SILENT_SECONDS + 20 <= 60


NOISY = """
import os, threading, time
from hunyuan_jax.parallel import lifeline
def write():
    while True:
        os.write(2, b"Socket closed")
threading.Thread(target=write, daemon=True).start()
time.sleep(0.1)
lifeline._say_and_end("process 0 of 2 has ended")
"""


def test_the_last_line_of_a_process_that_has_lost_another_says_so_whatever_else_is_written(tmp_path):
    """JAX's own threads meet the same loss, and write of it in the middle of lines; to a file, where no write is kept waiting."""
    for _ in range(5):
        with (tmp_path / "log").open("w") as log:
            done = subprocess.run([sys.executable, "-c", NOISY], cwd=ROOT, stderr=log, timeout=60, check=False)
        written = (tmp_path / "log").read_text()
        assert done.returncode == lifeline.LOST
        assert "Socket closed" in written
        assert written.splitlines()[-1].startswith("error: process 0 of 2 has ended. This process ends too")


ALONE = """
import signal, sys
from hunyuan_jax.errors import run_command
from hunyuan_jax.parallel import distributed
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has switched off for what it runs in the background
distributed.START_SECONDS = int(sys.argv[1])
run_command(lambda _: distributed.initialize())
"""


@pytest.mark.parametrize(("seconds", "code", "says"), [("2", lifeline.LOST, "came within 2 s"), ("100", 130, "interrupted")])
def test_who_waits_for_hosts_that_do_not_come_says_so_and_hears_ctrl_c(seconds, code, says):
    environment = os.environ | {ADDRESS: f"127.0.0.1:{free_port()}", COUNT: "2", NUMBER: "0"}
    command = [sys.executable, "-c", ALONE, seconds]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert "Joining a run of several processes" in process.stderr.readline()
        if code == 130:
            time.sleep(1)
            process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == code, said
    assert says in said
    assert "Traceback" not in said


CONFIG = """
import json
from ml_collections import ConfigDict
def get_config():
    return ConfigDict(json.loads({!r}))
"""


def test_two_processes_train_as_one_does_and_measure_preview_and_save_together(tmp_path):
    """On clips one of which is damaged for each of the two."""
    write_clips(tmp_path / "clips")
    flip_in_records(tmp_path / "clips" / "clips-0.array_record", 1, 3)
    config = quickstart.get_config("vae")
    config.start = ""
    config.model = ConfigDict({name: value for name, value in dataclasses.asdict(MODEL).items() if name != "dtype"})
    config.data.update({"path": str(tmp_path / "clips"), "held_out": 0.3})
    config.data.buckets = ({"frames": 5, "height": 16, "width": 16, "batch": 2},)
    config.train.update({"steps": 2, "log_every": 1, "checkpoint_every": 2, "measure_every": 2, "preview_every": 2, "preview_samples": 1})
    (tmp_path / "config.py").write_text(CONFIG.format(config.to_json()))
    arguments = ("hunyuan_jax.train", f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/two")
    command = [*LOCAL, "--processes", "2", "--", sys.executable, "-m", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as two:
        config.train.update({"measure_every": 0, "preview_every": 0})
        train(config, tmp_path / "one")
        said = two.communicate(timeout=300)[0]
    assert two.returncode == 0, said[-3000:]
    one, both = (read_metrics(tmp_path / run / "metrics.jsonl") for run in ("one", "two"))
    assert [row["step"] for row in both] == [1, 2, 2]
    assert [row["quarantined"] for row in both[:2]] == [1, 2]
    assert len(list((tmp_path / "two").glob("quarantine-0000[01].jsonl"))) == 2
    assert "held_out/psnr/5x16x16_db" in both[2]
    for expected, came in zip(one, both[:2], strict=True):
        assert expected.keys() == came.keys()
        for name in repeatable(expected):
            assert came[name] == pytest.approx(expected[name], rel=1e-4), name
    whole = tmp_path / "two" / "checkpoints" / "2"
    assert {path.name for path in (whole / "params").glob("ocdbt.*")} == {"ocdbt.process_0", "ocdbt.process_1"}
    previews = {path.name for path in (tmp_path / "two" / "previews").iterdir()}
    assert previews == {"step_00000000.mp4", "step_00000000.npz", "step_00000002.mp4"}
    assert json.loads((tmp_path / "two" / "environment.json").read_text())["process_count"] == 2
    assert not list((tmp_path / "two").rglob("*.tmp-*"))
