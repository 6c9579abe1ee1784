//! A host that is killed at any moment comes back with what it had promised: fifty `kill -9` at seeded moments in the middle
//! of uploads, signatures, deletions, swaps, rollbacks, removals, changes of an alias, the beginning, the pauses and the end of
//! rollouts of policies, of shadows and of variants, and of safe mode, all on one data directory.
//!
//! The operator below knows what it was told (a 200 that arrived) and what was on its way when the host died. After each
//! start nothing that was promised may be missing, and nothing may be there that nobody asked for.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use ed25519_compact::{KeyPair, Seed};
use pointsman_tests::rng::Rng;
use pointsman_tests::{Host, looks, root};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::journal;
use crate::trust::PROGRAM;

const KILLS: u64 = 50;
const SEED: u64 = 0x5eed_0f6b_1115;
const SLOTS: [&str; 3] = ["router", "scheduler", "telemetry.watch"];
const VARIANTS: [&str; 2] = ["demo:f16", "demo:q8_0"];
/// Components that may be uploaded: few, so that they come again after they went, and while they are there.
const COMPONENTS: u64 = 40;
/// The name of the key that signs.
const SIGNER: &str = "release";

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
    Upload { number: u64, signed: bool },
    Sign { digest: String },
    Delete { digest: String },
    SafeMode { on: bool },
    Put { slot: &'static str, component: String },
    Rollback { slot: &'static str },
    Remove { slot: &'static str },
    Rollout { slot: &'static str, component: String, mode: &'static str, on_restart: &'static str },
    Steer { slot: &'static str, verb: &'static str, generation: u64 },
    Weights(Weights),
    Variant { candidate: String, on_restart: &'static str },
    SteerVariant { promote: bool, number: u64 },
}

/// What the operator was told, and what it had asked for when the host died.
#[derive(Debug, Default)]
struct Told {
    /// Uploaded and not deleted, and whether it is signed.
    components: BTreeMap<String, bool>,
    safe_mode: bool,
    slots: BTreeMap<&'static str, Stand>,
    /// Slots whose rollout was paused.
    paused: BTreeSet<&'static str>,
    alias: AliasStand,
    open: Option<Wish>,
}

fn key() -> KeyPair {
    KeyPair::from_seed(Seed::new([7; 32]))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(bytes)))
}

fn signature(digest: &str) -> String {
    hex(&*key().sk.sign(format!("pointsman-component-v1 {digest}"), None))
}

/// The same policy with a custom section of its own is another component.
fn component(number: u64) -> Vec<u8> {
    let mut bytes = std::fs::read(root().join("plugins/prebuilt/route-weighted.wasm")).expect("a component");
    let content = number.to_le_bytes();
    bytes.extend([0, 2 + content.len() as u8, 1, b'n']);
    bytes.extend(content);
    bytes
}

/// Sends a request the way a client does that may lose the host: an answer, or none.
fn send(host: &Host, method: &str, path: &str, header: (&str, &str), body: Vec<u8>) -> Option<(u16, Value)> {
    let request = ureq::http::Request::builder().method(method).uri(format!("{}{path}", host.admin));
    let request = request.header(header.0, header.1).body(body).expect("a request");
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let mut answer = agent.run(request).ok()?;
    let text = answer.body_mut().read_to_string().ok()?;
    Some((answer.status().as_u16(), serde_json::from_str(&text).unwrap_or_default()))
}

const JSON: (&str, &str) = ("content-type", "application/json");
const BYTES: (&str, &str) = ("content-type", "application/octet-stream");

/// What may be put into a slot: digests by world, and native.
fn candidates(host: &Host, slot: &str) -> Option<Vec<String>> {
    let world = slot.split('.').next().unwrap_or_default();
    let (_, listed) = send(host, "GET", "/admin/v1/components", JSON, Vec::new())?;
    let rows = listed["data"].as_array()?.iter();
    let fits = rows.filter(|c| c["world"].as_str().is_some_and(|w| w.starts_with(world)));
    Some(fits.map(|c| c["digest"].as_str().expect("a digest").to_owned()).chain(["native".to_owned()]).collect())
}

impl Wish {
    /// The slot that it changes.
    fn slot(&self) -> Option<&'static str> {
        match self {
            Self::Put { slot, .. } | Self::Rollback { slot } | Self::Remove { slot } => Some(slot),
            Self::Rollout { slot, .. } | Self::Steer { slot, .. } => Some(slot),
            _ => None,
        }
    }

    fn ask(&self, host: &Host) -> Option<(u16, Value)> {
        let (method, path, body) = match self {
            Self::Upload { number, signed } => {
                let bytes = component(*number);
                let signature = signature(&digest(&bytes));
                let header = if *signed { ("x-pointsman-signature", &*signature) } else { BYTES };
                return send(host, "POST", "/admin/v1/components", header, bytes);
            }
            Self::Sign { digest } => {
                let signature = signature(digest).into_bytes();
                let path = format!("/admin/v1/components/{digest}/signature");
                return send(host, "PUT", &path, BYTES, signature);
            }
            Self::Delete { digest } => ("DELETE", format!("components/{digest}"), Value::Null),
            Self::SafeMode { on } => ("POST", "safe-mode".to_owned(), json!({ "on": on })),
            Self::Put { slot, component } => ("PUT", format!("slots/{slot}"), json!({ "component": component })),
            Self::Rollback { slot } => ("POST", format!("slots/{slot}/rollback"), Value::Null),
            Self::Remove { slot } => ("DELETE", format!("slots/{slot}"), Value::Null),
            Self::Rollout { slot, component, mode, on_restart } => {
                // Arms take turns every 100 ms, each turn a stored document.
                let plan = json!({
                    "component": component, "mode": mode, "on_restart": on_restart,
                    "block_ms": 100, "burn_in_ms": 0, "settle_ms": 0,
                });
                ("POST", format!("slots/{slot}/rollouts"), plan)
            }
            Self::Steer { slot, verb, generation } => {
                ("POST", format!("slots/{slot}/rollouts/{slot}-{generation}/{verb}"), json!({}))
            }
            Self::Weights(weights) => ("PUT", "aliases/demo".to_owned(), json!({ "weights": weights })),
            Self::Variant { candidate, on_restart } => {
                let plan = json!({
                    "candidate": candidate, "mode": "ab", "on_restart": on_restart,
                    "block_ms": 100, "burn_in_ms": 0, "settle_ms": 0,
                });
                ("POST", "aliases/demo/rollouts".to_owned(), plan)
            }
            Self::SteerVariant { promote, number } => {
                let verb = if *promote { "promote" } else { "abort" };
                ("POST", format!("aliases/demo/rollouts/alias.demo-{number}/{verb}"), json!({}))
            }
        };
        let body = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
        send(host, method, &format!("/admin/v1/{path}"), JSON, body)
    }
}

impl Told {
    /// The next wish; none once the host is dead.
    fn wish(&self, host: &Host, random: &mut Rng) -> Option<Wish> {
        // Little can be tried while every slot is native.
        if self.safe_mode && random.below(3) == 0 {
            return Some(Wish::SafeMode { on: false });
        }
        match random.below(16) {
            0..4 => Some(self.wish_of_alias(random)),
            4..8 => Some(self.wish_of_component(random)),
            8 => Some(Wish::SafeMode { on: !self.safe_mode }),
            _ => self.wish_of_slot(host, random),
        }
    }

    fn wish_of_component(&self, random: &mut Rng) -> Wish {
        let kind = random.below(8);
        let unsigned = self.components.iter().filter(|(_, signed)| !**signed).map(|(digest, _)| digest);
        let of: Vec<&String> = if kind < 6 { self.components.keys().collect() } else { unsigned.collect() };
        if kind < 3 || of.is_empty() {
            return Wish::Upload { number: random.below(COMPONENTS), signed: kind < 2 };
        }
        let digest = of[random.below(of.len() as u64) as usize].clone();
        if kind < 6 { Wish::Delete { digest } } else { Wish::Sign { digest } }
    }

    /// A rollout under way is steered sooner or later.
    fn wish_of_slot(&self, host: &Host, random: &mut Rng) -> Option<Wish> {
        let slot = SLOTS[random.below(3) as usize];
        let stand = self.slots.get(slot).cloned().unwrap_or_default();
        let kind = random.below(8) as usize;
        if stand.trying.is_some() && kind < 6 {
            let verb = ["promote", "promote", "abort", "abort", "pause", "resume"][kind];
            return Some(Wish::Steer { slot, verb, generation: stand.newest });
        }
        let mut any = || {
            let mut known = candidates(host, slot)?;
            Some(known.swap_remove(random.below(known.len() as u64) as usize))
        };
        Some(match kind {
            0..3 => Wish::Put { slot, component: any()? },
            3..6 if slot != SLOTS[2] => {
                let (mode, on_restart) =
                    [("switchback", "pause"), ("switchback", "resume"), ("shadow", "resume")][kind - 3];
                Wish::Rollout { slot, component: any()?, mode, on_restart }
            }
            3..7 => Wish::Rollback { slot },
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
                // The native scheduler's plans cannot be compared.
                400 if matches!(wish, Wish::Rollout { mode: "shadow", .. }) => {}
                404 | 409 | 422 => {}
                _ => panic!("{wish:?}: {status} {body}"),
            }
        }
    }

    fn heard(&mut self, wish: &Wish, body: &Value) {
        let generation = body["generation"].as_u64().unwrap_or_default();
        match wish {
            Wish::Upload { .. } | Wish::Sign { .. } | Wish::Delete { .. } => {
                self.components = self.components_after(wish)
            }
            Wish::SafeMode { on } => {
                self.safe_mode = *on;
                let tries = |slot: &&str| self.slots.get(slot).is_some_and(|stand| stand.trying.is_some());
                self.paused.extend(SLOTS.into_iter().filter(|slot| *on && tries(slot)));
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
                self.paused.remove(slot);
            }
            Wish::Steer { slot, verb: "pause", .. } => drop(self.paused.insert(slot)),
            Wish::Steer { slot, verb, .. } => {
                self.paused.remove(slot);
                let stand = self.slots.entry(slot).or_default();
                match *verb {
                    "promote" => {
                        stand.generation = stand.newest;
                        stand.component = stand.trying.take().expect("a rollout under way");
                    }
                    "abort" => stand.trying = None,
                    _ => {}
                }
            }
            Wish::Remove { slot } => {
                self.slots.entry(slot).or_default().removed = true;
            }
            Wish::Weights(_) | Wish::Variant { .. } | Wish::SteerVariant { .. } => self.alias = self.alias.after(wish),
        }
    }

    /// The components once a wish was granted.
    fn components_after(&self, wish: &Wish) -> BTreeMap<String, bool> {
        let mut next = self.components.clone();
        match wish {
            Wish::Upload { number, signed } => {
                let is_signed = next.entry(digest(&component(*number))).or_default();
                *is_signed |= signed;
            }
            Wish::Sign { digest } => drop(next.insert(digest.clone(), true)),
            Wish::Delete { digest } => drop(next.remove(digest)),
            _ => {}
        }
        next
    }

    /// Compares a host that has come back with what was told, and takes over what it says.
    fn check(&mut self, host: &Host) {
        let open = self.open.take();
        let lines = journal(host);
        self.check_components(host, open.as_ref(), &lines);
        self.check_safe_mode(host, open.as_ref(), &lines);
        for slot in SLOTS {
            self.check_slot(host, slot, open.as_ref(), &lines);
        }
        self.check_alias(host, open.as_ref(), &lines);
        self.no_leftovers(host);
        told_once(&lines);
    }

    /// What was uploaded is there, whole, with its signature; what was deleted is not; and there is one line of each.
    fn check_components(&mut self, host: &Host, open: Option<&Wish>, lines: &[Value]) {
        let listed = host.admin("GET", "/admin/v1/components", &Value::Null).body;
        let rows = listed["data"].as_array().expect("components").iter().filter(|c| c["builtin"] == false);
        let found: BTreeMap<String, bool> =
            rows.map(|c| (c["digest"].as_str().expect("a digest").to_owned(), c["signed_by"] == SIGNER)).collect();
        let may = [Some(self.components.clone()), open.map(|open| self.components_after(open))];
        assert!(may.contains(&Some(found.clone())), "found {found:?}, but told {:?}; open: {open:?}", self.components);
        let mut told = BTreeMap::new();
        for line in lines {
            let digest = line["digest"].as_str().unwrap_or_default().to_owned();
            let before = told.get(&digest).copied();
            match line["event"].as_str() {
                Some("uploaded") => {
                    assert_eq!(before, None, "it came twice: {line}");
                    told.insert(digest, line["signed_by"] == SIGNER);
                }
                Some("signed") => {
                    assert_eq!(before, Some(false), "signed twice, or not there: {line}");
                    told.insert(digest, true);
                }
                Some("deleted") => assert!(told.remove(&digest).is_some(), "it went twice: {line}"),
                _ => {}
            }
        }
        assert_eq!(told, found, "the journal and the components; open: {open:?}");
        self.components = found;
    }

    fn check_safe_mode(&mut self, host: &Host, open: Option<&Wish>, lines: &[Value]) {
        let found = host.admin("GET", "/admin/v1/safe-mode", &Value::Null).body["on"] == true;
        let asked = matches!(open, Some(Wish::SafeMode { on }) if *on == found);
        assert!(found == self.safe_mode || asked, "safe mode is {found}; open: {open:?}");
        let mut told = false;
        for line in lines.iter().filter(|line| line["event"] == "safe-mode") {
            assert_eq!(line["on"], !told, "switched twice: {line}");
            told = !told;
        }
        assert_eq!(told, found, "the journal and the switch; open: {open:?}");
        self.safe_mode = found;
    }

    /// Nothing half-written stays; a signature is beside each component that has one, and nowhere else.
    fn no_leftovers(&self, host: &Host) {
        let left = |path: &PathBuf| {
            let kind = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
            !matches!(kind, "json" | "wasm" | "sig")
        };
        for folder in ["slots", "aliases", "components"] {
            let files = std::fs::read_dir(host.folder().join(folder)).expect("a folder").flatten();
            // One that is being written now, by a rollout that goes on, has another name soon.
            let left: Vec<PathBuf> = files.map(|entry| entry.path()).filter(left).collect();
            assert!(looks().any(|_| !left.iter().any(|path| path.exists())), "{left:?} was left behind");
        }
        let signed = |digest: &str| host.folder().join(format!("components/{}.sig", &digest[7..])).exists();
        assert!(self.components.iter().all(|(digest, is_signed)| signed(digest) == *is_signed));
        let components = std::fs::read_dir(host.folder().join("components")).expect("a folder").flatten();
        let n_signatures = components.filter(|entry| entry.path().extension().is_some_and(|e| e == "sig")).count();
        assert_eq!(n_signatures, self.components.values().filter(|signed| **signed).count(), "a signature of nothing");
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
        let is_paused = rollout["phase"]["is"] == "paused";
        let resumed = matches!(open, Some(Wish::Steer { slot: of, verb: "resume", .. }) if *of == slot);
        let may_run = resumed || !self.paused.contains(slot);
        assert!(may_run || is_paused || !live, "{slot}: {rollout} was paused");
        self.paused.remove(slot);
        self.paused.extend(is_paused.then_some(slot));
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
        Wish::Steer { verb: "abort", .. } => Stand { trying: None, ..told.clone() },
        Wish::Steer { verb: "promote", .. } => {
            let component = told.trying.clone().unwrap_or_default();
            Stand { generation: told.newest, component, trying: None, ..told.clone() }
        }
        Wish::Steer { .. } => told.clone(),
        Wish::Remove { .. } => Stand { removed: true, ..told.clone() },
        _ => next,
    });
    [Some(told.clone()), granted].into_iter().flatten().collect()
}

