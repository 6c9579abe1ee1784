//! `pointsman policy explain`: why a request went where it went, for a person to read.

use serde_json::Value;

/// The stages of a request, with what happens until each is reached.
const STAGES: [(&str, &str); 5] = [
    ("admitted", "read, tokenized, admitted"),
    ("routed", "the router chose"),
    ("scheduled", "waited in the replica's queue"),
    ("first_token", "prefill"),
    ("ended", "decode"),
];

/// The last requests, one line each.
pub(crate) fn list(answer: &Value) -> String {
    let mut lines = vec![format!(
        "{:<36} {:<10} {:<16} {:<20} {:>10} {:>10}  {}",
        "REQUEST", "STATE", "MODEL", "REPLICA", "TTFT MS", "E2E MS", "ROUTER"
    )];
    let optional = |value: &Value| if value.is_null() { "-".to_owned() } else { text(value) };
    let ms = |micros: &Value| micros.as_u64().map_or("-".to_owned(), |us| format!("{:.1}", us as f64 * 1e-3));
    for request in answer["data"].as_array().into_iter().flatten() {
        let stages = &request["stages_us"];
        lines.push(format!(
            "{:<36} {:<10} {:<16} {:<20} {:>10} {:>10}  {};g={}",
            text(&request["id"]),
            text(&request["state"]),
            optional(&request["model"]),
            optional(&request["replica"]),
            ms(&stages["first_token"]),
            ms(&stages["ended"]),
            optional(&request["revision"]),
            optional(&request["generation"]),
        ));
    }
    lines.join("\n")
}

/// What the host said of a request, as text.
pub(crate) fn table(answer: &Value) -> String {
    let finish = answer["finish"].as_str().map_or(String::new(), |how| format!(": {how}"));
    let mut lines = vec![
        format!("request {}  {}{finish}", text(&answer["id"]), text(&answer["state"])),
        format!(
            "tokens  {} generated, {} of the prompt from the cache",
            answer["generated_tokens"], answer["cached_tokens"]
        ),
    ];
    if let admission @ Value::Object(_) = &answer["admission"] {
        let is_routed = answer["decision"].is_object();
        admitted(&mut lines, admission, is_routed);
    }
    if let decision @ Value::Object(_) = &answer["decision"] {
        decided(&mut lines, decision);
    }
    for tried in answer["upstreams"].as_array().into_iter().flatten() {
        let at_ms = tried["at_us"].as_u64().unwrap_or(0) as f64 * 1e-3;
        lines.push(format!("sent    {}: {} (after {at_ms:.1} ms)", text(&tried["replica"]), text(&tried["outcome"])));
    }
    if let previous @ Value::Object(_) = &answer["previous"] {
        lines.push(said_instead("before", previous, &answer["decision"]["rows"]));
    }
    if let shadow @ Value::Object(_) = &answer["shadow"] {
        lines.push(said_instead("shadow", shadow, &answer["decision"]["rows"]));
    }
    stages(&mut lines, &answer["stages_us"]);
    lines.join("\n")
}

/// What happened at the door; the request itself too, where no router saw it.
fn admitted(lines: &mut Vec<String>, admission: &Value, is_routed: bool) {
    if !is_routed {
        asked_for(lines, &admission["request"]);
    }
    let load = &admission["load"];
    lines.push(format!(
        "door    {};g={}  said: {}  (in {} us; {} of {} requests inside, {} of the tenant)",
        text(&admission["revision"]),
        admission["generation"],
        verdict(&admission["answer"]),
        admission["call_us"],
        load["in_flight"],
        load["in_flight_limit"],
        load["tenant_in_flight"]
    ));
    let clamps = admission["clamps"].as_array().map_or(&[][..], Vec::as_slice);
    lines.extend(clamps.iter().map(|clamp| format!("host    {}", text(clamp))));
    for (who, other) in [("before", &admission["previous"]), ("shadow", &admission["shadow"])] {
        match other {
            Value::Object(said) if said.contains_key("unavailable") => {}
            Value::Object(said) => lines.push(format!(
                "{who}  {};g={} would have said: {}",
                text(&said["revision"]),
                said["generation"],
                verdict(&said["answer"])
            )),
            _ => {}
        }
    }
}

