#!/usr/bin/env bash
# Everything worth measuring on a GPU machine without a network, inside a time limit: small files under --out.
#
#   benchmarks/gpu_campaign.sh [--out DIR] [--minutes 9] [--parts a,b,...] [--device cuda] [--python FILE] [--dry-run]
#
# Every part has a limit of its own and never more than what is left; a part that fails, or takes too long, loses
# nothing but itself.  status.tsv: part, done|failed|timeout|skipped, seconds, reason.  Exit 1 if any part failed.
set -u
cd "$(dirname "$0")/.." || exit 2

out=campaign minutes=9 device=cuda dry="" python=.venv/bin/python
parts=versions,build,ceilings,operators,network,tests,sanitizer,training,latency,compile,ncu
while [ $# -gt 0 ]; do
    case "$1" in
        --out) out=$2 && shift 2 ;;
        --minutes) minutes=$2 && shift 2 ;;
        --parts) parts=$2 && shift 2 ;;
        --device) device=$2 && shift 2 ;;
        --python) python=$2 && shift 2 ;;
        --dry-run) dry=yes && shift ;;
        *) echo "unknown argument $1; see the head of $0" >&2 && exit 2 ;;
    esac
done
deadline=$((SECONDS + minutes * 60)) failures=0
[ "$device" = cuda ] && small="" || small=--small
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

bench() { # bench NAME ARGUMENT...: rows into NAME.json and kernels.csv
    "$python" -m benchmarks "${@:2}" --device "$device" --json "$out/$1.json" --csv "$out/kernels.csv" $small
}

part_versions() {
    "$python" -m impure_fast.cli info
    "$python" -c "import torch; print('torch', torch.__version__, 'cuda', torch.version.cuda)" || return
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.draw,power.limit,memory.total --format=csv || true
}
part_build() { "$python" setup.py build_ext --inplace; }
part_tests() { "$python" -m pytest -q tests/ops tests/golden; }
part_ceilings() { bench ceilings ceilings --rounds 31; }
part_operators() {
    # One process an operator: a kernel that kills its process takes no other's figures along.
    local op worst=0
    for op in reconstruction_attention patch_mask patch_assemble patch_mix order; do
        bench "$op" run --ops $op --rounds 15 --providers "reference,sdpa*,auto,cuda*,triton*" || worst=1
    done
    return $worst
}
part_network() { bench network run --ops "reconstruct " --modes forward --rounds 15 --providers reference,auto; }
part_compile() {
    bench compile run --ops reconstruct --shapes 4x --modes forward --rounds 15 --dtypes bfloat16 \
        --providers 'reference,auto,compile*'
}
part_sanitizer() {
    # torch's allocator would hide what lies beside a tensor.
    local op worst=0
    for op in reconstruction_attention patch_mask patch_assemble patch_mix order; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m benchmarks run \
            --small --ops $op --rounds 1 --dtypes float32,bfloat16 --providers "cuda,triton" --device cuda || worst=1
    done
    return $worst
}
part_training() { "$python" -m benchmarks.training_memory --device "$device" --json "$out/training.json"; }
part_latency() { "$python" -m benchmarks.latency --device "$device" --seconds 2 --csv "$out/latency.csv"; }
part_ncu() {
    slowest | while IFS=$'\t' read -r op shape provider; do
        ncu --csv --set basic --launch-count 4 --kernel-name 'regex:attention|_forward|_backward' \
            "$python" -m benchmarks run --ops "$op" --shapes "$shape" --modes forward --dtypes bfloat16 --rounds 1 \
            --providers "$provider" --device cuda
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

limit() { # seconds a part may take
    case "$1" in
        operators) echo 150 ;; build | network | tests | compile) echo 90 ;;
        sanitizer | training | latency | ncu) echo 60 ;; *) echo 40 ;;
    esac
}

why_not() { # why a part cannot run here, or nothing
    local tool=""
    case "$1" in
        sanitizer) tool="compute-sanitizer --error-exitcode 9" ;;
        ncu) tool="ncu --launch-count 1" ;;
    esac
    [ -n "$tool" ] || return 0
    if ! command -v "${tool%% *}" > /dev/null; then
        echo "${tool%% *} is not installed"
    elif [ "$device" != cuda ]; then
        echo "${tool%% *} needs a GPU"
    elif ! probe=$(timeout 40 $tool "$python" -c "import torch; torch.zeros(1).cuda().add_(1).cpu()" 2>&1) ||
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
    elif reason=$(why_not "$name"); [ -n "$reason" ]; then
        state=skipped
    else
        [ "$(limit "$name")" -lt $left ] && left=$(limit "$name")
        # A shell of its own under timeout, so that a part's every child ends with it.
        timeout --kill-after=5 "$left" bash -c "$(declare -f); part_$name" > "$out/$name.txt" 2>&1
        code=$?
        case $code in
            0) ;; 124 | 137) state=timeout reason="more than $left s" ;;
            *) state=failed reason="exit $code: $(tail -n 1 "$out/$name.txt" | tr '\t' ' ' | cut -c -200)" ;;
        esac
    fi
    case $state in failed | timeout) failures=1 ;; esac
    printf '%s\t%s\t%s\t%s\n' "$name" $state $((SECONDS - began)) "$reason" | tee -a "$out/status.tsv"
}

if [ -n "$dry" ]; then
    for part in ${parts//,/ }; do
        printf '%s\tat most %s s\t%s\n' "$part" "$(limit "$part")" "$(declare -f "part_$part" | sed '1,2d;$d' | tr -s '\n ' ' ')"
    done
    exit 0
fi
mkdir -p "$out"
: > "$out/status.tsv"
export out device python small
for part in ${parts//,/ }; do run_part "$part"; done
exit $failures