/// No policy, no change of the alias and no end of a rollout is told of twice.
fn told_once(lines: &[Value]) {
    let mut told = BTreeSet::new();
    for line in lines {
        let event = line["event"].as_str().expect("an event");
        let is_end = match event {
            "rollout-decided" => matches!(line["decision"].as_str(), Some("abort" | "promote" | "complete")),
            _ => matches!(line["rollout"]["phase"]["is"].as_str(), Some("aborted" | "promoted" | "completed")),
        };
        let what = match event {
            "published" | "recovered" => format!("{} {}", line["slot"], line["target"]["generation"]),
            "alias-changed" => format!("{} {}", line["alias"], line["generation"]),
            _ if is_end => format!("the end of {}{}", line["id"], line["rollout"]["id"]).replace("null", ""),
            _ => continue,
        };
        assert!(told.insert(what), "told twice: {line}");
    }
}

#[test]
fn fifty_kills_lose_nothing_and_leave_nothing() {
    let mut random = Rng::new(SEED);
    let mut told = Told::default();
    let ring = format!("[trust.keys]\n{SIGNER} = \"{}\"\n", hex(&*key().pk));
    let mut host = Host::configured(PROGRAM, &ring);
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
            host.signal("-KILL");
        });
        host = host.restart(&[]);
        told.check(&host);
        let served = host.post("/v1/completions", &json!({ "model": "demo", "prompt": "Rust is", "max_tokens": 1 }));
        let router = served.headers.get("x-pointsman-router").and_then(|v| v.to_str().ok()).unwrap_or_default();
        let stand = &told.slots["router"];
        let arms = [Some(stand.generation), stand.trying.as_ref().map(|_| stand.newest)];
        let known = match told.safe_mode {
            true => router.starts_with("native;"),
            false => arms.into_iter().flatten().any(|generation| router.ends_with(&format!(";g={generation}"))),
        };
        assert!(served.status == 200 && known, "after kill {kill}: {router}, {stand:?}");
    }
    let lines = journal(&host);
    let count = |event: &str| lines.iter().filter(|e| e["event"] == event).count();
    let generations: Vec<u64> = told.slots.values().map(|s| s.generation).collect();
    println!(
        "{KILLS} kills, seed {SEED:#x}: {} uploads, {} signatures, {} deletions, {} switches of safe mode, generations \
         {generations:?}, {} rollouts started ({} of variants), {} restored, {} lines recovered",
        count("uploaded"),
        count("signed"),
        count("deleted"),
        count("safe-mode"),
        count("rollout-started"),
        told.alias.rollouts,
        count("rollout-restored"),
        count("recovered")
    );
}
