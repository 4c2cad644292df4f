#!/usr/bin/env bash
# Builds a program that needs no library of the machine that it runs on: packaging/static.sh [FILE]
#
#   FILE   where it goes (default: target/static/ocifs); its path is printed
#
# Needs musl-gcc (Debian: musl-tools) for the C in zstd and ring, and the target, which rustup adds.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
file=${1:-${root}/target/static/ocifs}
target=$(uname -m)-unknown-linux-musl
if command -v rustup >/dev/null; then
    rustup target add "${target}" >&2
fi
(cd "${root}" && cargo build --release --locked --target "${target}" --bin ocifs >&2)
install -D -m 755 "${root}/target/${target}/release/ocifs" "${file}"
if readelf --program-headers "${file}" | grep -q INTERP; then
    echo "static.sh: ${file} asks for a loader: it is not static" >&2
    exit 1
fi
printf '%s\n' "${file}"
