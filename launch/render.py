"""Runs a training on the pods of a Kubernetes cluster: renders its manifest as JSON, which kubectl takes like YAML, and applies it.

    python launch/render.py tpu --name NAME --image IMAGE --accelerator tpu-v6e-slice --topology 8x16 \\
        --config configs/t2v_13b.py:image_256 --workdir gs://BUCKET/runs/first --data gs://BUCKET/latents [--dry-run] [-- MORE ...]
    python launch/render.py gpu --name NAME --image IMAGE --nodes 4 --gpus 8 --config ... --workdir pvc://CLAIM/runs/first --data ...
    python launch/render.py xpk --name NAME --image IMAGE --cluster CLUSTER --tpu-type v6e-128 --config ... --workdir gs://... --data ...

A run is a JobSet: all pods start together, and when one of them fails all are started again and go on from the newest checkpoint.
MORE are further arguments of hunyuan_jax.train. A place is gs://BUCKET/PATH (by Cloud Storage FUSE on GKE) or pvc://CLAIM/PATH.
"""

import argparse
import dataclasses
import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

ACCELERATORS = ("tpu-v4-podslice", "tpu-v5-lite-podslice", "tpu-v5p-slice", "tpu-v6e-slice", "tpu7x")
COORDINATOR_PORT = 8476
LONGEST_NAME = 63  # of what becomes part of a host's name
USER_ERROR = 2  # the exit code of a mistake in the command; starting again would not help
# Several hosts write into one bucket, so none of them may trust what it remembers of it.
MOUNT_OPTIONS = "implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0"

Manifest = dict[str, Any]


