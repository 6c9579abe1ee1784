//! Whether requests go on without a sampler that faults, in the vocabularies of the admin plane, the documents and the runtime.

use pointsman_control::OnFault;
use pointsman_policy::OnFault as Rule;
use pointsman_server::admin::wire;

/// As documents have it.
pub(super) fn stored(on_fault: wire::OnFault) -> OnFault {
    match on_fault {
        wire::OnFault::Open => OnFault::Open,
        wire::OnFault::Closed => OnFault::Closed,
    }
}

/// As the admin plane shows it.
pub(super) fn shown(on_fault: OnFault) -> wire::OnFault {
    match on_fault {
        OnFault::Open => wire::OnFault::Open,
        OnFault::Closed => wire::OnFault::Closed,
    }
}

/// What holds for an activation.
pub(super) fn rule(on_fault: OnFault) -> Rule {
    match on_fault {
        OnFault::Open => Rule::Open,
        OnFault::Closed => Rule::Closed,
    }
}
