//! Models that are loaded when somebody asks for them: who comes, who goes, who stays, and what those hear who wait.

use std::path::Path;
use std::process::Command;

use pointsman_tests::{Host, looks, raw};
use serde_json::{Value, json};

use crate::embeddings::tiny;
use crate::journal;
use crate::loads::{PROGRAM, ask, folder, load, unload};

/// A host that knows `names`, each from a folder of the models, and beside them what `more` says.
fn start(folder: &Path, names: &[(&str, &str)], more: &str) -> Host {
    Host::configured(PROGRAM, &configuration(folder, names, more))
}

fn configuration(folder: &Path, names: &[(&str, &str)], more: &str) -> String {
    let known = names.iter().map(|(name, of)| format!("{name} = {:?}\n", folder.join(of).display().to_string()));
    let known: String = known.collect();
    format!("[engine]\ndemo = false\nkv_mib = 8\n{more}[on_demand]\n{known}")
}

fn status(host: &Host, model: &str) -> u16 {
    host.post("/v1/completions", &ask(model, 2)).status
}

fn shown(host: &Host, name: &str) -> Value {
    host.admin("GET", &format!("/admin/v1/models/{name}"), &Value::Null).body
}

/// Which models are loaded, in one text.
fn loaded(host: &Host) -> String {
    let models = host.admin("GET", "/admin/v1/models", &Value::Null).body;
    let ready = models["data"].as_array().expect("a list").iter().filter(|model| model["state"] == "ready");
    ready.map(|model| model["name"].as_str().expect("text")).collect::<Vec<_>>().join(" ")
}

/// What the replicas of all models hold, by their own account.
fn held(host: &Host) -> u64 {
    let models = host.admin("GET", "/admin/v1/models", &Value::Null).body;
    let replicas = models["data"].as_array().expect("a list").iter().flat_map(|model| model["replicas"].as_array());
    let bytes =
        |replica: &Value| ["weights", "kv", "workspace"].map(|of| replica["memory"][of].as_u64().expect("bytes"));
    replicas.flatten().flat_map(bytes).sum()
}

/// A metric, as it was a moment ago.
fn metric(host: &Host, name: &str) -> Option<u64> {
    let text = host.get("/metrics").body;
    let line = text.as_str().expect("text").lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.map(|value| value.parse().expect("a number"))
}

/// Waits until a metric has this value.
fn counts(host: &Host, name: &str, expect: u64) {
    let mut found = None;
    for _ in looks() {
        found = metric(host, name);
        if found == Some(expect) {
            return;
        }
        std::thread::yield_now();
    }
    panic!("{name} is {found:?} and not {expect}");
}

fn outcome(family: &str, outcome: &str) -> String {
    format!("pointsman_models_{family}_total{{outcome=\"{outcome}\"}}")
}

