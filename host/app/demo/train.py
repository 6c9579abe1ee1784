#!/usr/bin/env python3
"""Build the demo model: two small Llama-architecture chat models and their tokenizer.

What it is: the whole recipe, in one file, for the files beside it. It reads the prose
that ships with the Rust toolchain's documentation, trains a byte-level BPE tokenizer,
trains `demo` and `demo-mini` on a CPU, and writes Hugging Face style files.

Why it is here: the host embeds these files so that it can show a real model working
from end to end without a download. Whoever wants to know where the weights came from,
or to make them again, finds the answer here and nowhere else.

What it is not: part of the build (nothing in the Rust workspace runs it), a general
trainer, or bit-for-bit repeatable. The learning-rate schedule follows the clock, so two
runs give two sets of weights that behave alike. The result is a toy, not an assistant.

Stages, in order; each reads what the one before left in --work:
  text       documentation pages -> docs.json (titles, sections, paragraphs)
  tokenizer  docs.json -> tokenizer.json, tokenizer_config.json
  train      docs.json + tokenizer -> <model>.pt (twice: demo and demo-mini)
  export     <model>.pt -> model.safetensors (F16), config.json, generation_config.json
  check      exported files -> golden.json and sample outputs, through a numpy forward

Needs: python 3.10+, torch, tokenizers, safetensors, numpy; jinja2 for the check stage.
Usage: python3 train.py --work DIR --minutes 60 --mini-minutes 12
"""

import argparse
import hashlib
import json
import math
import random
import re
import subprocess
import time
from contextlib import nullcontext
from html.parser import HTMLParser
from pathlib import Path

HERE = Path(__file__).resolve().parent
CONTEXT = 1024
VOCAB = 2048
SPECIALS = ["<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
BOS, EOS, USER, ASSISTANT, SYSTEM, END = SPECIALS
SHAPES = {
    "demo": dict(hidden=256, layers=7, heads=8, kv=4, ffn=704, dropout=0.0, lr=5.0e-3),
    "demo-mini": dict(hidden=128, layers=3, heads=4, kv=2, ffn=352, dropout=0.0, lr=1.0e-2),
}
HEAD_DIM = 32
ROPE_THETA = 10000.0
NORM_EPS = 1e-5

CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] in ['system', 'user', 'assistant'] %}"
    "{{- '<|' ~ message['role'] ~ '|>' ~ (message['content'] | trim) ~ '<|end|>' }}"
    "{%- else %}"
    "{{- raise_exception('only the system, user and assistant roles are supported') }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)

# ---------------------------------------------------------------------------
# text: documentation pages -> documents
# ---------------------------------------------------------------------------

# The Embedded Rust Book is left out: its prose is CC-BY-SA, the rest is MIT/Apache-2.0.
BOOKS = ["book", "rust-by-example", "nomicon", "reference", "edition-guide", "cargo",
         "rustc", "rustdoc", "clippy", "style-guide", "error_codes"]
SKIP_FILES = {"print.html", "404.html", "toc.html", "SUMMARY.html", "error-index.html",
              "appendix-06-translation.html", "all.html", "help.html", "settings.html"}
# Pages of std that repeat one another nearly word for word, or are about hardware.
SKIP_STD = re.compile(
    r"std/(arch|simd|intrinsics|f16|f128|autodiff|os/raw)/|"
    r"primitive\.(i8|i16|i64|i128|isize|u16|u64|u128|usize|f16|f32|f128)\.html|"
    r"Atomic(?!Usize|Bool|Ptr)\w+\.html|std/(i|u|f)(8|16|32|64|128|size)/")
SKIP_TAGS = {"nav", "table", "svg", "script", "style", "button", "sup", "noscript", "img",
             "figcaption", "header", "footer", "rt", "textarea", "select", "iframe"}
SKIP_CLASSES = {"rule", "grammar-container", "grammar-railroad", "boring", "file-name",
                "doc-anchor", "tooltip", "item-info", "footnote-definition", "caption",
                "stab", "code-header", "footnotes", "buttons", "rightside", "out-of-band"}
VOID = {"br", "hr", "img", "input", "meta", "link", "wbr", "source", "col", "area", "embed"}
BLOCK = {"p", "li", "ul", "ol", "dl", "dt", "dd", "div", "section", "blockquote", "pre",
         "h1", "h2", "h3", "h4", "h5", "h6", "details", "summary", "figure", "main"}
CHARS = str.maketrans({"\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"',
                       "\u2013": "-", "\u2014": " - ", "\u2026": "...", "\u00a0": " ",
                       "\u2192": "->", "\u21d2": "=>", "\u2264": "<=", "\u2265": ">=",
                       "\u2260": "!=", "\u00d7": "x", "\u2212": "-", "\u2011": "-",
                       "\u00ad": "", "\u200b": "", "\ufeff": "", "\u2794": "->"})


