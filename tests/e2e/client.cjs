// Drives a running host with the stock OpenAI client for JavaScript: the argument is the base URL of the data plane, which
// serves the demo and a tiny encoder of the words w0 to w63. A CommonJS file, because only `require` looks into NODE_PATH.
const assert = require("node:assert/strict");
const OpenAI = require("openai");

const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is ownership?" }];
const settings = { model: "demo:f16", max_tokens: 24 };
const chat = (asked) => client.chat.completions.create(asked);
const complete = (asked) => client.completions.create(asked);

async function each(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

// Of each token its bytes, how likely it was, and how likely the likeliest were; in a chat or in a completion.
function entries({ content, tokens, token_logprobs, top_logprobs }) {
  const of = (bytes, own, tops) => [Buffer.from(bytes), own, tops];
  if (content) return content.map((one) => of(one.bytes, one.logprob, one.top_logprobs.map((top) => top.logprob)));
  return tokens.map((token, i) => of(token, token_logprobs[i], Object.values(top_logprobs[i])));
}

// What answers or chunks say, by choice: text, calls, log-probabilities, and the reasons to end.
function heard(answers) {
  const said = [];
  for (const choice of answers.flatMap((answer) => answer.choices)) {
    const one = (said[choice.index] ??= { text: "", calls: [], logprobs: [], reasons: [] });
    const part = choice.delta ?? choice.message ?? { content: choice.text };
    one.text += part.content ?? "";
    for (const call of part.tool_calls ?? []) {
      if (call.id) one.calls.push([call.type, call.function.name, ""]);
      assert.equal(call.index ?? one.calls.length - 1, one.calls.length - 1);
      one.calls.at(-1)[2] += call.function.arguments ?? "";
    }
    if (choice.logprobs) one.logprobs.push(...entries(choice.logprobs));
    if (choice.finish_reason !== null) one.reasons.push(choice.finish_reason);
  }
  return said;
}

// The choices of an answer, which whole and in a stream says the same.
async function both(create, asked) {
  const whole = await create(asked);
  const chunks = await each(await create({ ...asked, stream: true, stream_options: { include_usage: true } }));
  const last = chunks.pop();
  const [said, usage] = [heard([whole]), whole.usage];
  assert.deepEqual(heard(chunks), said);
  assert.equal(whole.object, create === chat ? "chat.completion" : "text_completion");
  for (const chunk of [...chunks, last]) {
    assert.equal(chunk.object, create === chat ? "chat.completion.chunk" : "text_completion");
    assert.deepEqual([chunk.id, chunk.model], [last.id, whole.model]);
    assert.equal(chunk.choices.length === 0, chunk === last);
    assert.equal((chunk.usage ?? null) === null, chunk !== last);
  }
  const counts = ({ prompt_tokens, completion_tokens, total_tokens }) => [prompt_tokens, completion_tokens, total_tokens];
  assert.deepEqual(counts(last.usage), counts(usage));
  assert.ok(usage.prompt_tokens > 0 && usage.total_tokens === usage.prompt_tokens + usage.completion_tokens);
  const prompts = Array.isArray(asked.prompt) ? asked.prompt.length : 1;
  assert.equal(said.length, prompts * (asked.n ?? 1));
  for (const one of said) assert.equal(one.reasons.length, 1);
  const most = asked.max_tokens * said.length;
  const ended = said.filter((one) => one.reasons[0] !== "length").length;
  assert.ok(ended ? usage.completion_tokens <= most : usage.completion_tokens === most);
  // The token of the model that ends a text is counted, and is no part of what is said.
  const scored = said.flatMap((one) => one.logprobs).length;
  assert.ok(!scored || (scored <= usage.completion_tokens && usage.completion_tokens <= scored + ended));
  return said;
}

const texts = (said) => said.map((one) => one.text);

// Of each token there is how likely it was, no more than all together, and of greedy ones no less than any other.
function likely(said, greedy) {
  for (const one of said) {
    assert.ok(one.text);
    assert.equal(Buffer.concat(one.logprobs.map(([bytes]) => bytes)).toString(), one.text);
    for (const [, own, tops] of one.logprobs) {
      assert.ok([own, ...tops].every((each) => Number.isFinite(each) && each <= 0));
      assert.ok(tops.length === 2 || tops.length === 3);
      assert.ok(tops.reduce((sum, top) => sum + Math.exp(top), 0) < 1.0001);
      assert.ok(own === Math.max(...tops) || !greedy);
    }
  }
}

// What both doors take: choices, seeds, log-probabilities, and what stops a text.
async function controls() {
  for (const [create, given, scores] of [
    [chat, { ...settings, messages }, { logprobs: true, top_logprobs: 2 }],
    [complete, { ...settings, prompt: "The borrow checker" }, { logprobs: 2 }],
  ]) {
    const [greedy, drawn] = [{ ...given, temperature: 0 }, { ...given, temperature: 1 }];
    const [{ text, logprobs, reasons }] = await both(create, greedy);
    assert.ok(text);
    assert.deepEqual([logprobs, reasons], [[], ["length"]]);
    assert.deepEqual(texts(await both(create, { ...greedy, n: 3 })), [text, text, text]);
    const seeded = [];
    for (const seed of [7, 8, 9]) seeded.push(...texts(await both(create, { ...drawn, seed })));
    assert.deepEqual(texts(await both(create, { ...drawn, seed: 7, n: 3 })), seeded);
    assert.equal(new Set(seeded).size, 3);
    likely(await both(create, { ...greedy, ...scores }), true);
    likely(await both(create, { ...drawn, ...scores, seed: 7, n: 2 }), false);
    const word = text.slice(text.length / 2).slice(0, 4);
    for (const stop of [word, [word], ["~~~", word]]) {
      const [stopped] = await both(create, { ...greedy, stop });
      assert.deepEqual([stopped.text, stopped.reasons], [text.slice(0, text.indexOf(word)), ["stop"]]);
    }
    for (const chunk of await each(await create({ ...greedy, stream: true }))) assert.equal(chunk.usage ?? null, null);
  }
}

// What completions take beside: more prompts than one, and their echo.
async function completes() {
  const asked = { ...settings, prompt: ["The borrow checker", "A trait"], temperature: 0 };
  const [first, other] = texts(await both(complete, asked));
  assert.notEqual(first, other);
  const [one, two] = ["The borrow checker" + first, "A trait" + other];
  assert.deepEqual(texts(await both(complete, { ...asked, n: 2, echo: true })), [one, one, two, two]);
}

const schema = {
  type: "object",
  additionalProperties: false,
  required: ["city", "day"],
  properties: { city: { enum: ["Ulm", "Bonn"] }, day: { type: "integer", minimum: 1, maximum: 9 } },
};

// Fails where this is not what the schema says.
function instance(text) {
  const day = JSON.parse(text);
  assert.deepEqual(Object.keys(day).sort(), ["city", "day"]);
  assert.ok(["Ulm", "Bonn"].includes(day.city) && Number.isInteger(day.day) && 1 <= day.day && day.day <= 9, text);
}

// What chats take beside: forms and tools. Any object may be a long one.
async function forms() {
  const asked = { ...settings, messages, max_tokens: 400, seed: 3 };
  const objects = await both(chat, { ...asked, n: 4, response_format: { type: "json_object" } });
  const ended = texts(objects.filter((one) => one.reasons[0] === "stop")).map((text) => JSON.parse(text));
  assert.ok(ended.length && ended.every((one) => one !== null && typeof one === "object" && !Array.isArray(one)));
  assert.ok(texts(objects).every((text) => text.startsWith("{")));
  const response_format = { type: "json_schema", json_schema: { name: "day", schema, strict: true } };
  for (const one of await both(chat, { ...asked, n: 2, response_format })) {
    assert.deepEqual(one.reasons, ["stop"]);
    instance(one.text);
  }
}

async function calls() {
  const weather = { name: "weather", description: "Tells the weather.", parameters: schema };
  const tools = [{ type: "function", function: weather }];
  const asked = { ...settings, messages, max_tokens: 400, seed: 3, tools, parallel_tool_calls: false };
  const named = { type: "function", function: { name: "weather" } };
  for (const [tool_choice, reason] of [["required", "tool_calls"], [named, "stop"]]) {
    for (const one of await both(chat, { ...asked, n: 2, tool_choice })) {
      const [[type, name, said]] = one.calls;
      assert.deepEqual([one.calls.length, type, name, one.text, one.reasons], [1, "function", "weather", "", [reason]]);
      instance(said);
    }
  }
  for (const one of await both(chat, { ...asked, max_tokens: 8, tool_choice: "none" })) assert.deepEqual(one.calls, []);
  assert.equal((await chat({ ...asked, tool_choice: named })).choices[0].message.content, null);
  // What the client itself adds up.
  const final = await client.chat.completions.stream({ ...asked, tool_choice: named }).finalChatCompletion();
  assert.deepEqual(heard([final]), heard([await chat({ ...asked, tool_choice: named })]));
  // Cut in the midst of a call, there is nothing to read.
  const cut = { ...asked, tool_choice: "required", max_tokens: 3 };
  assert.equal((await chat(cut)).choices[0].message.content ?? "", "");
}

async function embeds() {
  // Without a format the client asks for base64 and decodes it.
  const plain = await client.embeddings.create({ model: "encoder", input: ["w5 w6", "w7"] });
  const floats = await client.embeddings.create({ model: "encoder", input: ["w5 w6", "w7"], encoding_format: "float" });
  assert.equal(plain.data.length, 2);
  for (const [i, { embedding }] of plain.data.entries()) {
    const other = floats.data[i].embedding;
    assert.equal(embedding.length, other.length);
    embedding.forEach((x, k) => assert.ok(Math.abs(x - other[k]) < 1e-6));
  }
}

async function responds() {
  const asked = { model: "demo:f16", input: "What is ownership?", max_output_tokens: 24, temperature: 0 };
  const whole = await client.responses.create(asked);
  const events = await each(await client.responses.create({ ...asked, stream: true }));
  const deltas = events.filter((event) => event.type === "response.output_text.delta");
  assert.equal(deltas.map((event) => event.delta).join(""), whole.output_text);
}

async function refuses() {
  await assert.rejects(client.chat.completions.create({ model: "gpt-none", messages }), OpenAI.NotFoundError);
  const empty = client.chat.completions.create({ model: "demo", messages: [] });
  await assert.rejects(empty, (error) => error instanceof OpenAI.BadRequestError && error.param === "messages");
}

(async () => {
  for (const part of [controls, completes, forms, calls, embeds, responds, refuses]) await part();
})().catch((error) => {
  console.error(error);
  process.exitCode = 1;
});
