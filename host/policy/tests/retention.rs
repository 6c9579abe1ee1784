//! A retention guest through the trait: rankings, names, swaps, faults.

mod support;

use pointsman_policy::{FaultKind, Health, RetentionGuest, Slot};
use pointsman_sched::batch::Attention;
use pointsman_sched::retention::{BadRanking, BlockColumns, Ranking, RetentionPolicy};
use support::{Bench, MISDEEDS, SECOND};

/// More calls than a probe and a warm-up make.
const PROBED: u64 = 8;

/// Blocks of these tenants, with the names of those in `named`.
fn blocks(tenants: &[u32], named: &[u32]) -> BlockColumns {
    let n = u32::try_from(tenants.len()).expect("few rows");
    BlockColumns {
        prefix: (1..=u64::from(n)).collect(),
        depth: vec![0; tenants.len()],
        children: vec![0; tenants.len()],
        last_used: (1..=u64::from(n)).collect(),
        created: vec![1; tenants.len()],
        hits: (0..n).collect(),
        tenant: tenants.to_vec(),
        new_tenants: named.iter().map(|&tenant| (tenant, format!("tenant-{tenant}").into())).collect(),
    }
}

fn rank(guest: &mut RetentionGuest, now: u64, blocks: &BlockColumns) -> Option<Ranking> {
    let mut ranking = Ranking::default();
    guest.rank(now, 2, blocks, &mut ranking).then_some(ranking)
}

#[test]
fn a_guest_ranks_and_a_swap_starts_from_names() {
    let bench = Bench::new();
    let slot = bench.runtime.retention_slot("kv-retention");
    let mut guest = slot.attach(&"demo:f16@cpu".into());
    assert_eq!(guest.attend(1), Attention::Native);
    let component = bench.admit("kv-lru-with-pins");
    slot.publish(bench.prepare(&component, "kv-retention", r#"{"tenants": ["tenant-2"]}"#)).expect("a publish");
    assert_eq!(guest.attend(2), Attention::NeedsView);
    let keep = |rows: &[u32]| Some(Ranking { evict: Vec::new(), keep: rows.to_vec() });
    assert_eq!(rank(&mut guest, 2, &blocks(&[1, 2, 1, 2], &[1, 2])), keep(&[1, 3]));
    assert_eq!(guest.attend(3), Attention::Following);
    assert_eq!(rank(&mut guest, 3, &blocks(&[2, 1], &[])), keep(&[0]), "it has met tenant 2");
    assert_eq!(rank(&mut guest, 4, &blocks(&[1, 3], &[3])), None, "nothing is pinned: the host's order");
    slot.publish(bench.prepare(&component, "kv-retention", r#"{"min_hits": 2}"#)).expect("a publish");
    assert_eq!(guest.attend(5), Attention::NeedsView);
    assert_eq!(rank(&mut guest, 5, &blocks(&[1, 1, 1, 1], &[1])), keep(&[2, 3]));
    bench.runtime.maintain();
    assert_eq!((slot.status().draining, slot.status().fallbacks), (0, 0));
    slot.publish_native(3).expect("a publish");
    assert_eq!(guest.attend(6), Attention::Native);
}

#[test]
fn misdeeds_become_faults_and_the_hosts_order_holds() {
    for (deed, kind) in MISDEEDS.into_iter().chain([("huge-list", FaultKind::BadAnswer)]) {
        let bench = Bench::for_fault(kind, |budgets| &mut budgets.rank);
        let slot = bench.runtime.retention_slot("kv-retention");
        let mut guest = slot.attach(&"demo".into());
        let component = bench.admit("fixture-retention");
        let config = format!(r#"{{"do": "{deed}", "after": {PROBED}}}"#);
        slot.publish(bench.prepare(&component, "kv-retention", &config)).expect("a publish");
        assert_eq!(guest.attend(bench.now()), Attention::NeedsView);
        let mut good = 0;
        while rank(&mut guest, bench.now(), &blocks(&[1, 1], &[1])).is_some() {
            good += 1;
            assert!(good <= PROBED, "{deed} never misbehaves");
        }
        let status = slot.status();
        assert_eq!((status.faults[kind as usize], status.fallbacks), (1, 1), "{deed}: {status:?}");
        assert_eq!(guest.attend(bench.now()), Attention::NeedsView, "{deed}: the spare");
        assert!(rank(&mut guest, bench.now(), &blocks(&[1], &[1])).is_some(), "{deed}");
        bench.advance(SECOND);
        assert_eq!(slot.status().instances, 2, "{deed}: replaced after a second");
    }
}

#[test]
fn a_refused_ranking_is_a_fault() {
    let bench = Bench::new();
    let slot = bench.runtime.retention_slot("kv-retention");
    let mut guest = slot.attach(&"demo".into());
    let component = bench.admit("kv-lru-with-pins");
    slot.publish(bench.prepare(&component, "kv-retention", "{}")).expect("a publish");
    guest.attend(bench.now());
    rank(&mut guest, bench.now(), &blocks(&[1], &[1]));
    guest.refused(bench.now(), BadRanking::Duplicate(7));
    let status = slot.status();
    assert_eq!(status.faults[FaultKind::BadAnswer as usize], 1);
    let last = status.last_fault.expect("a fault");
    assert!(last.message.contains("demo: the ranking names row 7 twice"), "{}", last.message);
    assert_eq!(guest.attend(bench.now()), Attention::NeedsView, "another instance");
}

#[test]
fn the_trial_is_for_the_replica_that_has_something_to_rank() {
    let bench = Bench::new();
    let slot = bench.runtime.retention_slot("kv-retention");
    let (mut idle, mut busy) = (slot.attach(&"idle".into()), slot.attach(&"busy".into()));
    let component = bench.admit("kv-lru-with-pins");
    slot.publish(bench.prepare(&component, "kv-retention", r#"{"min_hits": 1}"#)).expect("a publish");
    for _ in 0..3 {
        busy.attend(bench.now());
        rank(&mut busy, bench.now(), &blocks(&[1, 1], &[1]));
        busy.refused(bench.now(), BadRanking::Duplicate(7));
        bench.advance(8 * SECOND);
    }
    assert!(matches!(slot.status().health, Health::Open { .. }));
    for _ in 0..3 {
        assert_eq!(idle.attend(bench.now()), Attention::NeedsView, "it could be asked");
    }
    assert_eq!(busy.attend(bench.now()), Attention::NeedsView, "the trial is free");
    assert!(rank(&mut busy, bench.now(), &blocks(&[1, 1], &[1])).is_some());
    assert_eq!(slot.status().health, Health::Closed);
}

#[test]
fn a_bad_answer_to_made_up_inputs_refuses_the_activation() {
    let bench = Bench::new();
    for (deed, expect) in [("bad-row", "names row"), ("duplicate-row", "twice"), ("trap", "a trap, as configured")] {
        let component = bench.admit("fixture-retention");
        let activation = bench.activation("kv-retention", &format!(r#"{{"do": "{deed}"}}"#));
        let error = bench.runtime.prepare(&component, activation).expect_err(deed).to_string();
        assert!(error.contains("failed the probe") && error.contains("in rank"), "{error}");
        assert!(deed == "trap" || error.contains(expect), "{error}");
    }
}
