"""Admission: no tenant has more than so many requests inside at once.

The host says how many it carries, so nothing is remembered here and any instance can answer for any request. Records have the
fields of wit/policy.wit in snake_case."""

import json

from componentize_py_types import Err
from wit_world import exports
from wit_world.exports.admission import Verdict_Accept, Verdict_Reject
from wit_world.exports.lifecycle import Manifest
from wit_world.imports.types import Refusal, Rejection

# What the operator may set. `max_in_flight`: most requests of one tenant. `retry_ms`: when a refused client should come again.
options = {"max_in_flight": 32, "retry_ms": 1000}


class Lifecycle(exports.Lifecycle):
    def init(self, config, host):
        given = json.loads(config)
        for key in given.keys() - options.keys():
            raise Err(f"unknown option {key}; there is {', '.join(options)}")
        options.update(given)
        return Manifest(name="{{name}}", version="0.1.0", wants=[], state_schema=0, summary="{{summary}}")


class Admission(exports.Admission):
    def admit(self, now, request, load):
        if load.tenant_in_flight < options["max_in_flight"]:
            return Verdict_Accept()
        message = f"tenant {request.tenant} has {load.tenant_in_flight} requests inside already"
        return Verdict_Reject(Rejection(Refusal.QUOTA, options["retry_ms"], message))

    def settle(self, now, endings):
        """What accepted requests came to: a quota would give back here what was not used."""
