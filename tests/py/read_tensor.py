"""Reads one tensor of one safetensors file through the library and prints its SHA-256: read_tensor.py FILE NAME."""

import hashlib
import sys

from safetensors import safe_open

with safe_open(sys.argv[1], framework="numpy") as opened:
    print(hashlib.sha256(opened.get_tensor(sys.argv[2]).tobytes()).hexdigest())
