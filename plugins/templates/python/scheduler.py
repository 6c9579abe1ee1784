"""Scheduler: short prompts first, with aging.

A request's place is the moment it arrived plus a handicap for each prompt token still to be computed. The place never
changes, so everybody who waits ages at the same rate. Records have the fields of wit/policy.wit in snake_case.
"""

import json
from bisect import bisect_left, insort

from componentize_py_types import Err
from wit_world import exports
from wit_world.exports.lifecycle import Manifest
from wit_world.exports.scheduler import Plan, Rest

# What the operator may set. `token_us`: for how long one prompt token may be overtaken, in microseconds.
options = {"token_us": 1000}


class Lifecycle(exports.Lifecycle):
    def init(self, config, host):
        given = json.loads(config)
        for key in given.keys() - options.keys():
            raise Err(f"unknown option {key}; there is {', '.join(options)}")
        options.update(given)
        return Manifest(name="{{name}}", version="0.1.0", wants=[], state_schema=0, summary="{{summary}}")


# Who waits, as (place, id) in order, and who runs; places by id.
waiting = []
running = set()
places = {}


def learn(sequences):
    """Notes the places of new requests; returns their ids."""
    rows = zip(
        sequences.id,
        sequences.arrived,
        sequences.prompt_tokens,
        sequences.computed_tokens,
        sequences.cached_tokens,
    )
    for id, arrived, prompt, computed, cached in rows:
        places[id] = arrived + (prompt - max(computed, cached)) * options["token_us"]
    return sequences.id


def wait(ids):
    for id in ids:
        running.discard(id)
        insort(waiting, (places[id], id))


def leave(id):
    at = bisect_left(waiting, (places.get(id, 0), id))
    if at < len(waiting) and waiting[at][1] == id:
        del waiting[at]


class Scheduler(exports.Scheduler):
    def resync(self, now, seed, budgets, tenants, queued, started):
        waiting.clear()
        running.clear()
        places.clear()
        wait(learn(queued))
        running.update(learn(started))

    def step(self, now, budgets, changes):
        for id in changes.gone:
            leave(id)
            running.discard(id)
            places.pop(id, None)
        wait(changes.preempted)
        wait(learn(changes.arrived))
        for id in changes.admitted:
            leave(id)
            running.add(id)
        free = max(0, budgets.running - len(running))
        return Plan(
            admit=[id for _, id in waiting[:free]],
            rest=Rest.HOST_ORDER,
            preempt=[],
            drop=[],
            prefill_id=[],
            prefill_tokens=[],
        )
