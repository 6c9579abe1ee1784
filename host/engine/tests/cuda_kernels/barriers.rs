//! The checks can fail: faults planted in kernels are found, and each barrier of the kernels is missed when it is left out.

use std::collections::{BTreeMap, BTreeSet};

use pointsman_engine::cuda::cases;

use crate::case::{Call, Case, Element, Rng, run};
use crate::shim::Shim;

fn rotate(kernel: &str) -> Call {
    Call::new(kernel, [1, 1, 1], 64)
}

#[test]
fn planted_faults_are_found() {
    let Some(mut shim) = Shim::start() else { return };
    let values = Element::F32.random(&mut Rng(1), 128);
    for (kernel, block, n_from, says) in [
        ("some_end_before_the_barrier", 64, 64, "waits for threads that have ended at selftest.cu:29"),
        ("different_barriers", 64, 64, "wait at different barriers"),
        ("half_a_warp_shuffles", 64, 64, "waits for threads that have ended at an operation of the warp"),
        ("reads_past_the_end", 64, 64, "heap-buffer-overflow"),
        ("writes_past_the_end", 64, 65, "heap-buffer-overflow"),
        ("leaves_shared_memory", 64, 64, "heap-buffer-overflow"),
        ("loads_unaligned", 64, 64, "not aligned"),
        ("rotate", 32, 64, "another block size"),
        ("no_such_kernel", 64, 64, "no such kernel"),
    ] {
        let call = Call::new(kernel, [1, 1, 1], block).input(Element::F32, &values[..n_from]).poisoned(64 * 4);
        let Err(said) = run(&call, &mut shim, 1, "") else { panic!("{kernel}: not found") };
        assert!(said.contains(says), "{kernel}: {said}");
        shim = Shim::start().expect("it started before");
    }
    let wrong = run(&rotate("rotate").input(Element::F32, &values[..64]).u32(1), &mut shim, 1, "");
    assert!(wrong.is_err_and(|said| said.contains("another type")));
}

#[test]
fn a_race_shows_under_some_order() {
    let Some(mut shim) = Shim::start() else { return };
    let values = Element::F32.random(&mut Rng(1), 128);
    for (kernel, block, is_sound) in
        [("rotate", 64, true), ("rotate_without_barrier", 64, false), ("copy_without_wait", 32, false)]
    {
        let call = Call::new(kernel, [1, 1, 1], block).input(Element::F32, &values).poisoned(64 * 4);
        let runs = (0..4).map(|seed| run(&call, &mut shim, seed, "").expect("no fault").outs);
        let differ = runs.collect::<BTreeSet<_>>().len() > 1;
        let expect: Vec<f64> = (0..64).map(|i| if i == 63 { values[0] } else { values[i + 1] }).collect();
        let right = Element::F32.encode(&expect);
        let is_right = run(&call, &mut shim, 0, "").expect("no fault").outs[0] == right;
        assert_eq!(is_right && !differ, is_sound, "{kernel}");
    }
}

/// Whether a case fails under some order of threads without one barrier.
fn is_missed(shim: &mut Shim, case: &Case, site: &str) -> bool {
    (0..6).any(|seed| match run(&case.call, shim, seed, site) {
        Ok(done) => (case.check)(&done.outs).is_err(),
        Err(_) => {
            *shim = Shim::start().expect("it started before");
            true
        }
    })
}

#[test]
fn every_barrier_is_missed_when_left_out() {
    let Some(mut shim) = Shim::start() else { return };
    // The plain products are the kernels whose barriers are of their type alone.
    let plain = cases::products::cases(Element::F32).into_iter().chain(cases::quantised::cases(Element::F32));
    let plain = plain.filter(|case| ["gemm ", "gemm_q8 "].iter().any(|name| case.what.starts_with(name)));
    let cases = cases::typed(Element::Bf16).into_iter().chain(plain).chain(cases::untyped());
    let mut missed: BTreeMap<String, bool> = BTreeMap::new();
    for case in cases {
        let done = run(&case.call, &mut shim, 0, "").expect("no fault");
        for site in done.sites {
            let is_settled = missed.get(&site).copied().unwrap_or_default();
            if !is_settled {
                let found = is_missed(&mut shim, &case, &site);
                missed.insert(site, found);
            }
        }
    }
    let idle: Vec<&String> = missed.iter().filter(|(_, found)| !**found).map(|(site, _)| site).collect();
    assert!(missed.len() > 10, "barriers are met: {missed:?}");
    assert!(idle.is_empty(), "nothing notices that these are left out: {idle:?}");
}
