// Router: the replica with the least work ahead of a new request.
//
// Work is prompt tokens accepted and not yet computed, plus a charge per request that waits or runs. Records have the fields
// of wit/policy.wit in camelCase; columns are arrays of one length; numbers beyond 2^53 lose their last digits.

// What the operator may set. `sequence_tokens`: what one more request in the batch costs, in prompt tokens.
const options = { sequence_tokens: 16 };

export const lifecycle = {
  init(config, host) {
    for (const [key, value] of Object.entries(JSON.parse(config))) {
      if (!Object.hasOwn(options, key)) throw `unknown option ${key}; there is ${Object.keys(options).join(", ")}`;
      options[key] = value;
    }
    return { name: "{{name}}", version: "0.1.0", wants: [], stateSchema: 0, summary: "{{summary}}" };
  },
};

export const router = {
  route(now, request, replicas) {
    let best = -1;
    let least = Infinity;
    for (let row = 0; row < replicas.id.length; row++) {
      if (replicas.weight[row] === 0) continue;
      const sequences = replicas.waiting[row] + replicas.running[row];
      const work = replicas.queuedTokens[row] + sequences * options.sequence_tokens;
      if (work < least) [best, least] = [row, work];
    }
    return best < 0 ? { tag: "abstain" } : { tag: "pick", val: best };
  },
};
