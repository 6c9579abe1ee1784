//! Batches against fakes: the state machine as a table, faults of files by line, answers exactly once over restarts, and what
//! other tenants see.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use pointsman_sched::ids::Priority;
use pointsman_sched::request::{Failure, SinkEvent};
use serde_json::{Map, Value, json};
use tokio::sync::watch;

use super::job::{Batch, Counts, Cut, LineFault, Status};
use super::line::{Lines, check};
use super::{BatchConfig, run};
use crate::fakes::{Answer, EmbedPlay, FakeShelf, Play, Rig, key, request, says};
use crate::ports::{Lease, Shelf, Want};
use crate::{ApiKey, KeyLimits, ServerConfig};

fn fresh() -> Batch {
    Batch {
        id: "batch_1".into(),
        tenant: "t".into(),
        key: None,
        endpoint: "/v1/completions".into(),
        input: "file-1".into(),
        output: "file-2".into(),
        errors: "file-3".into(),
        window: "24h".into(),
        metadata: Map::new(),
        status: Status::Validating,
        late: false,
        created_at: 10,
        expires_at: 100,
        in_progress_at: None,
        finalizing_at: None,
        cancelling_at: None,
        ended_at: None,
        faults: Vec::new(),
        counts: Counts::default(),
        has_output: false,
        has_errors: false,
    }
}

/// What happens to a batch, one after the other, with the time.
#[derive(Clone, Copy, Debug)]
enum Step {
    Good(u32),
    Bad,
    Cancel,
    Finalize,
    End,
}

#[test]
fn a_batch_goes_from_status_to_status() {
    use Status::{Cancelled, Cancelling, Completed, Expired, Failed, Finalizing, InProgress};
    use Step::{Bad, Cancel, End, Finalize, Good};
    for (steps, expect, cut) in [
        (&[(Good(3), 11)][..], InProgress, None),
        (&[(Bad, 11)], Failed, None),
        (&[(Bad, 11), (Good(3), 12), (Finalize, 13), (End, 14)], Failed, None),
        (&[(Good(1), 11), (Finalize, 50), (End, 51)], Completed, None),
        (&[(Good(3), 11), (Finalize, 99)], Finalizing, None),
        (&[(Good(3), 11), (Finalize, 99), (End, 101)], Completed, None),
        (&[(Good(3), 11), (Finalize, 100)], Finalizing, Some(Cut::Expired)),
        (&[(Good(3), 11), (Finalize, 100), (End, 101)], Expired, None),
        (&[(Finalize, 100), (End, 101)], Expired, None),
        (&[(Cancel, 11)], Cancelling, Some(Cut::Cancelled)),
        (&[(Cancel, 11), (Good(3), 12), (Finalize, 13)], Cancelling, Some(Cut::Cancelled)),
        (&[(Good(3), 11), (Cancel, 12), (Cancel, 13), (End, 14)], Cancelled, None),
        (&[(Good(3), 11), (End, 12)], InProgress, None),
    ] {
        let mut batch = fresh();
        for &(step, now) in steps {
            let fault = || LineFault { code: "c".into(), message: "m".into(), param: None, line: Some(1) };
            match step {
                Good(total) => batch.validated(Ok(total), now),
                Bad => batch.validated(Err(vec![fault()]), now),
                Cancel => batch.cancel(now).expect("it may be cancelled"),
                Finalize => batch.finalize(now),
                End => batch.end(batch.counts, now),
            }
        }
        assert_eq!((batch.status, batch.cut()), (expect, cut), "{steps:?}");
        assert_eq!(batch.ended_at.is_some(), expect.is_over(), "{steps:?}");
        let stored = serde_json::to_vec(&batch).expect("JSON");
        assert_eq!(serde_json::from_slice::<Batch>(&stored).expect("as it was"), batch);
    }
    for status in [Failed, Completed, Expired, Finalizing] {
        assert_eq!(Batch { status, ..fresh() }.cancel(1), Err(status));
    }
}

