//! Rust types of wit/policy.wit, one module per interface. Nothing from here leaves the crate: the seams of `pointsman-sched`
//! do.
//!
//! Per interface and not per world, because a component may export an older `lifecycle` beside its own interface, and any
//! other one besides (see versions). `Borrowing`, so that columns are lowered straight from the caller's slices: with owned
//! types every call would first copy them into vectors.

/// `interface router`, and what guests may import: generated once, here, and shared by the others.
pub(crate) mod router {
    wasmtime::component::bindgen!({
        path: "../../wit",
        inline: "
            package pointsman:host;
            world router {
                import pointsman:policy/host-log@0.2.0;
                import pointsman:policy/host-metrics@0.2.0;
                import pointsman:policy/host-state@0.2.0;
                export pointsman:policy/router@0.2.0;
            }
        ",
        world: "pointsman:host/router",
        ownership: Borrowing { duplicate_if_necessary: true },
    });
}

/// `interface admission`.
pub(crate) mod admission {
    wasmtime::component::bindgen!({
        path: "../../wit",
        inline: "package pointsman:host; world admission { export pointsman:policy/admission@0.2.0; }",
        world: "pointsman:host/admission",
        ownership: Borrowing { duplicate_if_necessary: true },
        with: { "pointsman:policy": super::router::pointsman::policy },
    });
}

/// `interface lifecycle`.
pub(crate) mod lifecycle {
    wasmtime::component::bindgen!({
        path: "../../wit",
        inline: "package pointsman:host; world lifecycle { export pointsman:policy/lifecycle@0.2.0; }",
        world: "pointsman:host/lifecycle",
        ownership: Borrowing { duplicate_if_necessary: true },
    });
}

/// `interface lifecycle` of guests of 0.1.
pub(crate) mod lifecycle_0_1 {
    wasmtime::component::bindgen!({
        path: "../../wit/frozen/0.1.0",
        inline: "package pointsman:host; world lifecycle { export pointsman:policy/lifecycle@0.1.0; }",
        world: "pointsman:host/lifecycle",
        ownership: Borrowing { duplicate_if_necessary: true },
    });
}

/// `interface handover`.
pub(crate) mod handover {
    wasmtime::component::bindgen!({
        path: "../../wit",
        inline: "package pointsman:host; world handover { export pointsman:policy/handover@0.2.0; }",
        world: "pointsman:host/handover",
        ownership: Borrowing { duplicate_if_necessary: true },
    });
}

/// `interface scheduler`.
pub(crate) mod scheduler {
    wasmtime::component::bindgen!({
        path: "../../wit",
        inline: "package pointsman:host; world scheduler { export pointsman:policy/scheduler@0.2.0; }",
        world: "pointsman:host/scheduler",
        ownership: Borrowing { duplicate_if_necessary: true },
        with: { "pointsman:policy": super::router::pointsman::policy },
    });
}

/// `interface telemetry`.
pub(crate) mod telemetry {
    wasmtime::component::bindgen!({
        path: "../../wit",
        inline: "package pointsman:host; world telemetry { export pointsman:policy/telemetry@0.2.0; }",
        world: "pointsman:host/telemetry",
        ownership: Borrowing { duplicate_if_necessary: true },
        with: { "pointsman:policy": super::router::pointsman::policy },
    });
}

/// `interface kv-retention`.
pub(crate) mod kv_retention {
    wasmtime::component::bindgen!({
        path: "../../wit",
        inline: "package pointsman:host; world kv-retention { export pointsman:policy/kv-retention@0.2.0; }",
        world: "pointsman:host/kv-retention",
        ownership: Borrowing { duplicate_if_necessary: true },
        with: { "pointsman:policy": super::router::pointsman::policy },
    });
}

/// `interface sampler`.
pub(crate) mod sampler {
    wasmtime::component::bindgen!({
        path: "../../wit",
        inline: "package pointsman:host; world sampler { export pointsman:policy/sampler@0.2.0; }",
        world: "pointsman:host/sampler",
        ownership: Borrowing { duplicate_if_necessary: true },
        with: { "pointsman:policy": super::router::pointsman::policy },
    });
}
