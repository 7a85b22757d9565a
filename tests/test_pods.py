"""Laws of the launchers: what they would do is shown, is what clusters take, and brings every argument to the training as it is."""

import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.commands import ROOT

RENDER = [sys.executable, str(ROOT / "launch" / "render.py")]
COMMON = {"name": "first", "image": "registry/project/hunyuan:1", "config": "configs/t2v_13b.py:image_256"}
COMMON |= {"workdir": "gs://my_bucket.1/runs/first", "data": "gs://my_bucket.1/latents"}
KINDS = {
    "tpu": COMMON | {"accelerator": "tpu-v6e-slice", "topology": "8x16"},
    "gpu": COMMON | {"nodes": "4", "gpus": "8", "workdir": "pvc://runs/first", "data": "pvc://data.set/latents"},
    "xpk": COMMON | {"cluster": "c", "tpu-type": "v6e-128"},
}
SLURM = {"name": "first", "nodes": "2", "gpus": "8", "config": "configs/t2v_13b.py:image_256", "data": "/shared/latents"}
QUEUED = COMMON | {"project": "my-project", "zone": "us-east5-b", "type": "v6e-128", "runtime": "v2-alpha-tpuv6e"}
del QUEUED["image"]
AWKWARD = ('--config.prompt=it\'s $(touch pwned) `id` $HOME \\ "q" * ;&|<>', "--config.seed=3", "", "zwei\nZeilen")