fn verdict(answer: &Value) -> String {
    match answer {
        Value::Object(said) if said.contains_key("accept-as") => format!("accept as {}", text(&said["accept-as"])),
        Value::Object(said) if said.contains_key("accept") => "accept".to_owned(),
        Value::Object(_) => said(answer, &Value::Null),
        _ => "nothing".to_owned(),
    }
}

fn asked_for(lines: &mut Vec<String>, request: &Value) {
    lines.push(format!(
        "model   {}  tenant {}  priority {}  prompt {} tokens, at most {} new",
        text(&request["model"]),
        text(&request["tenant"]),
        text(&request["priority"]),
        request["prompt_tokens"],
        request["max_new_tokens"]
    ));
    let attributes = request["attributes"].as_array().map_or(&[][..], Vec::as_slice);
    lines.extend(attributes.iter().map(|a| format!("        {} = {}", text(&a[0]), text(&a[1]))));
}

fn decided(lines: &mut Vec<String>, decision: &Value) {
    asked_for(lines, &decision["request"]);
    lines.push(format!(
        "router  {};g={}  said: {}  (in {} us)",
        text(&decision["revision"]),
        decision["generation"],
        said(&decision["answer"], &decision["rows"]),
        decision["call_us"]
    ));
    let clamps = decision["clamps"].as_array().map_or(&[][..], Vec::as_slice);
    lines.extend(clamps.iter().map(|clamp| format!("host    {}", text(clamp))));
    if let chosen @ Value::Object(_) = &decision["chosen"] {
        lines.push(format!("chosen  {} (variant {})", text(&chosen["replica"]), text(&chosen["variant"])));
    }
    replicas(lines, decision);
}

/// What the router saw; the chosen row is marked.
fn replicas(lines: &mut Vec<String>, decision: &Value) {
    lines.push(format!(
        "\n  {:>3} {:<24} {:>6} {:>7} {:>7} {:>7} {:>7} {:>7} {:>12} {:>9}",
        "ROW", "REPLICA", "HEALTH", "WEIGHT", "WAITING", "RUNNING", "QUEUED", "CACHED", "FREE BLOCKS", "TTFT MS"
    ));
    let (rows, columns) = (decision["rows"].as_array(), &decision["replicas"]);
    for (row, name) in rows.into_iter().flatten().enumerate() {
        let mark = if decision["chosen"]["row"] == row { '*' } else { ' ' };
        let number = |column: &str| columns[column][row].to_string();
        lines.push(format!(
            "{mark} {row:>3} {:<24} {:>6} {:>7} {:>7} {:>7} {:>7} {:>7} {:>12} {:>9}",
            text(name),
            number("health"),
            number("weight"),
            number("waiting"),
            number("running"),
            number("queued_tokens"),
            number("cached_tokens"),
            format!("{} of {}", number("free_blocks"), number("total_blocks")),
            predicted(&columns["predicted_ttft"][row]),
        ));
    }
    lines.push(String::new());
}

/// The predicted time to the first token; a dash where nobody knew.
fn predicted(value: &Value) -> String {
    value.as_u64().filter(|us| *us > 0).map_or("-".to_owned(), |us| format!("{:.1}", us as f64 * 1e-3))
}

/// What another policy says to the same inputs.
fn said_instead(who: &str, other: &Value, rows: &Value) -> String {
    if let Some(why) = other["unavailable"].as_str() {
        return format!("{who}  what the previous policy would have said is unavailable: {why}");
    }
    let row = other["row"].as_u64().map_or("no row".to_owned(), |row| named(row, rows));
    let (revision, generation) = (text(&other["revision"]), &other["generation"]);
    format!("{who}  {revision};g={generation} would have said: {}, so {row}", said(&other["answer"], rows))
}

fn said(answer: &Value, rows: &Value) -> String {
    if let Some(row) = answer["pick"].as_u64() {
        return named(row, rows);
    }
    if let Some(rank) = answer["rank"].as_array() {
        let ranked: Vec<String> = rank.iter().filter_map(Value::as_u64).map(|row| named(row, rows)).collect();
        return ranked.join(", then ");
    }
    match &answer["reject"] {
        reject @ Value::Object(_) => format!("reject ({}) {}", text(&reject["reason"]), text(&reject["message"])),
        _ => "nothing".to_owned(),
    }
}

fn named(row: u64, rows: &Value) -> String {
    let name = usize::try_from(row).map_or("?".into(), |place| text(&rows[place]));
    format!("row {row} ({name})")
}