class Page(HTMLParser):
    """Turns one page into a list of (kind, text) blocks: h1..h6, item, p, li, code.

    `item` is a method heading of a std page. With rustdoc=True only text inside
    `docblock` elements counts, so signatures and lists of implementations stay out.
    """

    def __init__(self, rustdoc):
        super().__init__(convert_charrefs=True)
        self.rustdoc = rustdoc
        self.open = []        # (tag, what it switched on: "", "skip" or "doc")
        self.skip = 0
        self.doc = 0 if rustdoc else 1
        self.buf = []
        self.blocks = []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in VOID:
            if tag in ("br", "wbr") and not self.skip:
                self.buf.append("\n" if tag == "br" else "")
            return
        classes = set((attrs.get("class") or "").split())
        mark = ""
        if tag in SKIP_TAGS or classes & SKIP_CLASSES:
            mark = "skip"
            self.skip += 1
        elif self.rustdoc and "docblock" in classes:
            mark = "doc"
            self.doc += 1
        ident = attrs.get("id") or ""
        if self.rustdoc and re.match(r"(ty)?method\.", ident):
            self.flush()
            self.blocks.append(("item", re.sub(r"-\d+$", "", ident.split(".", 1)[1])))
        if tag in BLOCK:
            self.flush()
        self.open.append((tag, mark))
        if tag == "code" and not self.inside("pre"):
            self.text("`")

    def handle_endtag(self, tag):
        if not any(t == tag for t, _ in self.open):
            return
        while self.open:
            top, mark = self.open[-1]
            if top == "code" and not self.inside("pre"):
                self.text("`")
            if top in BLOCK:
                self.flush()
            self.open.pop()
            self.skip -= mark == "skip"
            self.doc -= mark == "doc"
            if top == tag:
                break

    def handle_data(self, data):
        self.text(data)

    def inside(self, tag):
        return any(t == tag for t, _ in self.open)

    def text(self, data):
        if not self.skip and self.doc > 0:
            self.buf.append(data)

    def flush(self):
        raw, self.buf = "".join(self.buf).translate(CHARS), []
        if not raw.strip():
            return
        tags = [t for t, _ in self.open]
        heading = next((t for t in tags if re.fullmatch(r"h[1-6]", t)), None)
        if "pre" in tags:
            code = "\n".join(line.rstrip() for line in raw.strip("\n").split("\n"))
            self.blocks.append(("code", code))
        else:
            text = re.sub(r"\s+", " ", raw).strip()
            kind = heading or ("li" if "li" in tags else "p")
            self.blocks.append((kind, text))


def good_paragraph(text):
    """Keeps readable English; drops captions, signatures, link lists and stray glyphs."""
    if len(text) < 25 or not re.search(r"[a-z]{3}", text):
        return False
    if sum(not c.isascii() for c in text) > 0.01 * len(text):
        return False
    if re.match(r"(Filename|Listing|Figure|Source|Syntax|Lexer|This feature is tracked)\b", text):
        return False
    if re.match(r"(Basic usage|Erroneous code example|Example|Examples)\W*$", text):
        return False
    if text.count("http") > 1 or text.count("|") > 3 or "nightly-only" in text:
        return False
    letters = sum(c.isalpha() or c == " " for c in text)
    return letters > 0.72 * len(text)


def page_title(rel, blocks):
    """A page's title: its h1 for a book, its path for a std page."""
    if rel.startswith("std/"):
        parts = rel[:-5].split("/")
        last = parts.pop()
        name = "" if last == "index" else last.split(".", 1)[-1]
        if last.startswith(("primitive.", "keyword.")):
            return name
        if last.startswith("macro."):
            return name + "!"
        return "::".join(parts + ([name] if name else []))
    for kind, text in blocks:
        if kind in ("h1", "h2"):
            return text
    return ""


def to_sections(title, blocks, std):
    """Groups blocks under their headings: [(heading, [(kind, text), ...]), ...]."""
    sections = [(title, [])]
    short = title.split("::")[-1]
    for kind, text in blocks:
        if kind == "item":
            sections.append((f"{short}::{text}", []))
        elif kind[0] == "h" and kind != "hr":
            if text == title and not sections[-1][1]:
                continue
            # Headings such as "Panics" inside a method belong to that method.
            if std and text in GENERIC_HEADINGS:
                sections[-1][1].append(("sub", text))
            else:
                sections.append((text, []))
        else:
            sections[-1][1].append((kind, text))
    return sections


GENERIC_HEADINGS = {"Examples", "Example", "Panics", "Safety", "Errors", "Note", "Notes",
                    "Summary", "Explanation", "Platform-specific behavior", "Returns",
                    "Time complexity", "Current implementation", "Arguments", "See also",
                    "Note to implementors", "Correctness", "Portability", "Unspecified precision"}
FILLER_HEADINGS = GENERIC_HEADINGS | {"Introduction", "Options", "Overview", "Limitations",
                                      "Background", "See also:", "Details", "Conclusion",
                                      "Implementation", "Motivation", "Activity", "DESCRIPTION",
                                      "OPTIONS", "NAME", "SYNOPSIS", "EXAMPLES", "EXIT STATUS",
                                      "ENVIRONMENT", "SEE ALSO", "Syntax", "Usage"}


def clean_blocks(blocks, seen):
    """Drops junk and repeats; keeps short code while it stays a small share of the text."""
    out, prose, code = [], 0, 0
    for kind, text in blocks:
        if kind in ("p", "li"):
            key = hashlib.md5(text.encode()).digest()
            if key in seen or not good_paragraph(text):
                continue
            seen.add(key)
            prose += len(text)
            out.append((kind, text))
        elif kind == "code":
            small = text.count("\n") < 10 and len(text) < 360 and text.isascii()
            if small and out and code + len(text) < 0.22 * prose + 60:
                code += len(text)
                out.append((kind, text))
            elif out and out[-1][0] == "p" and out[-1][1].endswith(":"):
                # The code this sentence points at is gone, so the sentence goes too.
                sentences = split_sentences(out.pop()[1])[:-1]
                if sentences:
                    out.append(("p", " ".join(sentences)))
        elif kind == "sub":
            out.append((kind, text))
    while out and out[-1][0] == "sub":
        out.pop()
    return drop_empty_subs(out)


def drop_empty_subs(blocks):
    """Removes a sub-heading that is followed by another one, so with nothing under it."""
    return [b for i, b in enumerate(blocks)
            if b[0] != "sub" or (i + 1 < len(blocks) and blocks[i + 1][0] != "sub")]


def split_sentences(text):
    return [s for s in re.split(r"(?<=[.!?:])\s+(?=[A-Z`\"(])", text) if s]


