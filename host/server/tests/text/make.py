#!/usr/bin/env python3
"""Make the goldens of the text side: tiny tokenizers of the usual kinds, and what `transformers` makes of awkward texts with
them; chat templates of the usual structures (templates/, written for this), and what it renders from conversations.

Writes <kind>.json (a tokenizer.json of some 300 tokens, trained here on the texts below; no two trainings are quite the same)
and golden.json.

    pip install transformers && python3 host/server/tests/text/make.py
"""

import datetime
import json
import pathlib
import random

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.utils import chat_template_utils

HERE = pathlib.Path(__file__).parent
NOW = 1_718_500_445  # 2024-06-16 01:14:05 UTC, a Sunday

CORPUS = [
    "the quick brown fox jumps over the lazy dog and the other foxes",
    "The weather in Paris is sunny; the weather in London is not.",
    "naïve café, the façade; el niño and the señor",
    "def weather(city): return the_weather[city]",
    "there there, hello hello world world",
] * 20

TEXTS = [
    "", " ", "  ", "a", "hello world", "Hello,  World!", " leading and trailing ", "\n", "\n\n\n", "a\nb\r\nc\td", "tab\t\ttab",
    "the weather   in    Paris", "don't we'll I'm HE'S", "1234567890 3.14 1,000", "naïve café", "cafe\u0301 nai\u0308ve A\u030a\u0323",
    "ﬁ ligature, ﬀ, ½, ①, Ａ fullwidth", "\u00a0no\u00a0break\u2003em\u3000ideographic", "zero\u200bwidth\u200djoiner\ufeffmark",
    "👩‍👩‍👧‍👦", "👍🏽 🇪🇺 🦀🦀", "東京は日本の首都です。", "你好，世界", "안녕하세요", "สวัสดีชาวโลก", "Привет, мир!", "مرحبا بالعالم", "שָׁלוֹם עוֹלָם",
    "mixed שלום and مرحبا and 你好", "\u202eright to left\u202c", "nul\u0000bell\u0007del\u007f", "\ufffd \ufffe \uffff \U0010ffff",
    "<s>", "</s>", "<|bos|>hello<|end|>", "<|im_start|>system\nYou obey.<|im_end|>", "text <|end|> more<|end|>", "< s > <|bos |> <|bos|",
    "[CLS] [SEP] [MASK] [UNK]", "[cls]", "<think>why</think>", " <think> why </think> ", "▁hello▁world", "Ġhello Ċ", "##ing", "<0x41><0x0A>",
    "a" * 50, "ha" * 40, "!?!?...---", "{\"a\": [1, 2]}", "    def f(x):\n        return x\n", "http://example.org/a?b=c&d=%20", "ÀÉÎÕÜ ß İ ı ǅ",
]


def pieces(kind):
    """Normalizer, pre-tokenizer, decoder, model and trainer of a kind."""
    special = ["<s>", "</s>", "<unk>"]
    if kind == "bytelevel":
        pattern = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        split = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<|bos|>", "<|end|>"], initial_alphabet=alphabet)
        return normalizers.NFC(), pre_tokenizers.Sequence(split), decoders.ByteLevel(), models.BPE(), trainer
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    if kind == "sentencepiece":
        normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=special + byte_tokens, max_token_length=8)
        return normalizer, None, decoders.Sequence(decoder), models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"), trainer
    if kind == "unigram":
        trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>")
        space = dict(replacement="▁", prepend_scheme="always")
        return normalizers.NFKC(), pre_tokenizers.Metaspace(**space), decoders.Metaspace(**space), models.Unigram(), trainer
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    model = models.WordPiece(unk_token="[UNK]")
    return normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(), model, trainer


AROUND = {"bytelevel": ("<|bos|>", "<|end|>"), "sentencepiece": ("<s>", "</s>"), "unigram": ("<s>", "</s>"), "wordpiece": ("[CLS]", "[SEP]")}


def tokenizer(kind):
    normalizer, pre_tokenizer, decoder, model, trainer = pieces(kind)
    made = Tokenizer(model)
    if pre_tokenizer is None:
        # Else a piece would run over words: the real ones were trained on words, too.
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    else:
        made.pre_tokenizer, made.normalizer = pre_tokenizer, normalizer
    made.train_from_iterator(CORPUS, trainer)
    if pre_tokenizer is None:
        made = Tokenizer.from_str(made.to_str())
        made.normalizer = normalizer
        state = json.loads(made.to_str())
        state["pre_tokenizer"] = None
        # Bytes are no special tokens.
        state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
        made = Tokenizer.from_str(json.dumps(state))
    made.decoder = decoder
    bos, eos = AROUND[kind]
    single = f"{bos} $A {eos}" if kind in ("unigram", "wordpiece") else f"{bos} $A"
    ids = [(token, made.token_to_id(token)) for token in (bos, eos)]
    made.post_processor = processors.TemplateProcessing(single=single, pair=f"{bos} $A {eos} $B:1", special_tokens=ids)
    if kind == "bytelevel":
        made.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
        made.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    # What is written is what is used: a Python object may know more.
    text = json.dumps(json.loads(made.to_str()), ensure_ascii=False, separators=(",", ":"))
    (HERE / f"{kind}.json").write_text(text + "\n")
    bos_eos = dict(bos_token=bos, eos_token=eos)
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(HERE / f"{kind}.json"), **bos_eos)


