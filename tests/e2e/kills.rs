//! A host that is killed at any moment comes back with what it had promised: fifty `kill -9` at seeded moments in the middle
//! of uploads, swaps, rollbacks, removals, changes of an alias, and rollouts of policies and of variants, all on one data
//! directory.
//!
//! The operator below knows what it was told (a 200 that arrived) and what was on its way when the host died. After each
//! start nothing that was promised may be missing, and nothing may be there that nobody asked for.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use pointsman_tests::rng::Rng;
use pointsman_tests::{Host, root};
use serde_json::{Value, json};

use crate::{host, journal};

const KILLS: u64 = 50;
const SEED: u64 = 0x5eed_0f6b_1115;
const SLOTS: [&str; 3] = ["router", "scheduler", "telemetry.watch"];
const VARIANTS: [&str; 2] = ["demo:f16", "demo:q8_0"];

/// Where a slot stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Stand {
    /// Of what works there.
    generation: u64,
    /// Empty after a rollback that was told: the answer does not name it.
    component: String,
    removed: bool,
    /// Highest generation given there.
    newest: u64,
    /// Component of a rollout under way; its generation is the newest.
    trying: Option<String>,
}

/// Where the alias stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct AliasStand {
    generation: u64,
    weights: Weights,
    /// Rollouts there have been; the last one is under way if `trying` says what.
    rollouts: u64,
    trying: Option<String>,
}

type Weights = BTreeMap<String, u32>;

