#!/usr/bin/env bash
# Everything worth measuring on a GPU machine without a network, inside a time limit: small files under --out.
#
#   benchmarks/gpu_campaign.sh [--out DIR] [--archive FILE.tgz] [--minutes 9] [--parts a,b,...] [--device cuda]
#                              [--python FILE] [--authors DIR] [--dry-run]
#
# Needs torch, timm, numpy, safetensors and pytest; nothing is installed.  Libraries in impure_fast/*.so that load are
# not built again.  --authors: a checkout of the authors' code, timed beside the networks.  GIT_COMMIT names the commit where the tree has no .git.
# Every part has a share of the time and never more than what is left; a part that fails, or takes too long, loses
# nothing but itself, and rows are written as they come; after each part --archive holds all of DIR in one file.
# Without libraries for the GPU nothing else is run.  status.tsv: part, done|failed|timeout|skipped, seconds, reason.
# Parts beside the default ones: tests (all of a GPU's), compile, ncu.  Exit 1 if any part failed.
set -u
cd "$(dirname "$0")/.." || exit 2

usage() { echo "$1; see the head of $0" >&2 && exit 2; }
out=campaign archive="" minutes=9 device=cuda dry="" python="" authors=""
parts=versions,build,parity,ceilings,latency,network,operators,training,sanitizer
while [ $# -gt 0 ]; do
    case "$1" in
        --dry-run) dry=yes && shift && continue ;;
        --out | --archive | --minutes | --parts | --device | --python | --authors) [ $# -gt 1 ] || usage "$1 wants a value" ;;
        *) usage "unknown argument $1" ;;
    esac
    printf -v "${1#--}" %s "$2" && shift 2
done
[[ $minutes =~ ^[0-9]*\.?[0-9]+$ ]] || usage "--minutes $minutes is no number"
[[ $device =~ ^(cpu|cuda)$ ]] || usage "--device $device is neither cpu nor cuda"
[ -n "$python" ] || { [ -x .venv/bin/python ] && python=.venv/bin/python || python=python3; }
command -v "$python" > /dev/null || usage "there is no $python"
total=$(awk "BEGIN { print int(60 * $minutes) }")
deadline=$((SECONDS + total)) failures=0
[ "$device" = cuda ] && small="" || small=--small # on a CPU everything is cut down: a rehearsal
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

bench() { # bench SECONDS NAME ARGUMENT...: rows into NAME.json and kernels.csv
    timeout --foreground --signal=KILL "$1" "$python" -m benchmarks "${@:3}" --device "$device" --json "$out/$2.json" \
        --csv "$out/kernels.csv" $small
}

