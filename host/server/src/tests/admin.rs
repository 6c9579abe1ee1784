//! The admin plane: shapes, protections, and the description of all routes. One test opens real sockets.

use std::collections::BTreeSet;
use std::sync::Arc;

use pointsman_sched::request::SinkEvent;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::admin::places::Kind;
use crate::admin::wire;
use crate::fakes::{Play, Rig, bytes, model, request, token};
use crate::ports::{AdminError, AdminErrorKind, JournalLine, LoadReport};
use crate::{AdminRole, AdminToken, Listeners, Secret, ServeError, ServerConfig, ops, serve};

const HOST: (&str, &str) = ("host", "127.0.0.1:8081");

#[tokio::test]
async fn routes_have_their_shapes() {
    let rig = Rig::new();
    let put = r#"{"component": "sha256:00", "config": {"b":1,"a":2}}"#;
    for (method, path, body, status, expect) in [
        (
            "POST",
            "/admin/v1/components",
            "\0asm1234",
            201,
            json!({"digest": "sha256:00", "world": "router", "package": "0.1.0", "size": 8, "compile_ms": 1.5}),
        ),
        (
            "POST",
            "/admin/v1/components",
            "\0asm12345",
            200,
            json!({"digest": "sha256:00", "world": "router", "package": "0.1.0", "size": 9, "compile_ms": 1.5}),
        ),
        (
            "POST",
            "/admin/v1/components",
            r#"{"component": "oci://host/r"}"#,
            200,
            json!({"digest": "sha256:00", "world": "router", "package": "0.1.0", "size": 4, "compile_ms": 1.5}),
        ),
        ("GET", "/admin/v1/components", "", 200, json!({"object": "list", "data": []})),
        (
            "PUT",
            "/admin/v1/slots/router",
            put,
            200,
            json!({"revision": "router:sha256:00:{\"b\":1,\"a\":2}:loopback", "generation": 4, "warm_ms": 1.0, "publish_us": 2.0}),
        ),
        (
            "DELETE",
            "/admin/v1/slots/router",
            "",
            200,
            json!({"revision": "native", "generation": 5, "warm_ms": 0.0, "publish_us": 1.0}),
        ),
        (
            "GET",
            "/admin/v1/slots/router",
            "",
            200,
            json!({"slot": "router", "active": {"revision": "native", "generation": 3, "component": "native", "config": {}, "state_namespace": "router"},
            "previous": null, "candidate": null, "health": {"state": "native"}, "counters": {"calls": 0, "over_soft": 0, "faults": {}, "fallbacks": 0, "instances": 0, "state_bytes": 0, "state_limit_bytes": 0}}),
        ),
        (
            "GET",
            "/admin/v1/devices",
            "",
            200,
            json!({"object": "list", "data": [{"index": 0, "name": "cpu", "description": "a fake", "state": "up", "memory": {"weights": 0, "kv": 0, "workspace": 0}, "replicas": []}]}),
        ),
        ("POST", "/admin/v1/drain", "", 200, json!({"drained": true, "in_flight": 0})),
    ] {
        let kind = if body.starts_with('{') { "application/json; charset=utf-8" } else { "application/wasm" };
        let answer = rig.ask_admin(request(method, path, &[HOST, ("content-type", kind)], body)).await;
        assert_eq!((answer.status, answer.json()), (status, expect), "{method} {path}");
    }
    assert!(rig.state.admission.is_draining());
    assert_eq!(rig.ask_admin(request("DELETE", "/admin/v1/components/sha256:00", &[HOST], "")).await.status, 204);
}

