// Telemetry hook: counts first tokens that came late, and raises an alert when too many do. Records have the fields of
// wit/policy.wit in camelCase.
import { counter, recordValue } from "pointsman:policy/host-metrics@{{wit}}";

// What the operator may set. `ttft_ms`: a first token later than this is late. `alert_at`: late ones in one batch of events
// that raise an alert.
const options = { ttft_ms: 1000, alert_at: 20 };

// The number of this kind of event.
const FIRST_TOKEN = 2;

let late;

export const lifecycle = {
  init(config, host) {
    for (const [key, value] of Object.entries(JSON.parse(config))) {
      if (!Object.hasOwn(options, key)) throw `unknown option ${key}; there is ${Object.keys(options).join(", ")}`;
      options[key] = value;
    }
    late = counter("late_first_tokens_total", "First tokens over the objective.", null);
    return { name: "{{name}}", version: "0.1.0", wants: ["event.first-token"], stateSchema: 0, summary: "{{summary}}" };
  },
};

export const telemetry = {
  onEvents(now, events, dropped) {
    let n = 0;
    for (let row = 0; row < events.kind.length; row++) {
      if (events.kind[row] === FIRST_TOKEN && events.a[row] > options.ttft_ms * 1000) n++;
    }
    recordValue(late, n, null);
    if (n < options.alert_at) return [];
    const text = `${n} first tokens took more than ${options.ttft_ms} ms`;
    return [{ severity: "warning", title: "late first tokens", text }];
  },
};