#[test]
fn what_is_asked_for_comes_and_what_was_not_for_longest_goes() {
    let folder = folder();
    let names = [("a", "mini"), ("b", "mini"), ("c", "mini")];
    let pinned = format!("[models]\np = {:?}\n", folder.path().join("mini").display().to_string());
    let host = start(folder.path(), &names, &pinned);
    assert_eq!((status(&host, "p"), loaded(&host)), (200, "p".to_owned()));
    let one = held(&host);
    // Room for the one that stays and two more, and not for three.
    let bound = format!("memory_mib = {}\n{pinned}", (one * 7 / 2) >> 20);
    let host = host.reconfigure(&configuration(folder.path(), &names, &bound));
    let listed = host.get("/v1/models").body;
    let states = listed["data"].as_array().expect("a list").iter().map(|row| (row["id"].clone(), row["state"].clone()));
    let expect = [
        ("p", json!(null)),
        ("p:f16", json!(null)),
        ("a", json!("unloaded")),
        ("b", json!("unloaded")),
        ("c", json!("unloaded")),
    ];
    assert!(states.eq(expect.map(|(id, state)| (json!(id), state))), "{listed}");
    // Who is asked for; who is loaded then, who was given up so far.
    let rows = [
        ("a", "a p", 0),
        ("b", "a b p", 0),
        ("p", "a b p", 0),
        ("a:f16", "a b p", 0),
        ("c", "a c p", 1),
        ("b", "b c p", 2),
        ("c", "b c p", 2),
        ("a", "a c p", 3),
        ("a", "a c p", 3),
    ];
    for (i, (model, expect, evicted)) in rows.into_iter().enumerate() {
        assert_eq!(status(&host, model), 200, "{i}: {model}");
        assert_eq!(loaded(&host), expect, "{i}: {model}");
        counts(&host, "pointsman_models_evicted_total", evicted);
        counts(&host, "pointsman_models_bytes", held(&host));
    }
    counts(&host, &outcome("requests", "hit"), 3);
    counts(&host, &outcome("requests", "miss"), 5);
    counts(&host, &outcome("loads", "loaded"), 5);
    assert_eq!(held(&host), 3 * one, "nothing of those that went is left");
    let metrics = host.get("/metrics").body;
    assert!(
        metrics.as_str().is_some_and(|text| text.contains("model_name=\"b:f16\"")),
        "what comes back keeps its series"
    );
    assert_eq!(status(&host, "nothing"), 404);
    let lines = journal(&host);
    assert!(
        !lines.iter().any(|line| line["event"].as_str().is_some_and(|event| event.starts_with("model-"))),
        "{lines:?}"
    );
}

#[test]
fn many_who_ask_share_one_load_and_one_who_leaves_stops_nothing() {
    let folder = folder();
    let host = start(folder.path(), &[("a", "demo"), ("b", "mini")], "");
    assert_eq!(host.get("/ready").status, 200, "a request would bring a model");
    std::thread::scope(|scope| {
        let asking: Vec<_> = (0..8).map(|_| scope.spawn(|| host.stream(&ask("a", 4)))).collect();
        let tokens = asking.into_iter().map(|asking| asking.join().expect("a client").expect("it is served").tokens);
        let tokens: Vec<_> = tokens.collect();
        assert!(tokens.iter().all(|found| *found == tokens[0]), "{tokens:?}");
    });
    counts(&host, &outcome("loads", "loaded"), 1);
    let waiting = raw::send(&host, "/v1/completions", &ask("b", 4)).expect("a request");
    let comes_to = |states: &[&str]| looks().any(|_| states.iter().any(|state| shown(&host, "b")["state"] == *state));
    assert!(comes_to(&["loading", "ready"]), "it has been asked for");
    drop(waiting);
    assert!(comes_to(&["ready"]), "whoever hangs up stops nothing");
    assert_eq!(status(&host, "b"), 200);
    counts(&host, &outcome("loads", "loaded"), 2);
    counts(&host, &outcome("loads", "failed"), 0);
}