fn line(custom_id: &str, prompt: &str) -> String {
    let body = json!({"model": "m", "prompt": prompt});
    json!({"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}).to_string()
}

#[test]
fn a_bad_file_is_refused_by_line() {
    let good = line("a", "hi");
    let with = |name: &str, value: Value| {
        let mut line: Value = serde_json::from_str(&line("b", "hi")).expect("JSON");
        line[name] = value;
        line.to_string()
    };
    let with_prompt = |prompt: &str| line("b", "hi").replace("\"hi\"", prompt);
    for (text, expect) in [
        (String::new(), Err(("empty_file", None))),
        ("\n  \n".to_owned(), Err(("empty_file", None))),
        (good.clone(), Ok(1)),
        (format!("{good}\r\n\n{}\n", line("b", "hi")), Ok(2)),
        (format!("{good}\n{{\"custom_id\": \n"), Err(("invalid_json_line", Some(2)))),
        (format!("{good}\n[1]\n"), Err(("invalid_json_line", Some(2)))),
        (format!("{good}\n\n{good}"), Err(("duplicate_custom_id", Some(3)))),
        (with("custom_id", json!(7)), Err(("invalid_custom_id", Some(1)))),
        (with("custom_id", json!("")), Err(("invalid_custom_id", Some(1)))),
        (with("method", json!("GET")), Err(("invalid_method", Some(1)))),
        (with("url", json!("/v1/embeddings")), Err(("mismatched_endpoint", Some(1)))),
        (with("body", json!("x")), Err(("invalid_body", Some(1)))),
        (format!("{good}\n{}", with_prompt(r#""\ud800""#)), Err(("invalid_json_line", Some(2)))),
        (with_prompt("1e999"), Err(("invalid_json_line", Some(1)))),
        (with_prompt(&("[".repeat(130) + &"]".repeat(130))), Err(("invalid_json_line", Some(1)))),
        (with_prompt("[[1e99]]"), Ok(1)),
        (line("b", &"x".repeat(400)), Err(("line_too_long", Some(1)))),
        ((0..9).map(|i| line(&i.to_string(), "") + "\n").collect(), Err(("too_many_lines", None))),
    ] {
        let shelf: Arc<dyn Shelf> = Arc::new(FakeShelf::default());
        shelf.append("file-1", text.as_bytes()).expect("memory");
        let checked = check(Lines::new(&shelf, "file-1", 400), "/v1/completions", 8).expect("memory");
        let found = checked.map_err(|faults| (faults[0].code.clone(), faults[0].line));
        assert_eq!(found, expect.map_err(|(code, line): (&str, Option<u32>)| (code.to_owned(), line)), "{text}");
    }
}

const FORM: &str = "multipart/form-data; boundary=b";

fn form(purpose: &str, text: &str) -> String {
    let part = |head: &str, body: &str| format!("--b\r\ncontent-disposition: form-data; {head}\r\n\r\n{body}\r\n");
    let file = part("name=\"file\"; filename=\"in.jsonl\"", text);
    format!("{}{file}--b--\r\n", part("name=\"purpose\"", purpose))
}

fn lines(n: usize) -> String {
    (0..n).map(|i| line(&format!("id-{i}"), &format!("p{i}")) + "\n").collect()
}

async fn upload(rig: &Rig, tenant: &str, text: &str) -> Answer {
    let headers = [("content-type", FORM), ("x-tenant-id", tenant)];
    rig.send(request("POST", "/v1/files", &headers, &form("batch", text))).await
}

async fn call(rig: &Rig, tenant: &str, (method, path): (&str, &str), body: &Value) -> Answer {
    let headers = [("content-type", "application/json"), ("x-tenant-id", tenant)];
    let body = if body.is_null() { String::new() } else { body.to_string() };
    rig.send(request(method, path, &headers, &body)).await
}

/// A file and a batch of it.
async fn begin(rig: &Rig, text: &str, window: &str) -> String {
    let file = upload(rig, "acme", text).await.json()["id"].as_str().expect("an id").to_owned();
    let body = json!({"input_file_id": file, "endpoint": "/v1/completions", "completion_window": window,
        "metadata": {"a": "b"}});
    let created = call(rig, "acme", ("POST", "/v1/batches"), &body).await;
    assert_eq!((created.status, &created.json()["status"]), (200, &json!("validating")), "{}", created.body);
    created.json()["id"].as_str().expect("an id").to_owned()
}

/// A host that works on batches.
fn working(shelf: &Arc<FakeShelf>) -> Rig {
    working_with(ServerConfig::default(), shelf)
}

fn working_with(config: ServerConfig, shelf: &Arc<FakeShelf>) -> Rig {
    let rig = Rig::on(config, shelf);
    rig.engine.takes.store(true, Ordering::Relaxed);
    rig.state.spawn(run(Arc::clone(&rig.state)));
    rig
}

/// Looks until a batch is as wanted; what it is then. Each look is a second for those who pause.
async fn until(rig: &Rig, id: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    loop {
        let batch = call(rig, "acme", ("GET", &format!("/v1/batches/{id}")), &Value::Null).await.json();
        if wanted(&batch) {
            return batch;
        }
        rig.clock.now.fetch_add(1_000_000, Ordering::Relaxed);
        tokio::task::yield_now().await;
    }
}

fn is_over(batch: &Value) -> bool {
    ["completed", "failed", "expired", "cancelled"].map(Value::from).contains(&batch["status"])
}

/// Custom ids of a file of answers with the status or the code of each, in order of the ids.
async fn answers(rig: &Rig, id: &Value) -> Vec<(String, Value)> {
    let Some(id) = id.as_str() else { return Vec::new() };
    let content = call(rig, "acme", ("GET", &format!("/v1/files/{id}/content")), &Value::Null).await;
    assert_eq!(content.header("content-length"), content.body.len().to_string());
    let line = |line: &str| {
        let line: Value = serde_json::from_str(line).expect("JSON");
        let what = if line["response"].is_null() {
            line["error"]["code"].clone()
        } else {
            line["response"]["status_code"].clone()
        };
        (line["custom_id"].as_str().expect("a text").to_owned(), what)
    };
    let mut found: Vec<_> = content.body.lines().map(line).collect();
    found.sort_by(|(a, _), (b, _)| (a.len(), a).cmp(&(b.len(), b)));
    found
}

fn all(range: std::ops::Range<usize>, what: Value) -> Vec<(String, Value)> {
    range.map(|i| (format!("id-{i}"), what.clone())).collect()
}

#[tokio::test]
async fn every_line_is_answered_or_told_why_not() {
    let rig = working(&Arc::default());
    rig.engine.play([Play::Now(vec![SinkEvent::Failed(Failure::DroppedByPolicy)])]);
    let wrong = json!({"custom_id": "wrong", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "x", "temperature": 9}});
    let streams = json!({"custom_id": "streams", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "x", "stream": true}});
    let id = begin(&rig, &format!("{}{wrong}\n{streams}\n", lines(20)), "24h").await;
    let batch = until(&rig, &id, is_over).await;
    assert_eq!(batch["status"], "completed", "{batch}");
    assert_eq!(batch["request_counts"], json!({"total": 22, "completed": 20, "failed": 2}));
    assert_eq!((&batch["metadata"], &batch["errors"]), (&json!({"a": "b"}), &Value::Null));
    assert_eq!(answers(&rig, &batch["output_file_id"]).await, all(0..20, json!(200)));
    let failed = answers(&rig, &batch["error_file_id"]).await;
    assert_eq!(failed, [("wrong".to_owned(), json!(400)), ("streams".to_owned(), json!(400))]);
    let priorities = rig.engine.taken.lock().expect("unpoisoned").iter().map(|t| t.priority).collect::<Vec<_>>();
    assert_eq!(priorities, [Priority::Low as u8; 21], "one was tried again");
    assert_eq!(rig.state.in_flight(), 0);
    let metrics = rig.send(request("GET", "/metrics", &[], "")).await.body;
    for expect in [
        "pointsman_batches{status=\"completed\"} 1",
        "pointsman_batch_lines_total{outcome=\"completed\"} 20",
        "pointsman_batch_lines_total{outcome=\"failed\"} 2",
    ] {
        assert!(metrics.contains(expect), "{expect}: {metrics}");
    }
}

#[tokio::test]
async fn lines_wait_while_their_model_loads_and_no_other_begins() {
    let rig = working(&Arc::default());
    rig.engine.know(&["m"]);
    let (load, loads) = watch::channel(());
    let left = || rig.admin.wants.lock().expect("unpoisoned").len();
    // What is asked for once it is there is there.
    let coming = (0..20).map(|_| Want::Coming(Lease::default(), loads.clone()));
    let here = (0..20).map(|_| Want::Here(Lease::default()));
    rig.admin.wants.lock().expect("unpoisoned").extend(coming.chain(here));
    let id = begin(&rig, &lines(20), "24h").await;
    until(&rig, &id, |_| rig.state.waiting_for_models.load(Ordering::Relaxed) > 0).await;
    for _ in 0..100 {
        until(&rig, &id, |_| true).await;
        tokio::task::yield_now().await;
        assert!(taken(&rig) == 0 && left() >= 32, "those that had begun wait, 8 at most");
    }
    load.send_replace(());
    let batch = until(&rig, &id, is_over).await;
    assert_eq!(batch["request_counts"], json!({"total": 20, "completed": 20, "failed": 0}));
    assert_eq!((left(), rig.state.waiting_for_models.load(Ordering::Relaxed)), (0, 0));
}

/// Lines that have begun.
fn taken(rig: &Rig) -> usize {
    rig.engine.taken.lock().expect("unpoisoned").len()
}

/// Answers so many lines and keeps the rest.
fn answer_only(rig: &Rig, n: usize) {
    rig.engine.play((0..99).map(|i| if i < n { Play::Now(says(&["a"])) } else { Play::Hold }));
}

#[tokio::test]
async fn a_restart_goes_on_where_the_answers_end() {
    // What never reached the disk may be missing, or be anything, with ends of lines behind it.
    for torn in [&b""[..], b"\n", b"\0\0\0\n{}\n", b"\n{\"id\":\"batch_req_1_40\"\n"] {
        restarts(torn).await;
    }
}

async fn restarts(torn: &[u8]) {
    let shelf = Arc::new(FakeShelf::default());
    let rig = working(&shelf);
    answer_only(&rig, 12);
    let id = begin(&rig, &lines(40), "24h").await;
    let half = until(&rig, &id, |batch| batch["request_counts"]["completed"] == 12).await;
    assert_eq!((&half["status"], &half["output_file_id"]), (&json!("in_progress"), &Value::Null), "{half}");
    rig.state.stop_tasks().await;
    // As a crash leaves it: the last line half there, and an upload that never ended.
    let output = shelf.largest_hidden();
    let length = shelf.length(&output).expect("memory");
    shelf.cut(&output, length - 9).expect("memory");
    shelf.append(&output, torn).expect("memory");
    shelf.append("file-never", b"x").expect("memory");
    let rig = working(&shelf);
    assert_eq!(shelf.length("file-never").expect("memory"), 0, "what is left of nothing is swept");
    let batch = until(&rig, &id, is_over).await;
    assert_eq!(batch["request_counts"], json!({"total": 40, "completed": 40, "failed": 0}));
    assert_eq!(answers(&rig, &batch["output_file_id"]).await, all(0..40, json!(200)));
    assert_eq!(rig.engine.taken.lock().expect("unpoisoned").len(), 29, "11 whole answers are not computed again");
}

#[tokio::test]
async fn a_full_disk_loses_and_repeats_nothing() {
    for is_stuck in [false, true] {
        fills_up(is_stuck).await;
    }
}

async fn fills_up(is_stuck: bool) {
    let shelf = Arc::new(FakeShelf::default());
    let rig = working(&shelf);
    answer_only(&rig, 5);
    let id = begin(&rig, &lines(9), "24h").await;
    until(&rig, &id, |batch| batch["request_counts"]["completed"] == 5 && taken(&rig) == 9).await;
    shelf.is_full.store(true, Ordering::Relaxed);
    shelf.is_stuck.store(is_stuck, Ordering::Relaxed);
    let held: Vec<_> = rig.engine.taken.lock().expect("unpoisoned").iter().skip(5).map(|taken| taken.id).collect();
    for id in held {
        for event in says(&["b"]) {
            rig.engine.push(id, event);
        }
    }
    while rig.state.in_flight() > 0 {
        tokio::task::yield_now().await;
    }
    let full = upload(&rig, "acme", &lines(1)).await;
    assert_eq!((full.status, &full.json()["error"]["code"]), (503, &json!("disk")), "{}", full.body);
    shelf.is_full.store(false, Ordering::Relaxed);
    rig.engine.forget_plays();
    if is_stuck {
        // It takes more before it lets go of what it has: nothing may be written behind that.
        rig.clock.now.fetch_add(2_000_000, Ordering::Relaxed);
        until(&rig, &id, |_| rig.state.in_flight() == 0).await;
        shelf.is_stuck.store(false, Ordering::Relaxed);
    }
    let batch = until(&rig, &id, is_over).await;
    assert_eq!(batch["request_counts"], json!({"total": 9, "completed": 9, "failed": 0}));
    assert_eq!(answers(&rig, &batch["output_file_id"]).await, all(0..9, json!(200)));
}

#[tokio::test]
async fn a_batch_that_is_cancelled_or_late_keeps_what_it_has() {
    for (late, status, code) in [(false, "cancelled", "batch_cancelled"), (true, "expired", "batch_expired")] {
        let rig = working(&Arc::default());
        answer_only(&rig, 3);
        let id = begin(&rig, &lines(12), "60s").await;
        until(&rig, &id, |batch| batch["request_counts"]["completed"] == 3).await;
        if late {
            rig.clock.later.store(60, Ordering::Relaxed);
        } else {
            let path = format!("/v1/batches/{id}/cancel");
            let other = call(&rig, "other", ("POST", &path), &Value::Null).await;
            assert_eq!(other.status, 404, "{}", other.body);
            let cancelled = call(&rig, "acme", ("POST", &path), &Value::Null).await;
            assert_eq!((cancelled.status, &cancelled.json()["status"]), (200, &json!("cancelling")));
        }
        let batch = until(&rig, &id, is_over).await;
        assert_eq!(
            (&batch["status"], &batch["request_counts"]),
            (&json!(status), &json!({"total": 12, "completed": 3, "failed": 9}))
        );
        assert_eq!(answers(&rig, &batch["output_file_id"]).await, all(0..3, json!(200)));
        assert_eq!(answers(&rig, &batch["error_file_id"]).await, all(3..12, json!(code)));
        while rig.state.in_flight() > 0 {
            tokio::task::yield_now().await;
        }
        let again = call(&rig, "acme", ("POST", &format!("/v1/batches/{id}/cancel")), &Value::Null).await;
        assert_eq!(again.status, if late { 409 } else { 200 }, "{}", again.body);
    }
}

#[tokio::test]
async fn a_reader_that_panics_delays_its_batch() {
    let shelf = Arc::new(FakeShelf::default());
    let rig = working(&shelf);
    shelf.panics.store(1, Ordering::Relaxed);
    let id = begin(&rig, &lines(3), "24h").await;
    let batch = until(&rig, &id, |batch| batch["request_counts"]["completed"] == 3 || is_over(batch)).await;
    assert_eq!((&batch["request_counts"]["failed"], shelf.panics.load(Ordering::Relaxed)), (&json!(0), 0), "{batch}");
    // In the middle too: 40 lines are read ahead in two turns.
    answer_only(&rig, 20);
    let id = begin(&rig, &lines(40), "24h").await;
    until(&rig, &id, |batch| batch["request_counts"]["completed"] == 20 && taken(&rig) == 31).await;
    shelf.panics.store(1, Ordering::Relaxed);
    let held: Vec<_> = rig.engine.taken.lock().expect("unpoisoned").iter().skip(23).map(|taken| taken.id).collect();
    rig.engine.forget_plays();
    for id in held {
        for event in says(&["b"]) {
            rig.engine.push(id, event);
        }
    }
    let batch = until(&rig, &id, is_over).await;
    assert_eq!(answers(&rig, &batch["output_file_id"]).await, all(0..40, json!(200)));
    assert_eq!(shelf.panics.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_read_that_fails_in_the_middle_of_a_line_loses_none() {
    let shelf = Arc::new(FakeShelf::default());
    let rig = working(&shelf);
    answer_only(&rig, 20);
    // More than one chunk of the file, so that lines lie across their ends.
    let padding = format!("\"padding\": \"{}\", \"prompt\"", "p".repeat(3_000));
    let long = lines(80).replace("\"prompt\"", &padding);
    let id = begin(&rig, &long, "24h").await;
    until(&rig, &id, |batch| batch["request_counts"]["completed"] == 20 && taken(&rig) == 28).await;
    shelf.fails_at.store(1, Ordering::Relaxed);
    let held: Vec<_> = rig.engine.taken.lock().expect("unpoisoned").iter().skip(20).map(|taken| taken.id).collect();
    rig.engine.forget_plays();
    for id in held {
        for event in says(&["b"]) {
            rig.engine.push(id, event);
        }
    }
    let batch = until(&rig, &id, is_over).await;
    assert_eq!(shelf.fails_at.load(Ordering::Relaxed), 0, "it has failed");
    assert_eq!(batch["request_counts"], json!({"total": 80, "completed": 80, "failed": 0}));
    assert_eq!(answers(&rig, &batch["output_file_id"]).await, all(0..80, json!(200)));
}

const WITH_KEY: [(&str, &str); 2] = [("content-type", "application/json"), ("authorization", "Bearer k1")];

#[tokio::test]
async fn lines_run_on_the_terms_of_their_key() {
    let limits = KeyLimits { requests_per_minute: NonZeroU32::new(4), ..KeyLimits::default() };
    let keyed = |name: &str| ApiKey { tenant: "acme".into(), ..key(name, Priority::High) };
    let other = ApiKey { tenant: "rival".into(), ..key("k3", Priority::High) };
    let api_keys = vec![ApiKey { limits, ..keyed("k1") }, other.clone()];
    let rig = working_with(ServerConfig { api_keys, ..ServerConfig::default() }, &Arc::default());
    let ask = async |key: &str, (method, path): (&str, &str), kind: &str, body: &str| {
        let bearer = format!("Bearer {key}");
        rig.send(request(method, path, &[("content-type", kind), ("authorization", &bearer)], body)).await
    };
    assert_eq!(upload(&rig, "acme", &lines(1)).await.status, 401, "a tenant is not taken at its word");
    let file = ask("k1", ("POST", "/v1/files"), FORM, &form("batch", &lines(6))).await.json()["id"].clone();
    let body = json!({"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}).to_string();
    assert_eq!(
        ask("k3", ("POST", "/v1/batches"), WITH_KEY[0].1, &body).await.status,
        400,
        "the file of another tenant"
    );
    let created = ask("k1", ("POST", "/v1/batches"), WITH_KEY[0].1, &body).await.json();
    let path = format!("/v1/batches/{}", created["id"].as_str().expect("an id"));
    assert_eq!(ask("k3", ("GET", &path), "", "").await.status, 404);
    let completed = async |key: &str| {
        let batch = ask(key, ("GET", &path), "", "").await.json();
        batch["request_counts"]["completed"].as_u64().expect("a number")
    };
    // Half of the four requests per minute are its own requests'.
    while completed("k1").await < 2 {
        tokio::task::yield_now().await;
    }
    rig.state.replace_keys(vec![other.clone()]).expect("good keys");
    rig.clock.now.fetch_add(600_000_000, Ordering::Relaxed);
    let answered =
        |tenant: &str| rig.state.metrics.render().contains(&format!("_requests_total{{tenant=\"{tenant}\"}}"));
    assert!(answered("acme") && !answered("rival"), "lines are their tenant's to pay");
    // Without a key, its tenant gets nothing more; with another one it does.
    let before = taken(&rig);
    for _ in 0..200 {
        rig.clock.now.fetch_add(2_000_000, Ordering::Relaxed);
        tokio::task::yield_now().await;
    }
    assert_eq!(taken(&rig), before);
    rig.state.replace_keys(vec![other, keyed("k2")]).expect("good keys");
    while completed("k2").await < 6 {
        rig.clock.now.fetch_add(1_000_000, Ordering::Relaxed);
        tokio::task::yield_now().await;
    }
    let priorities = rig.engine.taken.lock().expect("unpoisoned").iter().map(|t| t.priority).collect::<Vec<_>>();
    assert_eq!(priorities, [Priority::Low as u8; 6]);
}

#[tokio::test]
async fn no_line_begins_while_texts_wait_for_an_encoder() {
    let rig = working(&Arc::default());
    rig.engine.embeds.lock().expect("unpoisoned").push_back(EmbedPlay::Hold);
    let body = json!({"model": "e", "input": "x"});
    let mut waits = Box::pin(call(&rig, "acme", ("POST", "/v1/embeddings"), &body));
    while rig.engine.jobs.lock().expect("unpoisoned").is_empty() {
        assert!(looked_at(&mut waits).await.is_none(), "it is held");
    }
    let id = begin(&rig, &lines(3), "24h").await;
    until(&rig, &id, |batch| batch["status"] == "in_progress").await;
    for _ in 0..200 {
        rig.clock.now.fetch_add(1_000_000, Ordering::Relaxed);
        tokio::task::yield_now().await;
    }
    assert!(rig.engine.taken.lock().expect("unpoisoned").is_empty());
    drop(waits);
    let batch = until(&rig, &id, is_over).await;
    assert_eq!(batch["request_counts"], json!({"total": 3, "completed": 3, "failed": 0}));
}

/// One look at a future.
async fn looked_at<T>(future: &mut (impl Future<Output = T> + Unpin)) -> Option<T> {
    std::future::poll_fn(|cx| match std::pin::Pin::new(&mut *future).poll(cx) {
        std::task::Poll::Ready(value) => std::task::Poll::Ready(Some(value)),
        std::task::Poll::Pending => std::task::Poll::Ready(None),
    })
    .await
}

#[tokio::test]
async fn a_file_with_a_fault_fails_its_batch() {
    let rig = working(&Arc::default());
    let id = begin(&rig, &format!("{}{{\n", lines(2)), "24h").await;
    let batch = until(&rig, &id, is_over).await;
    assert_eq!((&batch["status"], &batch["errors"]["data"][0]["line"]), (&json!("failed"), &json!(3)), "{batch}");
    assert!(batch["failed_at"].is_u64() && batch["output_file_id"].is_null(), "{batch}");
    assert!(rig.engine.taken.lock().expect("unpoisoned").is_empty());
}

#[tokio::test]
async fn files_belong_to_their_tenant_and_are_bounded() {
    let batch =
        BatchConfig { max_bytes: 500, max_file_bytes: 400, max_files: 2, max_unfinished: 1, ..BatchConfig::default() };
    let rig = Rig::with(ServerConfig { batch, ..ServerConfig::default() });
    let large = upload(&rig, "acme", &"x".repeat(401)).await;
    assert_eq!((large.status, &large.json()["error"]["code"]), (413, &json!("body_too_large")), "{}", large.body);
    let file = upload(&rig, "acme", &lines(2)).await.json();
    assert_eq!(
        (&file["object"], &file["filename"], &file["bytes"]),
        (&json!("file"), &json!("in.jsonl"), &json!(lines(2).len()))
    );
    let full = upload(&rig, "acme", &"x".repeat(399)).await;
    assert_eq!((full.status, full.header("x-should-retry")), (429, "false"), "{}", full.body);
    let id = file["id"].as_str().expect("an id").to_owned();
    let path = format!("/v1/files/{id}");
    for (tenant, status) in [("acme", 200), ("other", 404)] {
        for path in [path.clone(), format!("{path}/content")] {
            let answer = call(&rig, tenant, ("GET", &path), &Value::Null).await;
            assert_eq!(answer.status, status, "{tenant} {path}: {}", answer.body);
        }
    }
    let body = json!({"input_file_id": id, "endpoint": "/v1/completions", "completion_window": "24h"});
    for (tenant, change, param) in [
        ("other", json!({}), "input_file_id"),
        ("acme", json!({"endpoint": "/v1/models"}), "endpoint"),
        ("acme", json!({"completion_window": "1w"}), "completion_window"),
        ("acme", json!({"completion_window": "99d"}), "completion_window"),
        ("acme", json!({"metadata": {"a": 1}}), "metadata"),
    ] {
        let mut body = body.clone();
        for (name, value) in change.as_object().expect("an object") {
            body[name] = value.clone();
        }
        let answer = call(&rig, tenant, ("POST", "/v1/batches"), &body).await;
        assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!(param)), "{}", answer.body);
    }
    assert_eq!(call(&rig, "acme", ("POST", "/v1/batches"), &body).await.status, 200);
    assert_eq!(call(&rig, "acme", ("POST", "/v1/batches"), &body).await.status, 429, "one is unfinished");
    assert_eq!(call(&rig, "acme", ("DELETE", &path), &Value::Null).await.status, 409, "a batch reads it");
    let listed = call(&rig, "acme", ("GET", "/v1/batches"), &Value::Null).await.json();
    assert_eq!((listed["data"].as_array().map(Vec::len), &listed["has_more"]), (Some(1), &json!(false)));
    let others = call(&rig, "other", ("GET", "/v1/batches?limit=3"), &Value::Null).await.json();
    assert_eq!(others["data"], json!([]));
    for (body, part) in [
        (form("assistants", "x"), "purpose"),
        ("--b--\r\n".to_owned(), "purpose"),
        ("--b\r\nnonsense".to_owned(), "form"),
    ] {
        let answer = rig.send(request("POST", "/v1/files", &[("content-type", FORM)], &body)).await;
        assert!(answer.status == 400 && answer.body.contains(part), "{} {}", answer.status, answer.body);
    }
}
