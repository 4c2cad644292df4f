#!/usr/bin/env bash
# Installs what the tests need and runs them all. Arguments go to `cargo test`.
#
#   OCIFS_TEST_SCALE=full   the same tests with larger numbers
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tests/setup.sh

# Mounts and servers take two cores and a few hundred megabytes a test: more at once would only make deadlines tight.
threads=$(nproc)
export RUST_TEST_THREADS=${RUST_TEST_THREADS:-$((threads < 4 ? threads : 4))}
exec cargo test --locked --features runner "$@"
