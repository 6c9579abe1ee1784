// Sampler: no token more than so many times in a row.
//
// It remembers the last token of each request and for how long it has been that one. A new instance is told of every request
// again, from its start on, so what is remembered here may go at any time. Records have the fields of wit/policy.wit in
// camelCase.

// What the operator may set. `max_run`: how often a token may stand in a row.
const options = { max_run: 8 };

// By request: { token, length }.
const runs = new Map();

export const lifecycle = {
  init(config, host) {
    for (const [key, value] of Object.entries(JSON.parse(config))) {
      if (!Object.hasOwn(options, key)) throw `unknown option ${key}; there is ${Object.keys(options).join(", ")}`;
      options[key] = value;
    }
    if (!(options.max_run >= 1)) throw "max_run must be at least 1";
    return { name: "{{name}}", version: "0.1.0", wants: [], stateSchema: 0, summary: "{{summary}}" };
  },
};

export const sampler = {
  start(now, requests) {
    for (const request of requests) runs.set(request.id, { token: 0, length: 0 });
    return requests.map(() => ({ tag: "free" }));
  },

  next(now, ids, tokens) {
    const edits = [];
    for (let i = 0; i < ids.length; i++) {
      const token = tokens[i];
      const before = runs.get(ids[i]);
      const length = before?.token === token ? before.length + 1 : 1;
      runs.set(ids[i], { token, length });
      edits.push(length < options.max_run ? { tag: "free" } : { tag: "forbid", val: [token] });
    }
    return edits;
  },

  ended(ids) {
    for (const id of ids) runs.delete(id);
  },
};
