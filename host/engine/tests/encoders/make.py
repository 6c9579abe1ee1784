#!/usr/bin/env python3
"""Make the golden encoders: tiny random checkpoints of the supported families, and what `transformers` computes with them.

Writes one folder per case beside this file, as ../goldens/make.py does for decoders: config.json and model.safetensors as
`save_pretrained` writes them, and golden.json with sequences and, for each, the mean and the first of its last hidden states.
Weights are stored in bfloat16; the reference computes in float32 with eager attention, each sequence alone and unpadded.

    pip install torch transformers && python3 host/engine/tests/encoders/make.py
"""

import json
import math
import pathlib
import shutil

import torch
import transformers

transformers.utils.logging.disable_progress_bar()

HERE = pathlib.Path(__file__).parent
LENGTHS = (1, 2, 15, 16, 17, 40, 3)
SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, pad_token_id=0)
CASES = {
    "bert": ("BertConfig", dict(max_position_embeddings=40, hidden_act="gelu")),
    # Its positions begin after the padding token.
    "xlm-roberta": ("XLMRobertaConfig", dict(max_position_embeddings=42, hidden_act="gelu_pytorch_tanh", pad_token_id=1, type_vocab_size=1)),
}


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "LayerNorm.weight" in name:
            noise = 0.3 * noise + 1.0
        elif parameter.dim() == 1:
            noise = 0.3 * noise
        elif "embeddings" not in name:
            # Twice the usual size: attention then tells positions apart.
            noise = 2.0 * noise / math.sqrt(parameter.shape[-1])
        parameter.data = noise.to(torch.bfloat16).to(torch.float32)


@torch.no_grad()
def case(name, config_class, options):
    config = getattr(transformers, config_class)(**{**SMALL, **options})
    model = transformers.AutoModel.from_config(config, attn_implementation="eager", add_pooling_layer=False).float().eval()
    randomise(model, seed=len(name))
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    load = transformers.AutoModel.from_pretrained
    model = load(folder, dtype=torch.float32, attn_implementation="eager", add_pooling_layer=False).eval()
    cases = []
    for seed, length in enumerate(LENGTHS):
        tokens = torch.randint(3, SMALL["vocab_size"], (length,), generator=torch.Generator().manual_seed(seed))
        states = model(tokens[None]).last_hidden_state[0]
        cases.append(dict(tokens=tokens.tolist(), mean=states.mean(0).tolist(), first=states[0].tolist()))
    made_by = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
    (folder / "golden.json").write_text(json.dumps(dict(made_by=made_by, cases=cases)) + "\n")
    print(f"{name}: {sum(f.stat().st_size for f in folder.iterdir())} bytes")


if __name__ == "__main__":
    for name, (config_class, options) in CASES.items():
        case(name, config_class, options)
