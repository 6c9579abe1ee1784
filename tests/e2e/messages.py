"""Messages with the stock Anthropic client: argv[1] is the base URL of the data plane, whose model `tooled` knows tools."""

import sys

import anthropic

client = anthropic.Anthropic(base_url=sys.argv[1], api_key="none", max_retries=0)
question = [{"role": "user", "content": "What is ownership?"}]
# Fields that this client does not know are sent beside those that it does.
settings = {"model": "tooled", "max_tokens": 24, "system": "Be brief.", "extra_body": {"temperature": 0}}

whole = client.messages.create(**settings, messages=question)
assert whole.role == "assistant" and whole.content[0].type == "text" and whole.content[0].text, whole
assert whole.stop_reason in ("end_turn", "max_tokens") and 0 < whole.usage.output_tokens <= 24, whole

with client.messages.stream(**settings, messages=question) as stream:
    text = "".join(stream.text_stream)
    final = stream.get_final_message()
assert text == whole.content[0].text == final.content[0].text, (text, whole)
assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens), final


def prompt_tokens(message):
    return message.usage.input_tokens + message.usage.cache_read_input_tokens


count = client.messages.count_tokens(model="tooled", system="Be brief.", messages=question)
assert count.input_tokens == prompt_tokens(whole) == prompt_tokens(final), (count, whole.usage, final.usage)

stop = whole.content[0].text[3:6]
stopped = client.messages.create(**settings, messages=question, stop_sequences=["never said", stop])
assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop), stopped
assert stop not in "".join(block.text for block in stopped.content), stopped

weather = {
    "name": "weather",
    "description": "Tells the weather.",
    "input_schema": {
        "type": "object",
        "additionalProperties": False,
        "required": ["city", "days"],
        "properties": {"city": {"enum": ["Ulm", "Bonn"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    },
}
for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "weather"}):
    forced = {"model": "tooled", "max_tokens": 300, "tools": [weather], "tool_choice": choice, "extra_body": {"seed": 5}}
    called = client.messages.create(**forced, messages=question)
    (use,) = called.content
    assert (called.stop_reason, use.type, use.name) == ("tool_use", "tool_use", "weather"), called
    assert use.input["city"] in ("Ulm", "Bonn") and 1 <= use.input["days"] <= 9, use
    with client.messages.stream(**forced, messages=question) as stream:
        again = stream.get_final_message()
    assert (again.stop_reason, again.content[0].input) == ("tool_use", use.input), (again, use)

turn = [
    *question,
    {"role": "assistant", "content": called.content},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "rain"}]},
]
told = client.messages.create(model="tooled", max_tokens=8, messages=turn, tools=[weather], tool_choice={"type": "none"})
assert told.stop_reason in ("end_turn", "max_tokens"), told

for error, wrong in [
    (anthropic.NotFoundError, {"model": "claude-none"}),
    (anthropic.BadRequestError, {"messages": []}),
    (anthropic.BadRequestError, {"thinking": {"type": "enabled", "budget_tokens": 1024}}),
]:
    try:
        client.messages.create(**{**settings, "messages": question, **wrong})
        raise AssertionError(f"{wrong} was served")
    except error as refused:
        assert refused.body["type"] == "error" and refused.body["error"]["message"], refused

print("the stock client's messages are answered")
