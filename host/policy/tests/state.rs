//! `host-state` as a guest sees it, with a guest written by hand: it counts in the store and picks the row of that number.

mod support;

use pointsman_policy::{Activation, Component, Slot};
use pointsman_sched::route::{Choice, RoutePolicy};
use support::{Bench, replicas, request};
use wit_component::{StringEncoding, embed_component_metadata};

/// Layouts are those of the canonical ABI: `manifest` at 100, the answer of `get` at 200, `choice` at 220.
const COUNTER: &str = r#"(module
  (import "pointsman:policy/host-state@0.1.0" "get" (func $get (param i32 i32 i32)))
  (import "pointsman:policy/host-state@0.1.0" "set" (func $set (param i32 i32 i32 i32 i32)))
  (memory (export "memory") 2)
  (data (i32.const 16) "counter")
  (data (i32.const 32) "1.0.0")
  (data (i32.const 48) "n")
  (global $heap (mut i32) (i32.const 1024))
  (func (export "cabi_realloc") (param i32 i32) (param $align i32) (param $size i32) (result i32)
    (local $at i32)
    (local.set $at (i32.and
      (i32.add (global.get $heap) (i32.sub (local.get $align) (i32.const 1)))
      (i32.sub (i32.const 0) (local.get $align))))
    (global.set $heap (i32.add (local.get $at) (local.get $size)))
    (local.get $at))
  (func (export "pointsman:policy/lifecycle@0.1.0#init")
    (param i32 i32 i32 i32 i64 i32 i32 i32 i32 i32) (result i32)
    (i32.store (i32.const 104) (i32.const 16)) (i32.store (i32.const 108) (i32.const 7))
    (i32.store (i32.const 112) (i32.const 32)) (i32.store (i32.const 116) (i32.const 5))
    (i32.store (i32.const 128) (i32.const SCHEMA))
    (i32.const 100))
  (func (export "pointsman:policy/router@0.1.0#route") (param $arguments i32) (result i32)
    (local $rows i32) (local $n i32)
    (local.set $rows (i32.load offset=116 (local.get $arguments)))
    (global.set $heap (i32.const 1024))
    (call $get (i32.const 48) (i32.const 1) (i32.const 200))
    (if (i32.load8_u (i32.const 200))
      (then (local.set $n (i32.load8_u (i32.load (i32.const 204))))))
    (i32.store8 (i32.const 300) (i32.add (local.get $n) (i32.const 1)))
    (call $set (i32.const 48) (i32.const 1) (i32.const 300) (i32.const 1) (i32.const 240))
    (i32.store8 (i32.const 220) (i32.const 1))
    (i32.store (i32.const 224) (i32.rem_u (local.get $n) (local.get $rows)))
    (i32.const 220)))"#;

fn counter(bench: &Bench, schema: u32) -> Component {
    let text = COUNTER.replace("SCHEMA", &schema.to_string());
    let mut module = wat::parse_str(text).expect("text that assembles");
    let mut resolve = wit_parser::Resolve::default();
    let (package, _) = resolve.push_path("../../wit").expect("a package");
    let world = resolve.select_world(&[package], Some("router-policy")).expect("a world");
    embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8).expect("a module");
    bench.runtime.admit(&module).expect("a component")
}

#[test]
fn state_outlives_swaps_and_belongs_to_a_namespace_and_a_layout() {
    let bench = Bench::new();
    let slot = bench.runtime.router_slot("router");
    let (first, second) = (counter(&bench, 1), counter(&bench, 2));
    let columns = replicas(100, 0);
    let mut generation = 0;
    let mut picks = |component: &Component, namespace: Option<&str>| {
        generation += 1;
        let activation = Activation {
            slot: "router".into(),
            generation,
            config: "{}".into(),
            namespace: namespace.map(str::to_owned),
        };
        let prepared = bench.runtime.prepare(component, activation).expect("a generation");
        slot.publish(prepared).expect("a publish");
        [1, 2, 3].map(|now| slot.route(now, &request(now), &columns).choice)
    };
    let rows = |first: u32| [first, first + 1, first + 2].map(Choice::Pick);
    assert_eq!(picks(&first, None), rows(0), "probes count elsewhere");
    assert_eq!(picks(&first, None), rows(3), "after a swap it goes on");
    assert_eq!(picks(&second, None), rows(0), "another layout");
    assert_eq!(picks(&first, Some("shared")), rows(0), "another namespace");
    assert_eq!(picks(&first, None), rows(6), "what was there is still there");
}
