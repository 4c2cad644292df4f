#!/usr/bin/env bash
# Fuzzes every parser of outside bytes (or those that are named) for a bounded time, from the corpus in fuzz/corpus. Needs g++ for
# libFuzzer, and no other toolchain than the one that builds ocifs.
#
#   fuzz/run.sh [--seconds N] [--runs N] [--keep] [TARGET…]
#
#   --seconds N   time for each target (default 2; 0: no limit)
#   --runs N      stop each target after N inputs
#   --keep        add what was found to reach new code to fuzz/corpus
#
# An input that makes a target fail is kept in target/fuzz/failures; `OCIFS_FUZZ=TARGET target/debug/ocifs-fuzz FILE` runs it again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

seconds=2 runs=-1 keep= targets=()
while (($#)); do
    case $1 in
        --seconds) seconds=$2; shift ;;
        --runs) runs=$2; shift ;;
        --keep) keep=yes ;;
        -*) echo "usage: fuzz/run.sh [--seconds N] [--runs N] [--keep] [TARGET…]" >&2; exit 2 ;;
        *) targets+=("$1") ;;
    esac
    shift
done

# Only what is in this workspace is instrumented, so the dependencies are those of the ordinary build.
RUSTC_WORKSPACE_WRAPPER=$PWD/fuzz/instrument.sh cargo build --locked --quiet -p ocifs-fuzz \
    --config "profile.dev.package.ocifs.opt-level=${OCIFS_FUZZ_OPT:-1}"
((${#targets[@]})) || mapfile -t targets < <(ls fuzz/corpus)

failures=target/fuzz/failures
mkdir -p "${failures}"
failed=() total=0
for target in "${targets[@]}"; do
    found=target/fuzz/found/${target}
    mkdir -p "${found}" "fuzz/corpus/${target}"
    log=target/fuzz/${target}.log
    # An input that takes seconds or a gigabyte is a finding too.
    options=(-timeout=60 -rss_limit_mb=2048 -max_len=65536 -len_control=20 -print_final_stats=1 -verbosity=1
        -max_total_time="${seconds}" -runs="${runs}" -artifact_prefix="${failures}/${target}-")
    [[ ! -f fuzz/words/${target} ]] || options+=(-dict="fuzz/words/${target}")
    if ! OCIFS_FUZZ=${target} target/debug/ocifs-fuzz "${options[@]}" "${found}" "fuzz/corpus/${target}" >"${log}" 2>&1; then
        failed+=("${target}")
        tail -n 40 "${log}"
    fi
    count=$(sed -n 's/^stat::number_of_executed_units: *//p' "${log}")
    total=$((total + ${count:-0}))
    printf 'fuzz: %-14s %12s inputs, coverage %s\n' "${target}" "${count:-?}" \
        "$(grep -oE 'cov: [0-9]+' "${log}" | tail -n 1 | cut -d' ' -f2)"
    if [[ -n ${keep} ]]; then
        OCIFS_FUZZ=${target} target/debug/ocifs-fuzz -merge=1 -max_len=4096 "fuzz/corpus/${target}" "${found}" >>"${log}" 2>&1
    fi
done
printf 'fuzz: %s inputs in all, %s targets, %s failed\n' "${total}" "${#targets[@]}" "${#failed[@]}"
((${#failed[@]} == 0)) || { echo "fuzz: failed: ${failed[*]}" >&2; exit 1; }
