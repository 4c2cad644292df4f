"""Loads directories by from_pretrained, runs a forward pass and prints what came out, a line for each: logits.py DIR..."""

import hashlib
import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    torch.set_num_threads(1)
    for directory in sys.argv[1:]:
        forward(directory)


def forward(directory: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    # An error for weights that are missing or left over, in place of random ones.
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, local_files_only=True, torch_dtype=torch.float32, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            sys.exit(f"{kind}: {info[kind]}")
    model.eval()
    tokens = tokenizer("a mount shows a model", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(tokens).logits
    data = logits.contiguous().numpy().tobytes()
    print(json.dumps({"tokens": tokens.tolist(), "shape": list(logits.shape), "sha256": hashlib.sha256(data).hexdigest()}))


main()
