"""ocifs-run on a GPU, beside transformers on the same GPU; see gpu.sh. Prints a line a figure, and writes all of them to OUT/figures.json.

goldens: what tests/runner compares with, made by this machine's transformers (OUT/goldens). check: those tiny models on the GPU, whole
prompts and token by token. trained: a small model trained for seconds, so that its choices are clear; top-1 under teacher forcing.
speed: 1B and 8B shapes with random weights: logits, loading, and tokens/s at batch 1.
"""

import glob
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

HERE = Path(__file__).parent
BINARY, OUT, SECTIONS = sys.argv[1], Path(sys.argv[2]), sys.argv[3:] or ["goldens", "check", "trained", "speed"]
FIGURES = {"gpu": torch.cuda.get_device_name(0), "torch": torch.__version__, "transformers": transformers.__version__}
STARTED = time.time()


def note(name, value):
    FIGURES[name] = value
    print(f"[{time.time() - STARTED:5.0f} s] {name}: {value}", flush=True)
    (OUT / "figures.json").write_text(json.dumps(FIGURES, indent=1))


def goldens_script():
    for path in (HERE / "make_goldens.py", HERE / "../../tests/py/make_goldens.py"):
        if path.exists():
            text = path.read_text().removesuffix("main()\n")
            scope = {"__name__": "goldens"}
            exec(compile(text, str(path), "exec"), scope)
            return scope
    raise SystemExit("make_goldens.py is missing")


def run(folder, *args):
    done = subprocess.run([BINARY, str(folder), "--device", "cuda:0", *map(str, args)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ocifs-run {args}: {done.returncode} {done.stderr[-800:]}")
    return done.stdout


def with_tokenizer(folder):
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(Path(folder) / "tokenizer.json"))


def our_logits(folder, tokens, *args):
    (Path(folder) / "p.json").write_text(json.dumps([int(token) for token in tokens]))
    run(folder, "--prompt-tokens", f"{folder}/p.json", "--logits", f"{folder}/l.bin", *args)
    return torch.from_numpy(np.fromfile(f"{folder}/l.bin", dtype=np.float32).reshape(len(tokens), -1))


def goldens():
    scope = goldens_script()
    (OUT / "goldens").mkdir(parents=True, exist_ok=True)
    for family in scope["FAMILIES"]:
        try:
            (OUT / "goldens" / f"{family}.json").write_text(json.dumps(scope["golden"](family)) + "\n")
        except Exception as error:
            note(f"golden {family}", f"FAILED {error!r}"[:300])
    files = sorted(path.stem for path in (OUT / "goldens").glob("*.json"))
    note("goldens", files)
    # At most a few files come back: one archive.
    shutil.make_archive(str(OUT / "goldens"), "gztar", OUT / "goldens")


def check():
    scope = goldens_script()
    for path in sorted((OUT / "goldens").glob("*.json")):
        golden = json.loads(path.read_text())
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(golden["config"]))
            gemma = path.stem == "gemma3"
            save_file({name: scope["weight"](name, shape, gemma) for name, shape in golden["tensors"]}, f"{folder}/model.safetensors")
            with_tokenizer(folder)
            wanted = torch.tensor(golden["logits"])
            for piece in (512, 7, 1):
                try:
                    got = our_logits(folder, golden["prompt"], "--piece", piece)[golden["positions"]]
                    note(f"check {path.stem} f32, pieces of {piece}", float((got - wanted).abs().max()))
                except RuntimeError as error:
                    note(f"check {path.stem} f32, pieces of {piece}", str(error))
                    break


def compare(name, folder, model, tokens, exact):
    """Teacher forcing: ours in bf16 against transformers in bf16, and both against f32."""
    with torch.no_grad():
        theirs = model(torch.tensor([tokens], device="cuda")).logits[0].float().cpu()
    for piece in (512, 1):
        ours = our_logits(folder, tokens, "--piece", piece)
        same = lambda a, b: round(float((a.argmax(-1) == b.argmax(-1)).float().mean()), 4)
        far = lambda a, b: round(float((a - b).norm() / b.norm()), 5)
        note(f"{name}, pieces of {piece}: top-1 equal", {"ours = transformers bf16": same(ours, theirs), "ours = f32": same(ours, exact),
                                                          "transformers bf16 = f32": same(theirs, exact)})
        note(f"{name}, pieces of {piece}: distance", {"ours - transformers bf16": far(ours, theirs), "ours - f32": far(ours, exact),
                                                       "transformers bf16 - f32": far(theirs, exact)})


