"""Retention: cached blocks that several requests have found are evicted last.

Against the host's own order, by last use: one long prompt that nobody sends again touches every block once, and would push out
the beginning that all the others share. Records have the fields of wit/policy.wit in snake_case."""

import json

from componentize_py_types import Err
from wit_world import exports
from wit_world.exports.kv_retention import Ranking
from wit_world.exports.lifecycle import Manifest

# What the operator may set. `min_hits`: how many requests must have found a block.
options = {"min_hits": 2}


class Lifecycle(exports.Lifecycle):
    def init(self, config, host):
        given = json.loads(config)
        for key in given.keys() - options.keys():
            raise Err(f"unknown option {key}; there is {', '.join(options)}")
        options.update(given)
        return Manifest(name="{{name}}", version="0.1.0", wants=[], state_schema=0, summary="{{summary}}")


class KvRetention(exports.KvRetention):
    def rank(self, now, wanted, blocks):
        # Rows come least recently used first, and among the kept ones the last goes last.
        keep = [row for row, hits in enumerate(blocks.hits) if hits >= options["min_hits"]]
        return Ranking(evict=[], keep=keep) if keep else None
