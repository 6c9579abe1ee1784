// Drives a running host with the stock OpenAI client for JavaScript: the argument is the base URL of the data plane, which
// serves the demo and a tiny encoder of the words w0 to w63. A CommonJS file, because only `require` looks into NODE_PATH.
const assert = require("node:assert/strict");
const OpenAI = require("openai");

const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is ownership?" }];
const settings = { model: "demo:f16", max_tokens: 24, temperature: 0 };

async function each(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

async function chats() {
  const whole = await client.chat.completions.create({ ...settings, messages });
  const [choice] = whole.choices;
  assert.ok(choice.message.content && whole.usage.completion_tokens <= 24);
  const options = { stream: true, stream_options: { include_usage: true } };
  const chunks = await each(await client.chat.completions.create({ ...settings, messages, ...options }));
  const text = chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("");
  assert.equal(text, choice.message.content);
  assert.deepEqual(chunks.at(-1).usage.completion_tokens, whole.usage.completion_tokens);
  const final = await client.chat.completions.stream({ ...settings, messages }).finalChatCompletion();
  assert.equal(final.choices[0].message.content, text);
  assert.equal(final.choices[0].finish_reason, choice.finish_reason);
}

async function controls() {
  const said = await client.chat.completions.create({ ...settings, messages, n: 2, logprobs: true, top_logprobs: 2 });
  const [{ content: text }, { content: other }] = said.choices.map((choice) => choice.message);
  assert.equal(text, other);
  for (const token of said.choices[0].logprobs.content)
    assert.equal(token.logprob, Math.max(...token.top_logprobs.map((top) => top.logprob)));
  const stop = text.slice(text.length / 2).slice(0, 4);
  const stopped = await client.chat.completions.create({ ...settings, messages, stop });
  assert.equal(stopped.choices[0].message.content, text.slice(0, text.indexOf(stop)));
  assert.equal(stopped.choices[0].finish_reason, "stop");
  const seeded = () => client.completions.create({ ...settings, prompt: "A trait", temperature: 1, seed: 7 });
  assert.equal((await seeded()).choices[0].text, (await seeded()).choices[0].text);
}

async function forms() {
  const schema = { type: "object", properties: { n: { type: "integer" } }, required: ["n"], additionalProperties: false };
  const response_format = { type: "json_schema", json_schema: { name: "count", schema, strict: true } };
  const asked = { ...settings, messages, max_tokens: 64, response_format };
  const formed = await client.chat.completions.create(asked);
  if (formed.choices[0].finish_reason === "stop")
    assert.ok(Number.isInteger(JSON.parse(formed.choices[0].message.content).n), formed.choices[0].message.content);
  const chunks = await each(await client.chat.completions.create({ ...asked, stream: true }));
  const text = chunks.map((chunk) => chunk.choices[0].delta.content ?? "").join("");
  assert.equal(text, formed.choices[0].message.content);
}

async function calls() {
  const parameters = { type: "object", properties: { on: { type: "boolean" } }, required: ["on"], additionalProperties: false };
  const tools = [{ type: "function", function: { name: "light", description: "Turns it on or off.", parameters } }];
  const tool_choice = { type: "function", function: { name: "light" } };
  const asked = { ...settings, messages, max_tokens: 64, tools, tool_choice };
  const whole = await client.chat.completions.create(asked);
  const [{ message }] = whole.choices;
  assert.equal(message.content, null);
  assert.equal(message.tool_calls[0].function.name, "light");
  const chunks = await each(await client.chat.completions.create({ ...asked, stream: true }));
  const parts = chunks.flatMap((chunk) => chunk.choices[0].delta.tool_calls ?? []);
  assert.equal(parts[0].function.name, "light");
  const said = parts.map((part) => part.function.arguments ?? "").join("");
  assert.equal(said, message.tool_calls[0].function.arguments);
  // Cut in the midst of a call, there is nothing to read.
  const cut = { ...asked, tool_choice: "required", max_tokens: 3 };
  assert.equal((await client.chat.completions.create(cut)).choices[0].message.content ?? "", "");
}

async function completes() {
  const asked = { ...settings, prompt: "The borrow checker", max_tokens: 8 };
  const whole = await client.completions.create(asked);
  const chunks = await each(await client.completions.create({ ...asked, stream: true }));
  assert.equal(chunks.map((chunk) => chunk.choices[0].text).join(""), whole.choices[0].text);
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
  for (const part of [chats, controls, forms, calls, completes, embeds, responds, refuses]) await part();
})().catch((error) => {
  console.error(error);
  process.exitCode = 1;
});