def encoded(kind):
    made = tokenizer(kind)
    plain = dict(clean_up_tokenization_spaces=False)
    decode = lambda ids: [made.decode(ids, skip_special_tokens=skip, **plain) for skip in (False, True)]
    rng = random.Random(7)
    texts = []
    for text in TEXTS:
        ids = made(text)["input_ids"]
        texts.append(dict(text=text, ids=ids, bare=made(text, add_special_tokens=False)["input_ids"], decoded=decode(ids)))
    soup = [[rng.randrange(len(made)) for _ in range(rng.randrange(1, 24))] for _ in range(24)]
    return dict(texts=texts, soup=[dict(ids=ids, decoded=decode(ids)) for ids in soup])


# === conversations ===

CITY = dict(type="string", description='The city, e.g. "Paris" <or> L\'Aquila & Zürich')
TOOLS = [
    dict(type="function", function=dict(name="get_weather", description="Current weather", parameters=dict(
        type="object", properties=dict(city=CITY, unit=dict(type="string", enum=["c", "f"])), required=["city"]))),
    dict(type="function", function=dict(name="now", description="The time", parameters=dict(type="object", properties={}))),
]


def call(name, arguments, id="abcdefghi"):
    return dict(type="function", id=id, function=dict(name=name, arguments=arguments))


def say(role, content, **more):
    return dict(role=role, content=content, **more)


ASK = say("user", "What's the weather in Zürich & \"Paris\"?")
CALLED = [ASK, say("assistant", "", tool_calls=[call("get_weather", {"city": "Zürich", "days": [1, 2.5, None, True]})])]
CONVERSATIONS = {
    "user": dict(messages=[say("user", "hi")]),
    "system": dict(messages=[say("system", " Be brief. \n"), say("user", "  hi <b>there</b> & 'you' \"too\"  \n")]),
    "turns": dict(messages=[say("user", "one"), say("assistant", " two \n"), say("user", "three\n\n"), say("assistant", "four 🦀"), say("user", "五")]),
    "system turns": dict(messages=[say("system", "S"), say("user", "1"), say("assistant", "2"), say("user", "3")]),
    "thinking": dict(messages=[say("user", "1"), say("assistant", "<think>\nhm\n</think>\n\n2"), say("user", "3"), say("assistant", "<think>\nwell\n</think>\n\n4")]),
    "reasoning": dict(messages=[say("user", "1"), say("assistant", "2", reasoning_content="why\n")], enable_thinking=False),
    "no thinking": dict(messages=[say("user", "1")], enable_thinking=False),
    "date": dict(messages=[say("user", "1")], date_string="3 Mar 2033"),
    "tools": dict(messages=[say("system", "S"), ASK], tools=TOOLS),
    "a call": dict(messages=CALLED, tools=TOOLS),
    "its result": dict(messages=[*CALLED, say("tool", '{"temp": 21}', tool_call_id="abcdefghi", name="get_weather"), say("assistant", "21 °C"), say("user", "thanks")], tools=TOOLS),
    "two calls": dict(messages=[ASK, say("assistant", "Let me see.", tool_calls=[call("get_weather", {"city": "A"}), call("now", {}, "123456789")]),
                                say("tool", "sunny", tool_call_id="abcdefghi"), say("tool", "noon", tool_call_id="123456789")], tools=TOOLS[:1]),
    "arguments as text": dict(messages=[ASK, say("assistant", "", tool_calls=[call("now", "{\"a\": 1}", "short")])]),
    "parts": dict(messages=[say("user", [dict(type="text", text=" look "), dict(type="image"), dict(type="text", text="here")])]),
    "out of turn": dict(messages=[say("user", "1"), say("user", "2")]),
    "unknown role": dict(messages=[say("user", "1"), say("critic", "2")]),
    "empty content": dict(messages=[say("user", ""), say("assistant", ""), say("user", "\n")]),
}


class FixedTime(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(NOW, datetime.timezone.utc)


def rendered(made, template):
    cases = []
    for name, conversation in CONVERSATIONS.items():
        for prompt in (True, False):
            case = dict(conversation=name, add_generation_prompt=prompt)
            try:
                text = made.apply_chat_template(tokenize=False, chat_template=template, add_generation_prompt=prompt, conversation=conversation["messages"],
                                                **{key: value for key, value in conversation.items() if key != "messages"})
                case["text"] = text
            except Exception as error:
                case["error"] = str(error) if type(error).__name__ == "TemplateError" else type(error).__name__
            cases.append(case)
    return cases


if __name__ == "__main__":
    chat_template_utils.datetime = FixedTime
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    templates = {path.stem: rendered(made, path.read_text()) for path in sorted((HERE / "templates").glob("*.jinja"))}
    golden = dict(
        made_by=f"transformers {transformers.__version__}, tokenizers {__import__('tokenizers').__version__}, jinja2 {__import__('jinja2').__version__}",
        tokenizers={kind: encoded(kind) for kind in AROUND}, now=NOW, conversations=CONVERSATIONS, templates=templates,
    )
    # Nothing but ASCII, so that no editor composes what must stay in parts; a line per case, for diffs.
    text = json.dumps(golden, ensure_ascii=True, separators=(",", ":")).replace('{"text":', '\n{"text":').replace('{"conversation":', '\n{"conversation":')
    (HERE / "golden.json").write_text(text + "\n")
    for path in sorted(HERE.glob("*.json")):
        print(f"{path.name}: {path.stat().st_size} bytes")
    for name, cases in templates.items():
        print(name, sorted({case["error"] for case in cases if "error" in case}))
