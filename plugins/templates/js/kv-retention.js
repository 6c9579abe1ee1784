// Retention: cached blocks that several requests have found are evicted last.
//
// Against the host's own order, by last use: one long prompt that nobody sends again touches every block once, and would push
// out the beginning that all the others share. Records have the fields of wit/policy.wit in camelCase.

// What the operator may set. `min_hits`: how many requests must have found a block.
const options = { min_hits: 2 };

export const lifecycle = {
  init(config, host) {
    for (const [key, value] of Object.entries(JSON.parse(config))) {
      if (!Object.hasOwn(options, key)) throw `unknown option ${key}; there is ${Object.keys(options).join(", ")}`;
      options[key] = value;
    }
    return { name: "{{name}}", version: "0.1.0", wants: [], stateSchema: 0, summary: "{{summary}}" };
  },
};

export const kvRetention = {
  rank(now, wanted, blocks) {
    // Rows come least recently used first, and among the kept ones the last goes last.
    const keep = [];
    for (let row = 0; row < blocks.hits.length; row++) {
      if (blocks.hits[row] >= options.min_hits) keep.push(row);
    }
    return keep.length > 0 ? { evict: [], keep } : null;
  },
};
