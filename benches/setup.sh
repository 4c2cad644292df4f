#!/usr/bin/env bash
# Installs what the benchmarks compare ocifs with on Debian 12, as root; safe to run again: what is there is left.
# `read_path` needs Debian packages, and for its rows of Python libraries the environment of tests/setup.sh. `runner` needs that too (the model,
# llama.cpp), torch and transformers as they are today (5 GB: the one wheel of torch has CUDA's libraries), and candle-transformers, which is
# built here. What is missing is left out of the tables, and said so.
#
#   benches/setup.sh [read_path|runner]      for one of them; both when none is named
#   OCIFS_BENCH_ENV                          where the Python environment goes (default: ${XDG_CACHE_HOME:-~/.cache}/ocifs-benches)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
wanted=${1:-all}

python_packages=(torch==2.11.0 transformers==5.17.0)
environment=${OCIFS_BENCH_ENV:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/ocifs-benches}
if [[ ${wanted} != read_path && $(cat "${environment}/ready" 2>/dev/null) != "${python_packages[*]}" ]]; then
    printf 'setup: making the Python environment in %s\n' "${environment}" >&2
    rm -rf "${environment}"
    /usr/bin/python3 -m venv "${environment}/venv"
    "${environment}/venv/bin/python3" -m pip install -q --no-input --retries 5 "${python_packages[@]}" </dev/null
    printf '%s\n' "${python_packages[*]}" >"${environment}/ready"
fi
if [[ ${wanted} != read_path ]]; then
    cargo build --locked --release -p ocifs-bench-candle
fi

packages=(
    nginx-light curl iproute2    # the wire, and a link with a limit
    docker-registry              # the usual case
    rclone nbdkit libnbd-bin     # other ways to mount a file behind HTTP
)

missing=()
for package in "${packages[@]}"; do
    status=$(dpkg-query -W -f '${db:Status-Abbrev}' "${package}" 2>/dev/null || true)
    [[ ${status} == ii* ]] || missing+=("${package}")
done
if ((${#missing[@]} == 0)); then
    exit 0
fi
printf 'setup: installing %s\n' "${missing[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
apt-get -q -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300 update </dev/null
apt-get -q -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "${missing[@]}" </dev/null
# The benchmark starts servers of its own.
for service in nginx docker-registry; do
    systemctl disable --now "${service}" 2>/dev/null || true
done
