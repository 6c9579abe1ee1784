// Scheduler: short prompts first, with aging.
//
// A request's place is the moment it arrived plus a handicap for each prompt token still to be computed. The place never
// changes, so everybody who waits ages at the same rate. Records have the fields of wit/policy.wit in camelCase; numbers
// beyond 2^53 lose their last digits.

// What the operator may set. `token_us`: for how long one prompt token may be overtaken, in microseconds.
const options = { token_us: 1000 };

// Who waits and who runs, by id: { id, place }.
const waiting = new Map();
const running = new Map();

export const lifecycle = {
  init(config, host) {
    for (const [key, value] of Object.entries(JSON.parse(config))) {
      if (!Object.hasOwn(options, key)) throw `unknown option ${key}; there is ${Object.keys(options).join(", ")}`;
      options[key] = value;
    }
    return { name: "{{name}}", version: "0.1.0", wants: [], stateSchema: 0, summary: "{{summary}}" };
  },
};

function add(queue, sequences) {
  for (let row = 0; row < sequences.id.length; row++) {
    const left = sequences.promptTokens[row] - Math.max(sequences.computedTokens[row], sequences.cachedTokens[row]);
    const id = sequences.id[row];
    queue.set(id, { id, place: sequences.arrived[row] + left * options.token_us });
  }
}

function move(ids, from, to) {
  for (const id of ids) {
    const request = from.get(id);
    if (request && from.delete(id)) to.set(id, request);
  }
}

// The first `n` that wait: one pass, because most of the queue is not among them.
function first(n) {
  const best = [];
  for (const request of waiting.values()) {
    let at = best.length;
    while (at > 0 && request.place < best[at - 1].place) at--;
    if (at === n) continue;
    best.splice(at, 0, request);
    if (best.length > n) best.pop();
  }
  return best.map((request) => request.id);
}

export const scheduler = {
  resync(now, seed, budgets, tenants, queued, started) {
    waiting.clear();
    running.clear();
    add(waiting, queued);
    add(running, started);
  },

  step(now, budgets, changes) {
    for (const id of changes.gone) running.delete(id) || waiting.delete(id);
    move(changes.preempted, running, waiting);
    add(waiting, changes.arrived);
    move(changes.admitted, waiting, running);
    const admit = first(Math.max(0, budgets.running - running.size));
    return { admit, rest: "host-order", preempt: [], drop: [], prefillId: [], prefillTokens: [] };
  },
};