def options(values: dict[str, str]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def render(kind: str, *more: str, expect: int = 0, **changed: str) -> str:
    """What render.py prints in a dry run, to stdout, or to stderr where it is expected to fail."""
    values = KINDS[kind] | {name.replace("_", "-"): value for name, value in changed.items()}
    command = [*RENDER, kind, *options(values), "--dry-run", "--", *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (expect, False), done.stderr
    return done.stderr if expect else done.stdout


def job_of(manifest):
    (replicated,) = manifest["spec"]["replicatedJobs"]
    return replicated, replicated["template"]["spec"]


def expanded(text: str) -> str:
    """What Kubernetes makes of a word of a command: $$ is a dollar, $(NAME) is a variable's value."""
    out, i = "", 0
    while i < len(text):
        if text.startswith("$$", i):
            out, i = out + "$", i + 2
        elif text.startswith("$(", i) and ")" in text[i:]:
            out, i = out + "VALUE", text.index(")", i) + 1
        else:
            out, i = out + text[i], i + 1
    return out


@pytest.mark.parametrize(
    ("kind", "changed"), [("tpu", {}), ("tpu", {"slices": "3", "data": "pvc://data/x"}), ("gpu", {}), ("gpu", {"node_selector": "a/b=c"})]
)
def test_manifests_are_what_kubernetes_takes(kind, changed):
    """The jobs by Kubernetes' own schemas, strictly; the JobSet around them, which these do not have, by the fields it knows."""
    manifest = json.loads(render(kind, *AWKWARD, service_account="trainer", namespace="video", **changed))
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest.keys() == {"apiVersion", "kind", "metadata", "spec"}
    spec = manifest["spec"]
    assert spec.keys() == {"network", "failurePolicy", "replicatedJobs"}
    assert spec["network"].keys() <= {"enableDNSHostnames", "subdomain", "publishNotReadyAddresses"}
    assert spec["failurePolicy"].keys() == {"maxRestarts", "rules"}
    for rule in spec["failurePolicy"]["rules"]:
        assert rule == {"name": "userError", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    replicated, job = job_of(manifest)
    assert replicated.keys() == {"name", "replicas", "template"}
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": manifest["metadata"], "spec": job}
    kubernetes_validate.validate(whole, "1.37", strict=True)
    job["paralelism"] = 3
    with pytest.raises(kubernetes_validate.ValidationError, match="paralelism"):
        kubernetes_validate.validate(whole, "1.37", strict=True)


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_a_pod_mounts_what_it_writes_to_and_is_restarted_with_all_others(kind):
    _, job = job_of(json.loads(render(kind)))
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    given = dict(word.split("=", 1) for word in container["command"] if word.startswith("--"))
    for option, place in (("workdir", given["--workdir"]), ("data", given["--config.data.path"])):
        name, path = KINDS[kind][option].split("://")[1].split("/", 1)
        (volume,) = (
            v for v in pod["volumes"] if name in (v.get("persistentVolumeClaim") or v.get("csi", {}).get("volumeAttributes", {})).values()
        )
        assert place == f"{mounts[volume['name']]}/{path}"
    assert len(set(mounts.values())) == len(mounts)
    assert (pod["restartPolicy"], job["backoffLimit"], job["completionMode"]) == ("Never", 0, "Indexed")
    assert job["parallelism"] == job["completions"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    uses_bucket = job["template"].get("metadata", {}).get("annotations", {}).get("gke-gcsfuse/volumes") == "true"
    assert uses_bucket == any("csi" in volume for volume in pod["volumes"])


def test_tpu_pods_are_the_hosts_of_their_slices():
    for topology, chips, hosts in (("8x16", "4", 32), ("4x4x8", "4", 32), ("2x4", "8", 1), ("2x2", "8", 1)):
        replicated, job = job_of(json.loads(render("tpu", topology=topology, chips_per_host=chips, slices="2")))
        assert (replicated["replicas"], job["parallelism"]) == (2, hosts)
        limits = job["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert int(limits["google.com/tpu"]) * hosts == math.prod(int(side) for side in topology.split("x"))
    assert "do not divide" in render("tpu", topology="3x3", expect=2)


def test_gpu_pods_find_the_first_of_them():
    """By the names that JobSet gives to pods: JOBSET-JOB-0-0 in the domain JOBSET."""
    manifest = json.loads(render("gpu", nodes="3"))
    replicated, job = job_of(manifest)
    pod = job["template"]["spec"]["containers"][0]
    told = {variable["name"]: variable for variable in pod["env"]}
    name = manifest["metadata"]["name"]
    host, port = told["JAX_COORDINATOR_ADDRESS"]["value"].split(":")
    assert host == f"{name}-{replicated['name']}-0-0.{name}"
    assert {"containerPort": int(port)} in pod["ports"]
    assert int(told["JAX_NUM_PROCESSES"]["value"]) == job["parallelism"] == 3
    field = told["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.annotations['batch.kubernetes.io/job-completion-index']"


@pytest.fixture(scope="module")
def module():
    sys.path.insert(0, str(ROOT / "launch"))
    import render

    yield render
    sys.path.remove(str(ROOT / "launch"))


@settings(max_examples=200, deadline=None)
@given(more=st.lists(st.text(alphabet="$(){}ab '\"\\\n-", max_size=12), max_size=4))
def test_every_argument_reaches_the_training_as_it_is(module, more):
    manifest = module.manifest_of(module.parse(["gpu", *options(KINDS["gpu"]), "--", *more]))
    _, job = job_of(json.loads(json.dumps(manifest)))
    command = [expanded(word) for word in job["template"]["spec"]["containers"][0]["command"]]
    assert command[:4] == ["python", "-m", "hunyuan_jax.train", "--stopped_code=143"]
    assert command[len(command) - len(more) :] == more
    run = module.Run.from_options(module.parse(["xpk", *options(KINDS["xpk"]), "--", *more]))
    assert shlex.split(module.xpk_command(run, cluster="c", tpu_type="t", slices=1, project="", zone="")[-1])[-len(more) or 99 :] == more


def test_xpk_gets_a_command_of_its_own():
    words = shlex.split(render("xpk", *AWKWARD, project="p", zone="us-east5-b"))
    assert words[:3] == ["xpk", "workload", "create"]
    given = dict(word.removeprefix("--").split("=", 1) for word in words[3:])
    assert given["tpu-type"] == "v6e-128"
    assert shlex.split(given["command"])[-len(AWKWARD) :] == list(AWKWARD)


@pytest.mark.parametrize(
    ("kind", "changed", "says"),
    [
        ("tpu", {"name": "First"}, "--name must be at most 63 of a-z, 0-9 and '-', with a letter first and no '-' last, not 'First'"),
        ("tpu", {"name": "1st"}, "--name"),
        ("tpu", {"name": "first-"}, "--name"),
        ("tpu", {"name": "a" * 64}, "--name"),
        ("tpu", {"name": "a" * 50}, "--name must be shorter by 4"),
        ("tpu", {"name": "a\nb"}, "--name"),
        ("tpu", {"namespace": "kube.system"}, "--namespace"),
        ("tpu", {"service_account": "a_b"}, "--service-account"),
        ("tpu", {"image": "a b"}, "--image must be the address of a container image"),
        ("tpu", {"image": "--privileged"}, "expected one argument"),
        ("tpu", {"topology": "4*4"}, "--topology must be chips along each side, such as 4x4 or 4x4x8, not '4*4'"),
        ("tpu", {"accelerator": "tpu-v6e"}, "tpu-v6e-slice"),
        ("tpu", {"slices": "0"}, "--slices must be at least 1, not 0"),
        (
            "tpu",
            {"workdir": "/runs/first"},
            "--workdir must be gs://BUCKET/PATH or pvc://CLAIM/PATH, which outlives the pods, not '/runs/first'",
        ),
        ("tpu", {"workdir": "gs://My/runs"}, "a bucket's name"),
        ("tpu", {"data": "gs://bucket/../other"}, "--data must stay within"),
        ("gpu", {"data": "pvc://a_b/x"}, "--data"),
        ("gpu", {"nodes": "0"}, "--nodes must be at least 1, not 0"),
        ("gpu", {"node_selector": "pool"}, "--node-selector must be LABEL=VALUE"),
        ("xpk", {"max_restarts": "-1"}, "--max-restarts"),
    ],
)
def test_what_a_cluster_would_refuse_is_refused_here(kind, changed, says):
    said = render(kind, expect=2, **changed)
    assert says in said
    assert "error: " in said


def programs(folder: Path, **scripts: str) -> dict[str, str]:
    """An environment in which these programs, written for bash, are found first; each notes its words in FOLDER/log."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, script in scripts.items():
        path = folder / "bin" / name
        path.write_text(f'#!/usr/bin/env bash\n(printf "%q " {name} "$@"; echo) >>"{folder}/log"\n{script}\n')
        path.chmod(0o755)
    return os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


def log_of(folder: Path) -> list[list[str]]:
    """The words of each program that was run."""
    path = folder / "log"
    return [words_of(line) for line in path.read_text().splitlines()] if path.exists() else []


def words_of(line: str) -> list[str]:
    """A line of bash's words, read by bash."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize(
    ("state", "calls"), [("", ["get", "apply"]), ("Failed", ["get", "delete", "apply"]), ("Completed", ["get", "delete", "apply"])]
)
def test_a_manifest_takes_the_place_of_an_ended_run_and_leaves_one_at_work_alone(tmp_path, state, calls):
    kubectl = f'case "$1" in get) printf %s "{state}" ;; apply) cat >"{tmp_path}/applied" ;; esac'
    command = [*RENDER, "gpu", *options(KINDS["gpu"]), "--namespace=video"]
    assert subprocess.run(command, env=programs(tmp_path, kubectl=kubectl), check=False).returncode == 0
    assert [words[1] for words in log_of(tmp_path)] == calls
    assert json.loads((tmp_path / "applied").read_text()) == json.loads(render("gpu", namespace="video"))


def test_a_missing_program_is_one_clear_error(tmp_path):
    command = [*RENDER, "gpu", *options(KINDS["gpu"])]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "kubectl is not installed here" in done.stderr


def bash(script: str, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "launch" / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def slurm(tmp_path: Path, *arguments: str, code: int = 0, state: str = "RUNNING", **variables: str) -> list[list[str]]:
    """What is run where a job is submitted, and then runs, with a training that ends with `code` and leaves the job in `state`."""
    job = f'cat >"{tmp_path}/job" && cd / && SLURM_JOB_ID=7 bash "{tmp_path}/job"'
    srun = 'while [[ "$1" == --* ]]; do shift; done; exec "$@"'
    scripts = {"sbatch": job, "srun": srun, "scontrol": "", "squeue": f"echo {state}", "python": f"exit {code}"}
    environment = programs(tmp_path, **scripts) | {"VENV": str(tmp_path)} | variables
    values = options(SLURM | {"workdir": f"{tmp_path}/my runs/100%"})
    done = bash("slurm.sh", *values, *arguments, "--", *AWKWARD, environment=environment)
    assert done.returncode == code, done.stderr
    return log_of(tmp_path)


def test_slurm_runs_one_process_for_each_gpu_with_its_arguments_as_they_are(tmp_path):
    sbatch, srun, python = slurm(tmp_path, "--partition=gpu", "--time", "2-00:00:00")
    assert {"--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--requeue", "--partition=gpu", "--time=2-00:00:00"} <= set(sbatch)
    assert f"--output={tmp_path}/my runs/100%%/slurm-%j.log" in sbatch
    assert (tmp_path / "my runs" / "100%").is_dir()
    assert srun[3:] == [str(tmp_path / "bin" / "python"), *python[1:]]
    assert python[1:4] == ["-m", "hunyuan_jax.train", "--stopped_code=143"]
    assert f"--workdir={tmp_path}/my runs/100%" in python
    assert python[-len(AWKWARD) :] == list(AWKWARD)
    assert not (Path("/") / "pwned").exists()


@pytest.mark.parametrize(
    ("code", "restarts", "state", "again"),
    [
        (0, 0, "RUNNING", False),
        (1, 0, "RUNNING", True),
        (134, 99, "RUNNING", True),
        (1, 100, "RUNNING", False),
        (2, 0, "RUNNING", False),
        (143, 0, "COMPLETING", False),
    ],
)
def test_slurm_queues_a_failed_run_again_but_no_mistake_and_nothing_cancelled(tmp_path, code, restarts, state, again):
    calls = [words for words in slurm(tmp_path, code=code, state=state, SLURM_RESTART_COUNT=str(restarts)) if words[0] != "squeue"]
    assert [words[0] for words in calls] == ["sbatch", "srun", "python"] + ["scontrol"] * again
    assert not again or calls[-1] == ["scontrol", "requeue", "7"]


def test_what_slurm_would_get_is_shown(tmp_path):
    done = bash("slurm.sh", *options(SLURM | {"workdir": f"{tmp_path}/runs"}), "--dry-run", "--", *AWKWARD)
    assert done.returncode == 0
    assert done.stdout.splitlines()[0] == f"mkdir -p {tmp_path}/runs"
    assert done.stdout.splitlines()[1].startswith("sbatch --job-name=first --nodes=2")
    assert not (tmp_path / "runs").exists()


# Cloud TPU's command: it gives one state after the other, and hosts are folders of this machine. Installing is left out.
GCLOUD = """
case "$*" in
*queued-resources\\ describe*)
    head -n 1 "$FOLDER/states"
    sed -i 1d "$FOLDER/states"
    ;;
*tpu-vm\\ ssh*)
    for word in "$@"; do case "$word" in --command=*) command="${word#--command=}" ;; esac; done
    [[ "$command" == *"tar --extract"* ]] || { cd "$FOLDER/home" && HOME="$FOLDER/home" bash -c "$command"; }
    ;;
esac
"""


def queued(tmp_path: Path, *states: str, code: int = 0) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """What tpu_queued.sh says and runs, with a training that ends with `code`."""
    environment = programs(tmp_path, gcloud=GCLOUD, python=f"echo trained; exit {code}") | {"FOLDER": str(tmp_path), "WAIT_SECONDS": "0"}
    (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
    venv = tmp_path / "home" / "hunyuan_jax" / ".venv"
    venv.mkdir(parents=True)
    (venv / "bin").symlink_to(tmp_path / "bin")
    done = bash("tpu_queued.sh", *options(QUEUED), "--spot", "--", *AWKWARD, environment=environment)
    return done, log_of(tmp_path)


def steps_of(calls: list[list[str]]) -> list[str]:
    return [
        words[words.index("queued-resources" if "queued-resources" in words else "tpu-vm") + 1] for words in calls if words[0] == "gcloud"
    ]


def test_a_slice_is_queued_filled_and_trained_on_with_all_arguments_as_they_are(tmp_path):
    done, calls = queued(tmp_path, "", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    assert done.returncode == 0, done.stderr
    assert steps_of(calls) == ["describe", "create", *["describe"] * 3, "scp", "ssh", "ssh", "ssh"]
    create = next(words for words in calls if "create" in words)
    assert {"--node-id=first", "--accelerator-type=v6e-128", "--runtime-version=v2-alpha-tpuv6e", "--spot"} <= set(create)
    assert [word for words in calls for word in words if word.startswith("--worker")] == ["--worker=all"] * 3 + ["--worker=0"]
    (python,) = (words for words in calls if words[0] == "python")
    assert python[1:4] == ["-m", "hunyuan_jax.train", "--stopped_code=143"]
    assert {"--workdir=/mnt/gs/my_bucket.1/runs/first", "--config.data.path=/mnt/gs/my_bucket.1/latents"} <= set(python)
    assert python[-len(AWKWARD) :] == list(AWKWARD)
    assert done.stdout.splitlines()[-1] == "trained"


def test_a_preempted_slice_is_queued_anew_and_the_training_s_code_is_the_launcher_s(tmp_path):
    done, calls = queued(tmp_path, "SUSPENDED", "ACTIVE", code=7)
    assert steps_of(calls)[:4] == ["describe", "delete", "create", "describe"]
    assert done.returncode == 7


def test_what_a_slice_would_get_is_shown():
    done = bash(
        "tpu_queued.sh", *options(QUEUED), "--reserved", "--dry-run", "--", *AWKWARD, environment=os.environ | {"PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 0, done.stderr
    shown = [words_of(line) for line in done.stdout.splitlines()]
    assert [words[0] for words in shown] == ["gcloud", "git", "gcloud", "gcloud", "gcloud", "gcloud"]
    assert steps_of(shown) == ["create", "scp", "ssh", "ssh", "ssh"]
    for words in shown[3:]:
        command = next(word for word in words if word.startswith("--command=")).removeprefix("--command=")
        assert subprocess.run(["bash", "-n"], input=command, text=True, check=False).returncode == 0
    deleting = bash("tpu_queued.sh", "--name=first", "--project=my-project", "--zone=us-east5-b", "--delete", "--dry-run")
    assert words_of(deleting.stdout)[3:6] == ["queued-resources", "delete", "first"]


@pytest.mark.parametrize(
    ("script", "changed", "says"),
    [
        ("tpu_queued.sh", {"name": "First"}, "--name must be at most 63"),
        ("tpu_queued.sh", {"zone": "us;id"}, "--zone must be a zone"),
        ("tpu_queued.sh", {"type": "tpu7x-8"}, "--type must be a slice"),
        ("tpu_queued.sh", {"workdir": "/runs"}, "--workdir must be gs://BUCKET/PATH, which outlives the slice, not '/runs'"),
        ("tpu_queued.sh", {"workdir": ""}, "--workdir is missing"),
        ("slurm.sh", {"nodes": "many"}, "--nodes must be a number of nodes, not 'many'"),
        ("slurm.sh", {"workdir": "runs"}, "--workdir must be an absolute path"),
        ("slurm.sh", {"name": "a b"}, "--name"),
        ("slurm.sh", {"partitoin": "gpu"}, "--partitoin is not known. Known: name nodes"),
        ("slurm.sh", {"dry-run": "yes"}, "Argument yes was not understood"),
    ],
)
def test_what_is_wrong_with_a_script_s_arguments_is_said_before_anything_is_run(script, changed, says):
    values = (QUEUED if script == "tpu_queued.sh" else SLURM | {"workdir": "/shared/runs"}) | changed
    done = bash(script, *options(values), environment=os.environ | {"PATH": "/usr/bin:/bin"})
    assert done.returncode == 2
    assert says in done.stderr


def test_the_commands_of_the_page_on_launching_are_taken():
    page = (ROOT / "launch" / "README.md").read_text()
    lines = [line for block in page.split("```")[1::2] for line in block.replace("\\\n", " ").splitlines()]
    ours = [line for line in lines if line.startswith(("bash launch/", "python3 launch/"))]
    assert all(
        any(name in line for line in ours) for name in ("tpu_queued.sh", "slurm.sh", "render.py tpu", "render.py gpu", "render.py xpk")
    )
    names = {"PROJECT": "my-project", "ZONE": "us-east5-b", "BUCKET": "my-runs", "ACCOUNT": "a@b.c", "IMAGE": "registry/hunyuan/train:1"}
    for line in ours:
        done = subprocess.run(
            ["bash", "-c", f"{line} --dry-run"], cwd=ROOT, env=os.environ | names, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (line, done.stderr)


def test_the_image_has_what_the_training_imports():
    copied = [line.split()[1] for line in (ROOT / "launch" / "Dockerfile").read_text().splitlines() if line.startswith("COPY")]
    assert {"requirements.txt", "hunyuan_jax", "configs"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
