"""Laws of a plan: it is refused before anything is compiled, its arithmetic is that of the state, and it says what a machine reads."""

import json
import os
import signal

import jax
import pytest

from configs import t2v_13b, vae
from hunyuan_jax import plan
from hunyuan_jax.chips import chip_named
from hunyuan_jax.errors import UserError
from hunyuan_jax.estimate import pairs_seen
from hunyuan_jax.flops import dit_forward_flops
from hunyuan_jax.models.dit import DiTConfig
from tests.commands import run_module, run_program

CONFIG = "--config=configs/t2v_13b.py:video_720"
PARAMETERS = 12_810_782_784


def made(*settings: str, topology: str = "h100:128", stage: str = "video_720") -> plan.Plan:
    config = t2v_13b.get_config(stage)
    for setting in settings:
        plan.change(config, setting)
    return plan.make_plan(config, topology)


def test_the_json_object_says_what_a_machine_asks():
    said = json.loads(run_module("hunyuan_jax.plan", CONFIG, "--topology=h100:128", "--set", "mesh.sequence=16", "mesh.fsdp=8", "--json"))
    assert said["mesh"] == {"data": 1, "fsdp": 8, "sequence": 16, "tensor": 1}
    assert said["fits"] == (said["total_bytes_per_chip"] <= 0.85 * said["hbm_bytes_per_chip"])
    flops = 3 * 32 * dit_forward_flops(DiTConfig(**t2v_13b.get_config("video_720").model), 33 * 45 * 80, 256)
    assert said["model_flops_per_step"] == pytest.approx(flops)
    assert said["hardware_flops_per_step"] > said["model_flops_per_step"]
    assert said["mfu"] == pytest.approx(flops / (said["step_seconds"] * 128 * 989.4e12))
    assert said["compile_seconds"] is None


def test_the_state_is_split_over_fsdp_and_tensor_to_the_byte():
    """AdamW keeps two numbers for each parameter, and a count; small biases and the two ends' patches stay whole."""
    whole = made("mesh.fsdp=1", "mesh.sequence=1", "mesh.data=1", topology="h100:1")
    split = made("mesh.fsdp=16", "mesh.sequence=4", "mesh.tensor=2")
    assert whole.memory.parameters == whole.memory.average == 4 * PARAMETERS
    assert whole.memory.optimizer == pytest.approx(8 * PARAMETERS, rel=1e-6)
    assert whole.checkpoint == pytest.approx(16 * PARAMETERS, rel=1e-6)
    assert 4 * PARAMETERS / 32 < split.memory.parameters < 1.01 * 4 * PARAMETERS / 32


def test_an_optimizer_that_lies_on_the_host_takes_its_memory_there():
    here, there = (made(f"optimizer.offload={offload}").memory for offload in (False, True))
    assert (there.optimizer, there.host) == (0.0, here.host + here.optimizer)
    assert there.total == pytest.approx(here.total - here.optimizer)


def test_what_is_computed_follows_from_recomputation():
    none, attention, full = (made(f"model.remat={remat}").flops for remat in ("none", "attention", "full"))
    assert none.model == attention.model == full.model
    assert none.hardware < attention.hardware < full.hardware
    assert attention.hardware / attention.model == pytest.approx(1.19, abs=0.01)  # five products for four, and linear layers again
    assert full.hardware / full.model == pytest.approx(1.48, abs=0.01)


PAIRS = """
import math
import jax, jax.numpy as jnp
jax.config.update("jax_num_cpu_devices", 8)
from hunyuan_jax.flops import equations
from hunyuan_jax.models.dit import DiTConfig
from hunyuan_jax.parallel.context_attention import How, context_attention, degree_of
from hunyuan_jax.parallel.mesh import MeshConfig, make_mesh
from hunyuan_jax.estimate import pairs_seen

def seen(function, *arguments):
    total = 0
    for equation, times in equations(function, *arguments):
        if equation.primitive.name == "pallas_call":
            q, k = [v.aval.shape for v in equation.invars if v.aval.shape[-1] == 16][:2]
            total += times * math.prod(q[:-1]) * k[-2]
    return total

tokens, txt, heads = 7001, 130, 4
for context, sequence in (("ring", 8), ("heads", 8), ("heads", 4)):
    config = DiTConfig(width=16 * heads, num_heads=heads, rope_axes=(4, 4, 8), num_double_blocks=1, num_single_blocks=1, text_dim=8,
                       pooled_dim=8, context=context)
    mesh = make_mesh(MeshConfig(data=-1, sequence=sequence))
    samples, filled = 8 // sequence, -(-tokens // sequence) * sequence
    x = [jax.ShapeDtypeStruct((samples, count, heads, 16), jnp.float32) for count in 3 * [filled] + 3 * [txt]]
    how = How(tokens, degree_of(context, heads, mesh.shape), "splash")
    with jax.set_mesh(mesh):
        run = lambda lengths, *x: context_attention(x[:3], x[3:], txt_lengths=lengths, how=how)
        kernels = seen(run, jax.ShapeDtypeStruct((samples,), jnp.int32), *x)
    assert sequence * kernels == heads * pairs_seen(config, tokens, txt, mesh.shape, blocks=True), (context, sequence)
print("counted")
"""