part_versions() {
    "$python" -m impure_fast.cli info
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.draw,power.limit,memory.total --format=csv
    "$python" -c "import sys, torch, timm; print(sys.version, torch.__version__, torch.version.cuda, timm.__version__)"
}
part_build() {
    local probe="from impure_fast.ops._native import why_not; print(why_not('cpu') or why_not('$device'))"
    [ -n "$("$python" -c "$probe")" ] || { echo "The libraries that are there load." && return; }
    if [ "$device" = cuda ]; then # for this GPU alone: half the time
        TORCH_CUDA_ARCH_LIST=$("$python" -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())")
        export TORCH_CUDA_ARCH_LIST
    fi
    "$python" setup.py build_ext --inplace
    [ -z "$("$python" -c "$probe" | tee /dev/stderr)" ]
}
part_ceilings() { bench 999 ceilings ceilings --rounds 31; }
part_operators() {
    # One process an operator: a kernel that kills or hangs its process takes no other's figures along.
    local op worst=0 seconds=$((share / 6))
    for op in noise order patch_mix patch_mask patch_assemble reconstruction_attention; do
        [ $op != reconstruction_attention ] || seconds=999
        bench $seconds $op run --ops $op --rounds 11 --dtypes bfloat16,float32 \
            --providers "reference,sdpa*,products,cuda,triton" || worst=1
    done
    return $worst
}
part_network() {
    bench 999 network run --ops "reconstruct " --modes forward --rounds 15 ${authors:+--authors "$authors"} \
        --providers "reference,auto,engine${authors:+,authors}"
}
part_compile() {
    local what=(--ops "reconstruct impure_base" --shapes 4x3) provider worst=0
    [ -z "$small" ] || what=(--ops "reconstruct ")
    for provider in compile compile-max-autotune; do # rows come when all of a problem's providers are done
        bench 999 $provider run "${what[@]}" --modes forward --rounds 15 --dtypes bfloat16 \
            --providers "reference,auto,engine,$provider" || worst=1
    done
    bench 999 patches run --ops patch_ --modes forward --rounds 15 --dtypes bfloat16 \
        --providers reference,compile,triton || worst=1
    [ -n "$small" ] || "$python" -m benchmarks.latency --device "$device" --csv "$out/latency.csv" --batches 1,64 \
        --seconds 2 --model impure_base_patch16_224 --providers "engine bf16,engine bf16 compiled" || worst=1
    bench 999 products ceilings --compile --dtypes bfloat16 --rounds 31 || worst=1
    return $worst
}
check() { # check ARGUMENT...: pytest, each verdict at once, on several processes where it can
    local many=""
    "$python" -c "import xdist" 2> /dev/null && many="-n 8"
    "$python" -m pytest -v -p no:cacheprovider $many "$@"
}
drawn="order_is or normals_are or noise_made"  # parity of what is equal to the bit
part_parity() { check tests/ops tests/golden -k "(parity or golden or released or $drawn) and (cuda or triton)"; }
part_tests() { check tests/ops tests/golden tests/test_engine.py -k "cuda or triton or gpu"; }
part_sanitizer() {
    # torch's allocator would hide what lies beside a tensor.  No timing: its graphs need that allocator.
    local tool worst=0
    for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --foreground --signal=KILL $((share / 2)) \
            compute-sanitizer --tool $tool --error-exitcode 9 --report-api-errors no "$python" -m pytest -v \
            -p no:cacheprovider tests/ops -k "(parity and (fp32 or bf16) or $drawn) and (cuda or triton)" || worst=$?
    done
    return $worst
}
part_training() {
    "$python" -m benchmarks.training_memory --device "$device" --json "$out/training.json" \
        ${small:+--model impure_tiny --batch 1 --rounds 1}
}
part_latency() {
    local base="--batches 1,64 --rates 100 --seconds 0.4" tiny="--side 224 --batches 1,8,64 --rates 100 --seconds 0.4"
    local providers="engine bf16,engine fp8,engine fp16,operators,no purifier" worst=0
    [ -z "$small" ] || tiny="--side 32 --batches 1 --rates 50 --seconds 0" providers="engine fp32"
    [ -n "$small" ] || "$python" -m benchmarks.latency --device "$device" --csv "$out/latency.csv" \
        --providers "$providers${authors:+,authors,authors bf16 autocast}" ${authors:+--authors "$authors"} \
        --model impure_base_patch16_224 $base || worst=1
    "$python" -m benchmarks.latency --device "$device" --csv "$out/latency.csv" --providers "$providers" $tiny || worst=1
    return $worst
}
part_ncu() {
    [ -n "$(slowest)" ] || { echo "$out holds no figures of a kernel; run the part operators" && return 1; }
    slowest | while IFS=$'\t' read -r op shape provider; do
        ncu --csv --set basic --clock-control none --launch-count 4 --kernel-name 'regex:attention|_forward|_backward' \
            "$python" -m benchmarks run --ops "$op" --shapes "$shape" --modes forward --dtypes bfloat16 --rounds 1 \
            --providers "$provider" --device cuda < /dev/null
    done
}

