#!/usr/bin/env python3
"""Make vocabulary.json: two small vocabularies as GGUF files have them, and the tokens of awkward strings by their own libraries.

`spm` is a SentencePiece model with byte fallback, trained here and asked here; `bytes` is a byte-level one, asked through the
`tokenizers` package with the pre-tokenizer and the normalizer that the tokenizer.json of each named family has.

    pip install sentencepiece tokenizers && python3 host/server/src/text/goldens/make.py
"""

import io
import json
import pathlib

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

HERE = pathlib.Path(__file__).parent
CORPUS = (HERE.parents[4] / "docs" / "trust.md").read_text().splitlines()

STRINGS = [
    "Hello world",
    " a  b   c    ",
    "\n\n\tx\r\n y",
    "",
    "12345 6,789.01",
    "It's we'LL they'Re",
    "h\u00e9llo e\u0301 \u4e16\u754c \U0001f980\U0001f3fd \u202f\u00a0",
    "a<s>b</s> <x> c",
    "snake_case camelCase XMLHttp \u00c9COLE",
    "...---!!! ((a))",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0928\u092e\u0938\u094d\u0924\u0947 3\u00b2 \u2163",
]

SPLITS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def spm():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=420, model_type="bpe", byte_fallback=True,
        user_defined_symbols=["<x>"], normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, minloglevel=2,
    )
    sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(sp.vocab_size())

    def kind(i):
        return 2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 4 if i == 3 else 1

    vocabulary = dict(
        model="llama", tokens=[sp.id_to_piece(i) for i in ids], kinds=[kind(i) for i in ids],
        scores=[round(sp.get_score(i), 3) for i in ids], merges=[], bos=1, eos=2, unknown=0,
    )

    def encode(text):
        """A special token is not text to SentencePiece: what stands around it is tokenized by itself."""
        out, rest = [1], text
        while rest:
            at, token = min(((rest.find(t), t) for t in ("<s>", "</s>", "<x>") if t in rest), default=(len(rest), ""))
            out += sp.encode(rest[:at]) if rest[:at] else []
            out += [sp.piece_to_id(token)] if token else []
            rest = rest[at + len(token):]
        return out

    return vocabulary, [dict(pre="default", text=text, ids=encode(text)) for text in STRINGS]


def byte_level():
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>", "<x>"],
    )
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator(CORPUS, trainer)
    state = json.loads(trained.to_str())
    merges = [tuple(merge) for merge in state["model"]["merges"]]
    vocab = state["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.get)
    kinds = [3 if token in ("<s>", "</s>") else 4 if token == "<x>" else 1 for token in tokens]
    vocabulary = dict(
        model="gpt2", tokens=tokens, kinds=kinds, scores=[], merges=[" ".join(merge) for merge in merges], bos=0, eos=1,
    )
    cases = []
    for pre in ("gpt-2", "smollm", *SPLITS):
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in ("llama-bpe", "tekken")))
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in SPLITS)
        cut = [pre_tokenizers.Split(Regex(SPLITS[pre]), "isolated")] if pre in SPLITS else []
        cut += [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cut, plain])
        tokenizer.decoder = decoders.ByteLevel()
        if pre == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.add_special_tokens(["<s>", "</s>"])
        tokenizer.add_tokens(["<x>"])
        start = [0] if pre in ("llama-bpe", "tekken") else []
        cases += [dict(pre=pre, text=text, ids=start + tokenizer.encode(text).ids) for text in STRINGS]
    return vocabulary, cases


if __name__ == "__main__":
    out = dict(zip(("spm", "bytes"), (dict(vocabulary=v, cases=c) for v, c in (spm(), byte_level()))))
    (HERE / "vocabulary.json").write_text(json.dumps(out, separators=(",", ":")) + "\n")
    print({name: (len(part["vocabulary"]["tokens"]), len(part["cases"])) for name, part in out.items()})
