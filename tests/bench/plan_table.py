"""The ladder's rows, each compiled for pods that are not attached:

    python -m tests.bench.plan_table [--topologies v5p:4x4x8 v6e:16x16 tpu7x:4x4x8] [--configs t2v_13b.py:video_720 ...]

A row is one run of `hunyuan_jax.plan` on the config's costliest bucket; rows are printed as they come. The costliest passes are left out.
What a pod needs to be set beside the config stands in `SETTINGS`.
"""

import argparse
import json
import subprocess
import sys

STAGES = ("image_256", "image_512", "video_256", "video_360", "video_540", "video_720")
CONFIGS = (*(f"t2v_13b.py:{stage}" for stage in STAGES), "vae.py:tiling")
BUCKETS = {"vae.py:tiling": "65x512x512"}  # in whole; in tiles its compilation takes more than 20 GiB of host memory
LARGER = ("v6e:16x16", "tpu7x:4x4x8")  # 256 devices, for 32 clips
SETTINGS = {
    **{("vae.py:tiling", topology): ("mesh.sequence=8",) for topology in LARGER},
    # A third of v5p's memory.
    **{(f"t2v_13b.py:{stage}", "v6e:16x16"): ("model.remat=attention_host",) for stage in ("video_540", "video_720")},
}
TOPOLOGIES = ("v5p:4x4x8", "v6e:16x16", "tpu7x:4x4x8")
GIB = 2**30


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.plan_table", description=__doc__.splitlines()[0])
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES)
    parser.add_argument("--configs", nargs="+", default=CONFIGS)
    return parser.parse_args()


def row(config: str, topology: str) -> str:
    command = [sys.executable, "-m", "hunyuan_jax.plan", f"--config=configs/{config}", f"--topology={topology}", "--json"]
    changed = SETTINGS.get((config, topology), ())
    command += [f"--bucket={BUCKETS.get(config, '')}", *(word for setting in changed for word in ("--set", setting))]
    asked = " ".join((config, *changed))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"| {asked} | {topology} | {done.stderr.strip().splitlines()[-1][:300]} |" + " |" * 7
    said = json.loads(done.stdout)
    mesh = " ".join(f"{axis} {size}" for axis, size in said["mesh"].items() if size > 1)
    share = said["total_bytes_per_chip"] / said["hbm_bytes_per_chip"]
    computed = said["hardware_flops_per_step"] / said["model_flops_per_step"]
    memory = f"{said['total_bytes_per_chip'] / GIB:.1f} GiB ({share:.0%}{'' if said['fits'] else ', too much'})"
    return (
        f"| {asked} | {topology} | {mesh} | {said['bucket']} x {said['batch']} | {memory} | {said['model_flops_per_step']:.3g} | "
        f"{computed:.2f} | {said['step_seconds']:.2f} s | {100 * said['mfu']:.1f} % | "
        f"{said['compile_seconds']:.0f} s |"
    )


def main() -> None:
    args = parse()
    print("| config | topology | mesh | bucket x batch | memory of a chip | model FLOPs | computed | a step | MFU | compiled in |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for topology in args.topologies:
        for config in args.configs:
            print(row(config, topology), flush=True)


if __name__ == "__main__":
    main()
