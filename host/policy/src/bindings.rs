//! Rust types of wit/policy.wit, one set per world. Nothing from here leaves the crate: the seams of `pointsman-sched` do.
//!
//! `Borrowing`, so that columns are lowered straight from the caller's slices: with owned types every call would first copy
//! them into vectors. The imports are generated once, with the router's world, and shared by the others.

/// `world router-policy`.
pub(crate) mod router {
    wasmtime::component::bindgen!({
        path: "../../wit",
        world: "router-policy",
        ownership: Borrowing { duplicate_if_necessary: true },
    });
}

/// `world scheduler-policy`.
pub(crate) mod scheduler {
    wasmtime::component::bindgen!({
        path: "../../wit",
        world: "scheduler-policy",
        ownership: Borrowing { duplicate_if_necessary: true },
        with: { "pointsman:policy": super::router::pointsman::policy },
    });
}

/// `world telemetry-hook`.
pub(crate) mod telemetry {
    wasmtime::component::bindgen!({
        path: "../../wit",
        world: "telemetry-hook",
        ownership: Borrowing { duplicate_if_necessary: true },
        with: { "pointsman:policy": super::router::pointsman::policy },
    });
}