#[test]
fn a_model_in_use_is_waited_for_and_not_taken() {
    let folder = folder();
    let names = [("a", "mini"), ("b", "mini"), ("c", "mini")];
    // Steps that take so long that a stream is open until its client goes.
    let slow = "devices = [\"null:50000\"]\nmax_loaded = 1\n";
    let host = start(folder.path(), &names, slow);
    let long = |host: &Host| {
        let mut body = ask("a", 900);
        body["stream"] = true.into();
        let mut running = raw::Raw::ask(host, "/v1/completions", &body).expect("a stream");
        assert!(running.event().expect("an event").is_some());
        running
    };
    let comes_to = |host: &Host, name: &str, expect: &str| looks().any(|_| shown(host, name)["state"] == expect);
    let running = long(&host);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| status(&host, "b"));
        assert!(comes_to(&host, "b", "loading"), "it has been asked for");
        counts(&host, &outcome("requests", "miss"), 2);
        // From some moment on it takes no more requests.
        let mut late = Vec::new();
        while metric(&host, &outcome("requests", "miss")) != Some(3) {
            let one = scope.spawn(|| status(&host, "a"));
            while !one.is_finished() && metric(&host, &outcome("requests", "miss")) != Some(3) {
                std::thread::yield_now();
            }
            late.push(one);
        }
        assert!(loaded(&host) == "a" && !waiting.is_finished(), "nobody else has its place");
        counts(&host, "pointsman_models_evicted_total", 0);
        drop(running);
        assert_eq!(waiting.join().expect("a client"), 200, "then the other had its place");
        for late in late {
            assert_eq!(late.join().expect("a client"), 200, "and whoever came after it was served after it");
        }
    });
    counts(&host, "pointsman_models_evicted_total", 2);
    // Who waits for nothing is told what to change.
    let host = host.reconfigure(&configuration(folder.path(), &names, &format!("{slow}load_wait_ms = 0\n")));
    assert_eq!(load(&host, "a", &folder.path().join("mini")).status, 201, "an operator may bring it before");
    let running = long(&host);
    let refused = host.post("/v1/completions", &ask("b", 1));
    // Before the load has failed, or after it: it is told at once.
    assert_eq!((refused.status, refused.headers["retry-after"].as_bytes()), (503, &b"1"[..]), "{refused:?}");
    assert!(looks().any(|_| ["failed", "unloaded"].iter().any(|state| shown(&host, "b")["state"] == *state)));
    let guest = load(&host, "guest", &folder.path().join("mini"));
    assert!(guest.status == 422 || guest.body.to_string().contains("raise engine.max_loaded"), "{guest:?}");
    assert_eq!(loaded(&host), "a");
    drop(running);
    // An operator's model takes the place of one that nobody has any more; until that is so it is refused.
    assert!(looks().any(|_| load(&host, "guest", &folder.path().join("mini")).status == 201), "its place is free");
    assert_eq!(loaded(&host), "guest");
}

#[test]
fn a_load_that_fails_is_told_to_those_who_wait_and_to_nobody_else() {
    let folder = folder();
    let host = start(folder.path(), &[("a", "mini"), ("x", "broken"), ("gone", "nowhere")], "memory_mib = 4\n");
    // Nobody can make room where nobody has any.
    let refused = host.post("/v1/completions", &ask("a", 1));
    let told = refused.body["error"]["message"].as_str().unwrap_or_default();
    assert!(refused.status == 503 && told.contains("it needs") && told.contains("engine.memory_mib"), "{refused:?}");
    let host =
        host.reconfigure(&configuration(folder.path(), &[("a", "mini"), ("x", "broken"), ("gone", "nowhere")], ""));
    std::thread::scope(|scope| {
        let asking: Vec<_> = (0..4).map(|_| scope.spawn(|| host.post("/v1/completions", &ask("x", 1)))).collect();
        for asking in asking {
            let refused = asking.join().expect("a client");
            assert_eq!(
                (refused.status, &refused.body["error"]["code"]),
                (503, &json!("model_not_loaded")),
                "{refused:?}"
            );
            let told = refused.body["error"]["message"].as_str().expect("a message");
            assert!(
                told.starts_with("`x` could not be loaded: ") && told.contains("not a complete safetensors"),
                "{told}"
            );
            assert!(
                !told.contains(&folder.path().display().to_string()),
                "clients need not know where it lies: {told}"
            );
            assert!(refused.headers.contains_key("retry-after"));
        }
        assert_eq!(status(&host, "a"), 200, "the rest serves");
    });
    assert_eq!(status(&host, "gone"), 503);
    let failed = shown(&host, "x");
    assert_eq!((&failed["state"], &failed["source"]), (&json!("failed"), &json!("on-demand")), "{failed}");
    assert_eq!(host.get("/v1/models/x").body["state"], "failed");
    // Mended, and an operator need not wait until it is tried again.
    let file = folder.path().join("broken/model.safetensors");
    std::fs::copy(folder.path().join("mini/model.safetensors"), file).expect("a file");
    assert_eq!(unload(&host, "x", "").status, 200);
    assert_eq!((&shown(&host, "x")["state"], status(&host, "x")), (&json!("unloaded"), 200));
}

