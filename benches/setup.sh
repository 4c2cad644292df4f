#!/usr/bin/env bash
# Installs what `cargo bench --bench read_path` compares ocifs with on Debian 12, as root; safe to run again.
# The rows of Python libraries also need the environment of tests/setup.sh. What is missing is left out of the table, and said so.
set -euo pipefail

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
