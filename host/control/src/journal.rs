//! Every decision on deployments with its evidence, as JSON lines that replay to the same state.
//!
//! The journal is for people and audits; the slot documents are what a restart reads. It numbers and bounds entries; the
//! app appends the lines to a file.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::alias::AliasDocument;
use crate::deployment::{DocumentError, SlotDocument, Target, stored};
use crate::rollout::{Decision, Evidence, Period, RolloutDocument, Sticky};
use crate::slot::SlotName;

/// Who asked: `startup`, `host`, `rollout`, or the name of an admin token (`loopback` where none is asked for) and the address that
/// called, as in `ci@10.0.0.7`.
pub type Actor = String;

/// One line of the journal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// 1, 2, 3 ... across restarts.
    pub sequence: u64,
    /// Milliseconds since 1970.
    pub at_unix_ms: u64,
    /// Who asked.
    pub actor: Actor,
    /// What happened.
    #[serde(flatten)]
    pub what: Happened,
}

/// Something that has no document of its own, written down before it is done: a host that dies before its line is written can
/// write it at the next start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Intent {
    /// Version of this layout: 1.
    pub format: u32,
    /// The journal's last line before it.
    pub journal_before: u64,
    /// Who asked.
    pub actor: Actor,
    /// The line to come.
    pub what: Happened,
}

/// Why a policy was published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Why {
    /// A slot was put.
    Put,
    /// Back to the previous policy.
    Rollback,
    /// Back to native.
    Delete,
    /// The host started.
    Start,
    /// A rollout promoted it.
    Rollout,
}

/// What can happen to a deployment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Happened {
    /// A component was accepted.
    Uploaded {
        /// Its digest.
        digest: String,
        /// Its world.
        world: String,
        /// Its size in bytes.
        size: u64,
        /// Name of the key in the host's ring that signed it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        signed_by: Option<String>,
        /// Where the host got it, when it was not in the request: an OCI reference with the manifest's digest, or a file.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        source: Option<String>,
    },
    /// A component was refused because of its signature, or for want of one.
    UploadRefused {
        /// Its digest.
        digest: String,
        /// What was wrong.
        error: String,
    },
    /// A stored component got a signature.
    Signed {
        /// Its digest.
        digest: String,
        /// Name of the key in the host's ring.
        signed_by: String,
    },
    /// A component was deleted.
    Deleted {
        /// Its digest.
        digest: String,
    },
    /// A policy became active.
    Published {
        /// Where.
        slot: SlotName,
        /// What.
        target: Target,
        /// What was active before.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        before: Option<String>,
        /// Why.
        why: Why,
    },
    /// Requests of an alias are assigned otherwise from now on.
    AliasChanged {
        /// Which.
        alias: String,
        /// Its generation.
        generation: u64,
        /// Weight by variant; none leaves the choice to the router.
        weights: BTreeMap<String, u32>,
        /// What stays at one variant.
        sticky: Sticky,
    },
    /// A start found a stored document ahead of the journal: the host died between the two.
    Recovered {
        /// Where.
        slot: SlotName,
        /// What the document says, and what works there from now on.
        target: Target,
    },
    /// An activation was refused; the slot is as it was.
    Refused {
        /// Where.
        slot: SlotName,
        /// The component.
        component: String,
        /// What was wrong.
        error: String,
    },
    /// What a policy was handed by the one before it when it was published or staged.
    HandedOver {
        /// The slot.
        slot: SlotName,
        /// Of the policy that was handed something.
        generation: u64,
        /// Instances that were.
        restored: u32,
        /// How much that was, in bytes.
        bytes: u64,
        /// Whose instances start cold and why.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        cold: Vec<String>,
    },
    /// A telemetry slot was removed.
    Removed {
        /// Which.
        slot: SlotName,
    },
    /// A guest misbehaved; the native policy decided.
    Fault {
        /// Where.
        slot: SlotName,
        /// Which revision.
        revision: String,
        /// Its generation.
        generation: u64,
        /// timeout, trap, memory, bad-answer or link.
        kind: String,
        /// What it did, in words.
        detail: String,
    },
    /// The native policy took over, or the guest is back.
    Circuit {
        /// Where.
        slot: SlotName,
        /// Which revision.
        revision: String,
        /// `open`, `half-open` or `closed`.
        state: String,
    },
    /// A telemetry hook raised an alert.
    Alert {
        /// Which slot.
        slot: SlotName,
        /// info, warning or critical.
        severity: String,
        /// One line.
        title: String,
        /// More.
        text: String,
    },
    /// A replica is unlike its past or its peers, or is usual again.
    Anomaly {
        /// As in `demo:f16@cpu`.
        replica: String,
        /// What is measured.
        metric: String,
        /// Mean of the last interval, in seconds or as a share.
        value: f64,
        /// Median of the intervals before, where there are enough.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        baseline: Option<f64>,
        /// How it is unusual, in words.
        detail: String,
    },
    /// Every slot was made native by one switch, or the policies are back.
    SafeMode {
        /// Which.
        on: bool,
        /// In the operator's words.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
    },
    /// A model is served from now on that was loaded while the host ran.
    ModelLoaded {
        /// Its name.
        model: String,
        /// Where its files are.
        path: String,
        /// What it is served as.
        variants: Vec<String>,
        /// What it took, all devices together.
        bytes: u64,
    },
    /// A model could not be loaded; what was served is.
    ModelRefused {
        /// Its name.
        model: String,
        /// Where its files are.
        path: String,
        /// What was wrong.
        error: String,
    },
    /// A model is served no more, and what it held is free.
    ModelUnloaded {
        /// Its name.
        model: String,
        /// Requests that were ended because they ran longer than they were given.
        ended: u64,
        /// What it held, all devices together.
        bytes: u64,
    },
    /// The configuration file and the stored deployment disagree; the stored one is used.
    Differs {
        /// Where.
        slot: SlotName,
        /// What the configuration names.
        configured: String,
        /// What is stored.
        stored: String,
    },
    /// A rollout began.
    RolloutStarted {
        /// As it was stored.
        rollout: Box<RolloutDocument>,
    },
    /// A rollout was found in a stored document when the host started; it goes on from there.
    RolloutRestored {
        /// As it was stored.
        rollout: Box<RolloutDocument>,
    },
    /// A period of a rollout was taken in.
    RolloutObserved {
        /// The rollout.
        id: String,
        /// Its slot or alias.
        subject: String,
        /// What happened in the period.
        period: Box<Period>,
    },
    /// A rollout changed: by its own rules when the actor is `rollout`, else because somebody asked.
    RolloutDecided {
        /// The rollout.
        id: String,
        /// Its slot or alias.
        subject: String,
        /// What was decided.
        #[serde(flatten)]
        decision: Decision,
        /// The numbers at that moment.
        evidence: Box<Evidence>,
    },
}

