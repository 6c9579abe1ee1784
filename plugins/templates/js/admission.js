// Admission: no tenant has more than so many requests inside at once.
//
// The host says how many it carries, so nothing is remembered here and any instance can answer for any request. Records have
// the fields of wit/policy.wit in camelCase.

// What the operator may set. `max_in_flight`: most requests of one tenant. `retry_ms`: when a refused client should come again.
const options = { max_in_flight: 32, retry_ms: 1000 };

export const lifecycle = {
  init(config, host) {
    for (const [key, value] of Object.entries(JSON.parse(config))) {
      if (!Object.hasOwn(options, key)) throw `unknown option ${key}; there is ${Object.keys(options).join(", ")}`;
      options[key] = value;
    }
    return { name: "{{name}}", version: "0.1.0", wants: [], stateSchema: 0, summary: "{{summary}}" };
  },
};

export const admission = {
  admit(now, request, load) {
    if (load.tenantInFlight < options.max_in_flight) return { tag: "accept" };
    const message = `tenant ${request.tenant} has ${load.tenantInFlight} requests inside already`;
    return { tag: "reject", val: { reason: "quota", retryAfterMs: options.retry_ms, message } };
  },

  // What accepted requests came to: a quota would give back here what was not used.
  settle(now, endings) {},
};
