"""Router: the replica with the least work ahead of a new request.

Work is prompt tokens accepted and not yet computed, plus a charge per request that waits or runs. Records have the fields of
wit/policy.wit in snake_case; columns are lists of one length.
"""

import json

from componentize_py_types import Err
from wit_world import exports
from wit_world.exports.lifecycle import Manifest
from wit_world.exports.router import Choice_Abstain, Choice_Pick

# What the operator may set. `sequence_tokens`: what one more request in the batch costs, in prompt tokens.
options = {"sequence_tokens": 16}


class Lifecycle(exports.Lifecycle):
    def init(self, config, host):
        given = json.loads(config)
        for key in given.keys() - options.keys():
            raise Err(f"unknown option {key}; there is {', '.join(options)}")
        options.update(given)
        return Manifest(name="{{name}}", version="0.1.0", wants=[], state_schema=0, summary="{{summary}}")


class Router(exports.Router):
    def route(self, now, request, replicas):
        charge = options["sequence_tokens"]
        rows = zip(replicas.weight, replicas.queued_tokens, replicas.waiting, replicas.running)
        work = [
            (queued + (waiting + running) * charge, row)
            for row, (weight, queued, waiting, running) in enumerate(rows)
            if weight > 0
        ]
        return Choice_Pick(min(work)[1]) if work else Choice_Abstain()
