//! A sampler guest through its port: words, takeovers, faults. The guest runs on its own thread, so every test asks and waits;
//! what it waits for always comes.

mod support;

use std::sync::Arc;

use pointsman_policy::{
    Activation, Compared, FaultKind, Health, Maintenance, OnFault, Role, SampledReplica, SamplerPort, SamplerSlot, Slot,
};
use pointsman_sched::ids::RequestId;
use pointsman_sched::sampler::{Batch, Chosen, Edit, Overheard, Reply, SamplerWorker, Started, Word};
use support::{Bench, MISDEEDS, SECOND};

/// More calls than a probe and a warm-up make.
const PROBED: u64 = 12;

fn replica() -> SampledReplica {
    SampledReplica { name: "demo:f16@cpu".into(), variant: "demo:f16".into(), vocabulary: 100 }
}

fn started(id: u64, tenant: &str) -> Started {
    Started {
        id: RequestId(id),
        tenant: tenant.into(),
        stop_tokens: Arc::from([2]),
        prompt_tokens: 5,
        max_new_tokens: 10,
        attributes: Arc::default(),
        said: Vec::new(),
    }
}

fn batch(started: Vec<Started>, tokens: &[(u64, u32)], ended: &[u64]) -> Batch {
    Batch {
        now: 1,
        started,
        tokens: tokens.iter().map(|&(id, token)| (RequestId(id), token)).collect(),
        ended: ended.iter().map(|&id| RequestId(id)).collect(),
        fresh: false,
    }
}

/// Hands a batch over and waits for the reply, however long the thread is kept from its work.
fn ask(port: &mut SamplerPort, batch: Batch) -> Reply {
    port.send(batch).expect("its hands are free");
    (0..10_000).find_map(|_| port.wait()).expect("every batch is answered")
}

fn allow(tokens: &[u32]) -> Word {
    Word::Edit(Arc::new(Edit::Allow(tokens.into())))
}

fn words(words: &[(RequestId, Word)]) -> Vec<(u64, Word)> {
    words.iter().map(|(id, word)| (id.0, word.clone())).collect()
}

