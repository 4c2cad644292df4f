"""Makes what tests/runner compares with: make_goldens.py OUT_DIR [FAMILY...]

For each family a tiny model with weights from a generator that the tests have too, what transformers computes with it in float32,
and the config that it writes. One JSON file a family; the weights themselves are not kept.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import save_file

SMALL = dict(vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=None)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

FAMILIES = {
    "llama": ("LlamaConfig", SMALL),
    "llama3": ("LlamaConfig", SMALL | dict(rope_theta=500000.0, rope_scaling=LLAMA3, tie_word_embeddings=True)),
    "llama_linear_bias": ("LlamaConfig", SMALL | dict(rope_scaling={"rope_type": "linear", "factor": 4.0}, attention_bias=True, mlp_bias=True)),
    "mistral": ("MistralConfig", SMALL | dict(sliding_window=16, head_dim=24)),
    "qwen2": ("Qwen2Config", SMALL | dict(rope_theta=1000000.0)),
    "qwen3": ("Qwen3Config", SMALL | dict(head_dim=32, tie_word_embeddings=True)),
    "qwen3_moe": ("Qwen3MoeConfig", SMALL | dict(head_dim=32, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=40,
                                                 norm_topk_prob=True, mlp_only_layers=[1])),
    "gemma3": ("Gemma3TextConfig", SMALL | dict(num_hidden_layers=4, head_dim=32, sliding_window=16, query_pre_attn_scalar=24,
                                                layer_types=["sliding_attention", "full_attention"] * 2)),
}
MASK = (1 << 64) - 1


def values(name, shape):
    """Numbers from -0.5 up to 0.5 that depend on the name alone."""
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = ((seed ^ byte) * 0x100000001B3) & MASK
    count = int(np.prod(shape))
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return ((z >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24) - np.float32(0.5)).reshape(shape)


def weight(name, shape, gemma):
    numbers = values(name, shape)
    if name.endswith("norm.weight"):
        return numbers if gemma else numbers + np.float32(1)
    return numbers * np.float32(0.25)


def golden(family):
    kind, settings = FAMILIES[family]
    config = getattr(transformers, kind)(**settings)
    with tempfile.TemporaryDirectory() as folder:
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder, safe_serialization=True)
        path = Path(folder) / "model.safetensors"
        with safe_open(path, "np") as file:
            shapes = {name: list(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
        save_file({name: weight(name, shape, family == "gemma3") for name, shape in shapes.items()}, path, metadata={"format": "pt"})
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="eager").eval()
        prompt = [int(x) for x in (np.arange(40) * 37 + 11) % 96]
        positions = [0, 1, 21, 39]
        tokens = list(prompt)
        with torch.no_grad():
            logits = model(torch.tensor([prompt]), use_cache=False).logits[0].float()
            for _ in range(12):
                tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        return {
            "transformers": transformers.__version__,
            "config": json.loads((Path(folder) / "config.json").read_text()),
            "tensors": [[name, shape] for name, shape in shapes.items()],
            "prompt": prompt,
            "positions": positions,
            "logits": [[float(f"{x:.8g}") for x in logits[at].tolist()] for at in positions],
            "greedy": tokens[len(prompt):],
        }


def main():
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for family in sys.argv[2:] or FAMILIES:
        if not hasattr(transformers, FAMILIES[family][0]):
            print(f"{family}: transformers {transformers.__version__} does not have it", file=sys.stderr)
            continue
        (out / f"{family}.json").write_text(json.dumps(golden(family)) + "\n")
        print(family, file=sys.stderr)


main()
