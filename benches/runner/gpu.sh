#!/usr/bin/env bash
# What a GPU machine without Rust can tell about ocifs-run: gpu.sh BINARY OUT_DIR [SECTION...]
#
# BINARY was built elsewhere with `--features runner,cuda`; python3 there has torch and transformers. Sections of gpu.py: goldens check
# trained speed; all when none is named.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
binary=$1 out=$2
shift 2
# The CUDA libraries that it links: the toolkit's, or those that came with torch.
libraries=$(python3 - <<'PY'
import pathlib, sysconfig
print(":".join(str(path) for path in pathlib.Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/lib")))
PY
)
export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:-}:${libraries}:/usr/local/cuda/lib64:/usr/local/nvidia/lib64"
ldd "$binary" | grep -E "not found" || true
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || true
exec python3 -u "$here/gpu.py" "$binary" "$out" "$@"