#[test]
fn operators_see_and_steer_what_requests_load() {
    let folder = folder();
    let host = start(folder.path(), &[("a", "mini"), ("b", "mini")], "max_loaded = 2\n");
    assert_eq!(status(&host, "a"), 200);
    let ready = shown(&host, "a");
    assert_eq!((&ready["source"], &ready["variants"]), (&json!("on-demand"), &json!(["a:f16"])), "{ready}");
    let path = folder.path().join("mini");
    let rows = [
        (load(&host, "a", &path), 409, "there is a model `a` already"),
        (load(&host, "a:v2", &path), 409, "`a` is loaded on demand: it comes and goes"),
        (unload(&host, "b", ""), 409, "`b` is not loaded; the next request for it does that"),
        (unload(&host, "a", ""), 200, "\"a:f16\""),
        (unload(&host, "a", ""), 409, "`a` is not loaded"),
        (load(&host, "a", &path), 201, "on-demand"),
    ];
    for (i, (answer, status, told)) in rows.into_iter().enumerate() {
        assert!(answer.status == status && answer.body.to_string().contains(told), "{i}: {answer:?}");
    }
    let mut listing = Command::new(PROGRAM);
    let listed = listing.args(["model", "list", "--url", &host.admin]).output().expect("it runs").stdout;
    let listed = String::from_utf8(listed).expect("text");
    for (name, state) in [("a ", "ready"), ("b ", "unloaded")] {
        let line = listed.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}: {listed}"));
        assert!(line.contains(state) && line.contains("on-demand"), "{line}");
    }
    // A start opens nothing and knows the same.
    let host = host.restart(&[]);
    assert_eq!((loaded(&host), status(&host, "b"), loaded(&host)), (String::new(), 200, "b".to_owned()));
}

#[test]
fn a_variant_comes_by_its_own_name_beside_its_model_or_alone() {
    let folder = folder();
    let own = |name: &str| folder.path().join(name).display().to_string();
    // Beside a model that is always there: requests for that load no variant, and one with other texts is refused.
    let names = [("\"a:v2\"", "mini"), ("\"a:x\"", "foreign"), ("b", "mini")];
    let resident = format!("max_loaded = 1\n[models]\na = {:?}\n", own("mini"));
    let host = start(folder.path(), &names, &resident);
    for (i, (model, expect)) in
        [("a", "a"), ("a:v2", "a a:v2"), ("a", "a a:v2"), ("b", "a b"), ("a", "a b"), ("a:v2", "a a:v2")]
            .into_iter()
            .enumerate()
    {
        assert_eq!((status(&host, model), loaded(&host)), (200, expect.to_owned()), "{i}: {model}");
    }
    let refused = host.post("/v1/completions", &ask("a:x", 1));
    let told = refused.body["error"]["message"].as_str().unwrap_or_default();
    assert!(refused.status == 503 && told.contains("its tokenizer"), "{refused:?}");
    let listed = host.get("/v1/models/a:x").body;
    assert_eq!((&listed["state"], &listed["root"]), (&json!("failed"), &json!("a")), "{listed}");
    // Where both come on demand, either may be there without the other.
    let names = [("a", "mini"), ("\"a:v2\"", "mini"), ("b", "mini")];
    let host = start(folder.path(), &names, "max_loaded = 2\n");
    for (i, (model, expect)) in [
        ("a:v2", "a:v2"),
        ("a", "a a:v2"),
        ("a:f16", "a a:v2"),
        // Requests for the alias were for the variant too.
        ("b", "a b"),
        ("a:v2", "a:v2 b"),
        ("a", "a a:v2"),
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!((status(&host, model), loaded(&host)), (200, expect.to_owned()), "{i}: {model}");
    }
}