def test_what_fills_up_the_blocks_of_a_tpus_kernels_is_counted():
    """The kernels' own shapes, in the traced program: one forward kernel's pairs, times how often it runs, over all devices."""
    assert run_program(PAIRS) == "counted"
    whole, filled = (
        pairs_seen(DiTConfig(**t2v_13b.get_config("video_720").model), 118_800, 256, {"sequence": 8, "tensor": 1}, blocks=blocks)
        for blocks in (False, True)
    )
    assert whole == (118_800 + 256) ** 2 + 7 * 256**2
    assert filled / whole == pytest.approx((8 * 13 * 1152 / 118_800) ** 2, rel=2e-4)


@pytest.mark.parametrize(
    ("settings", "topology", "message"),
    [
        ((), "v5q:4x4", r"'v5q' is not known. Did you mean 'v5p'"),
        ((), "h100:", r"write the number of GPUs after the colon, such as h100:64"),
        ((), "v5p:4x4x9", r"v5p has no slices of that shape; the nearest is v5p:4x4x8"),
        ((), "v6e:4x4x4", r"slices of v6e have 2 dimensions; write v6e:4x4"),
        ((), "v5p:1x1x1", r"the nearest is v5p:2x2x1"),
        (("mesh.sequence=3",), "h100:128", r"does not fit 128 devices, .*nearest that does is data=1, fsdp=32, sequence=4, tensor=1"),
        (("model.context=heads", "model.context_degree=16", "mesh.sequence=16"), "h100:128", r"24 heads .*; the nearest that does is 8,"),
        (("mesh.sequence=1",), "h100:128", r"a batch of 32 cannot be spread over .*mesh.fsdp=128; let these be 32 in all"),
        (("mesh.tensor=16", "mesh.sequence=1"), "h100:128", r"mesh.tensor=16 does not divide the 24 heads; set it to one of 1, 2, 3"),
        (("mesh.sequenc=4",), "h100:128", r"the config has no 'mesh.sequenc'"),
        (("mesh.sequence=many",), "h100:128", r"mesh.sequence is 8, of type int, and 'many' is not"),
        (("model.patch_size=1,2,two",), "h100:128", r"of type tuple, and '1,2,two' is not"),
    ],
)
def test_what_cannot_be_is_one_line_that_names_the_numbers(settings, topology, message):
    with pytest.raises(UserError, match=message):
        made(*settings, topology=topology)


def test_a_bucket_that_is_none_and_a_topology_that_is_none_are_one_line_of_the_command():
    assert "129x720x1280" in run_module("hunyuan_jax.plan", CONFIG, "--topology=h100:128", "--bucket=9x9x9", expect=2)
    assert "--topology is missing" in run_module("hunyuan_jax.plan", CONFIG, expect=2)


def test_a_search_ranks_what_fits_fastest_first():
    ranked = [found for _, found in plan.search(t2v_13b.get_config("video_720"), "h100:128", "", tries=6)]
    assert len(ranked) == 6
    assert all(found.fits for found in ranked)
    times = [found.step_seconds for found in ranked]
    assert times == sorted(times)
    assert times[0] <= made().step_seconds


def test_a_compiler_that_aborts_its_process_is_one_line():
    with pytest.raises(UserError, match=rf"ended with -{signal.SIGABRT.value}, and its last words stand above.*mesh.sequence=2"):
        plan.apart(os.abort)
    assert plan.apart(os.path.join, "what", "returns") == os.path.join("what", "returns")


