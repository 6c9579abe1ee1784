//! What may be uploaded, and the words that refuse the rest.

mod support;

use pointsman_policy::{Digest, UploadError, World};
use support::{Bench, prebuilt};

#[test]
fn refusals_say_what_to_do() {
    let bench = Bench::new();
    for (name, expect) in [
        ("fixture-foreign", "imports wasi:clocks/monotonic-clock@0.2.0"),
        ("fixture-wrong-version", "this host binds 0.1.x and 0.2.x; rebuild it"),
        ("fixture-wrong-world", "implements none of the worlds"),
        ("fixture-wrong-shape", "rebuild it against this host's wit/policy.wit"),
        ("fixture-bare-core", "core module without a component type"),
    ] {
        let error = bench.runtime.admit(&prebuilt(name)).expect_err(name);
        assert!(error.to_string().contains(expect), "{name}: {error}");
        assert!(!error.is_host_fault() && !error.is_busy(), "{name}");
    }
}

#[test]
fn components_say_what_they_are() {
    let bench = Bench::new();
    for (name, world) in
        [("route-least-loaded", World::Router), ("sched-fcfs", World::Scheduler), ("hook-slo-log", World::Telemetry)]
    {
        let bytes = prebuilt(name);
        let component = bench.admit(name);
        assert_eq!((component.world, &*component.package), (world, "pointsman:policy@0.2.0"), "{name}");
        assert_eq!((component.digest.clone(), component.size), (Digest::of(&bytes), bytes.len() as u64));
        assert!(!component.cached);
        let again = bench.admit(name);
        assert!(again.cached && again.digest == component.digest, "{name}");
        assert!(bench.runtime.load(&component.digest, &bytes).is_ok());
        let damaged = bench.runtime.load(&component.digest, &bytes[1..]);
        assert!(matches!(damaged, Err(UploadError::WrongDigest { .. })), "{damaged:?}");
    }
}

#[test]
fn compiled_code_is_found_again_after_a_restart() {
    let dir = tempfile::tempdir().expect("a directory");
    let bench = || Bench::with(|config| config.cache_dir = Some(dir.path().join("components")));
    assert!(!bench().admit("route-least-loaded").cached);
    assert!(bench().admit("route-least-loaded").cached);
}

#[test]
fn damaged_components_are_refused_and_never_crash() {
    let bench = Bench::new();
    let good = prebuilt("route-least-loaded");
    for (cut, flip) in
        [(9, 0), (100, 0), (good.len() / 2, 0), (good.len() - 1, 0), (good.len(), 40), (good.len(), 5_000)]
    {
        let mut bytes = good[..cut].to_vec();
        if flip > 0 {
            bytes[flip..flip + 8].fill(0xff);
        }
        let error = bench.runtime.admit(&bytes).expect_err("damaged");
        assert!(!error.is_host_fault(), "{cut} {flip}: {error}");
    }
}
