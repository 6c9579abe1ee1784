"""What PyTorch makes of the shapes that `pointsman gpu-check` measures: a line of JSON for each figure.

Read from standard input by any Python with PyTorch. Random weights of Llama-3.1-8B's shapes in bf16, one decode step captured in a
CUDA graph: packed projections, rotation, the new key and value written to a dense cache, attention over the cache, a greedy token.
`--tiny` runs small shapes on the CPU, to check the script itself. `batching` is transformers' own continuous batching, on a GPU
only.
"""

import inspect
import json
import statistics
import sys
import time

try:
    import torch
    import torch.nn.functional as functional
except ImportError as error:
    print(json.dumps({"name": "torch", "missing": str(error)}))
    sys.exit(0)

TINY = "--tiny" in sys.argv
DEVICE = "cpu" if TINY else "cuda"
LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD, VOCAB = (2, 64, 160, 4, 2, 16, 512) if TINY else (32, 4096, 14336, 32, 8, 128, 128256)
STEPS = [(2, 8)] if TINY else [(1, 128), (1, 1024), (8, 1024), (32, 1024), (64, 1024)]


def say(name, **figures):
    print(json.dumps({"name": name, **figures}), flush=True)


def wait():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def median_seconds(run, in_a_row=1, warm=0.3, times=30):
    """The median of some times, each of so many runs and one wait for them all, after as many as fill `warm` seconds."""
    until = time.perf_counter() + warm
    while time.perf_counter() < until:
        run()
        wait()
    seconds = []
    for _ in range(3 if TINY else times):
        wait()
        start = time.perf_counter()
        for _ in range(in_a_row):
            run()
        wait()
        seconds.append((time.perf_counter() - start) / in_a_row)
    return statistics.median(seconds)


def matrix(*shape):
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16) * 0.02


class Model:
    def __init__(self):
        self.embedding, self.head = matrix(VOCAB, HIDDEN), matrix(VOCAB, HIDDEN)
        self.gain = torch.ones(HIDDEN, device=DEVICE, dtype=torch.bfloat16)
        self.layers = [
            {
                "qkv": matrix((HEADS + 2 * KV_HEADS) * HEAD, HIDDEN),
                "out": matrix(HIDDEN, HEADS * HEAD),
                "gate_up": matrix(2 * FFN, HIDDEN),
                "down": matrix(HIDDEN, FFN),
            }
            for _ in range(LAYERS)
        ]

    def norm(self, x):
        return functional.rms_norm(x, (HIDDEN,), self.gain, 1e-5)

    def step(self, tokens, caches, turn, context):
        """One token for each row; `tokens` becomes the chosen ones."""
        cosine, sine = turn
        rows = tokens.shape[0]
        x = self.embedding[tokens]
        for weights, (keys, values) in zip(self.layers, caches):
            qkv = functional.linear(self.norm(x), weights["qkv"]).view(rows, HEADS + 2 * KV_HEADS, HEAD)
            turned = qkv[:, : HEADS + KV_HEADS]
            low, high = turned.chunk(2, dim=-1)
            turned = turned * cosine + torch.cat((-high, low), dim=-1) * sine
            keys[:, :, context - 1] = turned[:, HEADS:]
            values[:, :, context - 1] = qkv[:, HEADS + KV_HEADS :]
            query = turned[:, :HEADS].unsqueeze(2)
            mixed = functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
            x = x + functional.linear(mixed.reshape(rows, HEADS * HEAD), weights["out"])
            gate, up = functional.linear(self.norm(x), weights["gate_up"]).chunk(2, dim=-1)
            x = x + functional.linear(functional.silu(gate) * up, weights["down"])
        tokens.copy_(functional.linear(self.norm(x), self.head).argmax(dim=-1))


def captured(step):
    """The step as a graph, where there is a GPU."""
    if DEVICE == "cpu":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def decode():
    model = Model()
    turn = matrix(HEAD), matrix(HEAD)
    for rows, context in STEPS:
        shape = (rows, KV_HEADS, context, HEAD)
        caches = [(matrix(*shape), matrix(*shape)) for _ in range(LAYERS)]
        tokens = torch.zeros(rows, device=DEVICE, dtype=torch.long)
        run = captured(lambda: model.step(tokens, caches, turn, context))
        alone = median_seconds(run)
        # As ours, which are begun behind one another: a step in a row of them pays for no wait of its own.
        behind = median_seconds(run, in_a_row=30, times=5)
        say("torch, graph", rows=rows, context=context, seconds=min(alone, behind), alone_seconds=alone, behind_seconds=behind)


def copy():
    n = 1 << 16 if TINY else 4 << 30
    source = torch.zeros(n, device=DEVICE, dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source))
    say("copy on the device", bytes_per_s=2 * n / seconds)


def product():
    n = 64 if TINY else 8192
    a, b = matrix(n, n), matrix(n, n)
    seconds = median_seconds(lambda: a @ b)
    say("bf16 product", n=n, flop_per_s=2 * n**3 / seconds)


def batching():
    """32 prompts of 1,024 tokens, 128 new ones each."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=HEAD, vocab_size=VOCAB, max_position_embeddings=8192,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    job = {"prompts": 32, "prompt_tokens": 1024, "new_tokens": 128}
    prompts, length, new = job.values()
    # Other ones to warm up with: a manager that is kept knows the keys and values of prompts that it had.
    ids = [[(row * 131 + i * 37) % (VOCAB - 10) + 5 for i in range(length)] for row in range(2 * prompts)]
    rules = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    takes = inspect.signature(model.generate_batch).parameters
    options = {"progress_bar": False} if "progress_bar" in takes else {}
    # Graphs are captured for a manager, so that one for both calls captures none while the clock runs. It is made for what it is
    # first asked for. There were versions that lost the results of its second call: without one, then.
    ways = [{"persistent_manager": True}, {}] if "persistent_manager" in takes else [{}]

    def generate(inputs, way):
        outputs = list(model.generate_batch(inputs=inputs, generation_config=rules, **options, **way).values())
        wait()
        # A thread that failed is only logged, and what it had until then is the answer.
        whole = sum(len(output.generated_tokens) == new for output in outputs)
        if whole != len(inputs):
            why = next((output.error for output in outputs if output.error), "no reason is given")
            raise RuntimeError(f"{whole} of {len(inputs)} prompts have all their tokens: {why}")

    for attention in ("paged|flash_attention_2", "paged|sdpa", "sdpa_paged"):
        name = "transformers, continuous batching" + (", paged sdpa" if "sdpa" in attention else "")
        try:
            # Once: what it refuses it may have taken all the same when it is asked again.
            model.set_attn_implementation(attention)
        except Exception as error:
            say(name, attention=attention, failed=repr(error)[:200])
            continue
        for way in ways:
            try:
                generate(ids[prompts:], way)
                start = time.perf_counter()
                generate(ids[:prompts], way)
                seconds = time.perf_counter() - start
                say(name, attention=attention, **way, job=job, seconds=seconds, tokens_per_s=prompts * new / seconds)
                return
            except Exception as error:
                say(name, attention=attention, **way, failed=repr(error)[:200])
            finally:
                getattr(model, "destroy_cached_continuous_batching_manager", lambda: None)()


if not TINY and not torch.cuda.is_available():
    say("torch", missing="no GPU that it sees")
    sys.exit(0)
# Batching brings its own mode, and on a CPU takes all the memory that there is.
for figure in (copy, product, decode) if TINY else (copy, product, decode, batching):
    try:
        with torch.inference_mode(mode=figure is not batching):
            figure()
    except Exception as error:
        say(figure.__name__, failed=repr(error)[:300])
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
