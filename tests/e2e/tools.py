"""Tools and structured outputs with the stock OpenAI client: argv[1] is the base URL of the data plane."""

import enum
import json
import sys

import openai
import pydantic

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0)
messages = [{"role": "user", "content": "What is the weather?"}]


class City(enum.Enum):
    ULM = "Ulm"
    BONN = "Bonn"


class Day(pydantic.BaseModel):
    number: int = pydantic.Field(ge=1, le=9)


class Weather(pydantic.BaseModel):
    """Tells the weather."""

    city: City
    day: Day


settings = {"model": "tooled", "messages": messages, "max_tokens": 300}

for seed in range(3):
    parsed = client.chat.completions.parse(**settings, seed=seed, response_format=Weather)
    answer = parsed.choices[0].message.parsed
    assert isinstance(answer, Weather) and 1 <= answer.day.number <= 9, parsed

tools = [openai.pydantic_function_tool(Weather, name="weather")]
forced = client.chat.completions.parse(**settings, tools=tools, tool_choice="required", parallel_tool_calls=False, seed=1)
call = forced.choices[0].message.tool_calls[0]
assert isinstance(call.function.parsed_arguments, Weather), forced
assert forced.choices[0].finish_reason == "tool_calls" and forced.choices[0].message.content is None, forced

named = {"type": "function", "function": {"name": "weather"}}
with client.chat.completions.stream(**settings, tools=tools, tool_choice=named, seed=2) as stream:
    events = list(stream)
    final = stream.get_final_completion()
done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
assert len(done) == 1 and done[0].name == "weather", events
whole = client.chat.completions.create(**settings, tools=tools, tool_choice=named, seed=2)
assert json.loads(done[0].arguments) == json.loads(whole.choices[0].message.tool_calls[0].function.arguments), (done, whole)
assert final.choices[0].message.tool_calls[0].function.parsed_arguments is not None, final

turn = [*messages, whole.choices[0].message, {"role": "tool", "tool_call_id": whole.choices[0].message.tool_calls[0].id, "content": "rain"}]
told = client.chat.completions.create(model="tooled", messages=turn, max_tokens=8, tools=tools, tool_choice="none")
assert told.choices[0].message.tool_calls is None, told

try:
    client.chat.completions.create(**settings, tools=tools, tool_choice={"type": "function", "function": {"name": "other"}})
    raise AssertionError("an unknown function was called")
except openai.BadRequestError as error:
    assert error.param == "tool_choice.function.name", error

print("the stock client calls tools")