/// The most recent entries, numbered. Older ones are in the app's file only.
#[derive(Debug)]
pub struct Journal {
    recent: VecDeque<Entry>,
    next: u64,
    capacity: usize,
}

/// The last word on a slot.
#[derive(Clone, Copy, Debug, Default)]
struct LastOf {
    /// Of the last publication; 0 for none.
    generation: u64,
    /// Whether the slot was removed after it.
    removed: bool,
}

impl Journal {
    /// An empty journal that keeps `capacity` entries and numbers on from `last`.
    #[must_use]
    pub fn new(capacity: usize, last: u64) -> Self {
        Self { recent: VecDeque::new(), next: last + 1, capacity: capacity.max(1) }
    }

    /// Numbers and keeps an entry; the oldest one makes room. Returns the line to append to the file.
    pub fn append(&mut self, at_unix_ms: u64, actor: &str, what: Happened) -> (u64, String) {
        let entry = Entry { sequence: self.next, at_unix_ms, actor: actor.to_owned(), what };
        let line = entry.to_json();
        self.next += 1;
        if self.recent.len() == self.capacity {
            self.recent.pop_front();
        }
        self.recent.push_back(entry);
        (self.next - 1, line)
    }

    /// Takes entries of an earlier life back, oldest first; numbering goes on after the last one.
    pub fn restore(&mut self, entries: impl IntoIterator<Item = Entry>) {
        for entry in entries {
            self.next = self.next.max(entry.sequence + 1);
            if self.recent.len() == self.capacity {
                self.recent.pop_front();
            }
            self.recent.push_back(entry);
        }
    }

    /// Numbers on from a line that a stored document knows, also where the file has lost it: a line that comes now must not pass for
    /// an older one.
    pub fn go_on_after(&mut self, sequence: u64) {
        self.next = self.next.max(sequence.saturating_add(1));
    }

