//! Every decision on deployments with its evidence, as JSON lines that replay to the same state.
//!
//! The journal is for people and audits; the slot documents are what a restart reads. It numbers and bounds entries; the
//! app appends the lines to a file.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::deployment::Target;
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

/// Where a slot stands by the journal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LastOf {
    /// Of the last publication; 0 for none.
    pub generation: u64,
    /// Whether the slot was removed after it.
    pub removed: bool,
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

    /// What the kept entries say last about a slot.
    #[must_use]
    pub fn last_of(&self, slot: &SlotName) -> LastOf {
        let mut last = LastOf::default();
        for entry in &self.recent {
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

    /// Whether a kept entry says that this rollout is over.
    #[must_use]
    pub fn tells_end_of(&self, rollout: &str) -> bool {
        self.recent.iter().any(|entry| match &entry.what {
            Happened::RolloutDecided { id, decision, .. } => id == rollout && decision.is_end(),
            Happened::RolloutRestored { rollout: found } => found.id == rollout && found.phase.is_over(),
            _ => false,
        })
    }

    /// The generation of an alias by the kept entries; 0 for none.
    #[must_use]
    pub fn last_of_alias(&self, alias: &str) -> u64 {
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
    use crate::deployment::{Budget, Deployment, Desired};
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

    #[test]
    fn the_last_word_on_a_slot_is_found() {
        let mut journal = Journal::new(8, 0);
        let slot = SlotName::Telemetry("t".into());
        let target = |generation| Target {
            component: ComponentRef::Native,
            config: "{}".into(),
            state_namespace: None,
            budget: Budget::default(),
            revision: "native".into(),
            generation,
        };
        assert_eq!(journal.last_of(&slot), LastOf::default());
        for (what, generation, removed) in [
            (Happened::Published { slot: slot.clone(), target: target(1), before: None, why: Why::Put }, 1, false),
            (Happened::Published { slot: SlotName::Router, target: target(9), before: None, why: Why::Put }, 1, false),
            (Happened::Removed { slot: slot.clone() }, 1, true),
            (Happened::Recovered { slot: slot.clone(), target: target(2) }, 2, false),
        ] {
            journal.append(0, "t", what);
            assert_eq!(journal.last_of(&slot), LastOf { generation, removed });
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
