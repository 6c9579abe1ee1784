"""Responses with the stock OpenAI client: argv[1] is the base URL of the data plane, whose model `tooled` knows tools."""

import json
import sys

import openai
import pydantic

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0)
settings = {"model": "tooled", "max_output_tokens": 24, "temperature": 0, "instructions": "Be brief."}

whole = client.responses.create(**settings, input="What is ownership?")
assert whole.output_text and whole.status in ("completed", "incomplete") and whole.store is False, whole
assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens, whole.usage

with client.responses.stream(**settings, input="What is ownership?") as stream:
    kinds = [event.type for event in stream]
    final = stream.get_final_response() if whole.status == "completed" else None
assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"], kinds
assert kinds[-3:] == ["response.content_part.done", "response.output_item.done", f"response.{whole.status}"], kinds
raw = list(client.responses.create(**settings, input="What is ownership?", stream=True))
assert "".join(event.delta for event in raw if event.type == "response.output_text.delta") == whole.output_text, raw
assert [event.sequence_number for event in raw] == list(range(len(raw))), raw
assert final is None or final.output_text == whole.output_text, final
assert raw[-1].response.usage.output_tokens == whole.usage.output_tokens, raw[-1]

turn = [{"role": "user", "content": "What is ownership?"}, *whole.output, {"role": "user", "content": "Why?"}]
again = client.responses.create(**settings, input=turn)
assert again.usage.input_tokens > whole.usage.input_tokens, again.usage


class Day(pydantic.BaseModel):
    number: int = pydantic.Field(ge=1, le=9)


parsed = client.responses.parse(model="tooled", input="Which day?", max_output_tokens=200, text_format=Day)
assert 1 <= parsed.output_parsed.number <= 9, parsed

weather = {
    "type": "function",
    "name": "weather",
    "description": "Tells the weather.",
    "strict": True,
    "parameters": {
        "type": "object",
        "additionalProperties": False,
        "required": ["city"],
        "properties": {"city": {"enum": ["Ulm", "Bonn"]}},
    },
}
forced = {"model": "tooled", "input": "Weather?", "max_output_tokens": 300, "tools": [weather], "parallel_tool_calls": False}
for choice in ("required", {"type": "function", "name": "weather"}):
    seed = {"seed": 5}
    called = client.responses.create(**forced, tool_choice=choice, extra_body=seed)
    (call,) = called.output
    assert (call.type, call.name, called.status) == ("function_call", "weather", "completed"), called
    assert json.loads(call.arguments)["city"] in ("Ulm", "Bonn"), call
    with client.responses.stream(**forced, tool_choice=choice, extra_body=seed) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "response.function_call_arguments.delta")
        final = stream.get_final_response()
    assert deltas == call.arguments == final.output[0].arguments, (deltas, final)

answered = [
    {"role": "user", "content": "Weather?"},
    call,
    {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
]
told = client.responses.create(model="tooled", input=answered, tools=[weather], tool_choice="none", max_output_tokens=8)
assert told.status in ("completed", "incomplete"), told

try:
    client.responses.create(**settings, input="And then?", previous_response_id=whole.id)
    raise AssertionError("a response was stored")
except openai.BadRequestError as error:
    assert error.param == "previous_response_id", error

print("the stock client's responses are answered")