@pytest.mark.parametrize("compiled", [0, 1])
def test_a_search_goes_on_where_the_compiler_gives_up(compiled, monkeypatch, capsys):
    """Two candidates are tried for TPUs that this machine need not know; of those, so many compile."""
    config, tried = t2v_13b.get_config("video_720"), []
    by_arithmetic = plan.make_plan

    def make_plan(config, topology, *, compiles=True, exact=False, **more):
        tried.append(compiles)
        if compiles and tried.count(True) > compiled:
            raise UserError("The compiler gave up.")
        return by_arithmetic(config, topology, compiles=False, **more)

    monkeypatch.setattr(plan, "target", lambda topology: (chip_named("v5p"), 128))
    monkeypatch.setattr(plan, "make_plan", make_plan)
    if compiled:
        assert len(plan.search(config, "v5p:4x4x8", "", tries=2)) == compiled
    else:
        with pytest.raises(UserError, match="Of the 2 candidates tried none could be compiled"):
            plan.search(config, "v5p:4x4x8", "", tries=2)
    assert tried.count(True) == 2
    assert capsys.readouterr().err.count("The compiler gave up.") == 2 - compiled


def test_a_searchs_json_is_one_object_the_best_plan_with_all_that_were_ranked():
    said = json.loads(run_module("hunyuan_jax.plan", CONFIG, "--topology=h100:128", "--search", "--tries=3", "--json"))
    assert len(said["ranked"]) == 3
    assert {**said["ranked"][0], "ranked": said["ranked"]} == said
    assert {"context", "remat", "offload", "fits"} <= said["ranked"][2].keys()


def test_a_search_puts_on_the_hosts_what_devices_have_no_room_for():
    """Of a batch for which few meshes have room: first what attention keeps, then the optimizer's state."""
    config = t2v_13b.get_config("video_720")
    config.data.buckets[-1]["batch"] = 4
    found = plan.search(config, "h100:16", "", tries=100)
    choices = {(tried.model.remat, tried.optimizer.offload) for tried, _ in found}
    assert {("attention", False), ("attention_host", False), ("attention_host", True), ("full", False), ("full", True)} == choices
    assert all(found.memory.host > 0 for tried, found in found if tried.optimizer.offload or tried.model.remat == "attention_host")
    more = plan.with_more_on_the_host(config)
    assert (more.model.remat, more.optimizer.offload) == ("attention_host", False)
    most = plan.with_more_on_the_host(more)
    assert (most.model.remat, most.optimizer.offload) == ("attention_host", True)
    assert plan.with_more_on_the_host(most) is None


def test_a_vae_is_planned_for_gpus_by_arithmetic():
    """What the forward pass keeps of a clip is all its blocks' inputs, of which six are as large as the clip in 128 channels."""
    config = vae.get_config("tiling")
    plans = []
    for sequence in (1, 4):
        config.mesh.sequence = sequence
        plans.append(plan.make_plan(config, f"h100:{32 * sequence}", bucket_name="65x512x512"))
    one, split = plans
    widest = 2 * 65 * 512 * 512 * 128
    assert 6 * widest < one.memory.activations < 14 * widest
    assert split.memory.activations == one.memory.activations / 4
    assert one.flops == split.flops
    assert 1.0 < one.flops.hardware / one.flops.model < 1.4
    config.mesh.sequence = 128
    with pytest.raises(UserError, match=r"mesh.sequence=128 splits the rows .* 64 rows do not divide .* the nearest that they do is 64"):
        plan.make_plan(config, "h100:4096", bucket_name="65x512x512")


def test_what_a_worker_says_a_user_can_mend_is_said():
    with pytest.raises(UserError, match=r"the config has no 'mesh.sequenc'"):
        plan.apart(plan.change, t2v_13b.get_config("video_720"), "mesh.sequenc=3")


@pytest.mark.parametrize(("said", "needed"), [("Used 120.50G of 95.74G hbm", 120.5 * 2**30), ("Used 900.0M of 95.74G hbm", 900 * 2**20)])
def test_what_a_compiler_without_room_needs_is_read_from_its_words(said, needed, monkeypatch):
    def compile_step(*_, **__):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {said}.")

    monkeypatch.setattr(plan, "devices_of", lambda topology: [])
    monkeypatch.setattr(plan, "compile_step", compile_step)
    config = t2v_13b.get_config("video_720")
    assert plan.read_step(config.to_dict(), plan.costliest(config, ""), "v5p:4x4x8", False) == needed
    said = "Ran out of memory in vmem"
    with pytest.raises(UserError, match="does not say how much it needs: RESOURCE_EXHAUSTED: Ran out of memory in vmem"):
        plan.read_step(config.to_dict(), plan.costliest(config, ""), "v5p:4x4x8", False)