fn stages(lines: &mut Vec<String>, stages: &Value) {
    lines.push(format!("{:<12} {:>12} {:>12}  {}", "STAGE", "AT MS", "TOOK MS", "UNTIL THEN"));
    let mut before = 0;
    for (stage, what) in STAGES {
        let Some(at) = stages[stage].as_u64() else {
            lines.push(format!("{stage:<12} {:>12} {:>12}", "-", "-"));
            continue;
        };
        let ms = |micros: u64| micros as f64 * 1e-3;
        lines.push(format!("{stage:<12} {:>12.3} {:>12.3}  {what}", ms(at), ms(at.saturating_sub(before))));
        before = at;
    }
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_request_reads_as_a_story() {
        let said = table(&json!({
            "id": "r-1", "state": "finished", "finish": "length", "cached_tokens": 16, "generated_tokens": 4,
            "stages_us": {"admitted": 100, "routed": 150, "scheduled": 1150, "first_token": 3150, "ended": null},
            "decision": {
                "request": {"model": "demo", "tenant": "t", "priority": "normal", "prompt_tokens": 20,
                            "max_new_tokens": 4, "attributes": [["header.x-plan", "gold"]]},
                "replicas": {"health": [0, 0], "weight": [1000, 1000], "waiting": [9, 0], "running": [1, 0],
                             "queued_tokens": [90, 0], "cached_tokens": [16, 0], "free_blocks": [3, 8],
                             "total_blocks": [8, 8], "predicted_ttft": [0, 12_345]},
                "rows": ["demo:f16@cpu", "demo:q8_0@cpu"], "revision": "a@1.0.0+00000000", "generation": 3,
                "answer": {"rank": [0, 1]}, "call_us": 2, "clamps": ["row 0 (demo:f16@cpu) had no room"],
                "chosen": {"row": 1, "replica": "demo:q8_0@cpu", "variant": "demo:q8_0"}
            },
            "previous": {"revision": "native", "generation": 2, "answer": {"abstain": true}, "row": 1},
            "shadow": {"revision": "b@2.0.0+00000000", "generation": 4, "answer": {"pick": 0}, "row": 1}
        }));
        for expect in [
            "request r-1  finished: length",
            "        header.x-plan = gold",
            "router  a@1.0.0+00000000;g=3  said: row 0 (demo:f16@cpu), then row 1 (demo:q8_0@cpu)  (in 2 us)",
            "host    row 0 (demo:f16@cpu) had no room",
            "chosen  demo:q8_0@cpu (variant demo:q8_0)",
            "*   1 demo:q8_0@cpu",
            "8 of 8      12.3",
            "before  native;g=2 would have said: nothing, so row 1 (demo:q8_0@cpu)",
            "shadow  b@2.0.0+00000000;g=4 would have said: row 0 (demo:f16@cpu), so row 1 (demo:q8_0@cpu)",
            "first_token         3.150        2.000  prefill",
            "ended                   -            -",
        ] {
            assert!(said.contains(expect), "{expect:?} is missing in\n{said}");
        }
        let refused = table(&json!({
            "id": "r", "state": "rejected", "finish": "no", "stages_us": {},
            "admission": {
                "request": {"model": "demo", "tenant": "t", "priority": "normal", "prompt_tokens": 20, "max_new_tokens": 4},
                "load": {"in_flight": 3, "in_flight_limit": 256, "tenant_in_flight": 2},
                "revision": "b@1.0.0+00000000", "generation": 2, "call_us": 4, "clamps": [],
                "answer": {"reject": {"reason": "quota", "message": "no"}},
                "previous": {"revision": "native", "generation": 1, "answer": null},
                "shadow": {"revision": "c@1.0.0+00000000", "generation": 3, "answer": {"accept-as": "low"}}
            }
        }));
        for expect in [
            "request r  rejected: no\n",
            "model   demo  tenant t  priority normal  prompt 20 tokens, at most 4 new",
            "door    b@1.0.0+00000000;g=2  said: reject (quota) no  (in 4 us; 3 of 256 requests inside, 2 of the tenant)",
            "before  native;g=1 would have said: nothing",
            "shadow  c@1.0.0+00000000;g=3 would have said: accept as low",
        ] {
            assert!(refused.contains(expect), "{expect:?} is missing in\n{refused}");
        }
    }
}
