"""Telemetry hook: counts first tokens that came late, and raises an alert when too many do. Records have the fields of
wit/policy.wit in snake_case."""

import json

from componentize_py_types import Err
from wit_world import exports
from wit_world.exports.lifecycle import Manifest
from wit_world.exports.telemetry import Alert, Severity
from wit_world.imports import host_metrics

# What the operator may set. `ttft_ms`: a first token later than this is late. `alert_at`: late ones in one batch of events
# that raise an alert.
options = {"ttft_ms": 1000, "alert_at": 20}

# The number of this kind of event.
FIRST_TOKEN = 2

metrics = {}


class Lifecycle(exports.Lifecycle):
    def init(self, config, host):
        given = json.loads(config)
        for key in given.keys() - options.keys():
            raise Err(f"unknown option {key}; there is {', '.join(options)}")
        options.update(given)
        help = "First tokens over the objective."
        metrics["late"] = host_metrics.counter("late_first_tokens_total", help, None)
        return Manifest(name="{{name}}", version="0.1.0", wants=["event.first-token"], state_schema=0, summary="{{summary}}")


class Telemetry(exports.Telemetry):
    def on_events(self, now, events, dropped):
        limit_us = options["ttft_ms"] * 1000
        late = sum(kind == FIRST_TOKEN and took > limit_us for kind, took in zip(events.kind, events.a))
        host_metrics.record_value(metrics["late"], float(late), None)
        if late < options["alert_at"]:
            return []
        text = f"{late} first tokens took more than {options['ttft_ms']} ms"
        return [Alert(Severity.WARNING, "late first tokens", text)]
