//! From a policy type to a component: the exported functions, written once for all policies, and the macros.
//!
//! The one policy of an instance lives in a thread-local cell: the component model has no `self`, and a cell needs no
//! `unsafe`. Exports exist on wasm32 only, so that a policy crate is an ordinary library everywhere else.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::thread::LocalKey;

use crate::bindings::admission::exports::pointsman::policy::admission;
use crate::bindings::handover::exports::pointsman::policy::handover;
use crate::bindings::kv_retention::exports::pointsman::policy::kv_retention;
use crate::bindings::lifecycle::exports::pointsman::policy::lifecycle;
use crate::bindings::router::exports::pointsman::policy::router;
use crate::bindings::sampler::exports::pointsman::policy::sampler;
use crate::bindings::scheduler::exports::pointsman::policy::scheduler;
use crate::bindings::telemetry::exports::pointsman::policy::telemetry;
use crate::{
    Admission, AdmitRequest, Alert, Blocks, Budgets, Changes, Choice, Edit, Endings, Events, Handover, HostInfo,
};
use crate::{Load, Manifest, Micros, Plan, Policy, Ranking, Replicas, Request, RequestId, Retention, Router, Sampler};
use crate::{Scheduler, Sequences, Started, Telemetry, Verdict, View, config};

/// A policy with a place to live in; implemented by the macros.
#[doc(hidden)]
pub trait Instance: Policy {
    /// The place.
    fn cell() -> &'static LocalKey<RefCell<Option<Self>>>;
}

/// The component made of a policy.
#[doc(hidden)]
#[derive(Debug)]
pub struct Component<P>(PhantomData<P>);

impl<P: Instance> lifecycle::Guest for Component<P> {
    fn init(config: String, host: HostInfo) -> Result<Manifest, String> {
        // A panic is a trap, which has no message: the log gets it before.
        #[cfg(target_arch = "wasm32")]
        std::panic::set_hook(Box::new(|panic| crate::log::error(&panic.to_string())));
        let policy = P::init(config::parse(&config)?, &host)?;
        let manifest = policy.manifest();
        P::cell().set(Some(policy));
        Ok(manifest)
    }
}

fn with<P: Instance, R>(call: impl FnOnce(&mut P) -> R) -> R {
    P::cell().with_borrow_mut(|policy| call(policy.as_mut().expect("the host calls init first")))
}

impl<P: Instance + Admission> admission::Guest for Component<P> {
    fn admit(now: Micros, request: AdmitRequest, load: Load) -> Verdict {
        with::<P, _>(|policy| policy.admit(now, &request, &load))
    }

    fn settle(now: Micros, endings: Endings) {
        with::<P, _>(|policy| policy.settle(now, &endings));
    }
}

impl<P: Instance + Router> router::Guest for Component<P> {
    fn route(now: Micros, request: Request, replicas: Replicas) -> Choice {
        with::<P, _>(|policy| policy.route(now, &request, &replicas))
    }
}

impl<P: Instance + Scheduler> scheduler::Guest for Component<P> {
    fn resync(
        now: Micros,
        seed: u64,
        budgets: Budgets,
        tenants: Vec<(u32, String)>,
        waiting: Sequences,
        running: Sequences,
    ) {
        with::<P, _>(|policy| policy.resync(&View { now, seed, budgets, tenants, waiting, running }));
    }

    fn step(now: Micros, budgets: Budgets, changes: Changes) -> Option<Plan> {
        with::<P, _>(|policy| policy.step(now, &budgets, &changes))
    }
}

impl<P: Instance + Telemetry> telemetry::Guest for Component<P> {
    fn on_events(now: Micros, events: Events, dropped: u64) -> Vec<Alert> {
        with::<P, _>(|policy| policy.on_events(now, &events, dropped))
    }
}

impl<P: Instance + Retention> kv_retention::Guest for Component<P> {
    fn rank(now: Micros, wanted: u32, blocks: Blocks) -> Option<Ranking> {
        with::<P, _>(|policy| policy.rank(now, wanted, &blocks))
    }
}

impl<P: Instance + Sampler> sampler::Guest for Component<P> {
    fn start(now: Micros, requests: Vec<Started>) -> Vec<Edit> {
        with::<P, _>(|policy| policy.start(now, &requests))
    }

    fn next(now: Micros, ids: Vec<RequestId>, tokens: Vec<u32>) -> Vec<Edit> {
        with::<P, _>(|policy| policy.next(now, &ids, &tokens))
    }

    fn ended(ids: Vec<RequestId>) {
        with::<P, _>(|policy| policy.ended(&ids));
    }
}

impl<P: Instance + Handover> handover::Guest for Component<P> {
    fn take_snapshot() -> Option<handover::Snapshot> {
        with::<P, _>(|policy| policy.snapshot().map(|bytes| handover::Snapshot { schema: policy.schema(), bytes }))
    }

    fn restore(snapshot: handover::Snapshot) -> Result<(), String> {
        with::<P, _>(|policy| match policy.schema() {
            known if known == snapshot.schema => policy.restore(&snapshot.bytes),
            known => Err(format!("it has the layout {}, and this policy knows {known}", snapshot.schema)),
        })
    }
}

/// Exports an [`Admission`] policy as a component of world `admission-policy`.
#[macro_export]
macro_rules! admission {
    ($policy:ty) => {
        $crate::__export!(admission, $policy);
    };
}

/// Exports a [`Router`] as a component of world `router-policy`.
#[macro_export]
macro_rules! router {
    ($policy:ty) => {
        $crate::__export!(router, $policy);
    };
}

/// Exports a [`Scheduler`] as a component of world `scheduler-policy`.
#[macro_export]
macro_rules! scheduler {
    ($policy:ty) => {
        $crate::__export!(scheduler, $policy);
    };
}

/// Exports a [`Telemetry`] hook as a component of world `telemetry-hook`.
#[macro_export]
macro_rules! telemetry {
    ($policy:ty) => {
        $crate::__export!(telemetry, $policy);
    };
}

/// Exports a [`Retention`] policy as a component of world `kv-retention-policy`.
#[macro_export]
macro_rules! retention {
    ($policy:ty) => {
        $crate::__export!(kv_retention, $policy);
    };
}

/// Exports a [`Sampler`] as a component of world `sampler-policy`.
#[macro_export]
macro_rules! sampler {
    ($policy:ty) => {
        $crate::__export!(sampler, $policy);
    };
}

/// Exports the [`Handover`] of a policy besides its world; a router's or an admission policy's would be refused.
#[macro_export]
macro_rules! handover {
    ($policy:ty) => {
        #[cfg(target_arch = "wasm32")]
        const _: () = {
            type Exported = $crate::Component<$policy>;
    $crate::bindings::handover::export!(Exported with_types_in $crate::bindings::handover);
        };
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __export {
    ($interface:ident, $policy:ty) => {
        #[cfg(target_arch = "wasm32")]
        const _: () = {
            ::std::thread_local! {
                static POLICY: ::std::cell::RefCell<::std::option::Option<$policy>> =
                    const { ::std::cell::RefCell::new(::std::option::Option::None) };
            }

            impl $crate::Instance for $policy {
                fn cell() -> &'static ::std::thread::LocalKey<::std::cell::RefCell<::std::option::Option<Self>>> {
                    &POLICY
                }
            }

            type Exported = $crate::Component<$policy>;
    $crate::bindings::lifecycle::export!(Exported with_types_in $crate::bindings::lifecycle);
    $crate::bindings::$interface::export!(Exported with_types_in $crate::bindings::$interface);
        };
    };
}