#[test]
fn an_encoder_comes_and_goes_like_any_model() {
    let (folder, tiny) = (folder(), tiny());
    let own = tiny.path().display().to_string();
    let host = start(folder.path(), &[("a", "mini"), ("e", &own)], "max_loaded = 1\n");
    let embed = |host: &Host, model: &str| host.post("/v1/embeddings", &json!({"model": model, "input": "w5 w6"}));
    assert_eq!(host.get("/ready").status, 200, "a request would bring one");
    let tokens = host.post("/tokenize", &json!({"model": "e", "prompt": "w5 w6"}));
    assert_eq!((tokens.status, &tokens.body["count"], loaded(&host)), (200, &json!(2), "e".to_owned()), "{tokens:?}");
    let first = embed(&host, "e");
    assert_eq!(first.status, 200, "{first:?}");
    for round in 0..2 {
        assert_eq!((status(&host, "a"), loaded(&host)), (200, "a".to_owned()), "{round}");
        counts(&host, "pointsman_models_bytes", held(&host));
        assert_eq!(host.get("/v1/models/e").body["state"], "unloaded", "{round}");
        let again = embed(&host, "e");
        assert_eq!((again.status, &again.body["data"]), (200, &first.body["data"]), "{round}: {again:?}");
        assert_eq!(loaded(&host), "e", "{round}");
        counts(&host, "pointsman_models_bytes", held(&host));
    }
    counts(&host, "pointsman_models_evicted_total", 4);
    let listed = host.get("/v1/models/e").body;
    assert!(listed["state"].is_null() && listed["embedding_dimensions"].is_u64(), "{listed}");
    for (path, model, told) in
        [("/v1/completions", "e", "use it with /v1/embeddings"), ("/v1/embeddings", "a", "generates text")]
    {
        let refused = host.post(path, &json!({"model": model, "input": "x", "prompt": "x"}));
        assert!(refused.status == 400 && refused.body.to_string().contains(told), "{refused:?}");
    }
    // Operators load and unload them too, and a start brings them back.
    let extra = load(&host, "extra", tiny.path());
    assert_eq!((extra.status, &extra.body["variants"]), (201, &json!(["extra"])), "{extra:?}");
    assert_eq!(embed(&host, "extra").body["data"], first.body["data"]);
    let host = host.restart(&[]);
    assert_eq!(embed(&host, "extra").body["data"], first.body["data"]);
    let gone = unload(&host, "extra", "");
    assert!(gone.status == 200 && gone.body["bytes"].as_u64().is_some_and(|bytes| bytes > 0), "{gone:?}");
    assert_eq!(embed(&host, "extra").status, 404);
    let metrics = host.get("/metrics").body;
    assert!(metrics.as_str().is_some_and(|text| !text.contains("\"extra\"")), "its series have gone");
    let null = "devices = [\"null:0\"]\n";
    let host = host.reconfigure(&configuration(folder.path(), &[("e", &own)], null));
    assert_eq!(embed(&host, "e").status, 200, "whatever devices serve the others");
}

#[test]
fn events_tell_of_the_wait_from_its_beginning() {
    let folder = folder();
    let host = start(folder.path(), &[("a", "demo")], "");
    for (round, expect) in ["loading", "queued"].into_iter().enumerate() {
        let headers = [("content-type", "application/json"), ("accept", "application/x-ndjson")];
        let answer =
            host.send("POST", &format!("{}/v1/completions", host.data), &headers, ask("a", 4).to_string().as_bytes());
        let text = answer.body.as_str().expect("text").to_owned();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        let (loading, rest): (Vec<_>, Vec<_>) = lines.iter().partition(|line| line["event"] == "loading");
        assert_eq!((answer.status, &lines[0]["event"]), (200, &json!(expect)), "{round}: {text}");
        assert!(loading.is_sorted_by_key(|line| line["percent"].as_u64()), "{round}: {text}");
        assert!(loading.iter().all(|line| line["model"] == "a"), "{round}: {text}");
        assert_eq!((&rest[0]["event"], &rest[rest.len() - 1]["event"]), (&json!("queued"), &json!("done")), "{text}");
    }
}