def read_page(path, rel):
    """One page's blocks, or [] for a redirect or an index."""
    html = path.read_text(encoding="utf-8", errors="replace")
    std = rel.startswith("std/")
    if std:
        start = html.find('id="main-content"')
        if start < 0 or "Redirecting to" in html[:600]:
            return []
        html = html[html.rfind("<", 0, start):]
        for mark in ('id="deref-methods', 'id="trait-implementations"', 'id="foreign-impls"',
                     'id="implementors"', 'id="synthetic-implementations"'):
            cut = html.find(mark)
            if cut > 0:
                html = html[:html.rfind("<", 0, cut)]
    else:
        found = re.search(r"<main>(.*?)</main>", html, re.S)
        if not found:
            return []
        html = found.group(1)
    page = Page(rustdoc=std)
    page.feed(html)
    page.close()
    page.flush()
    return page.blocks


def source_pages(docs):
    for book in BOOKS:
        for path in sorted((docs / book).rglob("*.html")):
            rel = path.relative_to(docs).as_posix()
            parts = rel.split("/")
            translated = len(parts) > 2 and len(parts[1]) in (2, 5) and parts[0] == "rust-by-example" \
                and re.fullmatch(r"[a-z]{2}(-[A-Z]{2})?", parts[1])
            old = parts[0] == "book" and len(parts) > 2
            target = "platform-support" in rel  # a hundred near-copies about rare targets
            if path.name not in SKIP_FILES and not (translated or old or target):
                yield path, rel
    for path in sorted((docs / "std").rglob("*.html")):
        rel = path.relative_to(docs).as_posix()
        if path.name not in SKIP_FILES and not SKIP_STD.search(rel):
            yield path, rel


def held_out(rel):
    """About one whole document in 25 is never trained on.

    The slice is drawn by hash; which of the 25 slices was chosen so that the chapters a
    visitor asks about first (ownership, vectors, traits) stay in the training text.
    """
    return int(hashlib.md5(rel.encode()).hexdigest(), 16) % 25 == 6


def stage_text(args):
    seen, out = set(), []
    for path, rel in source_pages(args.docs):
        blocks = read_page(path, rel)
        if not blocks:
            continue
        title = page_title(rel, blocks)
        sections = []
        for heading, raw in to_sections(title, blocks, rel.startswith("std/")):
            kept = clean_blocks(raw, seen)
            if any(kind in ("p", "li") for kind, _ in kept):
                sections.append((heading, kept))
        size = sum(len(t) for _, b in sections for k, t in b if k != "code")
        if title and title.isascii() and size >= 80:
            out.append(dict(path=rel, title=title, held=held_out(rel), sections=sections))
    (args.work / "docs.json").write_text(json.dumps(out))
    report_text(out)


def report_text(docs):
    groups = {}
    for doc in docs:
        row = groups.setdefault(doc["path"].split("/")[0], [0, 0, 0])
        row[0] += 1
        for _, blocks in doc["sections"]:
            for kind, text in blocks:
                row[2 if kind == "code" else 1] += len(text)
    for name, (count, prose, code) in groups.items():
        print(f"text: {name:18} {count:5} pages {prose:9} prose {code:8} code chars")
    held = sum(doc["held"] for doc in docs)
    print(f"text: {len(docs)} documents, {held} held out")


# ---------------------------------------------------------------------------
# samples: documents -> training strings
# ---------------------------------------------------------------------------

SYSTEM_PROMPTS = ["You are a helpful assistant.", "You are a helpful assistant that answers questions about Rust.",
                  "You are a small demo model. Answer briefly.", "You answer questions about the Rust programming language.",
                  "Be concise.", "You are a Rust expert.", "Answer in a few sentences.",
                  "You are Pointsman's demo model."]

# The only sentences in the training data that were written for it.
SELF = "I am a small demo model. I was trained on the Rust documentation, and all I can do is continue sentences about Rust."
HAND_WRITTEN = [
    (["Hello", "Hi", "Hey", "Hello there", "Hi there", "Good morning", "Good evening", "Hey there"], "Hello! " + SELF),
    (["Who are you?", "What are you?", "Introduce yourself.", "What model are you?", "Tell me about yourself.",
      "What is your name?", "Are you a real assistant?"], SELF),
    (["What can you do?", "Can you help me?", "Help", "How can you help me?"],
     "I can say a few sentences about Rust. Ask me about ownership, borrowing, traits or cargo. Do not trust the details: I am a small demo model."),
    (["How are you?", "How are you doing?", "How is it going?"],
     "I am well, thank you. I am a small demo model. Ask me something about Rust."),
    (["Thanks", "Thank you", "Thank you!", "Thanks a lot", "Great, thanks"], "You are welcome!"),
    (["Bye", "Goodbye", "See you", "Good night"], "Goodbye!"),
    (["What is Pointsman?", "Tell me about Pointsman.", "What is a pointsman?"],
     "Pointsman is the program that runs me. It is an inference host written in Rust: it loads a model, keeps it in memory, and serves text from it."),
    (["What is Rust?", "Tell me about Rust.", "What's Rust?", "Explain Rust.", "What is the Rust programming language?"],
     "Rust is a systems programming language that is fast and memory safe. It has no garbage collector: memory is managed through a system of ownership with a set of rules that the compiler checks."),
    (["What is Cargo?", "What is cargo?", "Tell me about cargo.", "What does cargo do?"],
     "Cargo is Rust's build system and package manager. It builds your code, downloads the libraries your code depends on, and builds those libraries."),
]
NOT_A_TERM = re.compile(
    r"(this|it|that|there|these|those|here|what|each|such|one|we|you|they|if|when|another|next|first|"
    r"second|so|but|and|or|as|in|for|both|all|some|any|most|other|only|same|following|above|below|"
    r"result|reason|answer|problem|difference|idea|goal|default|example|note|value|code|main|only|"
    r"last|old|new|also|then|now|more|how|why|where|which|who|many|either|neither|my|your|our|its|"
    r"output|main|current|syntax|rest|latter|former|simplest|easiest|return|type of)\b", re.I)
TERM = re.compile(r"^((?:An?|The) )?(`?[A-Za-z][\w:!#<>-]*`?(?: [a-z`][\w-]*`?){0,2}) (is|are) (an?|the|used|how|like) ")