slowest() { # operator, shape and provider of the three kernels furthest from their floor
    "$python" - "$out" <<'PYTHON'
import json, pathlib, sys
rows = [row for file in pathlib.Path(sys.argv[1]).glob("*.json") for row in json.loads(file.read_text())]
rows = [r for r in rows if r.get("provider") in ("cuda", "triton") and r["dtype"] == "bfloat16" and r.get("of_floor")]
for row in sorted(rows, key=lambda r: r["of_floor"])[:3]:
    print(row["op"], row["shape"], row["provider"], sep="\t")
PYTHON
}

share() { # seconds a part may take
    local of_nine_minutes
    case "$1" in
        operators | build) of_nine_minutes=150 ;; latency) of_nine_minutes=110 ;;
        compile | tests) of_nine_minutes=240 ;; versions) of_nine_minutes=20 ;; *) of_nine_minutes=60 ;;
    esac
    echo $((of_nine_minutes * total / 540 + 1))
}

why_not() { # why a part cannot run here, or nothing
    local tool="" probe
    case "$1" in
        tests | parity) timeout "$2" "$python" -c "import pytest" 2> /dev/null || echo "pytest is not installed" ;;
        sanitizer) tool="compute-sanitizer --error-exitcode 9" ;;
        ncu) tool="ncu --clock-control none --launch-count 1" ;;
    esac
    [ -n "$tool" ] || return 0
    if ! command -v "${tool%% *}" > /dev/null; then
        echo "${tool%% *} is not installed"
    elif [ "$device" != cuda ]; then
        echo "${tool%% *} needs a GPU"
    elif ! probe=$(timeout --signal=KILL "$2" $tool "$python" -c "import torch; torch.ones(1).cuda().add_(1).cpu()" 2>&1) ||
        grep -q ERR_NVGPUCTRPERM <<< "$probe"; then
        echo "${tool%% *} is refused: $(grep -m1 -iE 'error|denied|perm' <<< "$probe" | tr '\t' ' ')"
    fi
}

run_part() {
    local name=$1 began=$SECONDS reason="" state=done left=$((deadline - SECONDS)) code
    if ! declare -F "part_$name" > /dev/null; then
        state=failed reason="there is no such part"
    elif [ $left -lt 5 ]; then
        state=skipped reason="no time was left"
    elif reason=$(why_not "$name" $((left < 25 ? left : 25))); [ -n "$reason" ]; then
        state=skipped
    else
        left=$((deadline - SECONDS)) share=$(share "$name")
        [ "$share" -lt $left ] || share=$((left > 1 ? left : 1))
        # A shell of its own under timeout: KILL reaches the whole group, whatever it does about TERM.
        share=$share timeout --signal=KILL "$share" bash -c "$(declare -f); part_$name" > "$out/$name.txt" 2>&1 < /dev/null
        code=$?
        case $code in
            0) ;; 124 | 137) state=timeout reason="more than $share s" ;;
            *) state=failed reason="exit $code: $(tail -n 1 "$out/$name.txt" | tr '\t' ' ' | cut -c -200)" ;;
        esac
    fi
    case $state in failed | timeout) failures=1 ;; esac
    printf '%s\t%s\t%s\t%s\n' "$name" $state $((SECONDS - began)) "$reason" | tee -a "$out/status.tsv"
    [ -z "$archive" ] || tar czf "$archive" -C "$out" .
}

if [ -n "$dry" ]; then
    for part in ${parts//,/ }; do
        printf '%s\tat most %s s\t%s\n' "$part" "$(share "$part")" "$(declare -f "part_$part" | sed '1,2d;$d' | tr -s '\n ' ' ')"
    done
    exit 0
fi
mkdir -p "$out"
: > "$out/status.tsv"
export out device python small drawn
# Where the package is not installed, its kernels lie beside it.
"$python" -c "import sys, importlib.util as u; sys.exit(not u.find_spec('impure_fast.kernels'))" ||
    ln -sfn ../kernels impure_fast/kernels
for part in ${parts//,/ }; do run_part "$part"; done
exit $failures