#[tokio::test]
async fn caches_are_cleared_and_pools_bounded_by_a_number_of_mib_or_null() {
    let rig = Rig::new();
    let cleared = rig.ask_admin(request("DELETE", "/admin/v1/devices/cuda:0/prefix-cache", &[HOST], "")).await;
    assert_eq!(cleared.json(), json!({"object": "list", "data": [{"name": "m:a@cuda:0", "kv_blocks": 7}]}));
    for (body, status, expect) in [
        (r#"{"mib": null}"#, 200, "18446744073709551615"),
        (r#"{"mib": 1}"#, 200, "1048576"),
        (r#"{"mib": 0}"#, 400, "mib is 1 to 1099511627776, or null"),
        (r#"{"mib": 1099511627777}"#, 400, "or null for all that a pool was made with"),
        (r#"{"mib": -1}"#, 400, "invalid value"),
        ("{}", 400, "missing field `mib`"),
        (r#"{"mib": 1, "of": "m"}"#, 400, "unknown field `of`"),
    ] {
        let headers = [HOST, ("content-type", "application/json")];
        let answer = rig.ask_admin(request("PUT", "/admin/v1/devices/cuda:0/kv-pools", &headers, body)).await;
        assert!(answer.status == status && answer.body.contains(expect), "{body}: {} {}", answer.status, answer.body);
    }
}

/// The body of a client that announced more than it sends.
struct Stalled;

impl hyper::body::Body for Stalled {
    type Data = bytes::Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<hyper::body::Frame<bytes::Bytes>, Self::Error>>> {
        std::task::Poll::Pending
    }
}

#[tokio::test]
async fn slow_uploads_have_a_few_places_and_take_none_from_others() {
    let rig = std::rc::Rc::new(Rig::new());
    let upload = || request("POST", "/admin/v1/components", &[HOST], "\0asm1234");
    let tasks = tokio::task::LocalSet::new();
    let slow = || {
        let (rig, request) = (std::rc::Rc::clone(&rig), upload().map(|_| axum::body::Body::new(Stalled)));
        tasks.spawn_local(async move { rig.ask_admin(request).await.status })
    };
    let slow: Vec<_> = (0..Kind::Upload.places()).map(|_| slow()).collect();
    let asked = async {
        tokio::task::yield_now().await;
        let refused = rig.ask_admin(upload()).await;
        assert_eq!((refused.status, refused.header("retry-after")), (429, "1"), "{}", refused.body);
        assert_eq!(rig.ask_admin(request("GET", "/admin/v1/slots", &[HOST], "")).await.status, 200);
        slow.iter().for_each(|upload| upload.abort());
        tokio::task::yield_now().await;
        assert_eq!(rig.ask_admin(upload()).await.status, 201, "their places are free again");
    };
    tasks.run_until(asked).await;
}

/// Opens the gate when a test ends, however it ends: whoever waits there would keep the runtime.
struct Opens(Arc<crate::fakes::FakeAdmin>);

impl Drop for Opens {
    fn drop(&mut self) {
        self.0.gate.open();
    }
}

#[tokio::test]
async fn work_keeps_its_place_when_the_client_hangs_up_and_a_rescue_has_one_of_its_own() {
    let json = ("content-type", "application/json");
    let put = || request("PUT", "/admin/v1/slots/router", &[HOST, json], r#"{"component": "native"}"#);
    let upload = || request("POST", "/admin/v1/components", &[HOST], "\0asm12345");
    for (kind, ask) in [(Kind::Change, &put as &dyn Fn() -> _), (Kind::Upload, &upload)] {
        let rig = Rig::new();
        let _opens = Opens(Arc::clone(&rig.admin));
        rig.admin.gate.close();
        for n in 1..=kind.places() {
            let begun = async {
                while rig.admin.gate.arrived.load(std::sync::atomic::Ordering::Acquire) < n {
                    tokio::task::yield_now().await;
                }
            };
            tokio::select! {
                answer = rig.ask_admin(ask()) => panic!("the gate is closed: {answer:?}"),
                () = begun => {}
            }
        }
        let refused = rig.ask_admin(ask()).await;
        assert_eq!((refused.status, refused.header("retry-after")), (429, "1"), "{kind:?}: {}", refused.body);
        for (method, path, body, status) in [
            ("GET", "/admin/v1/slots", "", 200),
            ("GET", "/admin/v1/journal", "", 200),
            ("POST", "/admin/v1/slots/router/rollouts/router-4/abort", "", 200),
            ("POST", "/admin/v1/slots/router/rollouts/router-4/pause", "", 200),
            ("POST", "/admin/v1/aliases/m/rollouts/alias.m-4/abort", "", 200),
            ("POST", "/admin/v1/slots/router/rollback", r#"{"if_generation": 3}"#, 200),
            ("DELETE", "/admin/v1/slots/router", "", 200),
            ("POST", "/admin/v1/safe-mode", r#"{"on": true}"#, 200),
        ] {
            let answer = rig.ask_admin(request(method, path, &[HOST, json], body)).await;
            assert_eq!(answer.status, status, "{kind:?}: {method} {path}: {}", answer.body);
        }
        rig.admin.gate.open();
        while rig.ask_admin(ask()).await.status != 200 {
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test]
async fn signatures_reach_the_port() {
    let rig = Rig::new();
    let headers = [HOST, ("x-pointsman-signature", "AAAA")];
    let answer = rig.ask_admin(request("POST", "/admin/v1/components", &headers, "\0asm1234")).await;
    assert_eq!(answer.json()["signed_by"], "AAAA", "the header reaches the port");
    let signature = "/admin/v1/components/sha256:00/signature";
    assert_eq!(rig.ask_admin(request("PUT", signature, &[HOST], "good")).await.status, 204);
}

#[tokio::test]
async fn aliases_have_their_shape() {
    let rig = Rig::new();
    for (method, path, body, status, expect) in [
        (
            "PUT",
            "/admin/v1/aliases/m",
            r#"{"weights": {"m:a": 9, "m:b": 1}, "sticky": "tenant"}"#,
            200,
            json!({"alias": "m", "generation": 1, "sticky": "tenant",
            "variants": [{"id": "m:a", "weight": 9, "replicas": 2}, {"id": "m:b", "weight": 1, "replicas": 1}], "rollout": null}),
        ),
        (
            "GET",
            "/admin/v1/aliases",
            "",
            200,
            json!({"object": "list", "data": [{"alias": "m", "generation": 1, "sticky": "tenant",
            "variants": [{"id": "m:a", "weight": 9, "replicas": 2}, {"id": "m:b", "weight": 1, "replicas": 1}], "rollout": null}]}),
        ),
        (
            "PUT",
            "/admin/v1/aliases/m",
            r#"{"weights": {}}"#,
            200,
            json!({"alias": "m", "generation": 1, "sticky": null,
            "variants": [{"id": "m:a", "weight": null, "replicas": 2}, {"id": "m:b", "weight": null, "replicas": 1}], "rollout": null}),
        ),
    ] {
        let answer = rig.ask_admin(request(method, path, &[HOST, ("content-type", "application/json")], body)).await;
        assert_eq!((answer.status, answer.json()), (status, expect), "{method} {path}");
    }
}

#[tokio::test]
async fn rollouts_are_started_read_and_steered() {
    let rig = Rig::new();
    for (method, path, body, status, expect) in [
        (
            "POST",
            "/admin/v1/slots/router/rollouts",
            r#"{"component": "sha256:00", "mode": "canary"}"#,
            201,
            json!({"id": "router-4", "component": "sha256:00", "actor": "loopback"}),
        ),
        ("GET", "/admin/v1/slots/router/rollouts", "", 200, json!({"object": "list", "data": [{"id": "router-4"}]})),
        ("GET", "/admin/v1/slots/router/rollouts/router-4", "", 200, json!({"id": "router-4"})),
        (
            "POST",
            "/admin/v1/slots/router/rollouts/router-4/promote",
            r#"{"step": true}"#,
            200,
            json!({"steered": "Promote { step: true }"}),
        ),
        (
            "POST",
            "/admin/v1/slots/router/rollouts/router-4/promote",
            "",
            200,
            json!({"steered": "Promote { step: false }"}),
        ),
        ("POST", "/admin/v1/slots/router/rollouts/router-4/abort", "", 200, json!({"steered": "Abort"})),
        ("POST", "/admin/v1/slots/router/rollouts/router-4/pause", "", 200, json!({"steered": "Pause"})),
        ("POST", "/admin/v1/slots/router/rollouts/router-4/resume", "", 200, json!({"steered": "Resume"})),
    ] {
        let answer = rig.ask_admin(request(method, path, &[HOST], body)).await;
        assert_eq!((answer.status, answer.json()), (status, expect), "{method} {path}");
    }
}

#[tokio::test]
async fn rollouts_between_variants_are_started_read_and_steered() {
    let rig = Rig::new();
    let start = r#"{"candidate": "m:b", "mode": "ab"}"#;
    for (method, path, body, status, expect) in [
        (
            "POST",
            "",
            start,
            201,
            json!({"id": "alias.m-4", "candidate": "m:b", "plan": r#"{"mode":"ab"}"#, "actor": "loopback"}),
        ),
        ("GET", "", "", 200, json!({"object": "list", "data": [{"id": "alias.m-4"}]})),
        ("GET", "/alias.m-4", "", 200, json!({"id": "alias.m-4"})),
        (
            "POST",
            "/alias.m-4/promote",
            r#"{"step": true}"#,
            200,
            json!({"alias": "m", "id": "alias.m-4", "steered": "Promote { step: true }"}),
        ),
        ("POST", "/alias.m-4/abort", "", 200, json!({"alias": "m", "id": "alias.m-4", "steered": "Abort"})),
    ] {
        let path = format!("/admin/v1/aliases/m/rollouts{path}");
        let answer = rig.ask_admin(request(method, &path, &[HOST], body)).await;
        assert_eq!((answer.status, answer.json()), (status, expect), "{method} {path}");
    }
}

#[tokio::test]
async fn safe_mode_is_one_switch() {
    let rig = Rig::new();
    let loops = r#"{"on": true, "reason": "loops"}"#;
    for (method, body, expect) in [
        ("GET", "", json!({"on": false, "since_start": false})),
        ("POST", loops, json!({"on": true, "since_start": false, "reason": "loops", "by": "loopback"})),
        ("POST", r#"{"on": false}"#, json!({"on": false, "since_start": false, "by": "loopback"})),
    ] {
        let answer = rig.ask_admin(request(method, "/admin/v1/safe-mode", &[HOST], body)).await;
        assert_eq!((answer.status, answer.json()), (200, expect), "{method} {body}");
    }
}

#[tokio::test]
async fn faults_have_their_status() {
    let long = "A".repeat(129);
    let rig = Rig::with(ServerConfig { max_component_bytes: 8, ..ServerConfig::default() });
    for (method, path, body, status, code) in [
        ("POST", "/admin/v1/components", "", 400, "invalid_value"),
        ("POST", "/admin/v1/components", "nonsense", 400, "invalid_value"),
        ("POST", "/admin/v1/components", "\0asm12345", 413, "body_too_large"),
        ("DELETE", "/admin/v1/components/sha256:11", "", 404, "not_found"),
        ("PUT", "/admin/v1/components/sha256:11/signature", "good", 404, "not_found"),
        ("PUT", "/admin/v1/components/sha256:00/signature", "bad", 422, "refused"),
        ("PUT", "/admin/v1/components/sha256:00/signature", &long, 413, "body_too_large"),
        ("POST", "/admin/v1/components", r#"{"component": "oci://nowhere/r"}"#, 502, "registry"),
        ("POST", "/admin/v1/components", r#"{"componet": "oci://host/r"}"#, 400, "invalid_json"),
        ("GET", "/admin/v1/slots/other", "", 404, "not_found"),
        ("PUT", "/admin/v1/slots/router", r#"{"component": "native", "if_generation": 2}"#, 409, "conflict"),
        ("PUT", "/admin/v1/slots/router", r#"{"component": "native", "cofnig": 2}"#, 400, "invalid_value"),
        ("DELETE", "/admin/v1/slots/router?if_generation=2", "", 409, "conflict"),
        ("DELETE", "/admin/v1/slots/router?if_generation=x", "", 400, "invalid_value"),
        ("DELETE", "/admin/v1/slots/router?generation=3", "", 400, "invalid_value"),
        ("POST", "/admin/v1/slots/router/rollback", "", 409, "conflict"),
        ("POST", "/admin/v1/slots/router/rollback", r#"{"if_generation": 2}"#, 409, "conflict"),
        ("POST", "/admin/v1/slots/router/rollback", r#"{"generation": 3}"#, 400, "invalid_json"),
        ("POST", "/admin/v1/slots/router/rollouts", r#"{"component": "native", "mode": "ab"}"#, 400, "invalid_value"),
        ("POST", "/admin/v1/slots/router/rollouts", r#"{"mode": "canary"}"#, 400, "invalid_value"),
        ("POST", "/admin/v1/slots/router/rollouts/router-5/abort", "", 404, "not_found"),
        ("POST", "/admin/v1/slots/router/rollouts/router-4/promote", r#"{"stpe": 1}"#, 400, "invalid_json"),
        ("GET", "/admin/v1/slots/panic", "", 500, "internal"),
        ("GET", "/admin/v1/nope", "", 404, "unknown_url"),
        ("PATCH", "/admin/v1/slots/router", "", 405, "method_not_allowed"),
        ("GET", "/admin/v1/aliases/m:a", "", 404, "not_found"),
        ("PUT", "/admin/v1/aliases/n", r#"{"weights": {}}"#, 404, "not_found"),
        ("PUT", "/admin/v1/aliases/m", r#"{"weights": {"m:c": 1}}"#, 400, "invalid_value"),
        ("PUT", "/admin/v1/aliases/m", r#"{"weights": {"m:a": -1}}"#, 400, "invalid_json"),
        ("PUT", "/admin/v1/aliases/m", r#"{"sticky": "tenant"}"#, 400, "invalid_json"),
        ("PUT", "/admin/v1/aliases/m", r#"{"weights": {}, "stiky": "tenant"}"#, 400, "invalid_json"),
        ("PUT", "/admin/v1/aliases/m", r#"{"weights": {}, "if_generation": 4}"#, 409, "conflict"),
        ("POST", "/admin/v1/aliases/m/rollouts", r#"{"candidate": "m:c"}"#, 400, "invalid_value"),
        ("POST", "/admin/v1/aliases/n/rollouts", r#"{"candidate": "m:a"}"#, 404, "not_found"),
        ("GET", "/admin/v1/aliases/n/rollouts", "", 404, "not_found"),
        ("GET", "/admin/v1/journal?after=x", "", 400, "invalid_value"),
        ("POST", "/admin/v1/safe-mode", r#"{"on": "yes"}"#, 400, "invalid_json"),
        ("POST", "/admin/v1/safe-mode", r#"{"on": true, "reson": "x"}"#, 400, "invalid_json"),
    ] {
        let kind = if body.starts_with('{') { "application/json" } else { "application/wasm" };
        let answer = rig.ask_admin(request(method, path, &[HOST, ("content-type", kind)], body)).await;
        assert_eq!((answer.status, &answer.json()["error"]["code"]), (status, &json!(code)), "{method} {path}");
    }
}

#[tokio::test]
async fn web_pages_and_strangers_are_kept_out() {
    let with = |token: Option<&str>, admin_remote| {
        let token = token.map(|token| admin_token("ops", token, AdminRole::Operate));
        Rig::with(ServerConfig { admin_tokens: token.into_iter().collect(), admin_remote, ..ServerConfig::default() })
    };
    let token = ("authorization", "Bearer secret");
    for (rig, headers, status) in [
        (with(None, false), vec![HOST], 200),
        (with(None, false), vec![("host", "localhost")], 200),
        (with(None, false), vec![HOST, ("origin", "http://evil.example")], 403),
        (with(None, false), vec![HOST, ("origin", "http://127.0.0.1:8081")], 403),
        (with(None, false), vec![("host", "evil.example:8081")], 403),
        (with(None, false), vec![], 403),
        (with(Some("secret"), false), vec![HOST], 401),
        (with(Some("secret"), false), vec![HOST, ("authorization", "Bearer secre")], 401),
        (with(Some("secret"), false), vec![HOST, token], 200),
        (with(Some("secret"), false), vec![("host", "evil.example"), token], 403),
        (with(Some("secret"), true), vec![("host", "ops.example"), token], 200),
        (with(Some("secret"), true), vec![("host", "ops.example"), token, ("origin", "http://x")], 403),
    ] {
        let answer = rig.ask_admin(request("GET", "/admin/v1/slots", &headers, "")).await;
        assert_eq!(answer.status, status, "{headers:?} {:?}", rig.state.config.admin_tokens);
    }
}

fn admin_token(name: &str, token: &str, role: AdminRole) -> AdminToken {
    AdminToken { name: name.into(), token: Secret::new(token), role }
}

#[tokio::test]
async fn a_token_that_may_read_changes_nothing_and_the_journal_gets_the_name() {
    let admin_tokens =
        vec![admin_token("dashboard", "one", AdminRole::Read), admin_token("ci", "two", AdminRole::Operate)];
    let rig = Rig::with(ServerConfig { admin_tokens, ..ServerConfig::default() });
    let put = r#"{"component": "native"}"#;
    for (method, path, body, token, expect) in [
        ("GET", "/admin/v1/slots", "", "Bearer one", (200, "")),
        ("HEAD", "/admin/v1/slots", "", "Bearer one", (200, "")),
        ("GET", "/admin/v1/slots", "", "Bearer two", (200, "")),
        ("GET", "/admin/v1/slots", "", "Bearer three", (401, "the admin token is wrong")),
        ("GET", "/admin/v1/slots", "", "Basic one", (401, "the admin token is wrong")),
        (
            "PUT",
            "/admin/v1/slots/router",
            put,
            "Bearer one",
            (403, "`dashboard` has the role `read` and this call needs `operate`"),
        ),
        ("POST", "/admin/v1/drain", "", "Bearer one", (403, "needs `operate`")),
        ("DELETE", "/admin/v1/slots/router", "", "Bearer one", (403, "needs `operate`")),
        ("PUT", "/admin/v1/slots/router", put, "Bearer two", (200, "router:native:{}:ci")),
    ] {
        let answer = rig.ask_admin(request(method, path, &[HOST, ("authorization", token)], body)).await;
        assert_eq!(answer.status, expect.0, "{method} {path} {token}: {}", answer.body);
        assert!(answer.body.contains(expect.1), "{method} {path} {token}: {}", answer.body);
    }
    assert!(!rig.state.admission.is_draining());
}

fn line(sequence: u64) -> JournalLine {
    JournalLine { sequence, json: format!("{{\"sequence\":{sequence}}}").into() }
}

#[tokio::test]
async fn the_journal_is_lines_and_can_be_followed() {
    use http_body_util::BodyExt;
    use tower::ServiceExt;
    let rig = Rig::new();
    rig.admin.journal.lock().expect("unpoisoned").extend([line(1), line(2)]);
    let answer = rig.ask_admin(request("GET", "/admin/v1/journal?after=1", &[HOST], "")).await;
    assert_eq!((answer.body.as_str(), answer.header("content-type")), ("{\"sequence\":2}\n", "application/x-ndjson"));
    let followed = rig.admin().oneshot(request("GET", "/admin/v1/journal?follow", &[HOST], "")).await;
    let mut body = followed.expect("routers do not fail").into_body();
    let mut next = async || {
        let frame = body.frame().await.expect("goes on").expect("bodies do not fail");
        String::from_utf8(frame.into_data().expect("data").to_vec()).expect("UTF-8")
    };
    assert_eq!(next().await, "{\"sequence\":1}\n{\"sequence\":2}\n");
    rig.admin.journal.lock().expect("unpoisoned").push(line(3));
    assert_eq!(next().await, "{\"sequence\":3}\n");
}

#[tokio::test]
async fn a_load_tells_how_it_gets_on_as_events_or_at_its_end_as_json() {
    let progress = |percent| {
        let stage = wire::LoadStage::Packing;
        LoadReport::Progress(wire::LoadProgress { stage, bytes: 5, total_bytes: 10, percent })
    };
    let ready = || LoadReport::Ready(Box::new(model("m")));
    let failed = || {
        let message = "it is no model".to_owned();
        LoadReport::Failed(AdminError { kind: AdminErrorKind::Refused, message, param: None })
    };
    let rows: [(Option<LoadReport>, &str, u16, &str); 6] = [
        (Some(ready()), "*/*", 200, r#"data: {"stage":"ready","percent":100,"model":{"name":"m","#),
        (Some(failed()), "text/event-stream", 200, r#"data: {"error":{"message":"it is no model","#),
        (Some(ready()), "application/json", 201, r#"{"name":"m","state":"ready","source":"loaded","#),
        (Some(failed()), "application/json", 422, "it is no model"),
        (None, "*/*", 500, "the host ended before the model was loaded"),
        (None, "application/json", 500, "the host ended before the model was loaded"),
    ];
    for (last, accept, status, expect) in rows {
        let rig = Rig::new();
        let (sender, reports) = watch::channel(progress(50));
        *rig.admin.loads.lock().expect("unpoisoned") = Some(reports);
        let ask = request(
            "POST",
            "/admin/v1/models",
            &[HOST, ("content-type", "application/json"), ("accept", accept)],
            r#"{"name": "m", "path": "/m"}"#,
        );
        let end = async {
            tokio::task::yield_now().await;
            match last.clone() {
                Some(last) => drop(sender.send_replace(last)),
                None => drop(sender),
            }
        };
        let (answer, ()) = tokio::join!(rig.ask_admin(ask), end);
        // A stream that has begun ends with an error frame.
        let status = if last.is_none() && accept == "*/*" { 200 } else { status };
        assert_eq!(answer.status, status, "{accept} {answer:?}");
        assert!(answer.body.contains(expect), "{accept} {answer:?}");
    }
    let rig = Rig::new();
    let json = [HOST, ("content-type", "application/json")];
    for (method, path, body, status, expect) in [
        ("POST", "/admin/v1/models", r#"{"name": "m", "path": "/m"}"#, 409, "`m` is taken"),
        ("POST", "/admin/v1/models", r#"{"name": "m", "pth": "/m"}"#, 400, "pth"),
        ("GET", "/admin/v1/models", "", 200, "org/m"),
        ("GET", "/admin/v1/models/org/m", "", 200, r#""variants":["org/m:a"]"#),
        ("GET", "/admin/v1/models/org%2Fm", "", 200, r#""variants":["org/m:a"]"#),
        ("GET", "/admin/v1/models/other", "", 404, "models are `org/m`"),
        ("DELETE", "/admin/v1/models/org/m?grace_ms=5", "", 200, r#""waited_ms":5"#),
        ("DELETE", "/admin/v1/models/m?grace_ms=3600001", "", 400, "at most 3600000"),
        ("DELETE", "/admin/v1/models/m?grace=5", "", 400, "grace"),
    ] {
        let answer = rig.ask_admin(request(method, path, &json, body)).await;
        assert_eq!(answer.status, status, "{method} {path} {answer:?}");
        assert!(answer.body.contains(expect), "{method} {path} {answer:?}");
    }
}

#[test]
fn the_description_lists_the_routes_that_exist() {
    let document: Value = serde_json::from_str(ops::OPENAPI).expect("openapi.json is JSON");
    let described: BTreeSet<(String, String)> = (document["paths"].as_object().expect("paths").iter())
        .flat_map(|(path, methods)| methods.as_object().expect("methods").keys().map(|m| (path.clone(), m.clone())))
        .collect();
    let routes = crate::data::routes().into_iter().chain(crate::admin::routes());
    let served: BTreeSet<(String, String)> = routes
        .flat_map(|(path, methods, _)| methods.iter().map(|m| (path.replace('*', ""), (*m).to_owned())))
        .collect();
    assert_eq!(described, served);
}

async fn write_all(stream: &TcpStream, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        stream.writable().await.expect("open");
        match stream.try_write(bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
    }
}

/// Reads until `until` has come or the connection ends.
async fn read_until(stream: &TcpStream, until: &str) -> String {
    let mut text = Vec::new();
    let mut chunk = [0; 1_024];
    while !String::from_utf8_lossy(&text).contains(until) {
        stream.readable().await.expect("open");
        match stream.try_read(&mut chunk) {
            Ok(0) => break,
            Ok(n) => text.extend_from_slice(&chunk[..n]),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
    }
    String::from_utf8_lossy(&text).into_owned()
}

#[tokio::test]
async fn sockets_serve_stream_and_drain() {
    let rig = Rig::new();
    rig.engine.play([Play::Hold]);
    let bind = async || TcpListener::bind("127.0.0.1:0").await.expect("loopback");
    let listeners = Listeners { data: bind().await.into(), admin: bind().await.into() };
    let (data, admin) =
        (listeners.data.socket.local_addr().expect("bound"), listeners.admin.socket.local_addr().expect("bound"));
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = serve(listeners, Arc::clone(&rig.state), async { stopped.await.unwrap_or_default() });
    let client = async {
        let stream = TcpStream::connect(data).await.expect("accepted");
        let body = json!({"model": "m", "prompt": bytes("ab"), "stream": true}).to_string();
        let head = format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
        write_all(&stream, (head + &body).as_bytes()).await;
        let ready = TcpStream::connect(admin).await.expect("accepted");
        let ask = "GET /admin/v1/slots HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
        write_all(&ready, ask.as_bytes()).await;
        assert!(read_until(&ready, "\"native\"").await.starts_with("HTTP/1.1 200"));
        while rig.engine.taken.lock().expect("unpoisoned").is_empty() {
            tokio::task::yield_now().await;
        }
        let id = rig.engine.last_id();
        rig.engine.push(id, token(262));
        let head = read_until(&stream, "hello").await;
        assert!(head.starts_with("HTTP/1.1 200") && head.contains("x-pointsman-variant: m:a"), "{head}");
        // The shutdown begins while the request runs: it may finish.
        stop.send(()).expect("serving");
        rig.engine.push(id, token(262));
        rig.engine.push(id, SinkEvent::Finished(pointsman_sched::request::FinishReason::Length));
        let rest = read_until(&stream, "[DONE]").await;
        assert!(rest.contains("hello") && rest.contains("\"length\""), "{rest}");
    };
    let (served, ()) = tokio::join!(serving, client);
    served.expect("served");
    assert_eq!(rig.state.in_flight(), 0);
}

#[tokio::test]
async fn a_client_that_hangs_up_frees_its_request() {
    let rig = Rig::new();
    rig.engine.play([Play::Hold]);
    let bind = async || TcpListener::bind("127.0.0.1:0").await.expect("loopback");
    let listeners = Listeners { data: bind().await.into(), admin: bind().await.into() };
    let data = listeners.data.socket.local_addr().expect("bound");
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = serve(listeners, Arc::clone(&rig.state), async { stopped.await.unwrap_or_default() });
    let client = async {
        let stream = TcpStream::connect(data).await.expect("accepted");
        let body = json!({"model": "m", "prompt": bytes("ab")}).to_string();
        let head = format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
        write_all(&stream, (head + &body).as_bytes()).await;
        while rig.engine.taken.lock().expect("unpoisoned").is_empty() {
            tokio::task::yield_now().await;
        }
        drop(stream);
        while rig.state.in_flight() > 0 {
            tokio::task::yield_now().await;
        }
        stop.send(()).expect("serving");
    };
    let (served, ()) = tokio::join!(serving, client);
    served.expect("served");
    assert_eq!(rig.engine.cancels.lock().expect("unpoisoned").len(), 1);
}

#[tokio::test]
async fn an_open_admin_plane_is_not_served() {
    let rig = Rig::new();
    let data = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
    let admin = TcpListener::bind("0.0.0.0:0").await.expect("bound");
    let refused =
        serve(Listeners { data: data.into(), admin: admin.into() }, Arc::clone(&rig.state), std::future::pending())
            .await;
    assert!(matches!(refused, Err(ServeError::OpenAdmin(_))));
}
