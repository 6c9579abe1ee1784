"""Sampler: no token more than so many times in a row.

It remembers the last token of each request and for how long it has been that one. A new instance is told of every request
again, from its start on, so what is remembered here may go at any time. Records have the fields of wit/policy.wit in
snake_case."""

import json

from componentize_py_types import Err
from wit_world import exports
from wit_world.exports.lifecycle import Manifest
from wit_world.exports.sampler import Edit_Forbid, Edit_Free

# What the operator may set. `max_run`: how often a token may stand in a row.
options = {"max_run": 8}

# By request: its last token, and how often that has come since another one.
runs = {}


class Lifecycle(exports.Lifecycle):
    def init(self, config, host):
        given = json.loads(config)
        for key in given.keys() - options.keys():
            raise Err(f"unknown option {key}; there is {', '.join(options)}")
        options.update(given)
        if options["max_run"] < 1:
            raise Err("max_run must be at least 1")
        return Manifest(name="{{name}}", version="0.1.0", wants=[], state_schema=0, summary="{{summary}}")


class Sampler(exports.Sampler):
    def start(self, now, requests):
        runs.update((request.id, (0, 0)) for request in requests)
        return [Edit_Free() for _ in requests]

    def next(self, now, ids, tokens):
        return [self.edit(id, token) for id, token in zip(ids, tokens)]

    def edit(self, id, token):
        last, length = runs.get(id, (0, 0))
        length = length + 1 if last == token else 1
        runs[id] = (token, length)
        return Edit_Free() if length < options["max_run"] else Edit_Forbid([token])

    def ended(self, ids):
        for id in ids:
            runs.pop(id, None)
