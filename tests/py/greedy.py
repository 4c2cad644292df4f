"""What transformers makes of a prompt: greedy.py DIR PROMPT COUNT prints {"prompt": ids, "tokens": ids}, computed in float32."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompt, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
ids = AutoTokenizer.from_pretrained(folder)(prompt).input_ids
model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
tokens, past, step = [], None, ids
with torch.no_grad():
    for _ in range(count):
        out = model(torch.tensor([step]), past_key_values=past, use_cache=True)
        past, step = out.past_key_values, [int(out.logits[0, -1].argmax())]
        tokens += step
print(json.dumps({"prompt": ids, "tokens": tokens}))
