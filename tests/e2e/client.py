"""Drives a running host with the stock OpenAI client: argv[1] is the base URL of the data plane."""

import json
import math
import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0)

models = [model.id for model in client.models.list()]
assert models[0] == "demo" and {"demo:f16", "demo:q8_0"} <= set(models), models
assert client.models.retrieve("demo:f16").id == "demo:f16"


def entries(logprobs):
    """Of each token its bytes, how likely it was, and how likely the likeliest were; in a chat or in a completion."""
    if hasattr(logprobs, "content"):
        return [(bytes(one.bytes), one.logprob, [top.logprob for top in one.top_logprobs]) for one in logprobs.content]
    rows = zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True)
    return [(token.encode(), own, list(tops.values())) for token, own, tops in rows]


def heard(answers):
    """What answers or chunks say, by choice: text, calls, log-probabilities, and the reasons to end."""
    said = {}
    for choice in (choice for answer in answers for choice in answer.choices):
        one = said.setdefault(choice.index, {"text": "", "calls": [], "logprobs": [], "reasons": []})
        part = getattr(choice, "delta", None) or getattr(choice, "message", None)
        one["text"] += (part.content if part else choice.text) or ""
        for call in (part and part.tool_calls) or []:
            if call.id:
                one["calls"].append([call.type, call.function.name, ""])
            assert getattr(call, "index", len(one["calls"]) - 1) == len(one["calls"]) - 1, call
            one["calls"][-1][2] += call.function.arguments or ""
        one["logprobs"] += entries(choice.logprobs) if choice.logprobs else []
        one["reasons"] += [choice.finish_reason] if choice.finish_reason else []
    assert sorted(said) == list(range(len(said))), said
    return [said[index] for index in range(len(said))]


def both(create, **asked):
    """The choices of an answer, which whole and in a stream says the same, in the shapes that the client has types for."""
    whole = create(**asked)
    *chunks, last = create(**asked, stream=True, stream_options={"include_usage": True})
    # The chunks of a completion have the type of a whole one, whose finish reason is never null: before the end theirs is.
    typed = chunks if type(last) is not type(whole) else []
    for answer in (whole, *typed, last):
        type(answer).model_validate(answer.to_dict(), strict=True)
    said, usage = heard([whole]), whole.usage
    assert heard(chunks) == said, (asked, chunks, whole)
    assert not last.choices and all(chunk.choices and chunk.usage is None for chunk in chunks), (chunks, last)
    assert {chunk.id for chunk in chunks} == {last.id} != {whole.id}, (chunks, whole)
    for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(last.usage, count) == getattr(usage, count) > 0, (last, whole)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, usage
    prompts = len(asked["prompt"]) if isinstance(asked.get("prompt"), list) else 1
    assert len(said) == prompts * asked.get("n", 1) and all(len(one["reasons"]) == 1 for one in said), whole
    most, ended = asked["max_tokens"] * len(said), sum(one["reasons"] != ["length"] for one in said)
    assert usage.completion_tokens <= most if ended else usage.completion_tokens == most, (asked, usage)
    # The token of the model that ends a text is counted, and is no part of what is said.
    scored = [len(one["logprobs"]) for one in said]
    assert not any(scored) or sum(scored) <= usage.completion_tokens <= sum(scored) + ended, (scored, usage)
    return said


def texts(said):
    return [one["text"] for one in said]


def likely(said, greedy):
    """Of each token there is how likely it was, no more than all together, and of greedy ones no less than any other."""
    for one in said:
        assert b"".join(token for token, _, _ in one["logprobs"]).decode() == one["text"] != "", one
        for _, own, tops in one["logprobs"]:
            assert all(math.isfinite(each) and each <= 0 for each in (own, *tops)) and len(tops) in (2, 3), one
            assert sum(map(math.exp, tops)) < 1.0001 and (own == max(tops) or not greedy), one


def instance(text):
    """Whether this is what the schema below says."""
    day = json.loads(text)
    return set(day) == {"city", "day"} and day["city"] in ("Ulm", "Bonn") and type(day["day"]) is int and 1 <= day["day"] <= 9


# What both doors take: choices, seeds, log-probabilities, and what stops a text.
messages = [{"role": "user", "content": "What is ownership?"}]
chat, complete = client.chat.completions.create, client.completions.create
for create, asked, scores in (
    (chat, {"model": "demo:f16", "messages": messages}, {"logprobs": True, "top_logprobs": 2}),
    (complete, {"model": "demo:q8_0", "prompt": "The borrow checker"}, {"logprobs": 2}),
):
    asked |= {"max_tokens": 24}
    greedy, drawn = {**asked, "temperature": 0}, {**asked, "temperature": 1}
    (plain,) = both(create, **greedy)
    text = plain["text"]
    assert text and not plain["logprobs"] and plain["reasons"] == ["length"], plain
    assert texts(both(create, **greedy, n=3)) == [text] * 3, text
    seeded = [texts(both(create, **drawn, seed=seed))[0] for seed in (7, 8, 9)]
    assert texts(both(create, **drawn, seed=7, n=3)) == seeded and len(set(seeded)) == 3, seeded
    likely(both(create, **greedy, **scores), True)
    likely(both(create, **drawn, **scores, seed=7, n=2), False)
    word = text[len(text) // 2 :][:4]
    for stop in (word, [word], ["~~~", word]):
        (stopped,) = both(create, **greedy, stop=stop)
        assert (stopped["text"], stopped["reasons"]) == (text[: text.index(word)], ["stop"]), (stopped, text)
    assert all(chunk.usage is None for chunk in create(**greedy, stream=True)), "usage that nobody asked for"

# What completions take beside: more prompts than one, and their echo.
listed = {**greedy, "prompt": ["The borrow checker", "A trait"]}
(first, other) = texts(both(complete, **listed))
assert first == text != other, (first, other)
assert texts(both(complete, **listed, n=2, echo=True)) == [f"The borrow checker{first}"] * 2 + [f"A trait{other}"] * 2

# What chats take beside: forms and tools. Any object may be a long one.
schema = {
    "type": "object",
    "additionalProperties": False,
    "required": ["city", "day"],
    "properties": {"city": {"enum": ["Ulm", "Bonn"]}, "day": {"type": "integer", "minimum": 1, "maximum": 9}},
}
asked = {"model": "demo:f16", "messages": messages, "max_tokens": 400, "seed": 3}
objects = both(chat, **asked, n=4, response_format={"type": "json_object"})
ended = [json.loads(one["text"]) for one in objects if one["reasons"] == ["stop"]]
assert ended and all(type(one) is dict for one in ended) and all(text.startswith("{") for text in texts(objects)), objects
form = {"type": "json_schema", "json_schema": {"name": "day", "schema": schema, "strict": True}}
for one in both(chat, **asked, n=2, response_format=form):
    assert one["reasons"] == ["stop"] and instance(one["text"]), one
weather = {"name": "weather", "description": "Tells the weather.", "parameters": schema}
forced = {**asked, "tools": [{"type": "function", "function": weather}], "parallel_tool_calls": False}
for tool_choice, reason in (("required", "tool_calls"), ({"type": "function", "function": {"name": "weather"}}, "stop")):
    for one in both(chat, **forced, n=2, tool_choice=tool_choice):
        ((kind, name, arguments),) = one["calls"]
        assert (kind, name, one["text"], one["reasons"]) == ("function", "weather", "", [reason]), one
        assert instance(arguments), one
assert not any(one["calls"] for one in both(chat, **{**forced, "max_tokens": 8}, tool_choice="none"))

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