class RenderError(Exception):
    """What was expected, what came and what to do."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A folder on storage that all pods share: a bucket or a claim, mounted whole, and the path in it."""

    kind: str  # gs or pvc
    name: str
    path: str

    @classmethod
    def parse(cls, text: str, *, option: str) -> "Place":
        found = re.fullmatch(r"(gs|pvc)://([^/]+)/*(.*)", text)
        if not found:
            raise RenderError(f"--{option} must be gs://BUCKET/PATH or pvc://CLAIM/PATH, which outlives the pods, not {text!r}.")
        kind, name, path = found.groups()
        if kind == "gs" and not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", name):
            raise RenderError(f"--{option}: a bucket's name is 3 to 63 of a-z, 0-9, '-', '_' and '.', not {name!r}.")
        if kind == "pvc":
            check_name(name, option=option, dots=True)
        if ".." in path.split("/"):
            raise RenderError(f"--{option} must stay within its bucket or claim, and {text!r} goes up by '..'.")
        return cls(kind, name, path.rstrip("/"))

    @property
    def mount(self) -> str:
        return f"/mnt/{self.kind}/{self.name}"

    @property
    def in_pod(self) -> str:
        return f"{self.mount}/{self.path}".rstrip("/")

    def volume(self) -> Manifest:
        """What is mounted, but for the volume's name."""
        if self.kind == "pvc":
            return {"persistentVolumeClaim": {"claimName": self.name}}
        attributes = {"bucketName": self.name, "mountOptions": MOUNT_OPTIONS}
        return {"csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What is trained and under which name; `more` are further arguments of the training."""

    name: str
    image: str
    config: str
    workdir: Place
    data: Place
    namespace: str
    service_account: str
    max_restarts: int
    more: tuple[str, ...]

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> "Run":
        check_name(options.name, option="name")
        check_name(options.namespace, option="namespace")
        if options.service_account:
            check_name(options.service_account, option="service-account", dots=True)
        if not re.fullmatch(r"[A-Za-z0-9][\w.:/@-]*", options.image, re.ASCII):
            raise RenderError(
                f"--image must be the address of a container image, such as REGISTRY/PROJECT/hunyuan:1, not {options.image!r}."
            )
        return cls(
            name=options.name,
            image=options.image,
            config=options.config,
            workdir=Place.parse(options.workdir, option="workdir"),
            data=Place.parse(options.data, option="data"),
            namespace=options.namespace,
            service_account=options.service_account,
            max_restarts=at_least(0, options.max_restarts, option="max-restarts"),
            more=tuple(options.more),
        )

    @property
    def command(self) -> list[str]:
        where = [f"--workdir={self.workdir.in_pod}", f"--config.data.path={self.data.in_pod}"]
        return ["python", "-m", "hunyuan_jax.train", "--stopped_code=143", f"--config={self.config}", *where, *self.more]


def check_name(name: str, *, option: str, dots: bool = False) -> None:
    """Raises `RenderError` for what Kubernetes takes for no name: a part of a host's name, or with `dots` several of them."""
    part = r"[a-z]([a-z0-9-]*[a-z0-9])?" if not dots else r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?"
    if len(name) > LONGEST_NAME or not re.fullmatch(part, name):
        more = ", '.'" if dots else ""
        raise RenderError(
            f"--{option} must be at most {LONGEST_NAME} of a-z, 0-9{more} and '-', with a letter first and no '-' last, not {name!r}."
        )


def at_least(least: int, number: int, *, option: str) -> int:
    if number < least:
        raise RenderError(f"--{option} must be at least {least}, not {number}.")
    return number


def tpu_manifest(run: Run, *, accelerator: str, topology: str, slices: int, chips_per_host: int) -> Manifest:
    """The JobSet on TPU slices of GKE, one job a slice and one pod a host; GKE tells the pods who they are."""
    if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){1,2}", topology):
        raise RenderError(f"--topology must be chips along each side, such as 4x4 or 4x4x8, not {topology!r}.")
    chips = math.prod(int(side) for side in topology.split("x"))
    per_host = min(chips, at_least(1, chips_per_host, option="chips-per-host"))
    if chips % per_host:
        raise RenderError(f"A topology of {topology} has {chips} chips, and {per_host} on each host do not divide them.")
    container = {
        "resources": {"limits": {"google.com/tpu": str(per_host)}},
        "ports": [{"containerPort": port} for port in (8471, 8482)],  # of the TPU runtime and of jax
        "securityContext": {"privileged": True},  # the TPU driver locks more memory than a pod may otherwise
    }
    pod = {
        "nodeSelector": {"cloud.google.com/gke-tpu-accelerator": accelerator, "cloud.google.com/gke-tpu-topology": topology},
        "tolerations": [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}],
    }
    manifest = _job_set(run, job="slice", jobs=at_least(1, slices, option="slices"), pods=chips // per_host, pod=pod, container=container)
    # Each slice has a node pool of its own.
    manifest["metadata"]["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return manifest


def gpu_manifest(run: Run, *, nodes: int, gpus: int, node_selector: dict[str, str]) -> Manifest:
    """The JobSet on nodes with GPUs, one pod a node with all of its GPUs; variables tell the pods who they are."""
    at_least(1, nodes, option="nodes")
    number = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    container = {
        "resources": {"limits": {"nvidia.com/gpu": str(at_least(1, gpus, option="gpus"))}},
        "ports": [{"containerPort": COORDINATOR_PORT}],
        "env": [
            {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{run.name}-node-0-0.{run.name}:{COORDINATOR_PORT}"},
            {"name": "JAX_NUM_PROCESSES", "value": str(nodes)},
            {"name": "JAX_PROCESS_ID", "valueFrom": number},
        ],
    }
    pod: Manifest = {"tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]}
    if node_selector:
        pod["nodeSelector"] = node_selector
    return _job_set(run, job="node", jobs=1, pods=nodes, pod=pod, container=container)


def _job_set(run: Run, *, job: str, jobs: int, pods: int, pod: Manifest, container: Manifest) -> Manifest:
    longest = f"{run.name}-{job}-{jobs - 1}-{pods - 1}-xxxxx"  # a pod's name, which ends in five random letters
    if len(longest) > LONGEST_NAME:
        raise RenderError(f"--name must be shorter by {len(longest) - LONGEST_NAME}: pods are called {longest}, and {LONGEST_NAME} fit.")
    places = list({place.mount: place for place in (run.workdir, run.data)}.values())
    volumes: list[Manifest] = [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}]
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    for number, place in enumerate(places):
        volumes.append({"name": f"storage-{number}", **place.volume()})
        mounts.append({"name": f"storage-{number}", "mountPath": place.mount})
    command = [part.replace("$", "$$") for part in run.command]  # Kubernetes would put variables in the place of $(NAME)
    container = {"name": "train", "image": run.image, "command": command, "volumeMounts": mounts, **container}
    spec = {
        "restartPolicy": "Never",  # the JobSet restarts all pods together
        "shareProcessNamespace": True,  # or the training is process 1, which SIGTERM does not end
        "terminationGracePeriodSeconds": 120,  # a training saves meanwhile
        **({"serviceAccountName": run.service_account} if run.service_account else {}),
        **pod,
        "containers": [container],
        "volumes": volumes,
    }
    uses_bucket = any(place.kind == "gs" for place in places)
    annotations = {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}}} if uses_bucket else {}
    job_spec = {
        "parallelism": pods,
        "completions": pods,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [{"action": "FailJob", "onExitCodes": {"containerName": "train", "operator": "In", "values": [USER_ERROR]}}]
        },
        "template": {**annotations, "spec": spec},
    }
    failure_policy = {
        "maxRestarts": run.max_restarts,
        "rules": [{"name": "userError", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": run.name, "namespace": run.namespace},
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": failure_policy,
            "replicatedJobs": [{"name": job, "replicas": jobs, "template": {"spec": job_spec}}],
        },
    }


def xpk_command(run: Run, *, cluster: str, tpu_type: str, slices: int, project: str, zone: str) -> list[str]:
    """The same by xpk, on a cluster that xpk made, where `xpk storage attach` has mounted the buckets."""
    return [
        *("xpk", "workload", "create", f"--workload={run.name}", f"--cluster={cluster}", f"--tpu-type={tpu_type}"),
        *(f"--num-slices={at_least(1, slices, option='slices')}", f"--docker-image={run.image}", f"--max-restarts={run.max_restarts}"),
        "--restart-on-exit-codes=1",  # beside those of signals, which it knows
        *([f"--project={project}"] if project else []),
        *([f"--zone={zone}"] if zone else []),
        f"--command={shlex.join(run.command)}",
    ]


def apply(manifest: Manifest) -> None:
    """Puts a manifest in place of the ended run of the same name, if there is one; a run that is at work is left alone."""
    name, namespace = manifest["metadata"]["name"], manifest["metadata"]["namespace"]
    where = ["--namespace", namespace]
    state = ["kubectl", "get", "jobset", name, *where, "--ignore-not-found", "--output=jsonpath={.status.terminalState}"]
    if subprocess.run(state, check=True, stdout=subprocess.PIPE, text=True).stdout:
        subprocess.run(["kubectl", "delete", "jobset", name, *where], check=True)
    subprocess.run(["kubectl", "apply", "--filename=-"], check=True, input=json.dumps(manifest), text=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    common.add_argument("--name", required=True, help="of the run in the cluster")
    common.add_argument("--image", required=True, help="container image, made by launch/Dockerfile")
    common.add_argument("--config", required=True, help="such as configs/t2v_13b.py:image_256")
    common.add_argument("--workdir", required=True, help="gs://BUCKET/PATH or pvc://CLAIM/PATH: checkpoints and metrics")
    common.add_argument("--data", required=True, help="gs://BUCKET/PATH or pvc://CLAIM/PATH: the dataset")
    common.add_argument("--namespace", default="default")
    common.add_argument("--service-account", default="", help="of Kubernetes; needs access to the buckets")
    common.add_argument("--max-restarts", type=int, default=100)
    common.add_argument("--dry-run", action="store_true", help="print what would be applied or run")
    common.add_argument("more", nargs="*", metavar="MORE", help="after --: further arguments of hunyuan_jax.train")
    parser = argparse.ArgumentParser(
        prog="render.py", description="Runs a training on the pods of a Kubernetes cluster.", allow_abbrev=False
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    tpu = kinds.add_parser("tpu", parents=[common], allow_abbrev=False, help="TPU slices of GKE")
    tpu.add_argument("--accelerator", required=True, choices=ACCELERATORS)
    tpu.add_argument("--topology", required=True, help="of a slice, in chips, such as 4x4x8")
    tpu.add_argument("--slices", type=int, default=1)
    tpu.add_argument("--chips-per-host", type=int, default=4)
    gpu = kinds.add_parser("gpu", parents=[common], allow_abbrev=False, help="nodes with GPUs")
    gpu.add_argument("--nodes", type=int, required=True)
    gpu.add_argument("--gpus", type=int, default=8, help="of each node")
    gpu.add_argument("--node-selector", action="append", default=[], metavar="LABEL=VALUE")
    xpk = kinds.add_parser("xpk", parents=[common], allow_abbrev=False, help="TPU slices of a cluster made by xpk")
    xpk.add_argument("--cluster", required=True)
    xpk.add_argument("--tpu-type", required=True, help="such as v6e-128")
    xpk.add_argument("--slices", type=int, default=1)
    xpk.add_argument("--project", default="")
    xpk.add_argument("--zone", default="")
    return parser.parse_args(argv)


def manifest_of(options: argparse.Namespace) -> Manifest:
    run = Run.from_options(options)
    if options.kind == "tpu":
        how = {"accelerator": options.accelerator, "topology": options.topology, "chips_per_host": options.chips_per_host}
        return tpu_manifest(run, slices=options.slices, **how)
    pairs = [text.partition("=") for text in options.node_selector]
    if any(not (label and value) for label, _, value in pairs):
        raise RenderError(f"--node-selector must be LABEL=VALUE, not {options.node_selector}.")
    return gpu_manifest(run, nodes=options.nodes, gpus=options.gpus, node_selector={label: value for label, _, value in pairs})


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    try:
        if options.kind == "xpk":
            how = {name: getattr(options, name) for name in ("cluster", "tpu_type", "slices", "project", "zone")}
            command = xpk_command(Run.from_options(options), **how)
            if options.dry_run:
                print(shlex.join(command))
                return 0
            return subprocess.run(command, check=False).returncode
        manifest = manifest_of(options)
        if options.dry_run:
            print(json.dumps(manifest, indent=2))
        else:
            apply(manifest)
    except RenderError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FileNotFoundError as error:
        print(f"error: {error.filename} is not installed here; install it, or see with --dry-run what it would be given.", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        return error.returncode  # its own words stand above
    return 0


if __name__ == "__main__":
    sys.exit(main())