/// What an operator asks for.
#[derive(Clone, Debug)]
enum Wish {
    Upload(Vec<u8>),
    Put { slot: &'static str, component: String },
    Rollback { slot: &'static str },
    Remove { slot: &'static str },
    Rollout { slot: &'static str, component: String, on_restart: &'static str },
    Steer { slot: &'static str, promote: bool, generation: u64 },
    Weights(Weights),
    Variant { candidate: String, on_restart: &'static str },
    SteerVariant { promote: bool, number: u64 },
}

/// What the operator was told, and what it had asked for when the host died.
#[derive(Debug, Default)]
struct Told {
    uploaded: BTreeSet<String>,
    slots: BTreeMap<&'static str, Stand>,
    alias: AliasStand,
    open: Option<Wish>,
}

/// A component that no one has uploaded yet: the same policy with a custom section of its own.
fn component(number: u64) -> Vec<u8> {
    let mut bytes = std::fs::read(root().join("plugins/prebuilt/route-weighted.wasm")).expect("a component");
    let content = number.to_le_bytes();
    bytes.extend([0, 2 + content.len() as u8, 1, b'n']);
    bytes.extend(content);
    bytes
}

/// Sends a request the way a client does that may lose the host: an answer, or none.
fn send(host: &Host, method: &str, path: &str, body: (&str, Vec<u8>)) -> Option<(u16, Value)> {
    let request = ureq::http::Request::builder().method(method).uri(format!("{}{path}", host.admin));
    let request = request.header("content-type", body.0).body(body.1).expect("a request");
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let mut answer = agent.run(request).ok()?;
    let text = answer.body_mut().read_to_string().ok()?;
    Some((answer.status().as_u16(), serde_json::from_str(&text).unwrap_or_default()))
}

/// What may be put into a slot: digests by world, and native.
fn candidates(host: &Host, slot: &str) -> Option<Vec<String>> {
    let world = slot.split('.').next().unwrap_or_default();
    let (_, listed) = send(host, "GET", "/admin/v1/components", ("", Vec::new()))?;
    let rows = listed["data"].as_array()?.iter();
    let fits = rows.filter(|c| c["world"].as_str().is_some_and(|w| w.starts_with(world)));
    Some(fits.map(|c| c["digest"].as_str().expect("a digest").to_owned()).chain(["native".to_owned()]).collect())
}

impl Wish {
    /// The slot that it changes.
    fn slot(&self) -> Option<&'static str> {
        match self {
            Self::Upload(_) | Self::Weights(_) | Self::Variant { .. } | Self::SteerVariant { .. } => None,
            Self::Put { slot, .. } | Self::Rollback { slot } | Self::Remove { slot } => Some(slot),
            Self::Rollout { slot, .. } | Self::Steer { slot, .. } => Some(slot),
        }
    }

    fn ask(&self, host: &Host) -> Option<(u16, Value)> {
        let json = |value: Value| ("application/json", value.to_string().into_bytes());
        let (method, path, body) = match self {
            Self::Upload(bytes) => ("POST", "components".to_owned(), ("application/wasm", bytes.clone())),
            Self::Put { slot, component } => ("PUT", format!("slots/{slot}"), json(json!({ "component": component }))),
            Self::Rollback { slot } => ("POST", format!("slots/{slot}/rollback"), ("", Vec::new())),
            Self::Remove { slot } => ("DELETE", format!("slots/{slot}"), ("", Vec::new())),
            Self::Rollout { slot, component, on_restart } => {
                // Arms take turns every 100 ms, each turn a stored document.
                let plan = json!({
                    "component": component, "mode": "switchback", "on_restart": on_restart,
                    "block_ms": 100, "burn_in_ms": 0, "settle_ms": 0,
                });
                ("POST", format!("slots/{slot}/rollouts"), json(plan))
            }
            Self::Steer { slot, promote, generation } => {
                let verb = if *promote { "promote" } else { "abort" };
                let path = format!("slots/{slot}/rollouts/{slot}-{generation}/{verb}");
                ("POST", path, json(json!({})))
            }
            Self::Weights(weights) => ("PUT", "aliases/demo".to_owned(), json(json!({ "weights": weights }))),
            Self::Variant { candidate, on_restart } => {
                let plan = json!({
                    "candidate": candidate, "mode": "ab", "on_restart": on_restart,
                    "block_ms": 100, "burn_in_ms": 0, "settle_ms": 0,
                });
                ("POST", "aliases/demo/rollouts".to_owned(), json(plan))
            }
            Self::SteerVariant { promote, number } => {
                let verb = if *promote { "promote" } else { "abort" };
                ("POST", format!("aliases/demo/rollouts/alias.demo-{number}/{verb}"), json(json!({})))
            }
        };
        send(host, method, &format!("/admin/v1/{path}"), body)
    }
}

impl Told {
    /// The next wish; none once the host is dead. A rollout under way is steered sooner or later.
    fn wish(&self, host: &Host, random: &mut Rng) -> Option<Wish> {
        if random.below(4) == 0 {
            return Some(self.wish_of_alias(random));
        }
        let slot = SLOTS[random.below(3) as usize];
        let stand = self.slots.get(slot).cloned().unwrap_or_default();
        let kind = random.below(11);
        if stand.trying.is_some() && (3..9).contains(&kind) {
            return Some(Wish::Steer { slot, promote: kind < 6, generation: stand.newest });
        }
        let mut any = || {
            let mut known = candidates(host, slot)?;
            Some(known.swap_remove(random.below(known.len() as u64) as usize))
        };
        Some(match kind {
            0..3 => Wish::Upload(component(random.below(u64::MAX))),
            3..6 => Wish::Put { slot, component: any()? },
            6..8 if slot != SLOTS[2] => {
                let on_restart = if kind == 6 { "pause" } else { "resume" };
                Wish::Rollout { slot, component: any()?, on_restart }
            }
            6..10 => Wish::Rollback { slot },
            _ => Wish::Remove { slot: SLOTS[2] },
        })
    }

    /// A rollout where one variant serves alone, the end of one under way, else weights.
    fn wish_of_alias(&self, random: &mut Rng) -> Wish {
        let kind = random.below(4);
        if self.alias.trying.is_some() && kind < 3 {
            return Wish::SteerVariant { promote: kind < 2, number: self.alias.rollouts };
        }
        if kind < 3 && self.alias.weights.len() == 1 {
            let other = VARIANTS.into_iter().find(|v| !self.alias.weights.contains_key(*v)).expect("one of two");
            let on_restart = if kind == 0 { "pause" } else { "resume" };
            return Wish::Variant { candidate: other.to_owned(), on_restart };
        }
        let mut weight = || 1 + random.below(9_999) as u32;
        let one = (VARIANTS[kind as usize % 2].to_owned(), weight());
        let both = VARIANTS.map(|variant| (variant.to_owned(), weight()));
        Wish::Weights(if kind < 3 { [one].into() } else { both.into() })
    }

    /// Works until the host dies; `begun` counts the wishes that were sent.
    fn operate(&mut self, host: &Host, random: &mut Rng, begun: &AtomicUsize) {
        while let Some(wish) = self.wish(host, random) {
            self.open = Some(wish.clone());
            begun.fetch_add(1, Ordering::AcqRel);
            let Some((status, body)) = wish.ask(host) else { return };
            self.open = None;
            match status {
                200..300 => self.heard(&wish, &body),
                404 | 409 | 422 => {}
                _ => panic!("{wish:?}: {status} {body}"),
            }
        }
    }

    fn heard(&mut self, wish: &Wish, body: &Value) {
        let generation = body["generation"].as_u64().unwrap_or_default();
        match wish {
            Wish::Upload(_) => {
                self.uploaded.insert(body["digest"].as_str().expect("a digest").to_owned());
            }
            Wish::Put { slot, component } => {
                let component = component.clone();
                self.slots.insert(slot, Stand { generation, component, newest: generation, ..Stand::default() });
            }
            Wish::Rollback { slot } => {
                self.slots.insert(slot, Stand { generation, newest: generation, ..Stand::default() });
            }
            Wish::Rollout { slot, component, .. } => {
                let id = body["id"].as_str().and_then(|id| id.rsplit_once('-')?.1.parse().ok());
                let stand = self.slots.entry(slot).or_default();
                stand.newest = id.expect("an id");
                stand.trying = Some(component.clone());
            }
            Wish::Steer { slot, promote, .. } => {
                let stand = self.slots.entry(slot).or_default();
                let tried = stand.trying.take();
                if *promote {
                    stand.generation = stand.newest;
                    stand.component = tried.expect("a rollout under way");
                }
            }
            Wish::Remove { slot } => {
                self.slots.entry(slot).or_default().removed = true;
            }
            Wish::Weights(_) | Wish::Variant { .. } | Wish::SteerVariant { .. } => self.alias = self.alias.after(wish),
        }
    }

    /// Compares a host that has come back with what was told, and takes over what it says.
    fn check(&mut self, host: &Host) {
        let open = self.open.take();
        let listed = host.admin("GET", "/admin/v1/components", &Value::Null).body;
        let rows = listed["data"].as_array().expect("components");
        let digests: BTreeSet<String> = rows.iter().filter_map(|c| c["digest"].as_str().map(str::to_owned)).collect();
        assert!(self.uploaded.is_subset(&digests), "a component was lost: {:?}", &self.uploaded - &digests);
        let uploads = rows.iter().filter(|c| c["builtin"] == false).filter_map(|c| c["digest"].as_str());
        let unasked = uploads.filter(|digest| !self.uploaded.contains(*digest)).count();
        let may = usize::from(matches!(open, Some(Wish::Upload(_))));
        assert!(unasked <= may, "{unasked} components that nobody uploaded; open: {may}");
        self.uploaded = rows
            .iter()
            .filter(|c| c["builtin"] == false)
            .filter_map(|c| c["digest"].as_str().map(str::to_owned))
            .collect();
        let lines = journal(host);
        let told = |digest: &String| lines.iter().any(|e| e["event"] == "uploaded" && e["digest"] == *digest);
        let untold: Vec<&String> = self.uploaded.iter().filter(|digest| !told(digest)).collect();
        assert!(untold.is_empty(), "no line tells of {untold:?}");
        for slot in SLOTS {
            self.check_slot(host, slot, open.as_ref(), &lines);
        }
        self.check_alias(host, open.as_ref(), &lines);
        no_leftovers(host);
    }

    fn check_alias(&mut self, host: &Host, open: Option<&Wish>, lines: &[Value]) {
        let state = host.admin("GET", "/admin/v1/aliases/demo", &Value::Null).body;
        let Ok(bytes) = std::fs::read(host.folder().join("aliases/demo.json")) else {
            assert_eq!(self.alias, AliasStand::default(), "the alias has no document");
            return;
        };
        let document: Value = serde_json::from_slice(&bytes).expect("a whole document");
        let rollout = &document["rollout"];
        let live = matches!(rollout["phase"]["is"].as_str(), Some("running" | "paused"));
        let found = AliasStand {
            generation: document["generation"].as_u64().expect("a generation"),
            weights: serde_json::from_value(document["weights"].clone()).expect("weights"),
            rollouts: document["rollouts"].as_u64().expect("a number"),
            trying: live.then(|| rollout["candidate"].as_str().expect("a variant").to_owned()),
        };
        let may = [Some(self.alias.clone()), open.map(|open| self.alias.after(open))];
        assert!(may.contains(&Some(found.clone())), "found {document}, but told and asked for {may:?}");
        // What is stored is what serves.
        let trial = if live { &rollout["id"] } else { &Value::Null };
        assert_eq!((&state["generation"], &state["rollout"]["id"]), (&document["generation"], trial), "{state}");
        for variant in state["variants"].as_array().expect("variants") {
            let stored = document["weights"][variant["id"].as_str().expect("a name")].as_u64();
            assert_eq!(variant["weight"].as_u64(), Some(stored.unwrap_or(0)), "{document} {state}");
        }
        // The journal's last words are the same.
        let changed = lines.iter().rev().find(|e| e["event"] == "alias-changed").and_then(|e| e["generation"].as_u64());
        assert_eq!(changed.unwrap_or(0), found.generation, "the journal and the alias");
        let last = rollout["id"].as_str().unwrap_or("none");
        let known = lines.iter().any(|e| e["id"] == last || e["rollout"]["id"] == last);
        assert!(rollout.is_null() || known, "{last} is not in the journal");
        self.alias = found;
    }

    fn check_slot(&mut self, host: &Host, slot: &'static str, open: Option<&Wish>, lines: &[Value]) {
        let found = host.admin("GET", &format!("/admin/v1/slots/{slot}"), &Value::Null);
        let told = self.slots.get(slot).cloned().unwrap_or_default();
        let state = found.body;
        let is_there = found.status == 200;
        let stored = host.folder().join(format!("slots/{slot}.json"));
        let document: Value = match std::fs::read(&stored) {
            Ok(bytes) => serde_json::from_slice(&bytes).expect("a whole document"),
            Err(_) => {
                assert!(!is_there && told == Stand::default(), "{slot} has no document: {told:?}");
                return;
            }
        };
        let generation = document["active"]["generation"].as_u64().expect("a generation");
        let component = document["active"]["component"].as_str().expect("a component");
        let removed = document["removed"] == true;
        assert_eq!(is_there, !removed, "{slot}: {document} {state}");
        let rollout = &document["rollout"];
        let live = matches!(rollout["phase"]["is"].as_str(), Some("running" | "paused"));
        let newest = [&document["active"]["generation"], &document["newest"], &rollout["target"]["generation"]];
        let found = Stand {
            generation,
            component: component.to_owned(),
            removed,
            newest: newest.iter().filter_map(|n| n.as_u64()).max().unwrap_or(0),
            trying: live.then(|| rollout["target"]["component"].as_str().expect("a component").to_owned()),
        };
        if is_there {
            // What is stored is what serves, and it works.
            assert_eq!(state["active"]["generation"], generation, "{slot}: {document} {state}");
            assert_eq!(state["active"]["component"], component, "{slot}: {document} {state}");
            assert!(matches!(state["health"]["state"].as_str(), Some("closed" | "native")), "{slot}: {state}");
            assert_eq!(state["candidate"]["generation"].as_u64(), live.then_some(found.newest), "{slot}: {state}");
        }
        let may = expected(&told, open.filter(|open| open.slot() == Some(slot)));
        let is = |stand: &Stand| Stand { component: component.to_owned(), ..stand.clone() } == found;
        let fits = may.iter().any(|stand| is(stand) && (stand.component.is_empty() || stand.component == component));
        assert!(fits, "{slot}: found {document}, but told and asked for {may:?}");
        // The journal's last word on the slot is the same.
        let last = |events: &[&str]| {
            let of = |e: &&Value| e["slot"] == slot && e["event"].as_str().is_some_and(|event| events.contains(&event));
            lines.iter().rev().find(of).cloned().unwrap_or_default()
        };
        let published = last(&["published", "recovered"]);
        assert_eq!(published["target"], document["active"], "{slot}");
        let gone = last(&["removed"])["sequence"].as_u64() > published["sequence"].as_u64();
        assert_eq!(gone, removed, "{slot}: the journal and the document");
        let last_rollout = rollout["id"].as_str().unwrap_or("none");
        let of_rollout = |e: &&Value| e["id"] == last_rollout || e["rollout"]["id"] == last_rollout;
        let known = lines.iter().rev().find(of_rollout);
        assert!(rollout.is_null() || known.is_some(), "{slot}: {last_rollout} is not in the journal");
        self.slots.insert(slot, found);
    }
}

impl AliasStand {
    /// Where it stands once a wish was granted.
    fn after(&self, wish: &Wish) -> Self {
        let mut next = self.clone();
        match wish {
            Wish::Weights(weights) => (next.generation, next.weights) = (self.generation + 1, weights.clone()),
            Wish::Variant { candidate, .. } => {
                (next.rollouts, next.trying) = (self.rollouts + 1, Some(candidate.clone()));
            }
            Wish::SteerVariant { promote, .. } => {
                let tried = next.trying.take().unwrap_or_default();
                if *promote {
                    let weight = self.weights.values().copied().max().unwrap_or_default();
                    (next.generation, next.weights) = (self.generation + 1, [(tried, weight)].into());
                }
            }
            _ => {}
        }
        next
    }
}

/// Where a slot may stand after a crash: as was told, or as it would be had the open wish been granted.
fn expected(told: &Stand, open: Option<&Wish>) -> Vec<Stand> {
    let next = Stand { generation: told.newest + 1, newest: told.newest + 1, ..Stand::default() };
    let granted = open.map(|open| match open {
        Wish::Put { component, .. } => Stand { component: component.clone(), ..next },
        Wish::Rollout { component, .. } => {
            Stand { newest: told.newest + 1, trying: Some(component.clone()), ..told.clone() }
        }
        Wish::Steer { promote: false, .. } => Stand { trying: None, ..told.clone() },
        Wish::Steer { promote: true, .. } => {
            let component = told.trying.clone().unwrap_or_default();
            Stand { generation: told.newest, component, trying: None, ..told.clone() }
        }
        Wish::Remove { .. } => Stand { removed: true, ..told.clone() },
        _ => next,
    });
    [Some(told.clone()), granted].into_iter().flatten().collect()
}

/// Nothing half-written stays, and no signature without its component.
fn no_leftovers(host: &Host) {
    for folder in ["slots", "aliases", "components"] {
        for entry in std::fs::read_dir(host.folder().join(folder)).expect("a folder").flatten() {
            let path = entry.path();
            let kind = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
            assert!(matches!(kind, "json" | "wasm"), "{} was left behind", path.display());
        }
    }
}

#[test]
fn fifty_kills_lose_nothing_and_leave_nothing() {
    let mut random = Rng::new(SEED);
    let mut told = Told::default();
    let mut host = host(&[]);
    for (slot, name) in [("router", "route-least-loaded"), ("scheduler", "sched-fcfs")] {
        told.slots.insert(slot, Stand { generation: 1, component: host.builtin(name), newest: 1, ..Stand::default() });
    }
    for kill in 0..KILLS {
        let (wishes, spins) = (1 + random.below(4) as usize, random.below(1_000_000));
        let mut operator = Rng::new(SEED ^ kill);
        let begun = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            let work = scope.spawn(|| told.operate(&host, &mut operator, &begun));
            // Some wishes are granted; in the middle of the last one, after a while that the seed says, the host dies.
            while begun.load(Ordering::Acquire) < wishes && !work.is_finished() {
                std::hint::spin_loop();
            }
            for _ in 0..spins {
                std::hint::spin_loop();
            }
            let killed = Command::new("kill").args(["-KILL", &host.pid().to_string()]).status();
            assert!(killed.is_ok_and(|status| status.success()), "kill {kill}");
        });
        host = host.restart(&[]);
        told.check(&host);
        let served = host.post("/v1/completions", &json!({ "model": "demo", "prompt": "Rust is", "max_tokens": 1 }));
        let router = served.headers.get("x-pointsman-router").and_then(|v| v.to_str().ok()).unwrap_or_default();
        let stand = &told.slots["router"];
        let arms = [Some(stand.generation), stand.trying.as_ref().map(|_| stand.newest)];
        let known = arms.into_iter().flatten().any(|generation| router.ends_with(&format!(";g={generation}")));
        assert!(served.status == 200 && known, "after kill {kill}: {router}, {stand:?}");
    }
    let lines = journal(&host);
    let count = |event: &str| lines.iter().filter(|e| e["event"] == event).count();
    let generations: Vec<u64> = told.slots.values().map(|s| s.generation).collect();
    println!(
        "{KILLS} kills, seed {SEED:#x}: {} components, generations {generations:?}, {} rollouts started ({} of variants), {} \
         restored, {} lines recovered",
        told.uploaded.len(),
        count("rollout-started"),
        told.alias.rollouts,
        count("rollout-restored"),
        count("recovered")
    );
}
