"""transformers under measurement: transformers_peer.py DIR DTYPE loads a directory and says when it is ready, then answers requests,
a line of JSON each, with the likeliest tokens. Its loop is shorter than generate()'s."""

import json
import os
import sys
import time

import torch
from transformers import AutoModelForCausalLM, DynamicCache

torch.set_num_threads(os.cpu_count())
folder, dtype = sys.argv[1], getattr(torch, {"f32": "float32", "bf16": "bfloat16"}[sys.argv[2]])
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
print(json.dumps({"load": time.perf_counter() - start}), flush=True)


def answer(prompt: list[int], count: int) -> dict:
    cache, step, tokens = DynamicCache(), prompt, []
    start = time.perf_counter()
    first = start
    for _ in range(count):
        out = model(torch.tensor([step]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        step = [int(out.logits[0, -1].argmax())]
        if not tokens:
            first = time.perf_counter()
        tokens += step
    rest = time.perf_counter() - first
    return {"first": first - start, "rate": (count - 1) / rest, "tokens": tokens}


with torch.inference_mode():
    for line in sys.stdin:
        request = json.loads(line)
        if request["tokens"] == 0:
            # The likeliest token after each of the prompt's.
            result = model(torch.tensor([request["prompt"]])).logits[0].argmax(-1).tolist()
        else:
            result = answer(request["prompt"], request["tokens"])
        print(json.dumps(result), flush=True)