    /// The number of the last entry; 0 before the first one.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.next - 1
    }

    /// The lines that a stored document has not got: it is stored before them, and the host died in between. Where the kept
    /// entries do not reach back to the document, the host lived on, and wrote them. Each change was told of before the next
    /// one was stored, so a policy that a rollout came after was, and so was a rollout that a policy came after.
    #[must_use]
    pub fn untold(&self, document: &SlotDocument) -> Vec<Happened> {
        let SlotDocument { slot, active, rollout, removed, journal_before, .. } = document;
        let mut untold = Vec::new();
        if !self.keeps_all_after(*journal_before) {
            return untold;
        }
        let last = self.last_of(slot, *journal_before);
        if *removed {
            untold.extend((!last.removed).then(|| Happened::Removed { slot: slot.clone() }));
            return untold;
        }
        let tried = rollout.as_ref().and_then(|rollout| rollout.target.as_ref()).map_or(0, |target| target.generation);
        if tried <= active.generation && last.generation < active.generation {
            untold.push(Happened::Recovered { slot: slot.clone(), target: active.clone() });
        }
        if let Some(rollout) = rollout
            && rollout.phase.is_over()
            && tried >= active.generation
            && !self.tells_end_of(&rollout.id)
        {
            untold.push(Happened::RolloutRestored { rollout: Box::new(rollout.clone()) });
        }
        untold
    }

    /// As [`untold`](Self::untold), for an alias.
    #[must_use]
    pub fn untold_of_alias(&self, document: &AliasDocument) -> Vec<Happened> {
        let AliasDocument { alias, generation, weights, sticky, rollout, journal_before, ended_before, .. } =
            document.clone();
        let ended = rollout.filter(|rollout| {
            rollout.phase.is_over() && self.keeps_all_after(ended_before) && !self.tells_end_of(&rollout.id)
        });
        let is_ahead = self.keeps_all_after(journal_before) && self.last_of_alias(&alias) < generation;
        let changed = is_ahead.then_some(Happened::AliasChanged { alias, generation, weights, sticky });
        ended
            .map(|rollout| Happened::RolloutRestored { rollout: Box::new(rollout) })
            .into_iter()
            .chain(changed)
            .collect()
    }

    /// Whether the line of something that was to be done is missing; it is where it was not done, too. A component that is there
    /// is told of once, whoever brought it.
    #[must_use]
    pub fn lacks(&self, intent: &Intent) -> bool {
        let Intent { journal_before, actor, what, .. } = intent;
        let is_it = |entry: &Entry| entry.actor == *actor && entry.what == *what;
        let is_told = match what {
            Happened::Uploaded { digest, .. } => self.tells_upload_of(digest),
            _ => self.after(*journal_before, usize::MAX).any(is_it),
        };
        self.keeps_all_after(*journal_before) && !is_told
    }

    /// Whether every entry after this one is kept: only then was one that is not found never written.
    fn keeps_all_after(&self, sequence: u64) -> bool {
        self.recent.front().map_or(self.next, |oldest| oldest.sequence) <= sequence + 1
    }

    /// What the kept entries after this one say last about a slot.
    fn last_of(&self, slot: &SlotName, after: u64) -> LastOf {
        let mut last = LastOf::default();
        for entry in self.after(after, usize::MAX) {
            match &entry.what {
                Happened::Published { slot: of, target, .. } | Happened::Recovered { slot: of, target }
                    if of == slot =>
                {
                    last = LastOf { generation: target.generation, removed: false };
                }
                Happened::Removed { slot: of } if of == slot => last.removed = true,
                _ => {}
            }
        }
        last
    }

    /// Whether the kept entries' last word on a rollout is that it is over: an end that could not be stored does not last.
    fn tells_end_of(&self, rollout: &str) -> bool {
        let is_end = |entry: &Entry| match &entry.what {
            Happened::RolloutDecided { id, decision, .. } if id == rollout => Some(decision.is_end()),
            Happened::RolloutRestored { rollout: found } if found.id == rollout => Some(found.phase.is_over()),
            _ => None,
        };
        self.recent.iter().rev().find_map(is_end).unwrap_or(false)
    }

    /// Whether the kept entries' last word on a component is that it came.
    fn tells_upload_of(&self, component: &str) -> bool {
        let has_come = |entry: &Entry| match &entry.what {
            Happened::Uploaded { digest, .. } if digest == component => Some(true),
            Happened::Deleted { digest } if digest == component => Some(false),
            _ => None,
        };
        self.recent.iter().rev().find_map(has_come).unwrap_or(false)
    }

    /// The generation of an alias by the kept entries; 0 for none.
    fn last_of_alias(&self, alias: &str) -> u64 {
        let generation = |entry: &Entry| match &entry.what {
            Happened::AliasChanged { alias: of, generation, .. } if of == alias => Some(*generation),
            _ => None,
        };
        self.recent.iter().rev().find_map(generation).unwrap_or(0)
    }

    /// Kept entries after a sequence number, oldest first, at most `limit`.
    pub fn after(&self, sequence: u64, limit: usize) -> impl Iterator<Item = &Entry> {
        self.recent.iter().filter(move |entry| entry.sequence > sequence).take(limit)
    }
}

