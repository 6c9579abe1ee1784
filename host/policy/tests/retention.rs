//! A retention guest through the trait: rankings, names, swaps, faults.

mod support;

use std::sync::Arc;

use pointsman_policy::{Activation, Compared, FaultKind, Health, RetentionGuest, RetentionSlot, Role, Slot};
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

// === a shadow ===

fn stage_shadow(bench: &Bench, slot: &RetentionSlot, name: &str, config: &str) {
    let activation = Activation { role: Role::Shadow, ..bench.activation("kv-retention", config) };
    slot.stage(bench.runtime.prepare(&bench.admit(name), activation).expect("a generation")).expect("staged");
    slot.shadow(1_000_000).expect("a shadow");
}

/// Blocks that both would give up, blocks that only the active policy would, calls without an answer.
fn tally(bench: &Bench, slot: &RetentionSlot) -> (u64, u64, u64) {
    bench.runtime.maintain();
    let Compared { agreed, differed, unanswered, .. } = slot.compared().expect("a shadow");
    (agreed, differed.iter().map(|(_, n)| n).sum(), unanswered)
}

#[test]
fn a_shadow_beside_the_native_policy_is_shown_the_cache_and_the_hosts_order_holds() {
    let bench = Bench::new();
    let slot = bench.runtime.retention_slot("kv-retention");
    let mut guest = slot.attach(&"demo".into());
    assert_eq!(guest.attend(1), Attention::Native);
    stage_shadow(&bench, &slot, "kv-lru-with-pins", r#"{"tenants": ["tenant-2"]}"#);
    assert_eq!(guest.attend(2), Attention::NeedsView, "names are told anew");
    assert_eq!(rank(&mut guest, 2, &blocks(&[1, 2, 1, 2], &[1, 2])), None);
    assert_eq!(tally(&bench, &slot), (1, 1, 0), "rows 0 and 1 go, and it would have given up 0 and 2");
    assert_eq!(guest.attend(3), Attention::Following);
    assert_eq!(rank(&mut guest, 3, &blocks(&[2, 1, 1], &[])), None);
    assert_eq!(tally(&bench, &slot), (2, 2, 0), "it has met tenant 2");
    assert_eq!(rank(&mut guest, 4, &blocks(&[2, 1], &[])), None);
    assert_eq!(tally(&bench, &slot), (2, 2, 0), "both are wanted: there is nothing to choose");
    slot.shadow(0).expect("staged");
    assert_eq!(guest.attend(5), Attention::Native, "paused");
    slot.shadow(1_000_000).expect("staged");
    assert_eq!(guest.attend(6), Attention::NeedsView);
    assert_eq!(rank(&mut guest, 6, &blocks(&[2, 1, 1], &[2, 1])), None);
    assert_eq!(tally(&bench, &slot), (3, 3, 0));
    assert_eq!(slot.candidate().expect("staged").calls, 4);
    slot.promote().expect("staged");
    assert_eq!(guest.attend(7), Attention::NeedsView);
    bench.runtime.maintain();
    assert_eq!((slot.status().draining, slot.status().instances), (0, 2), "no instance is lost");
    assert_eq!(rank(&mut guest, 7, &blocks(&[2, 1], &[1, 2])), Some(Ranking { evict: vec![], keep: vec![0] }));
}

#[test]
fn a_shadow_of_a_policy_agrees_where_it_does_the_same() {
    for (config, expect) in [(r#"{"min_hits": 1}"#, (8, 0, 0)), (r#"{"min_hits": 3}"#, (4, 4, 0))] {
        let bench = Bench::new();
        let slot = bench.runtime.retention_slot("kv-retention");
        let mut guest = slot.attach(&"demo".into());
        let component = bench.admit("kv-lru-with-pins");
        slot.publish(bench.prepare(&component, "kv-retention", r#"{"min_hits": 1}"#)).expect("a publish");
        stage_shadow(&bench, &slot, "kv-lru-with-pins", config);
        assert_eq!(guest.attend(1), Attention::NeedsView);
        for now in 1..=4 {
            // Found as often as their number says: the first one goes either way, the second is kept by `min_hits` 1.
            let cached = BlockColumns { hits: vec![0, 1, 2, 0], ..blocks(&[1; 4], if now == 1 { &[1] } else { &[] }) };
            assert_eq!(rank(&mut guest, now, &cached), Some(Ranking { evict: vec![], keep: vec![1, 2] }), "{config}");
        }
        assert_eq!(tally(&bench, &slot), expect, "{config}");
        assert_eq!((slot.status().calls, slot.status().fallbacks), (4, 0), "{config}");
    }
}

#[test]
fn a_shadow_of_the_cache_that_misbehaves_is_off_at_its_third_fault() {
    for deed in ["trap", "bad-row", "duplicate-row"] {
        let bench = Bench::new();
        let slot = bench.runtime.retention_slot("kv-retention");
        let mut guest = slot.attach(&Arc::from("demo"));
        stage_shadow(&bench, &slot, "fixture-retention", &format!(r#"{{"do": "{deed}", "after": {PROBED}}}"#));
        guest.attend(bench.now());
        for turn in 0..200 {
            assert_eq!(rank(&mut guest, bench.now(), &blocks(&[1; 4], if turn == 0 { &[1] } else { &[] })), None);
            bench.advance(SECOND / 10);
        }
        let (active, shadow) = (slot.status(), slot.candidate().expect("staged"));
        assert_eq!((shadow.faults.iter().sum::<u64>(), shadow.fallbacks), (3, 0), "{deed}");
        assert!(matches!(shadow.health, Health::Open { .. }), "{deed}");
        assert_eq!((active.health, active.fallbacks), (Health::Closed, 0), "{deed}");
        drop(guest);
        slot.unstage().expect("staged");
        bench.advance(8 * SECOND);
        assert_eq!((slot.status().draining, slot.compared()), (0, None), "{deed}: nothing is left");
    }
}