/// A slot whose guest traps after some calls, and its port.
fn trapping(bench: &Bench, on_fault: OnFault) -> (Arc<SamplerSlot>, SamplerPort) {
    let slot = bench.runtime.sampler_slot("sampler");
    let mut port = slot.attach(replica()).expect("a thread");
    let config = format!(r#"{{"do": "trap", "after": {PROBED}}}"#);
    let activation = Activation { on_fault, ..bench.activation("sampler", &config) };
    let prepared = bench.runtime.prepare(&bench.admit("fixture-sampler"), activation).expect("a generation");
    slot.publish(prepared).expect("a publish");
    assert!(port.attend(bench.now()).is_some());
    (slot, port)
}

#[test]
fn a_guest_masks_and_its_successor_takes_over() {
    let bench = Bench::new();
    let slot = bench.runtime.sampler_slot("sampler");
    let mut port = slot.attach(replica()).expect("a thread");
    assert_eq!(port.attend(1), None, "native");
    let component = bench.admit("sampler-allowlist");
    let config = r#"{"allow": [7, 5], "tenants": {"free": []}}"#;
    slot.publish(bench.prepare(&component, "sampler", config)).expect("a publish");
    assert_eq!(port.attend(2), Some(1));
    let start = vec![started(1, "acme"), started(2, "free"), started(3, "acme")];
    let reply = ask(&mut port, batch(start, &[], &[]));
    assert_eq!(words(&reply.words), [(1, allow(&[2, 5, 7])), (2, Word::Leave), (3, allow(&[2, 5, 7]))]);
    assert!(reply.renewed.is_empty());
    // One token is of a request that the guest has left.
    let reply = ask(&mut port, batch(Vec::new(), &[(1, 5), (2, 9)], &[3]));
    assert_eq!(words(&reply.words), [(2, Word::Leave), (1, Word::Keep)]);
    // The next generation is told of request 1 alone, and what it wants holds before anything else.
    slot.publish(bench.prepare(&component, "sampler", r#"{"allow": [9]}"#)).expect("a publish");
    assert_eq!(port.attend(3), Some(2));
    let reply = ask(&mut port, batch(vec![started(4, "acme")], &[(1, 5)], &[]));
    assert_eq!(words(&reply.renewed), [(1, allow(&[2, 9]))]);
    assert_eq!(words(&reply.words), [(4, allow(&[2, 9])), (1, Word::Keep)]);
    bench.runtime.maintain();
    let status = slot.status();
    assert_eq!((status.draining, status.fallbacks, status.faults.iter().sum::<u64>()), (0, 0, 0));
    slot.publish_native(3).expect("a publish");
    assert_eq!(port.attend(4), None);
    // Answered after the thread has looked: it has left the generation, and everybody.
    let reply = ask(&mut port, batch(Vec::new(), &[(1, 5)], &[]));
    assert_eq!(words(&reply.words), [(1, Word::Leave)]);
    bench.runtime.maintain();
    assert_eq!(slot.status().draining, 0);
}

#[test]
fn a_guest_is_told_what_ran_before_it() {
    let bench = Bench::new();
    let slot = bench.runtime.sampler_slot("sampler");
    let mut port = slot.attach(replica()).expect("a thread");
    let component = bench.admit("sampler-allowlist");
    slot.publish(bench.prepare(&component, "sampler", r#"{"allow": [7]}"#)).expect("a publish");
    assert_eq!(port.attend(1), Some(1));
    let running = Started { said: vec![40, 41, 42], ..started(1, "acme") };
    let reply = ask(&mut port, batch(vec![running, started(2, "acme")], &[], &[]));
    assert_eq!(words(&reply.words), [(1, allow(&[2, 7])), (2, allow(&[2, 7]))]);
    assert_eq!(slot.status().calls, 1 + 3, "the start, and three tokens");
    assert_eq!(reply.decided_by.map(|by| by.generation), Some(1));
}

#[test]
fn a_start_that_faults_is_put_to_the_spare_at_once() {
    let bench = Bench::with(|config| config.budgets.edit.hard = 2_000_000);
    let (slot, mut port) = trapping(&bench, OnFault::Open);
    for id in 1..=2 * PROBED {
        let reply = ask(&mut port, batch(vec![started(id, "acme")], &[], &[]));
        if words(&reply.words) == [(id, Word::Free)] {
            continue;
        }
        let all: Vec<(u64, Word)> = (1..=id).map(|id| (id, Word::Free)).collect();
        assert_eq!((words(&reply.words), words(&reply.renewed)), (vec![(id, Word::Keep)], all));
        assert_eq!(slot.status().faults[FaultKind::Trap as usize], 1);
        return;
    }
    panic!("it never traps");
}

#[test]
fn misdeeds_become_faults_and_edits_stay() {
    let answers = ["uneven-lists", "unknown-token", "allow-nothing", "infinite-bias"];
    for (deed, kind) in MISDEEDS.into_iter().chain(answers.map(|deed| (deed, FaultKind::BadAnswer))) {
        let bench = Bench::for_fault(kind, |budgets| &mut budgets.edit);
        let slot = bench.runtime.sampler_slot("sampler");
        let mut port = slot.attach(replica()).expect("a thread");
        let component = bench.admit("fixture-sampler");
        let config = format!(r#"{{"do": "{deed}", "after": {PROBED}}}"#);
        slot.publish(bench.prepare(&component, "sampler", &config)).expect("a publish");
        assert_eq!(port.attend(bench.now()), Some(1));
        let reply = ask(&mut port, batch(vec![started(1, "acme")], &[], &[]));
        assert_eq!(words(&reply.words), [(1, Word::Free)], "{deed}");
        let mut good = 0;
        while words(&ask(&mut port, batch(Vec::new(), &[(1, 5)], &[])).words) == [(1, Word::Free)] {
            good += 1;
            assert!(good <= PROBED, "{deed} never misbehaves");
        }
        // The spare was told of the request and of all its tokens at once, and behaved no better.
        let status = slot.status();
        assert_eq!((status.faults[kind as usize], status.fallbacks), (2, 2), "{deed}: {status:?}");
        let reply = ask(&mut port, batch(Vec::new(), &[(1, 6)], &[]));
        assert_eq!((words(&reply.words), words(&reply.renewed)), (vec![(1, Word::Keep)], vec![]), "{deed}");
        bench.advance(60 * SECOND);
        assert_eq!(slot.status().instances, 2, "{deed}: replaced after a while");
    }
}

/// Calls of their predecessors that the instances so far were told of, together.
fn inherited(bench: &Bench) -> u64 {
    let text = bench.metrics.render();
    let line = text.lines().find(|line| line.starts_with("pointsman_plugin_inherited{"));
    line.and_then(|line| line.rsplit(' ').next()).and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[test]
fn what_it_has_learned_outlives_safe_mode() {
    let bench = Bench::with(|config| config.maintenance = Maintenance::Thread);
    let slot = bench.runtime.sampler_slot("sampler");
    let mut port = slot.attach(replica()).expect("a thread");
    let component = bench.admit("fixture-sampler");
    slot.publish(bench.prepare(&component, "sampler", "{}")).expect("a publish");
    port.attend(1);
    for id in 1..=3 {
        assert_eq!(words(&ask(&mut port, batch(vec![started(id, "acme")], &[], &[])).words), [(id, Word::Free)]);
    }
    bench.runtime.bypass(true);
    assert_eq!(port.attend(1), None);
    ask(&mut port, batch(Vec::new(), &[(1, 5)], &[]));
    bench.runtime.bypass(false);
    assert_eq!(port.attend(1), Some(1));
    let reply = ask(&mut port, Batch { fresh: true, ..batch(vec![started(4, "acme")], &[], &[]) });
    assert_eq!(
        (words(&reply.words), words(&reply.renewed)),
        (vec![(4, Word::Free)], vec![]),
        "of the others it is told no more"
    );
    std::thread::scope(|scope| {
        let preparing = scope.spawn(|| bench.prepare(&component, "sampler", "{}"));
        while !preparing.is_finished() {
            port.attend(1);
            std::thread::yield_now();
        }
        let handed = preparing.join().expect("no panic").inherited.expect("it exports handover");
        assert_eq!((handed.restored, handed.cold.len()), (1, 0), "{handed:?}");
    });
    // The warm-up, three starts before and one after.
    assert_eq!(inherited(&bench), 1 + 3 + 1);
    assert_eq!(slot.status().faults, [0; 5]);
}

#[test]
fn without_a_word_a_request_goes_on_or_ends_as_the_slot_says() {
    for (on_fault, expect) in [(OnFault::Open, Word::Keep), (OnFault::Closed, Word::End)] {
        let bench = Bench::with(|config| config.budgets.edit.hard = 2_000_000);
        let (slot, mut port) = trapping(&bench, on_fault);
        let reply = ask(&mut port, batch(vec![started(1, "acme")], &[], &[]));
        assert_eq!(words(&reply.words), [(1, Word::Free)]);
        let last = (0..2 * PROBED).find_map(|_| {
            let said = words(&ask(&mut port, batch(Vec::new(), &[(1, 5)], &[])).words);
            (said != [(1, Word::Free)]).then_some(said)
        });
        assert_eq!(last, Some(vec![(1, expect.clone())]), "the first one and the spare have failed it");
        let reply = ask(&mut port, batch(vec![started(2, "acme")], &[(1, 6)], &[]));
        assert_eq!(words(&reply.words), [(2, expect.clone()), (1, expect)], "there is nobody to ask");
        assert!(reply.renewed.is_empty(), "{on_fault:?}");
        // Back to native everybody is free, whatever was said before.
        slot.publish_native(9).expect("a publish");
        assert_eq!(port.attend(2), None, "{on_fault:?}");
    }
}

#[test]
fn a_panic_of_the_host_costs_the_words_of_its_batch() {
    for (on_fault, expect) in [(OnFault::Open, Word::Leave), (OnFault::Closed, Word::End)] {
        let bench = Bench::with(|config| {
            config.budgets.edit.hard = 2_000_000;
            // It listens on the sampler's thread, in the middle of a batch.
            config.on_fault = Some(Arc::new(|report| panic!("a fault of the host, not of {}", report.revision)));
        });
        let (slot, mut port) = trapping(&bench, on_fault);
        let reply = ask(&mut port, batch(vec![started(1, "acme"), started(2, "acme")], &[], &[]));
        assert_eq!(words(&reply.words), [(1, Word::Free), (2, Word::Free)]);
        let last = (0..2 * PROBED).find_map(|_| {
            let reply = ask(&mut port, batch(vec![], &[(1, 5)], &[]));
            (words(&reply.words) != [(1, Word::Free)]).then_some(reply)
        });
        let last = last.expect("it traps");
        assert_eq!((words(&last.words), last.spent.tokens.len()), (vec![(1, expect.clone())], 1), "{on_fault:?}");
        // The thread goes on with the spare, which is told of whoever was not at hand.
        assert!(port.attend(bench.now()).is_some());
        let reply = ask(&mut port, batch(vec![started(3, "acme")], &[(1, 6)], &[]));
        assert_eq!(words(&reply.renewed), [(2, Word::Free)], "{on_fault:?}");
        assert_eq!(words(&reply.words), [(3, Word::Free), (1, Word::Leave)], "{on_fault:?}");
        bench.runtime.maintain();
        assert_eq!(slot.status().fallbacks, 1, "{on_fault:?}");
    }
}

#[test]
fn a_slot_that_refuses_lets_nobody_go_on_until_something_is_published() {
    let bench = Bench::new();
    let slot = bench.runtime.sampler_slot("sampler");
    let mut early = slot.attach(replica()).expect("a thread");
    let refused = |port: &mut SamplerPort, id| {
        assert_eq!(port.attend(1), Some(0), "there is something to ask");
        let reply = ask(port, batch(vec![started(id, "acme")], &[], &[id]));
        assert_eq!((words(&reply.words), reply.decided_by), (vec![(id, Word::End)], None));
    };
    assert_eq!((early.attend(1), slot.refuses()), (None, false));
    slot.refuse();
    let mut late = slot.attach(replica()).expect("a thread");
    refused(&mut early, 1);
    refused(&mut late, 1);
    bench.runtime.bypass(true);
    assert_eq!((early.attend(1), slot.refuses()), (None, false), "safe mode");
    bench.runtime.bypass(false);
    assert!(slot.refuses());
    refused(&mut late, 2);
    slot.publish(bench.prepare(&bench.admit("sampler-allowlist"), "sampler", r#"{"allow": [7]}"#)).expect("a publish");
    assert_eq!((early.attend(2), slot.refuses()), (Some(1), false));
    let reply = ask(&mut early, batch(vec![started(3, "acme")], &[], &[]));
    assert_eq!(words(&reply.words), [(3, allow(&[2, 7]))]);
    slot.refuse();
    slot.publish_native(2).expect("a publish");
    assert_eq!((early.attend(3), slot.refuses()), (None, false));
    late.attend(3);
    bench.runtime.maintain();
    drop((early, late));
}

#[test]
fn only_a_sampler_can_be_told_to_fail_closed() {
    let bench = Bench::new();
    let activation = Activation { on_fault: OnFault::Closed, ..bench.activation("router", "{}") };
    let refused = bench.runtime.prepare(&bench.admit("route-least-loaded"), activation).expect_err("refused");
    assert!(refused.to_string().contains("`on_fault`: `closed` is for the slot sampler"), "{refused}");
}

#[test]
fn a_bad_answer_to_made_up_inputs_refuses_the_activation() {
    let bench = Bench::new();
    let component = bench.admit("fixture-sampler");
    for (deed, expect) in [
        ("uneven-lists", "3 edits for 2 requests"),
        ("unknown-token", "is not in the vocabulary"),
        ("allow-nothing", "`allow` names no token"),
        ("infinite-bias", "must be finite"),
    ] {
        let activation = bench.activation("sampler", &format!(r#"{{"do": "{deed}"}}"#));
        let error = bench.runtime.prepare(&component, activation).expect_err(deed).to_string();
        assert!(error.contains("failed the probe") && error.contains(expect), "{error}");
    }
}

// === a shadow ===

fn stage_shadow(bench: &Bench, slot: &SamplerSlot, name: &str, config: &str) {
    let activation = Activation { role: Role::Shadow, ..bench.activation("sampler", config) };
    slot.stage(bench.runtime.prepare(&bench.admit(name), activation).expect("a generation")).expect("staged");
    slot.shadow(1_000_000).expect("a shadow");
}

/// A step: requests that start, tokens with the edits that held for them, requests that end.
fn step(started: Vec<Started>, chosen: &[(u64, u32, Option<&[u32]>)], ended: &[u64]) -> Overheard {
    let allow = |tokens: &[u32]| Arc::new(Edit::Allow(tokens.into()));
    let one = |&(id, token, edit): &(u64, u32, Option<&[u32]>)| Chosen {
        request: RequestId(id),
        token,
        edit: edit.map(allow),
    };
    let chosen = chosen.iter().map(one).collect();
    Overheard { now: 1, started, chosen, ended: ended.iter().map(|&id| RequestId(id)).collect() }
}

/// Agreed, the kinds of difference, unanswered, dropped: each in tokens.
fn tally(bench: &Bench, slot: &SamplerSlot) -> (u64, [u64; 3], u64, u64) {
    bench.runtime.maintain();
    let Compared { agreed, differed, unanswered, dropped, .. } = slot.compared().expect("a shadow");
    let [(_, would_edit), (_, would_free), (_, other_edit)] = differed[..] else { panic!("{differed:?}") };
    (agreed, [would_edit, would_free, other_edit], unanswered, dropped)
}

#[test]
fn a_shadow_follows_requests_from_their_start_beside_the_native_policy() {
    let bench = Bench::new();
    let slot = bench.runtime.sampler_slot("sampler");
    let mut port = slot.attach(replica()).expect("a thread");
    assert!(!port.follows(RequestId(1)));
    stage_shadow(&bench, &slot, "sampler-allowlist", r#"{"allow": [7, 5], "tenants": {"free": []}}"#);
    assert_eq!(port.attend(1), None, "nobody waits for it");
    assert!(port.follows(RequestId(1)));
    let start = vec![started(1, "acme"), started(2, "free")];
    // Request 9 ran before.
    assert!(port.overhear(step(start, &[(1, 5, None), (2, 9, None), (9, 9, None)], &[])));
    assert_eq!(tally(&bench, &slot), (1, [1, 0, 0], 0, 0), "it would limit the first, and leaves the second");
    assert!(port.overhear(step(Vec::new(), &[(1, 7, Some(&[2, 5, 7])), (2, 9, Some(&[9]))], &[])));
    assert!(port.overhear(step(Vec::new(), &[(1, 2, Some(&[2])), (2, 9, None)], &[1, 2])));
    assert_eq!(tally(&bench, &slot), (3, [1, 1, 1], 0, 0), "compared is what holds, not what is said");
    assert_eq!(
        slot.candidate().expect("staged").calls,
        1 + 2 + 1,
        "a start, two tokens and an end, of the first alone"
    );
    slot.promote().expect("staged");
    assert_eq!(port.attend(2), Some(1), "its instance is there");
    let reply = ask(&mut port, batch(vec![started(3, "acme")], &[], &[]));
    assert_eq!(words(&reply.words), [(3, allow(&[2, 5, 7]))]);
    bench.runtime.maintain();
    assert_eq!((slot.status().draining, slot.status().instances, slot.compared()), (0, 2, None));
}

#[test]
fn a_shadow_that_is_behind_or_paused_follows_no_request_by_half() {
    let bench = Bench::new();
    let slot = bench.runtime.sampler_slot("sampler");
    let mut port = slot.attach(replica()).expect("a thread");
    stage_shadow(&bench, &slot, "sampler-allowlist", r#"{"allow": [7]}"#);
    assert!(port.overhear(step(vec![started(1, "acme")], &[], &[])));
    let token = || step(Vec::new(), &[(1, 7, Some(&[2, 7]))], &[]);
    let taken = (0..300).take_while(|_| port.overhear(token())).count();
    assert_eq!(taken, 255, "256 steps wait, the first of them the start");
    assert!(!port.follows(RequestId(2)), "it begins with no other one while it is behind");
    assert_eq!(tally(&bench, &slot), (255, [0; 3], 0, 1));
    assert!(port.follows(RequestId(2)) && port.overhear(step(vec![started(2, "acme")], &[(1, 7, None)], &[])));
    assert!(port.overhear(step(Vec::new(), &[(2, 7, Some(&[2, 7]))], &[])));
    assert_eq!(tally(&bench, &slot), (256, [0; 3], 0, 1), "the first is followed no further");
    slot.shadow(0).expect("staged");
    assert!(!port.follows(RequestId(3)) && !port.overhear(token()), "paused");
    slot.shadow(1_000_000).expect("staged");
    assert!(port.overhear(step(vec![started(4, "acme")], &[(2, 7, None), (4, 7, Some(&[2, 7]))], &[4])));
    assert_eq!(tally(&bench, &slot), (257, [0; 3], 0, 1), "nor the second");
    assert_eq!(slot.candidate().expect("staged").faults, [0; 5]);
}

#[test]
fn long_edits_take_more_room_once() {
    let bench = Bench::new();
    let slot = bench.runtime.sampler_slot("sampler");
    let mut port = slot.attach(replica()).expect("a thread");
    stage_shadow(&bench, &slot, "sampler-allowlist", "{}");
    assert!(port.overhear(step(vec![started(1, "acme")], &[], &[])));
    let edit = |n: u32| Some(Arc::new(Edit::Allow((0..n).collect())));
    let said = |edit: &Option<Arc<Edit>>| Overheard {
        chosen: vec![Chosen { request: RequestId(1), token: 7, edit: edit.clone() }],
        ..Overheard::default()
    };
    let kept = edit(100_000);
    assert!((0..100).all(|_| port.overhear(said(&kept))), "it is there once");
    // 1 of the start, 98 + 99 so far; each of these takes 98.
    let taken = (0..10).take_while(|_| port.overhear(said(&edit(100_000)))).count();
    assert_eq!(taken, 1, "what waits is bounded in bytes, too");
}

#[test]
fn a_listener_that_misbehaves_is_off_at_its_third_fault() {
    for deed in ["trap", "unknown-token", "uneven-lists"] {
        let bench = Bench::new();
        let slot = bench.runtime.sampler_slot("sampler");
        let mut port = slot.attach(replica()).expect("a thread");
        stage_shadow(&bench, &slot, "fixture-sampler", &format!(r#"{{"do": "{deed}", "after": {PROBED}}}"#));
        for id in 1..=100 {
            assert!(port.overhear(step(vec![started(id, "acme")], &[(id, 5, None)], &[])), "{deed}");
            assert!(port.overhear(step(Vec::new(), &[(id, 5, None)], &[id])), "{deed}");
            bench.advance(SECOND / 10);
        }
        let (active, shadow) = (slot.status(), slot.candidate().expect("staged"));
        assert_eq!((shadow.faults.iter().sum::<u64>(), shadow.fallbacks), (3, 0), "{deed}");
        assert!(matches!(shadow.health, Health::Open { .. }), "{deed}");
        assert_eq!((active.health, active.fallbacks), (Health::Closed, 0), "{deed}");
        let (agreed, differed, unanswered, dropped) = tally(&bench, &slot);
        assert!(agreed > 0 && unanswered > 0, "{deed}: {agreed} {unanswered}");
        assert_eq!((differed, dropped), ([0; 3], 0), "{deed}");
        slot.unstage().expect("staged");
        bench.advance(8 * SECOND);
        assert_eq!((slot.status().draining, slot.compared()), (0, None), "{deed}: nothing is left");
    }
}