impl Intent {
    /// Its stored form.
    #[must_use]
    pub fn to_json(&self) -> String {
        stored(self)
    }

    /// Reads a stored one.
    ///
    /// # Errors
    /// It is none, or a newer host wrote it.
    pub fn parse(json: &[u8]) -> Result<Self, DocumentError> {
        let intent: Self = serde_json::from_slice(json)?;
        DocumentError::check(intent.format).map(|()| intent)
    }
}

impl Entry {
    /// One JSON object without a line break.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_else(|error| unreachable!("an entry is plain data: {error}"))
    }

    /// Reads a line of the journal file.
    ///
    /// # Errors
    /// It is not an entry.
    pub fn parse(line: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::alias::Aliases;
    use crate::deployment::{Budget, Deployment, Desired, Handover, OnFault};
    use crate::rollout::{Mode, Phase, Spec};
    use crate::slot::ComponentRef;

    #[test]
    fn entries_are_numbered_bounded_and_survive_a_round_trip() {
        let mut journal = Journal::new(2, 0);
        for n in 0..3 {
            let (sequence, line) = journal.append(n, "admin", Happened::Deleted { digest: format!("sha256:{n}") });
            assert_eq!(sequence, n + 1);
            assert_eq!(Entry::parse(&line).expect("it was just written").sequence, sequence);
        }
        assert_eq!(journal.after(0, 9).map(|e| e.sequence).collect::<Vec<_>>(), [2, 3]);
        assert_eq!(journal.after(2, 9).map(|e| e.sequence).collect::<Vec<_>>(), [3]);
        let mut restored = Journal::new(8, 0);
        restored.restore(journal.after(0, 9).cloned());
        assert_eq!(restored.append(9, "admin", Happened::Deleted { digest: "x".into() }).0, 4);
    }

    fn target(generation: u64) -> Target {
        Target {
            component: ComponentRef::Native,
            config: "{}".into(),
            state_namespace: None,
            budget: Budget::default(),
            handover: Handover::default(),
            on_fault: OnFault::default(),
            revision: "native".into(),
            generation,
        }
    }

    /// A document whose rollout has this candidate, and is over or not.
    fn document(active: u64, journal_before: u64, rollout: Option<(u64, Phase)>, removed: bool) -> SlotDocument {
        let rollout = rollout.map(|(generation, phase)| {
            let names = ["native".into(), "native".into()];
            let id = format!("telemetry.t-{generation}");
            let started = RolloutDocument::new(id, "telemetry.t".into(), names, Spec::of(Mode::Canary, 1));
            RolloutDocument { target: Some(target(generation)), phase, ..started }
        });
        let (active, slot) = (target(active), SlotName::Telemetry("t".into()));
        let (previous, newest, forgotten) = (None, None, 0);
        SlotDocument { format: 1, slot, active, previous, rollout, newest, removed, journal_before, forgotten }
    }

    #[test]
    fn a_line_is_missing_only_where_the_kept_entries_reach_back_to_its_document() {
        let slot = SlotName::Telemetry("t".into());
        let published = |generation| Happened::Published {
            slot: slot.clone(),
            target: target(generation),
            before: None,
            why: Why::Put,
        };
        let removed = || Happened::Removed { slot: slot.clone() };
        let found = |generation, phase| {
            let rollout = document(1, 0, Some((generation, phase)), false).rollout.expect("just made");
            Happened::RolloutRestored { rollout: Box::new(rollout) }
        };
        let ended = |generation| found(generation, Phase::Completed);
        let went_on = || found(2, Phase::Running);
        let noise = || Happened::Deleted { digest: "x".into() };
        let over = |generation| Some((generation, Phase::Completed));
        let (recovered, restored) = ("recovered", "rollout-restored");
        // What was written; what of it is still kept; the document; what it lacks.
        for (name, written, kept, document, expect) in [
            ("nothing was ever written", vec![], 9, document(1, 0, None, false), &[recovered][..]),
            ("the line is there", vec![noise(), published(1)], 9, document(1, 1, None, false), &[]),
            ("died before the line", vec![published(1)], 9, document(2, 1, None, false), &[recovered]),
            ("another line came first", vec![published(1), noise()], 1, document(2, 1, None, false), &[recovered]),
            ("the line is forgotten", vec![published(1), noise(), noise()], 2, document(1, 0, None, false), &[]),
            ("an older host's document", vec![noise(), published(1)], 9, document(1, 0, None, false), &[]),
            ("removed", vec![published(1), removed()], 9, document(1, 1, None, true), &[]),
            ("died before it was told", vec![published(1)], 9, document(1, 1, None, true), &["removed"]),
            ("removed, forgotten before", vec![published(1), noise()], 1, document(1, 2, None, true), &["removed"]),
            ("removed twice", vec![removed(), published(2)], 9, document(2, 2, None, true), &["removed"]),
            ("tried", vec![published(1), noise()], 1, document(1, 2, Some((2, Phase::Running)), false), &[]),
            ("tried in vain", vec![noise()], 1, document(1, 1, over(2), false), &[restored]),
            ("that is told", vec![noise(), ended(2)], 2, document(1, 1, over(2), false), &[]),
            ("again", vec![ended(2), went_on()], 9, document(1, 2, over(2), false), &[restored]),
            ("again, and that is told", vec![went_on(), ended(2)], 9, document(1, 1, over(2), false), &[]),
            ("promoted", vec![noise()], 1, document(2, 1, over(2), false), &[recovered, restored]),
            ("a rollout long ago", vec![noise(), published(3)], 1, document(3, 1, over(2), false), &[]),
            ("died after one long ago", vec![noise()], 1, document(3, 1, over(2), false), &[recovered]),
        ] {
            let mut journal = Journal::new(kept, 0);
            written.into_iter().for_each(|what| drop(journal.append(0, "t", what)));
            let lacks = journal.untold(&document);
            let events = lacks.iter().map(|what| serde_json::to_value(what).expect("plain data")["event"].clone());
            assert_eq!(events.collect::<Vec<_>>(), expect, "{name}");
        }
    }

    #[test]
    fn an_alias_lacks_lines_where_the_kept_entries_reach_back_to_its_document() {
        let over = document(1, 0, Some((2, Phase::Completed)), false).rollout;
        // Of a change and another line this many are kept; what the document says of lines before; what it lacks.
        for (kept, generation, (journal_before, ended_before), rollout, expect) in [
            (9, 1, (0, 0), None, &[][..]),
            (9, 2, (2, 0), None, &["alias-changed"]),
            (1, 1, (0, 0), None, &[]),
            (1, 2, (2, 0), None, &["alias-changed"]),
            (1, 1, (0, 2), over.clone(), &["rollout-restored"]),
            (1, 2, (2, 2), over.clone(), &["rollout-restored", "alias-changed"]),
            (1, 1, (0, 0), over, &[]),
        ] {
            let mut journal = Journal::new(kept, 0);
            let (weights, sticky) = (BTreeMap::new(), Sticky::default());
            journal.append(0, "t", Happened::AliasChanged { alias: "demo".into(), generation: 1, weights, sticky });
            journal.append(0, "t", Happened::Deleted { digest: "x".into() });
            let alias = Aliases::default().get("demo");
            let document = AliasDocument { generation, rollout, journal_before, ended_before, ..alias };
            let lacks = journal.untold_of_alias(&document);
            let events = lacks.iter().map(|what| serde_json::to_value(what).expect("plain data")["event"].clone());
            let case = (kept, generation, journal_before, ended_before);
            assert_eq!(events.collect::<Vec<_>>(), expect, "{case:?}");
        }
    }

    #[test]
    fn an_intent_lacks_its_line_until_that_is_written() {
        let what = |digest: &str| Happened::Deleted { digest: digest.into() };
        // What was written before and after it, how many of it are kept, and whether its line is missing.
        for (before, after, kept, lacks) in [
            (vec![], vec![], 9, true),
            (vec![("ci", "a")], vec![], 9, true),
            (vec![("ci", "a")], vec![("ci", "a")], 9, false),
            (vec![("ci", "b")], vec![("ci", "b"), ("ci", "a")], 2, false),
            (vec![], vec![("ci", "b"), ("startup", "a")], 9, true),
            (vec![], vec![("ci", "a"), ("ci", "b"), ("ci", "b")], 2, false),
        ] {
            let mut journal = Journal::new(kept, 0);
            before.iter().for_each(|(actor, digest)| drop(journal.append(0, actor, what(digest))));
            let intent = Intent { format: 1, journal_before: journal.last(), actor: "ci".into(), what: what("a") };
            after.iter().for_each(|(actor, digest)| drop(journal.append(0, actor, what(digest))));
            assert_eq!(Intent::parse(intent.to_json().as_bytes()).expect("just written"), intent);
            assert_eq!(journal.lacks(&intent), lacks, "{before:?} {after:?}");
            let newer = intent.to_json().replace("\"format\": 1", "\"format\": 2");
            assert!(matches!(Intent::parse(newer.as_bytes()), Err(DocumentError::Format { found: 2 })));
        }
    }

    #[test]
    fn what_is_told_again_after_lines_were_lost_is_told_once() {
        let (slot, lost) = (SlotName::Telemetry("t".into()), document(2, 7, None, false));
        let mut journal = Journal::new(9, 0);
        for expect in [1, 0] {
            journal.go_on_after(lost.journal_before);
            let untold = journal.untold(&lost);
            assert_eq!(untold.len(), expect, "{untold:?}");
            untold.into_iter().for_each(|what| drop(journal.append(0, "startup", what)));
        }
        assert_eq!(journal.last_of(&slot, 7).generation, 2);
        assert_eq!(journal.last(), 8);
    }

    #[test]
    fn a_component_that_is_there_is_told_of_once() {
        let uploaded = |digest: &str, signed_by: Option<&str>| {
            let (digest, world, signed_by) = (digest.to_owned(), "router".to_owned(), signed_by.map(str::to_owned));
            Happened::Uploaded { digest, world, size: 4, signed_by, source: None }
        };
        let deleted = |digest: &str| Happened::Deleted { digest: digest.into() };
        // What the journal says of components, and whether the line of an upload of `a` is missing.
        for (written, lacks) in [
            (vec![], true),
            (vec![uploaded("b", None)], true),
            (vec![uploaded("a", None)], false),
            (vec![uploaded("a", Some("release"))], false),
            (vec![uploaded("a", None), deleted("b")], false),
            (vec![uploaded("a", None), deleted("a")], true),
            (vec![uploaded("a", None), deleted("a"), uploaded("a", Some("release"))], false),
        ] {
            let mut journal = Journal::new(9, 0);
            written.iter().for_each(|what| drop(journal.append(0, "ana", what.clone())));
            let intent = Intent { format: 1, journal_before: 0, actor: "ci".into(), what: uploaded("a", None) };
            assert_eq!(journal.lacks(&intent), lacks, "{written:?}");
        }
    }

    #[test]
    fn lines_of_older_hosts_are_still_read() {
        let line = r#"{"sequence":1,"at_unix_ms":5,"actor":"token","event":"uploaded","digest":"sha256:a","world":"router","size":9}"#;
        let entry = Entry::parse(line).expect("a line of the first release");
        assert!(matches!(&entry.what, Happened::Uploaded { signed_by: None, source: None, .. }));
        assert_eq!(entry.to_json(), line, "and written as it was");
    }

    #[test]
    fn the_journal_replays_to_the_same_state() {
        let mut deployment = Deployment::default();
        let mut journal = Journal::new(64, 0);
        for component in ["sha256:a", "sha256:b", "native", "sha256:a"] {
            let component = ComponentRef::from(component.to_owned());
            let desired = Desired { component, config: "{}".into(), ..Desired::default() };
            let planned = deployment.plan(SlotName::Router, desired).expect("no condition");
            let document = deployment.published(planned, "r@1".into());
            let before = document.previous.map(|t| t.revision);
            let what = Happened::Published { slot: SlotName::Router, target: document.active, before, why: Why::Put };
            journal.append(0, "admin", what);
        }
        let mut replayed = Deployment::default();
        for entry in journal.after(0, 64) {
            let Happened::Published { slot, target, .. } = entry.what.clone() else { continue };
            let (revision, generation) = (target.revision.clone(), target.generation);
            let planned = replayed.plan(slot, target.into()).expect("no condition");
            assert_eq!(planned.generation, generation);
            replayed.published(planned, revision);
        }
        assert_eq!(replayed, deployment);
    }
}
