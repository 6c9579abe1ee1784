//! What an admission policy sees of a request, what its answers come to, and what it hears of the end.

use std::sync::atomic::Ordering;

use pointsman_sched::admit::{Outcome, Verdict};
use pointsman_sched::ids::Priority;
use pointsman_sched::request::{Drafted, FinishReason, SinkEvent};
use pointsman_sched::route::{Choice, Refusal, Rejection};
use serde_json::json;

use crate::fakes::{Play, Rig, bytes};
use crate::ports::SubmitError;

const COMPLETIONS: &str = "/v1/completions";

fn rig(verdict: Verdict) -> Rig {
    let rig = Rig::new();
    rig.door.native.store(false, Ordering::Relaxed);
    *rig.door.verdict.lock().expect("unpoisoned") = Some(verdict);
    rig
}

fn body() -> String {
    json!({"model": "m", "prompt": [bytes("abc"), bytes("de")], "max_tokens": 4, "n": 2, "priority": "high"})
        .to_string()
}

#[tokio::test]
async fn a_policy_sees_the_whole_request_and_sets_its_priority() {
    let rig = rig(Verdict::AcceptAs(Priority::Low));
    let answer = rig.post(COMPLETIONS, &body()).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let asked = rig.door.asked.lock().expect("unpoisoned").clone();
    assert_eq!(asked, [("default".to_owned(), Priority::High, Priority::Critical, 5, 16)]);
    let taken = rig.engine.taken.lock().expect("unpoisoned");
    assert_eq!(taken.iter().map(|t| t.priority).collect::<Vec<_>>(), [Priority::Low as u8; 4]);
    let endings = rig.door.endings.lock().expect("unpoisoned");
    assert_eq!(endings.iter().map(|e| e.id).collect::<Vec<_>>(), [taken[0].id], "told once, by the first id");
}

#[tokio::test]
async fn refusals_are_those_of_routers() {
    for (reason, status, expect) in [
        (Refusal::Quota, 429, Some("quota")),
        (Refusal::Overloaded, 429, Some("policy")),
        (Refusal::CannotMeetDeadline, 429, Some("deadline")),
        (Refusal::NotAllowed, 403, Some("policy")),
    ] {
        let rig = rig(Verdict::Reject(Rejection { reason, retry_after_ms: 7_000, message: "not now".into() }));
        let answer = rig.post(COMPLETIONS, &body()).await;
        assert_eq!(answer.status, status, "{reason:?}: {}", answer.body);
        assert!(answer.body.contains("not now"), "{}", answer.body);
        assert_eq!(answer.headers.get("x-pointsman-reason").and_then(|v| v.to_str().ok()), expect, "{reason:?}");
        if status == 429 {
            assert_eq!(answer.headers["retry-after"], "7");
        }
        assert!(rig.engine.taken.lock().expect("unpoisoned").is_empty());
        assert!(rig.door.endings.lock().expect("unpoisoned").is_empty(), "it was never inside");
        assert_eq!(rig.state.in_flight(), 0);
    }
}

#[tokio::test]
async fn endings_say_what_became_of_a_request() {
    let one = json!({"model": "m", "prompt": bytes("abc"), "max_tokens": 4}).to_string();
    let token = || SinkEvent::Token { token: u32::from(b'x'), logprobs: None, drafted: Drafted::default() };
    let started = || SinkEvent::Started { queued_us: 5, cached_tokens: 2 };
    for (plays, expect) in [
        (
            vec![Play::Now(vec![started(), token(), token(), SinkEvent::Finished(FinishReason::Length)])],
            (Outcome::Finished, 2, 2),
        ),
        (vec![Play::Now(vec![started(), token()])], (Outcome::Failed, 2, 1)),
        ((0..3).map(|_| Play::Refuse(SubmitError::Full)).collect(), (Outcome::Rejected, 0, 0)),
    ] {
        let rig = rig(Verdict::Accept);
        rig.engine.play(plays);
        rig.post(COMPLETIONS, &one).await;
        let endings = rig.door.endings.lock().expect("unpoisoned");
        let [ending] = endings[..] else { panic!("{endings:?}") };
        assert_eq!((ending.outcome, ending.cached_tokens, ending.generated_tokens), expect);
        assert_eq!((ending.prompt_tokens, ending.max_new_tokens), (3, 4));
    }
    let rig = rig(Verdict::Accept);
    *rig.router.choice.lock().expect("unpoisoned") =
        Choice::Reject(Rejection { reason: Refusal::Overloaded, retry_after_ms: 0, message: "full".into() });
    rig.post(COMPLETIONS, &one).await;
    assert_eq!(rig.door.endings.lock().expect("unpoisoned")[0].outcome, Outcome::Rejected, "by the router");
}
