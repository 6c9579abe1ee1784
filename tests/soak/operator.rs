//! What an operator does all day, in a few seconds: policies in and out of every slot, weights of the alias back and forth, a model
//! loaded and unloaded.

use std::path::Path;

use pointsman_tests::Host;
use pointsman_tests::rng::Rng;
use serde_json::{Value, json};

use super::LAZY;

/// Requests between two changes.
const REQUESTS: u64 = 40;

/// The changes so far.
#[derive(Debug)]
pub(super) struct Changes<'a> {
    host: &'a Host,
    /// A model.
    folder: &'a Path,
    is_loaded: bool,
    rng: Rng,
    /// Digests by slot.
    policies: Vec<(&'static str, Vec<String>)>,
    requests: u64,
    made: u64,
}

impl<'a> Changes<'a> {
    pub(super) fn new(host: &'a Host, folder: &'a Path) -> Self {
        let policies = [
            ("router", &["route-least-loaded", "route-prefix-aware", "route-weighted"][..]),
            ("scheduler", &["sched-fcfs", "sched-shortest-first", "sched-priority", "sched-fair-share"]),
            ("kv-retention", &["kv-lru-with-pins"]),
            ("telemetry.slo-log", &["hook-slo-log"]),
        ];
        let digests = |names: &[&str]| names.iter().map(|name| host.builtin(name)).collect();
        let policies = policies.map(|(slot, names)| (slot, digests(names))).into();
        Self { host, folder, is_loaded: false, rng: Rng::new(7), policies, requests: 0, made: 0 }
    }

    pub(super) fn made(&self) -> u64 {
        self.made
    }

    /// Changes something after every so many requests.
    pub(super) fn after_a_request(&mut self) {
        self.requests += 1;
        if self.requests.is_multiple_of(REQUESTS) {
            self.made += 1;
            self.change();
        }
    }

    /// Memory with the same models each time, just loaded: those that requests bring, and none of the operator's.
    pub(super) fn resident_bytes(&mut self) -> u64 {
        if self.is_loaded {
            self.load_or_unload();
        }
        // Both are there, then neither, then both: there is a place for each, and so none goes by itself meanwhile.
        self.ask_lazy();
        for name in LAZY {
            let gone = self.host.admin("DELETE", &format!("/admin/v1/models/{name}"), &Value::Null);
            assert_eq!(gone.status, 200, "{name}: {gone:?}");
        }
        self.ask_lazy();
        self.host.resident_bytes()
    }

    fn ask_lazy(&self) {
        for name in LAZY {
            let asked = self.host.post("/v1/completions", &json!({ "model": name, "prompt": "A", "max_tokens": 1 }));
            assert_eq!(asked.status, 200, "{name}: {asked:?}");
        }
    }

    /// Loads a model, or unloads it again.
    fn load_or_unload(&mut self) {
        let headers = [("content-type", "application/json"), ("accept", "application/json")];
        let body = json!({ "name": "guest", "path": self.folder }).to_string();
        let models = format!("{}/admin/v1/models", self.host.admin);
        let answer = match self.is_loaded {
            true => self.host.send("DELETE", &format!("{models}/guest"), &headers, b""),
            false => self.host.send("POST", &models, &headers, body.as_bytes()),
        };
        assert!(matches!(answer.status, 200 | 201), "{answer:?}");
        self.is_loaded = !self.is_loaded;
    }

    fn change(&mut self) {
        if self.rng.below(6) == 0 {
            return self.load_or_unload();
        }
        let at = self.rng.below(self.policies.len() as u64) as usize;
        let (slot, digests) = &self.policies[at];
        let answer = match self.rng.below(8) {
            0 => self.host.admin("POST", &format!("/admin/v1/slots/{slot}/rollback"), &Value::Null),
            1 => {
                let weights = json!({ "demo:f16": self.rng.below(100), "demo:q8_0": 1 + self.rng.below(100) });
                self.host.admin("PUT", "/admin/v1/aliases/demo", &json!({ "weights": weights }))
            }
            2 => self.host.admin("PUT", "/admin/v1/aliases/demo", &json!({ "weights": {} })),
            _ => {
                let digest = &digests[self.rng.below(digests.len() as u64) as usize];
                self.host.activate(slot, digest, json!({}))
            }
        };
        // A rollback where there is nothing to go back to is the one refusal.
        assert!(matches!(answer.status, 200 | 404 | 409), "{slot}: {answer:?}");
    }
}
