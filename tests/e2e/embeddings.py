"""Embeds with the stock OpenAI client: argv[1] is the base URL of the data plane, argv[2] the golden of its encoder."""

import base64
import json
import math
import struct
import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0)
cases = json.load(open(sys.argv[2]))["cases"]


def normalised(vector):
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length for x in vector]


def close(found, expect):
    assert len(found) == len(expect), (len(found), len(expect))
    assert all(abs(a - b) < 1e-5 for a, b in zip(found, expect)), (found, expect)


expect = [normalised(case["mean"]) for case in cases]
ids = [case["tokens"] for case in cases]
texts = [" ".join(f"w{i}" for i in tokens) for tokens in ids]

# Without a format the client asks for base64 and decodes it.
for kwargs in ({}, {"encoding_format": "float"}):
    for given in (ids, texts):
        answer = client.embeddings.create(model="encoder", input=given, **kwargs)
        assert [item.index for item in answer.data] == list(range(len(cases))), answer
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids)), answer.usage
        for item, vector in zip(answer.data, expect):
            close(item.embedding, vector)
raw = client.embeddings.create(model="encoder", input=texts[0], encoding_format="base64").data[0].embedding
close(struct.unpack(f"<{len(expect[0])}f", base64.b64decode(raw)), expect[0])
close(client.embeddings.create(model="encoder", input=ids[0]).data[0].embedding, expect[0])
short = client.embeddings.create(model="encoder", input=texts[0], dimensions=8).data[0].embedding
close(short, normalised(expect[0][:8]))

listed = {model.id: model for model in client.models.list()}
assert listed["encoder"].embedding_dimensions == 32 and listed["encoder"].max_model_len == 40, listed
for model, param in (("demo", "model"), ("encoder", "input")):
    try:
        client.embeddings.create(model=model, input="w1 " * 41)
        raise AssertionError(f"{model} embedded it")
    except openai.BadRequestError as error:
        assert error.param == param, error

print("the stock client has its vectors")
