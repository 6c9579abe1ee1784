//! What wit-bindgen makes of wit/policy.wit: one module for the host's imports and one per exported interface.
//!
//! The package's worlds all export `lifecycle`, and an interface can be bound only once per crate. So each interface has a
//! one-interface world here, and a component is the union of two of them, `lifecycle` and its own, or of three with `handover`. wit-component merges
//! their types, and the result is exactly a world of the package. Guests do not name these modules: the crate root
//! re-exports what they need.

/// What the host offers: log, metrics, state.
pub mod host {
    wit_bindgen::generate!({
        path: "../../wit",
        inline: "
            package pointsman:sdk@0.1.0;
            world host {
                import pointsman:policy/types@0.2.0;
                import pointsman:policy/host-log@0.2.0;
                import pointsman:policy/host-metrics@0.2.0;
                import pointsman:policy/host-state@0.2.0;
            }
        ",
        world: "pointsman:sdk/host",
        generate_all,
        runtime_path: "pointsman_plugin::wit_bindgen::rt",
        additional_derives: [PartialEq],
    });
}

/// `interface lifecycle`.
pub mod lifecycle {
    wit_bindgen::generate!({
        path: "../../wit",
        inline: "package pointsman:sdk@0.1.0; world lifecycle { export pointsman:policy/lifecycle@0.2.0; }",
        world: "pointsman:sdk/lifecycle",
        generate_all,
        runtime_path: "pointsman_plugin::wit_bindgen::rt",
        default_bindings_module: "pointsman_plugin::bindings::lifecycle",
        pub_export_macro: true,
        additional_derives: [PartialEq],
    });
}

/// `interface handover`.
pub mod handover {
    wit_bindgen::generate!({
        path: "../../wit",
        inline: "package pointsman:sdk@0.1.0; world handover { export pointsman:policy/handover@0.2.0; }",
        world: "pointsman:sdk/handover",
        generate_all,
        runtime_path: "pointsman_plugin::wit_bindgen::rt",
        default_bindings_module: "pointsman_plugin::bindings::handover",
        pub_export_macro: true,
        additional_derives: [PartialEq],
    });
}

/// `interface admission`.
pub mod admission {
    wit_bindgen::generate!({
        path: "../../wit",
        inline: "package pointsman:sdk@0.1.0; world admission { export pointsman:policy/admission@0.2.0; }",
        world: "pointsman:sdk/admission",
        with: { "pointsman:policy/types@0.2.0": crate::bindings::host::pointsman::policy::types },
        generate_all,
        runtime_path: "pointsman_plugin::wit_bindgen::rt",
        default_bindings_module: "pointsman_plugin::bindings::admission",
        pub_export_macro: true,
        additional_derives: [PartialEq],
    });
}

/// `interface router`.
pub mod router {
    wit_bindgen::generate!({
        path: "../../wit",
        inline: "package pointsman:sdk@0.1.0; world router { export pointsman:policy/router@0.2.0; }",
        world: "pointsman:sdk/router",
        with: { "pointsman:policy/types@0.2.0": crate::bindings::host::pointsman::policy::types },
        generate_all,
        runtime_path: "pointsman_plugin::wit_bindgen::rt",
        default_bindings_module: "pointsman_plugin::bindings::router",
        pub_export_macro: true,
        additional_derives: [PartialEq],
    });
}

/// `interface scheduler`.
pub mod scheduler {
    wit_bindgen::generate!({
        path: "../../wit",
        inline: "package pointsman:sdk@0.1.0; world scheduler { export pointsman:policy/scheduler@0.2.0; }",
        world: "pointsman:sdk/scheduler",
        with: { "pointsman:policy/types@0.2.0": crate::bindings::host::pointsman::policy::types },
        generate_all,
        runtime_path: "pointsman_plugin::wit_bindgen::rt",
        default_bindings_module: "pointsman_plugin::bindings::scheduler",
        pub_export_macro: true,
        additional_derives: [PartialEq],
    });
}

/// `interface telemetry`.
pub mod telemetry {
    wit_bindgen::generate!({
        path: "../../wit",
        inline: "package pointsman:sdk@0.1.0; world telemetry { export pointsman:policy/telemetry@0.2.0; }",
        world: "pointsman:sdk/telemetry",
        with: { "pointsman:policy/types@0.2.0": crate::bindings::host::pointsman::policy::types },
        generate_all,
        runtime_path: "pointsman_plugin::wit_bindgen::rt",
        default_bindings_module: "pointsman_plugin::bindings::telemetry",
        pub_export_macro: true,
        additional_derives: [PartialEq],
    });
}

/// `interface kv-retention`.
pub mod kv_retention {
    wit_bindgen::generate!({
        path: "../../wit",
        inline: "package pointsman:sdk@0.1.0; world kv-retention { export pointsman:policy/kv-retention@0.2.0; }",
        world: "pointsman:sdk/kv-retention",
        with: { "pointsman:policy/types@0.2.0": crate::bindings::host::pointsman::policy::types },
        generate_all,
        runtime_path: "pointsman_plugin::wit_bindgen::rt",
        default_bindings_module: "pointsman_plugin::bindings::kv_retention",
        pub_export_macro: true,
        additional_derives: [PartialEq],
    });
}

/// `interface sampler`.
pub mod sampler {
    wit_bindgen::generate!({
        path: "../../wit",
        inline: "package pointsman:sdk@0.1.0; world sampler { export pointsman:policy/sampler@0.2.0; }",
        world: "pointsman:sdk/sampler",
        with: { "pointsman:policy/types@0.2.0": crate::bindings::host::pointsman::policy::types },
        generate_all,
        runtime_path: "pointsman_plugin::wit_bindgen::rt",
        default_bindings_module: "pointsman_plugin::bindings::sampler",
        pub_export_macro: true,
        additional_derives: [PartialEq],
    });
}