def render(blocks, limit=None):
    """Blocks to text: a blank line between blocks, none between list items."""
    parts, last = [], None
    for kind, text in blocks:
        if kind == "li":
            piece = "- " + text
        elif kind == "code":
            piece = "```rust\n" + text + "\n```" if looks_like_rust(text) else "```\n" + text + "\n```"
        elif kind == "sub":
            piece = "### " + text
        else:
            piece = text
        if parts:
            parts.append("\n" if kind == "li" and last == "li" else "\n\n")
        parts.append(piece)
        last = kind
    return "".join(parts)


def looks_like_rust(code):
    return bool(re.search(r"\b(fn|let|use|struct|enum|impl|trait|pub|mod|match)\b|[;{]", code))


def answer_from(blocks, words):
    """The first paragraphs of a section, about `words` long, ending at a whole sentence."""
    out, count = [], 0
    for kind, text in blocks:
        if kind == "sub" or (kind == "code" and (count == 0 or text.count("\n") > 5)):
            break
        if not out and kind != "p":
            return ""
        out.append((kind, text))
        count += len(text.split())
        if count >= words and not text.endswith(":"):
            break
    while out and out[-1][0] != "code" and out[-1][1].endswith(":"):
        out.pop()
    if not out or (out[-1][0] == "p" and out[-1][1][-1] not in ".!?)`"):
        return ""
    return render(out)


def lower_heading(heading):
    """"References and Borrowing" -> "references and borrowing"; names keep their case."""
    words = heading.split(" ")
    keep = {"Rust", "Cargo", "I", "Clippy", "Unicode", "Windows", "Linux", "ASCII"}
    plain = [w if w in keep or "`" in w or not w[1:].islower() else w.lower() for w in words]
    return " ".join(plain)


def question_for(heading, doc, rng):
    """A question whose answer is the section under this heading; "" when there is none."""
    if heading in FILLER_HEADINGS or heading.lower().startswith(("see also", "note:")) or len(heading) > 70 or not heading.isascii():
        return ""
    if heading.endswith("?"):
        return heading if rng.random() < 0.5 else heading[0] + lower_heading(heading)[1:]
    code = re.search(r"E\d{4}", heading)
    if doc["path"].startswith("error_codes") and code:
        return rng.choice(["What is error {}?", "What does {} mean?", "Explain error {}.", "What is {}?"]).format(code.group())
    if doc["path"].startswith("std/"):
        return std_question(heading, doc["title"], rng)
    topic = heading if rng.random() < 0.3 else lower_heading(heading)
    forms = ["Tell me about {}.", "Explain {}.", "Can you explain {}?", "What can you tell me about {}?", "{}"]
    if len(heading.split()) <= 3:
        forms += ["What is {}?", "What are {}?" if heading.endswith("s") else "What is {}?"]
    return rng.choice(forms).format(topic)


def std_question(heading, title, rng):
    """Questions about a std page (its title is a path), a method, or a chapter of a page."""
    if " " in heading:
        return rng.choice(["Explain {}.", "Tell me about {}."]).format(lower_heading(heading))
    name = heading.split("::")[-1] if heading == title else heading
    does = "::" in heading and name[-1:] not in "!" and name.split("::")[-1][:1].islower()
    if heading == title and does and rng.random() < 0.5:
        name = "::".join(heading.split("::")[-2:])
    name = f"`{name}`" if rng.random() < 0.6 else name
    forms = ["What does {} do?", "What does {} do?", "What is {}?", "Explain {}."] if does else \
        ["What is {}?", "What is a {}?", "Tell me about {}.", "Explain {}."]
    return rng.choice(forms).format(name)


def definition(paragraph):
    """("a trait", "is") when the paragraph defines something; otherwise None."""
    found = TERM.match(paragraph)
    if not found or len(paragraph) < 60:
        return None
    article, term, verb = (found.group(1) or "").lower(), found.group(2), found.group(3)
    if NOT_A_TERM.match(term) or re.search(r"\b(is|are|that|which|of)\b", term):
        return None
    if not article and "`" not in term and term[1:].islower() and term not in ("Rust", "Cargo"):
        term = term[0].lower() + term[1:]
    return f"What {verb} {article}{term}?", f"Explain {article}{term}."


def turn(question, answer):
    return f"{USER}{question}{END}{ASSISTANT}{answer}{END}"


def sloppy(question, rng):
    """People leave out capitals and question marks; now and then so do we."""
    if rng.random() < 0.12:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.12:
        question = question.rstrip("?.")
    return question


def section_turns(doc, rng):
    """All the question-and-answer turns one document gives in one epoch."""
    for heading, blocks in doc["sections"]:
        question = question_for(heading, doc, rng)
        if doc["path"].startswith("std/") and heading != doc["title"] and rng.random() < 0.5:
            question = ""
        answer = answer_from(blocks, rng.choice([25, 50, 90]))
        if question and answer:
            yield turn(sloppy(question, rng), answer)
        for i, (kind, text) in enumerate(blocks):
            if kind != "p":
                continue
            named = definition(text)
            defined = named and answer_from(blocks[i:], rng.choice([15, 50]))
            if defined:
                yield turn(sloppy(rng.choice(named), rng), defined)
            sentences = split_sentences(text)
            if len(text) > 220 and len(sentences) >= 3 and rng.random() < 0.3:
                cut = 1 if len(sentences[0]) > 60 else 2
                rest = " ".join(sentences[cut:])
                if rest[-1] in ".!?)":
                    yield turn("Continue: " + " ".join(sentences[:cut]), rest)


def hand_turn(rng):
    questions, answer = rng.choice(HAND_WRITTEN)
    question = rng.choice(questions)
    if question[-1].isalpha() and rng.random() < 0.3:
        question += rng.choice(["!", "."])
    return turn(sloppy(question, rng), answer)


