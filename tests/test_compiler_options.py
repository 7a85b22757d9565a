"""Laws of the compilers' options: each set is taken whole by the compiler it is for, and kinds that are not known get none."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from hunyuan_jax.parallel.compiler_options import OPTIONS, compiler_options
from tests.commands import ROOT

# What devices of each generation call themselves, and a small slice of each.
KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}

# Layers split over devices, forward and backward, so that there are collectives to overlap.
COMPILE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from hunyuan_jax.parallel.compiler_options import compiler_options

def loss(weights, x):
    return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0])

said = {}
for generation, topology in json.loads(sys.argv[1]).items():
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    mesh = Mesh(np.array(devices), ("fsdp",), axis_types=(AxisType.Auto,))
    def array(*shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
    lowered = jax.jit(jax.grad(loss)).lower(array(4, 256, 256, spec=(None, "fsdp")), array(64, 256, spec=("fsdp",)))
    options = compiler_options(devices[0].device_kind)
    said[generation] = []
    for tried in (options, options | {"xla_tpu_of_no_such_name": "true"}):
        try:
            lowered.compile(compiler_options=tried)
            said[generation].append("taken")
        except jax.errors.JaxRuntimeError as error:
            said[generation].append(str(error))
print(json.dumps(said))
"""


@pytest.mark.parametrize(("kind", "generation"), KINDS.items())
def test_devices_get_the_options_of_their_generation(kind, generation):
    assert compiler_options(kind) == OPTIONS[generation]
    compiler_options(kind).clear()
    assert compiler_options(kind)  # what is given is the caller's own


@pytest.mark.parametrize("kind", [jax.devices("cpu")[0].device_kind, "", "TPU v3", "TPU v9", "AMD Instinct MI300X"])
def test_cpus_and_unknown_devices_get_none(kind):
    assert compiler_options(kind) == {}


def test_what_hangs_on_v5p_stays_with_ironwood():
    assert any("sparse_core" in name for name in OPTIONS["tpu7x"])
    for generation in OPTIONS.keys() - {"tpu7x"}:
        assert not [name for name in OPTIONS[generation] if "sparse_core" in name or name.endswith("_on_sc")]
    assert [generation for generation in OPTIONS if any(name.endswith("fuse_all_gather") for name in OPTIONS[generation])] == ["v5e"]


def test_the_options_for_gpus_are_known_to_xla():
    """Which knows them on a CPU as well."""
    assert compiler_options("NVIDIA H100 80GB HBM3") == OPTIONS["gpu"]
    lowered = jax.jit(lambda x: x + 1).lower(jnp.ones(1))
    lowered.compile(compiler_options=OPTIONS["gpu"])
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        lowered.compile(compiler_options=OPTIONS["gpu"] | {"xla_gpu_of_no_such_name": "True"})


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs TPUs' compiler: pip install libtpu (any machine will do)")
def test_the_options_for_tpus_are_taken_whole_by_their_compiler():
    environment = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", COMPILE, json.dumps(TOPOLOGIES)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for generation, (whole, with_another) in json.loads(done.stdout.splitlines()[-1]).items():
        assert whole == "taken", (generation, whole)
        assert "No such compile option" in with_another
