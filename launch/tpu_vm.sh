#!/usr/bin/env bash
# A TPU slice, or several, by queued resources: asked for, waited for, installed, run on, and given back.
#
# Run by us: bash -n, shellcheck, and every command against a stand-in for gcloud that prints what it is given
# (tests/test_launch.py). Not run by us: on Google Cloud. The gcloud commands are those of its reference pages.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/tpu_vm.sh COMMAND

  create             ask for the slice(s), and wait until they are there (Ctrl-C leaves the request in the queue)
  wait               wait for a request made before
  install            copy this repository's last commit to every host, and install it with its TPU extra
  run COMMAND ...    run a command on every host at once, with launch/env/tpu.sh; its output comes back
  delete             give everything back, and stop paying

settings, from the environment:
  NAME=minisora            the request's name; its slices are NAME, or NAME-0, NAME-1, ... of several
  ZONE=us-central2-b       PROJECT=(gcloud's default)
  TYPE=v5litepod-16        the accelerator type of a slice    RUNTIME=v2-alpha-tpuv5-lite    its software version
  SLICES=1                 how many; mesh.data must be a multiple of it
  KIND=                    --spot, --reserved or --guaranteed, as your quota has it

example:
  export NAME=mine ZONE=us-west4-a TYPE=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite KIND=--spot
  launch/tpu_vm.sh create && launch/tpu_vm.sh install
  launch/tpu_vm.sh run minisora train --config=dit_tiny:data=/mnt/share/latents --workdir=/mnt/share/run
  launch/tpu_vm.sh delete

--workdir and data must lie where every host sees them: a Filestore mount, or a bucket mounted with Cloud Storage FUSE.
A request that was preempted: delete, create, install, and the same run goes on from its last checkpoint.
TEXT
}

NAME=${NAME:-minisora}
ZONE=${ZONE:-us-central2-b}
TYPE=${TYPE:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
SLICES=${SLICES:-1}
POLL=${POLL:-30}
where=(--zone="$ZONE")
if [ -n "${PROJECT:-}" ]; then where+=(--project="$PROJECT"); fi

slices() {
    if [ "$SLICES" = 1 ]; then
        echo "$NAME"
    else
        seq -f "$NAME-%g" 0 "$((SLICES - 1))"
    fi
}

create() {
    local nodes=(--node-id="$NAME") kind=()
    if [ "$SLICES" != 1 ]; then nodes=(--node-count="$SLICES" --node-prefix="$NAME"); fi
    if [ -n "${KIND:-}" ]; then kind=("$KIND"); fi
    gcloud compute tpus queued-resources create "$NAME" "${where[@]}" "${nodes[@]}" "${kind[@]}" \
        --accelerator-type="$TYPE" --runtime-version="$RUNTIME"
    wait_for_it
}

wait_for_it() {
    local state
    while true; do
        state=$(gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)')
        echo "$(date +%T) $NAME: $state"
        case $state in
        ACTIVE) return ;;
        FAILED | SUSPENDED | SUSPENDING)
            echo "the request ended as $state: launch/tpu_vm.sh delete, and create it anew" >&2
            return 1
            ;;
        esac
        sleep "$POLL"
    done
}

# The command on every host of every slice at once; fails where any of them does.
on_all() {
    local slice pids=() failed=0 pid
    for slice in $(slices); do
        gcloud compute tpus tpu-vm ssh "$slice" "${where[@]}" --worker=all --command="$1" &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
    return "$failed"
}

install() {
    local archive slice
    archive=$(mktemp -d)/minisora.tar.gz
    git -C "$(dirname "$0")/.." archive --format=tar.gz --output="$archive" HEAD
    for slice in $(slices); do
        gcloud compute tpus tpu-vm scp "$archive" "$slice:minisora.tar.gz" "${where[@]}" --worker=all
    done
    rm -r "$(dirname "$archive")"
    # uv brings the Python that the project needs, whatever the image has.
    on_all 'set -e; mkdir -p minisora && tar -xzf minisora.tar.gz -C minisora && cd minisora &&
        python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --clear --python 3.12 &&
        python3 -m uv pip install --quiet ".[tpu]"'
}

run() {
    local command
    command=$(printf '%q ' "$@")
    on_all "set -e; cd minisora && . launch/env/tpu.sh && . .venv/bin/activate && exec $command"
}

case ${1:-} in
create) create ;;
wait) wait_for_it ;;
install) install ;;
run)
    shift
    if [ $# = 0 ]; then
        usage >&2
        exit 2
    fi
    run "$@"
    ;;
delete) gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet ;;
-h | --help | help) usage ;;
*)
    usage >&2
    exit 2
    ;;
esac