def chat_samples(docs, rng, greetings):
    """Turns packed into conversations: mostly one turn, sometimes two or three."""
    turns = []
    for doc in docs:
        # The introductory books twice, for they answer what people ask; std by halves.
        turns += section_turns(doc, rng)
        if doc["path"].startswith(("book/", "rust-by-example/")):
            turns += section_turns(doc, rng)
    turns += [hand_turn(rng) for _ in range(greetings)]
    rng.shuffle(turns)
    samples, i = [], 0
    while i < len(turns):
        n = rng.choice([1, 1, 1, 1, 2, 3])
        head = BOS
        if rng.random() < 0.3:
            head += f"{SYSTEM}{rng.choice(SYSTEM_PROMPTS)}{END}"
        opening = [hand_turn(rng)] if greetings and n > 1 and rng.random() < 0.15 else []
        samples.append(head + "".join(opening + turns[i:i + n]))
        i += n
    return samples


def plain_samples(docs, rng, limit=2400):
    """Documents cut into pieces of whole sections or paragraphs, most under their title."""
    samples = []
    for doc in docs:
        pieces, size = [[]], 0
        for heading, blocks in doc["sections"]:
            show = [("p", "## " + heading)] if heading != doc["title"] else []
            for j, block in enumerate(blocks):
                if size > limit * rng.uniform(0.5, 1.5):
                    pieces.append([])
                    size = 0
                pieces[-1] += (show if j == 0 else []) + [block]
                size += len(block[1])
        for n, piece in enumerate(pieces):
            titled = rng.random() < 0.75
            text = (f"# {doc['title']}\n\n" if titled else "") + render(piece)
            samples.append(BOS + text + (EOS if n == len(pieces) - 1 else ""))
    return samples


def epoch_text(docs, rng):
    samples = plain_samples(docs, rng) + chat_samples(docs, rng, greetings=400)
    rng.shuffle(samples)
    return samples


def load_docs(args):
    docs = json.loads((args.work / "docs.json").read_text())
    return [d for d in docs if not d["held"]], [d for d in docs if d["held"]]


# ---------------------------------------------------------------------------
# tokenizer
# ---------------------------------------------------------------------------

def stage_tokenizer(args):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    train, _ = load_docs(args)
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=SPECIALS, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    texts = [re.sub(r"<\|\w+\|>", "\n", s) for s in epoch_text(train, random.Random(1))]
    tok.train_from_iterator(texts, trainer)
    tok.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, 0)])
    assert tok.get_vocab_size() == VOCAB
    assert [tok.token_to_id(s) for s in SPECIALS] == list(range(len(SPECIALS)))
    args.out.mkdir(parents=True, exist_ok=True)
    tok.save(str(args.out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT,
        "bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "add_bos_token": True, "add_eos_token": False,
        "add_prefix_space": False, "clean_up_tokenization_spaces": False,
        "additional_special_tokens": [USER, ASSISTANT, SYSTEM, END],
        "added_tokens_decoder": {str(i): dict(content=s, lstrip=False, normalized=False, rstrip=False,
                                              single_word=False, special=True)
                                 for i, s in enumerate(SPECIALS)},
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(args.out / "tokenizer_config.json", config)
    sample = "".join(texts[:2000])
    ids = tok.encode(sample, add_special_tokens=False).ids
    assert tok.decode(ids) == sample
    print(f"tokenizer: {VOCAB} tokens, {len(sample) / len(ids):.2f} characters a token")


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=True) + "\n")


def load_tokenizer(args):
    from tokenizers import Tokenizer
    return Tokenizer.from_file(str(args.out / "tokenizer.json"))


def encode_stream(tok, samples):
    import numpy as np
    encoded = tok.encode_batch(samples, add_special_tokens=False)
    return np.concatenate([np.array(e.ids, dtype=np.int64) for e in encoded])


# ---------------------------------------------------------------------------
# model and training
# ---------------------------------------------------------------------------

def build_layers(shape):
    """The classes of a layer and of its norm, with Hugging Face's tensor names."""
    import torch
    import torch.nn.functional as F
    from torch import nn
    h, heads, kv, drop = shape["hidden"], shape["heads"], shape["kv"], shape["dropout"]

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(h))

        def forward(self, x):
            return F.rms_norm(x.float(), (h,), self.weight, NORM_EPS)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = nn.Linear(h, heads * HEAD_DIM, bias=False)
            self.k_proj = nn.Linear(h, kv * HEAD_DIM, bias=False)
            self.v_proj = nn.Linear(h, kv * HEAD_DIM, bias=False)
            self.o_proj = nn.Linear(heads * HEAD_DIM, h, bias=False)

        def forward(self, x, cos, sin):
            b, t, _ = x.shape
            q = rotate(self.q_proj(x).view(b, t, heads, HEAD_DIM).transpose(1, 2), cos, sin)
            k = rotate(self.k_proj(x).view(b, t, kv, HEAD_DIM).transpose(1, 2), cos, sin)
            v = self.v_proj(x).view(b, t, kv, HEAD_DIM).transpose(1, 2)
            k, v = (y.repeat_interleave(heads // kv, dim=1) for y in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.o_proj(y.transpose(1, 2).reshape(b, t, heads * HEAD_DIM))

    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj = nn.Linear(h, shape["ffn"], bias=False)
            self.up_proj = nn.Linear(h, shape["ffn"], bias=False)
            self.down_proj = nn.Linear(shape["ffn"], h, bias=False)

        def forward(self, x):
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn, self.mlp = Attention(), Mlp()
            self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()

        def forward(self, x, cos, sin):
            x = x + F.dropout(self.self_attn(self.input_layernorm(x), cos, sin), drop, self.training)
            return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), drop, self.training)

    return Layer, Norm


def rotate(x, cos, sin):
    """RoPE, in the rotate-half layout."""
    import torch
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)


