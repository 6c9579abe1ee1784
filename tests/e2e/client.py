"""Drives a running host with the stock OpenAI client: argv[1] is the base URL of the data plane."""

import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0)

models = [model.id for model in client.models.list()]
assert models[0] == "demo" and {"demo:f16", "demo:q8_0"} <= set(models), models
assert client.models.retrieve("demo:f16").id == "demo:f16"

messages = [{"role": "user", "content": "What is ownership?"}]
chat = client.chat.completions.create(model="demo:f16", messages=messages, max_tokens=24, temperature=0)
assert chat.choices[0].message.role == "assistant" and chat.choices[0].message.content, chat
assert chat.usage.completion_tokens <= 24 and chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens, chat

options = {"stream": True, "stream_options": {"include_usage": True}}
chunks = list(client.chat.completions.create(model="demo:f16", messages=messages, max_tokens=24, temperature=0, **options))
text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
assert text == chat.choices[0].message.content, (text, chat)
assert chunks[-1].usage.completion_tokens == chat.usage.completion_tokens and not chunks[-1].choices, chunks[-1]
reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
assert reasons == [chat.choices[0].finish_reason], reasons

completion = client.completions.create(model="demo:q8_0", prompt="The borrow checker", max_tokens=8, temperature=0, logprobs=2)
assert len(completion.choices[0].logprobs.tokens) == completion.usage.completion_tokens, completion

# A prompt is as likely as its tokens were when they were chosen: what evaluation harnesses ask.
said = client.completions.create(model="demo:f16", prompt="The borrow checker", max_tokens=8, temperature=0, logprobs=2)
text = "The borrow checker" + said.choices[0].text
scored = client.completions.create(model="demo:f16", prompt=text, max_tokens=0, echo=True, logprobs=2).choices[0]
assert scored.text == text and scored.finish_reason == "length", scored
logprobs, n = scored.logprobs, len(said.choices[0].logprobs.tokens)
assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None, logprobs
assert logprobs.tokens[-n:] == said.choices[0].logprobs.tokens, (logprobs, said)
assert logprobs.token_logprobs[-n:] == said.choices[0].logprobs.token_logprobs, (logprobs, said)
assert logprobs.text_offset[-n] == len("The borrow checker"), logprobs
assert all(text[at:].startswith(token) for token, at in list(zip(logprobs.tokens, logprobs.text_offset))[-n:]), logprobs
options = {"max_tokens": 1, "echo": True, "logprobs": 2, "temperature": 0}
chunks = list(client.completions.create(model="demo:f16", prompt=text, stream=True, **options))
assert chunks[0].choices[0].text == text and chunks[0].choices[0].logprobs.token_logprobs == logprobs.token_logprobs, chunks

# The same as vLLM lists it, of two choices that share it.
for listed in client.completions.create(
    model="demo:f16", prompt=text, max_tokens=0, echo=True, n=2, extra_body={"prompt_logprobs": 2}
).choices:
    assert listed.text == text and listed.prompt_logprobs[0] is None, listed
    for all, own in list(zip(listed.prompt_logprobs, logprobs.token_logprobs, strict=True))[1:]:
        assert own in [one["logprob"] for one in all.values()] and len(all) in (2, 3), (all, own)

seeded = [client.completions.create(model="demo:f16", prompt="A trait", max_tokens=12, temperature=1, seed=7).choices[0].text for _ in range(2)]
assert seeded[0] == seeded[1], seeded

# What stops a text, how likely it was, and two of them.
asked = {"model": "demo:f16", "messages": messages, "max_tokens": 24, "temperature": 0}
said = client.chat.completions.create(**asked, n=2, logprobs=True, top_logprobs=2)
assert [choice.message.content for choice in said.choices] == [chat.choices[0].message.content] * 2, said
for one in said.choices[0].logprobs.content:
    assert one.logprob == max(top.logprob for top in one.top_logprobs) and len(one.top_logprobs) == 2, one
text = chat.choices[0].message.content
stop = text[len(text) // 2 :][:4]
stopped = client.chat.completions.create(**asked, stop=[stop]).choices[0]
assert stopped.finish_reason == "stop" and stopped.message.content == text[: text.index(stop)], (stopped, text)
chunks = client.chat.completions.create(**asked, stop=stop, stream=True)
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == stopped.message.content, stopped

try:
    client.chat.completions.create(model="gpt-none", messages=messages)
    raise AssertionError("an unknown model was served")
except openai.NotFoundError as error:
    assert "demo" in str(error), error
try:
    client.chat.completions.create(model="demo", messages=[])
    raise AssertionError("no messages were served")
except openai.BadRequestError as error:
    assert error.param == "messages", error

print("the stock client is served")
