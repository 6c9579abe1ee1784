//! What a policy was handed by the one before it, in the vocabularies of the admin plane, the documents and the runtime, and as a
//! line of the journal.
//!
//! `require` is for whoever activates: a rollback must not be refused by the policy that it takes back, nor wait long for it, and
//! at a start there is nobody to hand over, so both start cold where they have to.

use pointsman_control::{Handover, Happened, SlotName, Why};
use pointsman_policy::{Handover as Rule, Inheritance};
use pointsman_server::admin::wire;

use super::Deploy;
use super::activate::Ready;

/// As documents have it.
pub(super) fn stored(handover: wire::Handover) -> Handover {
    match handover {
        wire::Handover::Cold => Handover::Cold,
        wire::Handover::Require => Handover::Require,
    }
}

/// As the admin plane shows it.
pub(super) fn shown(handover: Handover) -> wire::Handover {
    match handover {
        Handover::Cold => wire::Handover::Cold,
        Handover::Require => wire::Handover::Require,
    }
}

/// What holds for an activation.
pub(super) fn rule(handover: Handover, why: Why) -> Rule {
    match (handover, why) {
        (_, Why::Rollback) => Rule::Soon,
        (Handover::Cold, _) | (_, Why::Start) => Rule::Cold,
        (Handover::Require, _) => Rule::Require,
    }
}

/// As the admin plane answers.
pub(super) fn answered(ready: &Ready) -> Option<wire::HandedOver> {
    let Ready::Guest(prepared) = ready else { return None };
    let Inheritance { restored, bytes, cold } = prepared.inherited.clone()?;
    Some(wire::HandedOver { restored, bytes, cold })
}

impl Deploy {
    /// Journals what the policy that is now published or staged was handed.
    pub(super) fn note_handover(
        &self,
        actor: &str,
        (slot, generation): (&SlotName, u64),
        handed: Option<&wire::HandedOver>,
    ) {
        if let Some(wire::HandedOver { restored, bytes, cold }) = handed.cloned() {
            self.note(actor, Happened::HandedOver { slot: slot.clone(), generation, restored, bytes, cold });
        }
    }
}