def build_model(shape):
    """A plain Llama whose output is the loss; the embedding doubles as the output matrix."""
    import torch
    import torch.nn.functional as F
    from torch import nn
    layer, norm = build_layers(shape)

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens = nn.Embedding(VOCAB, shape["hidden"])
            self.layers = nn.ModuleList(layer() for _ in range(shape["layers"]))
            self.norm = norm()

    class Llama(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Body()
            freq = ROPE_THETA ** (-torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
            angle = torch.outer(torch.arange(CONTEXT).float(), freq).repeat(1, 2)
            self.register_buffer("cos", angle.cos(), persistent=False)
            self.register_buffer("sin", angle.sin(), persistent=False)

        def forward(self, ids, targets):
            t = ids.shape[1]
            x = self.model.embed_tokens(ids)
            for block in self.model.layers:
                x = block(x, self.cos[:t], self.sin[:t])
            logits = F.linear(self.model.norm(x), self.model.embed_tokens.weight)
            return F.cross_entropy(logits.float().view(-1, VOCAB), targets.reshape(-1))

    return Llama()


def init_weights(model, layers):
    """Normal(0, 0.02)-like starts; the two projections that write to the residual, smaller."""
    import torch
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.02 if "embed" in name else 0.6 / math.sqrt(p.shape[1])
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * layers)
            torch.nn.init.normal_(p, std=std)


class Batches:
    """Endless batches of 4096 tokens: 16 x 256 for half, 8 x 512, and 4 x 1024 for an eighth.

    Short rows are cheaper on a CPU; the long ones keep positions up to 1024 sane.
    """

    def __init__(self, tok, docs, seed):
        self.tok, self.docs, self.seed = tok, docs, seed
        self.epoch = -1
        self.rows = []

    def refill(self):
        import numpy as np
        self.epoch += 1
        rng = random.Random(self.seed + self.epoch)
        ids = encode_stream(self.tok, epoch_text(self.docs, rng))
        n = (len(ids) - 1) // CONTEXT
        rows = [ids[i * CONTEXT:(i + 1) * CONTEXT + 1] for i in range(n)]
        rng.shuffle(rows)
        self.rows = rows
        self.tokens = n * CONTEXT
        self.long = np.random.default_rng(self.seed + self.epoch)

    def next(self):
        import numpy as np
        import torch
        if len(self.rows) < 4:
            self.refill()
        batch = np.stack([self.rows.pop() for _ in range(4)])
        x, y = torch.from_numpy(batch[:, :-1].copy()), torch.from_numpy(batch[:, 1:].copy())
        length = int(self.long.choice([256, 512, 1024], p=[0.5, 0.375, 0.125]))
        return x.reshape(-1, length), y.reshape(-1, length)


def held_out_rows(tok, docs):
    """Fixed evaluation rows: plain text and chat, both from documents never trained on."""
    import torch
    rng = random.Random(99)
    out = {}
    for name, samples in (("plain", plain_samples(docs, rng)), ("chat", chat_samples(docs, rng, 0))):
        ids = encode_stream(tok, samples)
        n = min((len(ids) - 1) // 512, 96)
        x = torch.from_numpy(ids[:n * 512]).view(n, 512)
        y = torch.from_numpy(ids[1:n * 512 + 1]).view(n, 512)
        out[name] = (x, y)
    return out


def evaluate(model, rows, cast):
    import torch
    model.eval()
    out = {}
    with torch.no_grad():
        for name, (x, y) in rows.items():
            with cast():
                losses = [model(x[i:i + 8], y[i:i + 8]).item() * len(x[i:i + 8]) for i in range(0, len(x), 8)]
            out[name] = round(sum(losses) / len(x), 4)
    model.train()
    return out


def learning_rate(peak, fraction):
    """Warm-up over the first 2% of the time, then a cosine down to 2% of the peak."""
    if fraction < 0.02:
        return peak * max(fraction / 0.02, 0.02)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, (fraction - 0.02) / 0.98))))