def trained(seconds=25):
    """Bytes of this machine's Python sources; held-out ones are compared."""
    torch.manual_seed(1)
    files = sorted(glob.glob(os.path.join(os.path.dirname(transformers.__file__), "**/*.py"), recursive=True))[:600]
    text = torch.tensor(list(b"".join(Path(file).read_bytes() for file in files)[: 8 << 20]), dtype=torch.long, device="cuda")
    config = transformers.LlamaConfig(vocab_size=256, hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8,
                                      num_key_value_heads=4, max_position_embeddings=1024)
    model = transformers.LlamaForCausalLM(config).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    end, steps, loss = time.time() + seconds, 0, None
    while time.time() < end:
        at = torch.randint(0, len(text) - 100_000 - 513, (32, 1), device="cuda") + torch.arange(512, device="cuda")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(text[at], labels=text[at]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps += 1
    note("trained", {"steps": steps, "loss": round(loss.item(), 3)})
    model = model.to(torch.bfloat16).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with_tokenizer(folder)
        tokens = text[-50_000:-49_000].tolist()
        wide = transformers.LlamaForCausalLM.from_pretrained(folder).float().cuda().eval()
        with torch.no_grad():
            exact = wide(torch.tensor([tokens], device="cuda")).logits[0].float().cpu()
        # Read again: a model that was cast has the angles of its positions in bf16 too, and is far from what it is when it is loaded.
        loaded = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda().eval()
        compare("trained", folder, loaded, tokens, exact)


def transformers_speed(model, prompt, count):
    """Greedy, one token at a time, as generate does it, without what generate adds."""
    with torch.no_grad():
        for repeat in range(2):
            cache = transformers.DynamicCache()
            torch.cuda.synchronize()
            start = time.time()
            token = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
            torch.cuda.synchronize()
            first = time.time() - start
            start = time.time()
            for _ in range(count - 1):
                token = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
            torch.cuda.synchronize()
            rate = (count - 1) / (time.time() - start)
    return {"first ms": round(first * 1e3, 1), "tokens/s": round(rate, 1)}


SHAPES = {
    "llama 1B": ("LlamaConfig", dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                                     num_key_value_heads=8, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True,
                                     rope_theta=500000.0)),
    "qwen3 1.7B": ("Qwen3Config", dict(vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
                                       num_key_value_heads=8, head_dim=128, max_position_embeddings=8192, tie_word_embeddings=True)),
    "llama 8B": ("LlamaConfig", dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                                     num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0)),
}


def copy_rate():
    """Bytes read and written by a large copy on the device, in a second."""
    a = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    b.copy_(a)
    torch.cuda.synchronize()
    start = time.time()
    for _ in range(10):
        b.copy_(a)
    torch.cuda.synchronize()
    return 10 * 2 * a.numel() / (time.time() - start) / 1e9


def speed(names=None):
    bandwidth = copy_rate()
    note("device copy GB/s", round(bandwidth))
    for name, (kind, settings) in SHAPES.items():
        torch.manual_seed(2)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings), attn_implementation="eager").eval()
        torch.set_default_dtype(torch.float32)
        folder = tempfile.mkdtemp()
        model.save_pretrained(folder, max_shard_size="4GB")
        with_tokenizer(folder)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        tokens = torch.randint(0, 100_000, (4096,)).tolist()
        theirs = {context: transformers_speed(model, torch.tensor([tokens[:context]], device="cuda"), 65) for context in (1, 512, 4096)}
        if "8B" not in name:
            with torch.no_grad():
                wide = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").cuda().eval()
                exact = wide(torch.tensor([tokens[:256]], device="cuda")).logits[0].float().cpu()
            del wide
            compare(name, folder, model, tokens[:256], exact)
        del model
        torch.cuda.empty_cache()
        for context in (1, 512, 4096):
            (Path(folder) / "p.json").write_text(json.dumps(tokens[:context]))
            document = json.loads(run(folder, "--prompt-tokens", f"{folder}/p.json", "-n", 129, "--ctx", 8192, "--repeat", 2, "--ignore-end",
                                      "--temp", 0, "--json"))
            ours = {"first ms": round(document["firstTokenSeconds"] * 1e3, 1), "tokens/s": round(document["tokensPerSecond"], 1)}
            note(f"{name} at {context}", {"ours": ours, "transformers": theirs[context],
                                          "ratio": round(ours["tokens/s"] / theirs[context]["tokens/s"], 2),
                                          "of bandwidth": round(ours["tokens/s"] * size / 1e9 / bandwidth, 3)})
            if context == 1:
                note(f"{name} loading", {"GB": round(size / 1e9, 2), "s": round(document["loadSeconds"], 3),
                                         "GB/s": round(document["loadBytes"] / 1e9 / document["loadSeconds"], 2)})
        shutil.rmtree(folder)


for section in SECTIONS:
    try:
        globals()[section]()
    except Exception as error:
        note(section, f"FAILED {error!r}"[:1500])
