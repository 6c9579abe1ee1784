//! When a retention policy is asked, and what its answer changes: the hit rate, and never who gets memory.

use std::sync::{Arc, Mutex};

use crate::batch::{Attention, NativeBatch};
use crate::config::Config;
use crate::request::Request;
use crate::retention::BadRanking;

use super::model::{self, Host, Librarian, Shelf, reference};
use super::{CONFIG, request};

/// A request of another tenant, with a prompt of its own.
fn of_tenant(tenant: u32, id: u64, n_prompt: u32) -> Request {
    Request { tenant, tenant_name: format!("tenant-{tenant}").into(), ..request(id, n_prompt, 1) }
}

fn host(shelf: Shelf) -> (Host, Arc<Mutex<Shelf>>) {
    let shelf = Arc::new(Mutex::new(shelf));
    let mut host = Host::new(CONFIG);
    host.retention = Box::new(Librarian(Arc::clone(&shelf)));
    (host, shelf)
}

fn run(host: &mut Host, request: Request) {
    host.now += 100;
    host.submit(request);
    host.run_until_idle(&mut NativeBatch);
}

/// Prompt tokens that were found in the cache, of a prompt of tenant 1 after a flood of others'.
fn hits_after_a_flood(host: &mut Host) -> u64 {
    run(host, of_tenant(1, 1, 17));
    for id in 2..12 {
        run(host, of_tenant(2, id, 17));
    }
    host.scheduler.take_counters();
    let again = Request { prompt: request(1, 17, 1).prompt, ..of_tenant(1, 99, 17) };
    let again = model::request(99, again.prompt.to_vec(), 1, CONFIG.block_tokens);
    let expect = reference(&again);
    run(host, again);
    assert_eq!(host.tokens(99), expect);
    host.scheduler.take_counters().prefix_hit_tokens
}

#[test]
fn what_is_kept_survives_a_flood() {
    for (keep, evict, expect) in [(None, None, 0), (Some(1), None, 16), (None, Some(2), 16), (Some(2), None, 0)] {
        let (mut host, shelf) = host(Shelf { keep, evict, ..Shelf::default() });
        assert_eq!(hits_after_a_flood(&mut host), expect, "keep {keep:?}, evict {evict:?}");
        assert!(!shelf.lock().expect("one thread").calls.is_empty());
    }
    assert_eq!(hits_after_a_flood(&mut Host::new(CONFIG)), 0, "the native order");
}

#[test]
fn it_is_asked_once_per_share_of_the_pool() {
    let (mut host, shelf) = host(Shelf { keep: Some(1), ..Shelf::default() });
    let calls = || std::mem::take(&mut shelf.lock().expect("one thread").calls);
    // 16 blocks; each prompt of 4 blocks leaves them cached.
    for id in 1..=3 {
        run(&mut host, of_tenant(u32::try_from(id % 2).expect("small"), id, 16));
        assert_eq!(calls(), [], "there are free blocks");
    }
    run(&mut host, of_tenant(3, 4, 16));
    assert_eq!(calls(), [(2, 12, vec![1, 0])], "none is free while it runs");
    // Before a request gets its blocks, for as many as it takes; and again when they are gone, for the usual share.
    run(&mut host, of_tenant(1, 5, 16));
    assert_eq!(calls(), [(4, 16, vec![3]), (2, 12, vec![])]);
    // A request that does not fit yet is no reason to ask again and again.
    host.submit(Request { max_new_tokens: 8, ..of_tenant(2, 6, 40) });
    host.step(&mut NativeBatch);
    host.submit(of_tenant(2, 7, 36));
    for _ in 0..6 {
        host.step(&mut NativeBatch);
    }
    assert_eq!(calls().len(), 3, "for the first, for the second, and for what the first grows by");
    host.run_until_idle(&mut NativeBatch);
    // A policy that starts anew knows no names and has no ranking.
    calls();
    shelf.lock().expect("one thread").attention = Some(Attention::NeedsView);
    host.submit(of_tenant(1, 8, 16));
    host.step(&mut NativeBatch);
    shelf.lock().expect("one thread").attention = None;
    host.run_until_idle(&mut NativeBatch);
    assert!(!calls()[0].2.is_empty());
}

#[test]
fn a_bad_ranking_is_no_ranking() {
    let (mut host, shelf) = host(Shelf { keep: Some(1), spoil: true, ..Shelf::default() });
    assert_eq!(hits_after_a_flood(&mut host), 0);
    let shelf = shelf.lock().expect("one thread");
    assert_eq!(shelf.refused.len(), shelf.calls.len());
    assert!(matches!(shelf.refused[0], BadRanking::OutOfRange { .. }));
}

#[test]
fn a_policy_that_goes_leaves_no_order_behind() {
    let (mut host, shelf) = host(Shelf { keep: Some(1), ..Shelf::default() });
    run(&mut host, of_tenant(1, 1, 17));
    for id in 2..6 {
        run(&mut host, of_tenant(2, id, 17));
    }
    shelf.lock().expect("one thread").attention = Some(Attention::Native);
    for id in 6..12 {
        run(&mut host, of_tenant(2, id, 17));
    }
    host.scheduler.take_counters();
    run(&mut host, Request { id: crate::ids::RequestId(99), ..of_tenant(1, 1, 17) });
    assert_eq!(host.scheduler.take_counters().prefix_hit_tokens, 0);
}

#[test]
fn nothing_is_kept_against_a_request() {
    let (mut host, shelf) = host(Shelf { keep: Some(1), ..Shelf::default() });
    // Everything that is cached is tenant 1's, and kept; a request of tenant 2 needs the whole pool.
    for id in 1..5 {
        run(&mut host, of_tenant(1, id, 16));
    }
    run(&mut host, of_tenant(1, 5, 4));
    let config = Config { ..CONFIG };
    let whole = config.n_blocks * config.block_tokens;
    run(&mut host, of_tenant(2, 6, whole - 1));
    assert_eq!(host.tokens(6), reference(&of_tenant(2, 6, whole - 1)));
    assert!(!shelf.lock().expect("one thread").calls.is_empty());
    assert_eq!(host.scheduler.block_counts().held, 0);
}
