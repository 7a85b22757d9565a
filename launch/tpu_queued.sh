#!/usr/bin/env bash
# Trains on a TPU slice that Cloud TPU's queue gives (v4 to v6e; Ironwood comes through GKE alone):
#
#   bash launch/tpu_queued.sh --name NAME --project P --zone Z --type v6e-128 --runtime v2-alpha-tpuv6e
#       --config configs/t2v_13b.py:image_256 --workdir gs://BUCKET/runs/first --data gs://BUCKET/latents
#       [--service-account EMAIL] [--spot] [--reserved] [--dry-run] [-- MORE ...]
#   bash launch/tpu_queued.sh --name NAME --project P --zone Z --delete
#
# Queues, waits, copies the committed state of this repository to every host, installs, starts training there in the background and
# shows the log of the first host, to end with its exit code. The same command again goes on where it stopped, also after a preemption.
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source=launch/arguments.sh
source "$root/launch/arguments.sh"

WAIT_SECONDS="${WAIT_SECONDS:-30}" # between two looks at the queue
GCSFUSE=3.8.0

name="" project="" zone="" type="" runtime="" config="" workdir="" data="" service_account="" spot="" reserved="" delete=""
read_arguments "name project zone" "type runtime config workdir data service-account" "spot reserved delete" "$@"
check name '[a-z]([a-z0-9-]{0,61}[a-z0-9])?' "at most 63 of a-z, 0-9 and '-', with a letter first and no '-' last"
check project '[a-z][a-z0-9.:-]*' "the project's id"
check zone '[a-z][a-z0-9-]*' "a zone such as us-east5-b"
place=("--project=$project" "--zone=$zone")
queue=(gcloud compute tpus queued-resources)

if [ -n "$delete" ]; then
    run "${queue[@]}" delete "$name" "${place[@]}" --force --quiet
    exit
fi
for argument in type runtime config workdir data; do
    [ -n "${!argument}" ] || fail "--$argument is missing."
done
check type 'v[4-6][a-z]*-[0-9]+' "a slice such as v6e-128 or v5p-256"
check runtime '[a-z0-9-]+' "a runtime version such as v2-alpha-tpuv6e"
check workdir 'gs://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]/.+' "gs://BUCKET/PATH, which outlives the slice"
check data 'gs://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]/.+' "gs://BUCKET/PATH"

# Where gs://BUCKET/PATH lies on the hosts.
mounted() {
    echo "/mnt/gs/${1#gs://}"
}

bucket_of() {
    local path="${1#gs://}"
    echo "${path%%/*}"
}

create() {
    local options=("--node-id=$name" "--accelerator-type=$type" "--runtime-version=$runtime")
    [ -z "$service_account" ] || options+=("--service-account=$service_account")
    [ -z "$spot" ] || options+=(--spot)
    [ -z "$reserved" ] || options+=(--reserved)
    run "${queue[@]}" create "$name" "${place[@]}" "${options[@]}"
}

# The state of the request, empty where there is none.
state() {
    "${queue[@]}" describe "$name" "${place[@]}" '--format=value(state.state)' 2>/dev/null || true
}

wait_until_active() {
    local now last=""
    while true; do
        now="$(state)"
        [ "$now" = "$last" ] || echo "The request $name is ${now:-not there}"
        last="$now"
        case "$now" in
        ACTIVE) return ;;
        FAILED | SUSPENDED)
            "${queue[@]}" delete "$name" "${place[@]}" --force --quiet
            create
            ;;
        "") create ;;
        *) sleep "$WAIT_SECONDS" ;;
        esac
    done
}

on() {
    run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" "--worker=$1" "--command=$2"
}

# Made for the hosts' shell; what comes from the arguments is quoted for it.
install="set -euo pipefail
mkdir -p hunyuan_jax
tar --extract --file=hunyuan_jax.tar --directory=hunyuan_jax
cd hunyuan_jax
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
~/.local/bin/uv venv --quiet --allow-existing --python 3.12 .venv
~/.local/bin/uv pip install --quiet --python .venv/bin/python --requirement requirements.txt 'jax[tpu]'
if ! command -v gcsfuse >/dev/null; then
    curl --fail --silent --location --output /tmp/gcsfuse.deb \\
        https://github.com/GoogleCloudPlatform/gcsfuse/releases/download/v$GCSFUSE/gcsfuse_${GCSFUSE}_amd64.deb
    sudo apt-get update --quiet
    sudo apt-get install --yes /tmp/gcsfuse.deb
fi
for bucket in $(quoted "$(bucket_of "$workdir")" "$(bucket_of "$data")"); do
    mountpoint --quiet /mnt/gs/\$bucket && continue
    sudo mkdir -p /mnt/gs/\$bucket
    sudo chown \"\$USER\" /mnt/gs/\$bucket
    gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \$bucket /mnt/gs/\$bucket
done"

train=(.venv/bin/python -m hunyuan_jax.train --stopped_code=143 "--config=$config" "--workdir=$(mounted "$workdir")")
train+=("--config.data.path=$(mounted "$data")" ${more[@]+"${more[@]}"})
start="cd hunyuan_jax
if [ -e train.pid ] && kill -0 \"\$(cat train.pid)\" 2>/dev/null; then
    echo 'training is at work here'
else
    nohup bash -c $(quoted "$(quoted "${train[@]}"); echo \$? >train.code") >train.log 2>&1 </dev/null &
    echo \$! >train.pid
fi"
follow="cd hunyuan_jax
tail --lines=+1 --follow --pid=\"\$(cat train.pid)\" train.log
exit \"\$(cat train.code)\""

if [ -n "$dry_run" ]; then
    create
else
    wait_until_active
fi
archive="$(mktemp)"
trap 'rm -f "$archive"' EXIT
run git -C "$root" archive "--output=$archive" --format=tar HEAD
run gcloud compute tpus tpu-vm scp "$archive" "$name:hunyuan_jax.tar" "${place[@]}" --worker=all
on all "$install"
on all "$start"
on 0 "$follow"
