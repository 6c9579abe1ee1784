//! Limits of slots, where they come from, and what an activation says besides, in the three vocabularies in which it is said.
//!
//! An activation's own limits come first, then those that the configuration file sets for the slot, then the host's. Only the
//! activation's are stored, so that an operator who edits the file changes every slot that has nothing of its own.

use pointsman_control::{Budget, SlotName};
use pointsman_policy::{BudgetChange, Limits, World};
use pointsman_server::admin::wire;

use super::Deploy;

const US_PER_MS: u64 = 1_000;
const BYTES_PER_MIB: u64 = 1 << 20;

/// As the runtime takes it.
pub(crate) fn change(budget: Budget) -> BudgetChange {
    let bytes = |mib: u64| usize::try_from(mib.saturating_mul(BYTES_PER_MIB)).unwrap_or(usize::MAX);
    BudgetChange {
        soft: budget.soft_us,
        hard: budget.hard_ms.map(|ms| ms.saturating_mul(US_PER_MS)),
        memory_bytes: budget.memory_mib.map(bytes),
    }
}

/// As documents have it.
pub(super) fn stored(budget: wire::Budget) -> Budget {
    let wire::Budget { soft_us, hard_ms, memory_mib } = budget;
    Budget { soft_us, hard_ms, memory_mib }
}

/// As the admin plane shows it.
pub(super) fn shown(budget: Budget) -> wire::Budget {
    let Budget { soft_us, hard_ms, memory_mib } = budget;
    wire::Budget { soft_us, hard_ms, memory_mib }
}

impl Deploy {
    /// What an activation with these limits of its own changes.
    pub(super) fn budget_of(&self, slot: &SlotName, own: Budget) -> BudgetChange {
        change(own.or(self.budgets.get(slot).copied().unwrap_or_default()))
    }

    /// The limits that hold in a slot, and who says so; none where they are out of bounds, which no policy that runs has.
    pub(super) fn limits(&self, slot: &SlotName, own: Budget) -> Option<wire::Limits> {
        let configured = self.budgets.get(slot).copied().unwrap_or_default();
        let Limits { budget, memory_bytes } =
            self.runtime.limits(World::of_slot(&slot.to_string())?, self.budget_of(slot, own)).ok()?;
        let hard = source(own.hard_ms, configured.hard_ms);
        let soft = match source(own.soft_us, configured.soft_us) {
            // Lowered to the hard one.
            wire::LimitSource::Default if budget.soft == budget.hard => hard,
            given => given,
        };
        let limit = |value, from| wire::Limit { value, from };
        Some(wire::Limits {
            soft_us: limit(budget.soft, soft),
            hard_ms: limit(budget.hard / US_PER_MS, hard),
            memory_mib: limit(memory_bytes as u64 / BYTES_PER_MIB, source(own.memory_mib, configured.memory_mib)),
        })
    }
}

fn source(own: Option<u64>, configured: Option<u64>) -> wire::LimitSource {
    match (own, configured) {
        (Some(_), _) => wire::LimitSource::Slot,
        (None, Some(_)) => wire::LimitSource::Config,
        (None, None) => wire::LimitSource::Default,
    }
}
