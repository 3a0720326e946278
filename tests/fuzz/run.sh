#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors
#
# usage: tests/fuzz/run.sh [--long] [--seconds N] [BUILD_DIR [TARGET...]]
#
# Runs each target of fuzz.cpp on the corpus of the tree and on new inputs, for 3 s; with --long for an hour, as many
# side by side as there are processors. BUILD_DIR (build-fuzz) is what tests/run builds. One line a target, with the
# number of inputs; the last line counts. What was found is in BUILD_DIR/findings:
#     LEASEHOLD_FUZZ_TARGET=TARGET BUILD_DIR/tests/fuzz/fuzz BUILD_DIR/findings/TARGET-...
# and what is new and interesting in BUILD_DIR/corpus, from where the next run takes it.
set -uo pipefail
seconds=3 parallel=1
while [[ ${1-} == -* ]]; do
    case $1 in
    --long) seconds=3600 parallel=$(nproc) ;;
    --seconds) seconds=$2 && shift ;;
    *)
        sed -n '5,13s/^# \?//p' "$0"
        exit
        ;;
    esac
    shift
done
build=$(realpath "${1:-$(dirname "$0")/../../build-fuzz}") && shift
cd "$(dirname "$0")" || exit 2
program=$build/tests/fuzz/fuzz
targets=("$@")
[ ${#targets[@]} -gt 0 ] || mapfile -t targets < <("$program")
results=$(mktemp -d -p /dev/shm) || exit 2 # in memory, for the targets' files too
export TMPDIR=$results
trap 'rm -rf "$results"' EXIT
mkdir -p "$build/findings"

fuzz() { # TARGET
    local log=$results/$1.log inputs
    mkdir -p "$build/corpus/$1"
    if LEASEHOLD_FUZZ_TARGET=$1 "$program" -max_total_time="$seconds" -timeout=60 -rss_limit_mb=4096 -max_len=70000 \
        -print_final_stats=1 -artifact_prefix="$build/findings/$1-" "$build/corpus/$1" "corpus/$1" >"$log" 2>&1; then
        inputs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
        printf 'ok      %-14s %10d inputs\n' "$1" "$inputs"
    else
        printf 'FAILED  %-14s\n%s\n' "$1" "$(grep -vE '^#[0-9]+	|^INFO' "$log" | head -n 60)"
    fi
}

for target in "${targets[@]}"; do
    while [ "$(jobs -rp | wc -l)" -ge "$parallel" ]; do wait -n; done
    fuzz "$target" >"$results/$target" &
done
wait
[ ${#targets[@]} -gt 0 ] && cat "${targets[@]/#/$results/}" | tee "$results/all"
passed=$(grep -c '^ok ' "$results/all") failed=$((${#targets[@]} - passed))
[ ${#targets[@]} -gt 0 ] || failed=1
echo "$(awk '/^ok / { all += $3 } END { printf "%d", all }' "$results/all") inputs"
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