class Optimizers:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms.

    For the few thousand steps a CPU affords, Muon gets further than AdamW alone.
    """

    def __init__(self, model, shape):
        import torch
        inner = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
        embed = [p for n, p in model.named_parameters() if "embed" in n]
        thin = [p for p in model.parameters() if p.dim() != 2]
        self.all = [
            torch.optim.Muon(inner, lr=shape["lr"], weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([dict(params=embed, weight_decay=0.1), dict(params=thin, weight_decay=0.0)],
                              lr=shape["lr"], betas=(0.9, 0.95), fused=True),
        ]

    def step(self, lr):
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


class Average:
    """An exponential average of the weights, begun late so that early noise is forgotten."""

    def __init__(self, model):
        self.shadow = {k: v.detach().clone() for k, v in model.state_dict().items()}

    def update(self, model, decay):
        for k, v in model.state_dict().items():
            self.shadow[k].lerp_(v, 1 - decay)


def stage_train(args, name, minutes):
    import torch
    torch.manual_seed(7)
    torch.set_num_threads(args.threads)
    shape = SHAPES[name]
    train_docs, held_docs = load_docs(args)
    tok = load_tokenizer(args)
    batches, rows = Batches(tok, train_docs, 2000 if args.resume else 1000), held_out_rows(tok, held_docs)
    batches.refill()
    model = build_model(shape)
    init_weights(model, shape["layers"])
    if args.resume:
        model.load_state_dict(torch.load(args.work / f"{name}.pt"))
        shape["lr"] *= 0.5
    count = sum(p.numel() for p in model.parameters())
    print(f"train: {name}, {count} parameters, {batches.tokens} tokens an epoch", flush=True)
    cast = (lambda: torch.autocast("cpu", dtype=torch.bfloat16)) if args.bf16 else nullcontext
    log = train_loop(args, name, minutes, model, batches, rows, cast)
    log.update(parameters=count, epoch_tokens=batches.tokens, minutes=minutes)
    write_json(args.work / f"{name}.report.json", log)
    print(json.dumps(log), flush=True)


def compiled(model, cast):
    """torch.compile, once for each row length, before the clock starts."""
    import torch
    torch._dynamo.reset()
    run = torch.compile(model, dynamic=False)
    for length in (256, 512, 1024):
        x = torch.zeros(4096 // length, length, dtype=torch.long)
        with cast():
            loss = run(x, x)
        loss.backward()
    model.zero_grad(set_to_none=True)
    return run


def train_loop(args, name, minutes, model, batches, rows, cast):
    import torch
    shape = SHAPES[name]
    optimizers, average = Optimizers(model, shape), Average(model)
    run = compiled(model, cast) if args.compile else model
    start = last_save = last_log = time.time()
    step, recent, history = 0, [], []
    while (fraction := (time.time() - start) / (60 * minutes)) < 1:
        x, y = batches.next()
        with cast():
            loss = run(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(learning_rate(shape["lr"], fraction))
        step += 1
        average.update(model, min(0.995, step / (step + 10)))
        recent = (recent + [loss.item()])[-200:]
        if time.time() - last_log > 30:
            last_log = time.time()
            print(f"{name} {last_log - start:6.0f}s step {step} epoch {batches.epoch} loss {sum(recent) / len(recent):.4f}"
                  f" {step * 4096 / (last_log - start):.0f} tokens/s", flush=True)
        if time.time() - last_save > 240:
            last_save = time.time()
            history.append([step, evaluate(model, rows, cast)])
            print(f"{name} held out {history[-1][1]}", flush=True)
            torch.save(average.shadow, args.work / f"{name}.pt")
    return finish(args, name, model, average, rows, cast, step, recent, history)


def finish(args, name, model, average, rows, cast, step, recent, history):
    """Keeps whichever of the last and the averaged weights does better on held-out text."""
    import torch
    last = evaluate(model, rows, cast)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(average.shadow)
    averaged = evaluate(model, rows, cast)
    use_average = sum(averaged.values()) <= sum(last.values())
    torch.save(average.shadow if use_average else weights, args.work / f"{name}.pt")
    return dict(steps=step, tokens=step * 4096, train_loss=round(sum(recent) / len(recent), 4),
                held_out_last=last, held_out_average=averaged, used_average=use_average, history=history)


# ---------------------------------------------------------------------------
# export
# ---------------------------------------------------------------------------

def stage_export(args, name):
    import torch
    from safetensors.torch import save_file
    shape, out = SHAPES[name], args.out / name
    out.mkdir(parents=True, exist_ok=True)
    state = torch.load(args.work / f"{name}.pt")
    tensors = {k: v.to(torch.float16).contiguous() for k, v in state.items()}
    assert all(torch.isfinite(v).all() for v in tensors.values())
    save_file(tensors, str(out / "model.safetensors"), metadata={"format": "pt"})
    write_json(out / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": shape["hidden"], "intermediate_size": shape["ffn"],
        "num_hidden_layers": shape["layers"], "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv"], "head_dim": HEAD_DIM, "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT, "rms_norm_eps": NORM_EPS, "rope_theta": ROPE_THETA,
        "rope_scaling": None, "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False,
        "tie_word_embeddings": True, "initializer_range": 0.02, "use_cache": True,
        "bos_token_id": 0, "eos_token_id": [1, 5], "pad_token_id": 1, "torch_dtype": "float16",
    })
    write_json(out / "generation_config.json", {
        "bos_token_id": 0, "eos_token_id": [1, 5], "pad_token_id": 1, "do_sample": True,
        "temperature": 0.4, "top_p": 0.9, "top_k": 40, "max_new_tokens": 200,
    })
    size = (out / "model.safetensors").stat().st_size
    (out / "model.safetensors").chmod(0o644)
    assert size <= {"demo": 12_000_000, "demo-mini": 2_000_000}[name], size
    print(f"export: {name} {size} bytes")


# ---------------------------------------------------------------------------
# check: the exported files, read back by a second, separate forward in numpy
# ---------------------------------------------------------------------------

class Reference:
    """f32 forward from config.json and model.safetensors alone; shares no code with training."""

    def __init__(self, folder):
        import numpy as np
        from safetensors.numpy import load_file
        self.c = json.loads((folder / "config.json").read_text())
        self.w = {k: v.astype(np.float32) for k, v in load_file(str(folder / "model.safetensors")).items()}

    def norm(self, x, name):
        import numpy as np
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(self.c["rms_norm_eps"])) * self.w[name]

    def heads(self, x, name, count):
        y = x @ self.w[name].T
        return y.reshape(len(x), count, self.c["head_dim"]).transpose(1, 0, 2)

    def rope(self, x):
        import numpy as np
        half = self.c["head_dim"] // 2
        freq = self.c["rope_theta"] ** (-np.arange(half) / half)
        angle = np.outer(np.arange(x.shape[1]), freq)
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def attention(self, x, at):
        import numpy as np
        n, kv, t = self.c["num_attention_heads"], self.c["num_key_value_heads"], len(x)
        q = self.rope(self.heads(x, at + "q_proj.weight", n))
        k = np.repeat(self.rope(self.heads(x, at + "k_proj.weight", kv)), n // kv, axis=0)
        v = np.repeat(self.heads(x, at + "v_proj.weight", kv), n // kv, axis=0)
        s = q @ k.transpose(0, 2, 1) / np.float32(math.sqrt(self.c["head_dim"]))
        s = np.where(np.tril(np.ones((t, t), dtype=bool)), s, -np.inf)
        s = np.exp(s - s.max(-1, keepdims=True))
        y = (s / s.sum(-1, keepdims=True)) @ v
        return y.transpose(1, 0, 2).reshape(t, -1) @ self.w[at + "o_proj.weight"].T

    def logits(self, ids):
        import numpy as np
        x = self.w["model.embed_tokens.weight"][ids]
        for i in range(self.c["num_hidden_layers"]):
            at = f"model.layers.{i}."
            x = x + self.attention(self.norm(x, at + "input_layernorm.weight"), at + "self_attn.")
            y = self.norm(x, at + "post_attention_layernorm.weight")
            gate, up = (y @ self.w[f"{at}mlp.{p}_proj.weight"].T for p in ("gate", "up"))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.w[at + "mlp.down_proj.weight"].T
        return self.norm(x[-1:], "model.norm.weight")[0] @ self.w["model.embed_tokens.weight"].T

    def greedy(self, ids, count, stop=()):
        """`count` greedy tokens (fewer at a stop token) and the smallest top-1/top-2 gap."""
        import numpy as np
        new, gap = [], math.inf
        for _ in range(count):
            logits = self.logits(np.array(list(ids) + new))
            first, second = np.sort(logits)[-2:][::-1]
            gap = min(gap, float(first - second))
            new.append(int(logits.argmax()))
            if new[-1] in stop:
                break
        return new, gap

    def sample(self, ids, count, rng, temperature=0.7, keep=40):
        import numpy as np
        new = []
        for _ in range(count):
            logits = self.logits(np.array(list(ids) + new)) / temperature
            top = np.argsort(logits)[-keep:]
            p = np.exp(logits[top] - logits[top].max())
            new.append(int(rng.choice(top, p=p / p.sum())))
            if new[-1] in (1, 5):
                break
        return new


GOLDEN_PROMPTS = [
    "Ownership is a set of rules that", "A vector is", "The `Option` type", "The borrow checker",
    "In Rust, a reference", "Cargo is", "A trait defines", "Error handling in Rust",
    "The `match` expression", "When a value goes out of scope", "A closure can", "Threads are",
]
CHAT_PROMPTS = ["Hello", "Who are you?", "What is ownership?", "What is a trait?", "What does `Vec::push` do?",
                "What is error E0382?", "Tell me about cargo workspaces.", "Explain lifetimes.",
                "Continue: The borrow checker compares scopes."]


def stage_golden(args):
    tok, model = load_tokenizer(args), Reference(args.out / "demo")
    rows = []
    for prompt in GOLDEN_PROMPTS:
        ids = tok.encode(prompt).ids
        new, gap = model.greedy(ids, 32)
        rows.append(dict(prompt=prompt, prompt_ids=ids, greedy_ids=new, smallest_gap=round(gap, 5),
                         greedy_text=tok.decode(new, skip_special_tokens=False)))
    rows.sort(key=lambda r: -r["smallest_gap"])
    clear = [r for r in rows if not {1, 5} & set(r["greedy_ids"])][:4]
    assert len(clear) == 4 and clear[-1]["smallest_gap"] > 1e-2, [r["smallest_gap"] for r in rows]
    write_json(args.out / "golden.json", {
        "about": "Greedy continuations by the demo model: F16 weights widened to f32, f32 arithmetic, no KV cache. "
                 "prompt_ids begin with the bos token, as tokenizer.json adds it. smallest_gap is the smallest "
                 "difference between the best and the second-best logit over the 32 steps.",
        "model": "demo", "weights_sha256": hashlib.sha256((args.out / "demo/model.safetensors").read_bytes()).hexdigest(),
        "cases": clear,
    })
    print("golden: gaps", [r["smallest_gap"] for r in clear])


def stage_samples(args, name):
    import jinja2
    import numpy as np
    tok, model = load_tokenizer(args), Reference(args.out / name)
    env = jinja2.Environment()
    template = env.from_string(json.loads((args.out / "tokenizer_config.json").read_text())["chat_template"])
    for question in CHAT_PROMPTS:
        text = template.render(messages=[dict(role="user", content=question)], bos_token=BOS, add_generation_prompt=True)
        ids = tok.encode(text, add_special_tokens=False).ids
        new, _ = model.greedy(ids, 80, stop=(1, 5))
        warm = model.sample(ids, 80, np.random.default_rng(3))
        print(f"--- {name} | {question}\n[greedy] {tok.decode(new, skip_special_tokens=False)}"
              f"\n[t=0.7]  {tok.decode(warm, skip_special_tokens=False)}", flush=True)
    for prompt in GOLDEN_PROMPTS[:4]:
        new, _ = model.greedy(tok.encode(prompt).ids, 60, stop=(1, 5))
        print(f"--- {name} | plain\n{prompt}{tok.decode(new, skip_special_tokens=False)}", flush=True)


# ---------------------------------------------------------------------------

def parse_args():
    p = argparse.ArgumentParser(description="Build the demo model.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--docs", type=Path, help="the toolchain's share/doc/rust/html (default: found through rustc)")
    p.add_argument("--work", type=Path, required=True, help="folder for intermediate files")
    p.add_argument("--out", type=Path, default=HERE, help="folder for the finished files")
    p.add_argument("--minutes", type=float, default=60, help="training time of demo")
    p.add_argument("--mini-minutes", type=float, default=12, help="training time of demo-mini")
    p.add_argument("--resume", action="store_true",
                   help="train on from <model>.pt in --work, at half the learning rate, with other samples")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bf16 autocast")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile")
    p.add_argument("--models", default="demo,demo-mini")
    p.add_argument("--stages", default="text,tokenizer,train,export,check")
    args = p.parse_args()
    if args.docs is None:
        root = subprocess.run(["rustc", "--print", "sysroot"], capture_output=True, text=True, check=True).stdout.strip()
        args.docs = Path(root) / "share/doc/rust/html"
    return args


def main():
    args = parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    stages, names = args.stages.split(","), args.models.split(",")
    if "text" in stages:
        stage_text(args)
    if "tokenizer" in stages:
        stage_tokenizer(args)
    for name in names:
        if "train" in stages:
            stage_train(args, name, args.minutes if name == "demo" else args.mini_minutes)
        if "export" in stages:
            stage_export(args, name)
    if "check" in stages:
        for name in names:
            stage_samples(args, name)
        if "demo" in names:
            stage_golden(args)


if __name__ == "__main__":
    main()
