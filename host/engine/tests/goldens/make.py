#!/usr/bin/env python3
"""Make the golden checkpoints: for every supported family a tiny random one, and what `transformers` computes with it.

Writes one folder per case beside this file: config.json and model.safetensors as `save_pretrained` writes them (so that the
tensor names are the real ones), and golden.json with prompts, the greedy tokens after each, and the logits at
both ends. Weights are stored in bfloat16; the reference computes in float32 with eager attention and no cache.

A prompt is kept only when no step has two tokens within MARGIN of the largest logit: greedy tokens are then
the same for every exact enough implementation. Nor is one kept that soon repeats a few tokens for ever.

    pip install torch transformers && python3 host/engine/tests/goldens/make.py
"""

import json
import math
import pathlib
import shutil

import torch
import transformers

transformers.utils.logging.disable_progress_bar()

HERE = pathlib.Path(__file__).parent
STEPS, MARGIN, DISTINCT = 64, 2e-3, 5
PROMPTS = (3, 37)

SMALL = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=500000.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)

YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64)
# An old context that every prompt is longer than: the reference takes the factors of a long one throughout.
LONGROPE = dict(
    rope_type="longrope", rope_theta=10000.0, original_max_position_embeddings=2,
    short_factor=[1.0 + i / 40 for i in range(16)], long_factor=[1.0 + i * i / 20 for i in range(16)],
)

CASES = {
    "llama": ("LlamaConfig", dict(tie_word_embeddings=True)),
    "llama3": ("LlamaConfig", dict(rope_parameters=LLAMA3, attention_bias=True)),
    "mistral": ("MistralConfig", dict(sliding_window=20)),
    "mixtral": ("MixtralConfig", dict(sliding_window=None, num_local_experts=4, num_experts_per_tok=2)),
    "qwen2": ("Qwen2Config", dict(use_sliding_window=True, sliding_window=20, max_window_layers=1)),
    "qwen3": ("Qwen3Config", dict(tie_word_embeddings=True)),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=32, mlp_only_layers=[1], norm_topk_prob=True),
    ),
    "phi3": ("Phi3Config", dict(sliding_window=24)),
    "phi3-longrope": (
        "Phi3Config", dict(rope_parameters=LONGROPE, original_max_position_embeddings=2, num_attention_heads=1),
    ),
    "qwen3-yarn": ("Qwen3Config", dict(rope_parameters=YARN)),
    "gemma2": ("Gemma2Config", dict(num_hidden_layers=4, sliding_window=20, query_pre_attn_scalar=48, attn_logit_softcapping=3.0,
                                    final_logit_softcapping=4.0)),
    "gemma3": ("Gemma3TextConfig", dict(num_hidden_layers=7, sliding_window=20, query_pre_attn_scalar=48)),
}


def randomise(model, seed):
    """Weights of a size that keeps every part of the model audible in the logits."""
    generator = torch.Generator().manual_seed(seed)
    plus_one = "gemma" in model.config.model_type
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            noise = 0.3 * noise + (0.0 if plus_one else 1.0)
        elif parameter.dim() == 1:
            noise = 0.3 * noise
        else:
            noise = noise / math.sqrt(parameter.shape[-1])
            if "embed" in name and model.config.tie_word_embeddings:
                # Else the head finds the last token's own embedding first, whatever the layers say.
                noise = noise / 6
        parameter.data = noise.to(torch.bfloat16).to(torch.float32)


@torch.no_grad()
def generate(model, prompt):
    """Greedy tokens, the logits after the prompt and before the last token, and the narrowest lead of a choice."""
    tokens, first, last, lead = list(prompt), None, None, math.inf
    for _ in range(STEPS):
        last = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].float()
        first = last if first is None else first
        best = torch.topk(last, 2).values
        lead = min(lead, float(best[0] - best[1]))
        tokens.append(int(last.argmax()))
    return tokens[len(prompt):], first.tolist(), last.tolist(), lead


def case(name, config_class, options):
    config = getattr(transformers, config_class)(**{**SMALL, **options})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    randomise(model, seed=len(name))
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    cases, seed = [], 0
    while len(cases) < len(PROMPTS):
        seed += 1
        length = PROMPTS[len(cases)]
        prompt = torch.randint(3, SMALL["vocab_size"], (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        tokens, first, last, lead = generate(model, prompt)
        if lead > MARGIN and len(set(tokens)) >= DISTINCT:
            cases.append(dict(prompt=prompt, tokens=tokens, first_logits=first, last_logits=last))
        elif seed > 400:
            raise SystemExit(f"{name}: no prompt is clear and varied enough")
    made_by = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
    (folder / "golden.json").write_text(json.dumps(dict(made_by=made_by, cases=cases)) + "\n")
    distinct = [len(set(c["tokens"])) for c in cases]
    print(f"{name}: {sum(f.stat().st_size for f in folder.iterdir())} bytes, {distinct} distinct tokens, seed {seed}")


if __name__ == "__main__":
    for name, (config_class, options) in CASES.items():
        case(name, config_class, options)
