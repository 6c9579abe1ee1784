//! `pointsman model ...`: lists, loads and unloads models of a running host.
//!
//! A load tells how it gets on as server-sent events. On a terminal they are one line that is written over, a bar; elsewhere a
//! line for each tenth, so that a log of them stays short.

use std::io::{BufRead, BufReader, IsTerminal, Write};

use anyhow::{Context, bail};
use serde_json::{Value, json};

use crate::cli::{AdminArgs, ModelCommand};
use crate::client::{Admin, print, rows, segment, text};

const MODELS: &str = "/admin/v1/models";
/// Letters of the bar.
const BAR: usize = 30;

/// Runs one command; what it prints goes to `out`.
///
/// # Errors
/// The host cannot be reached or refuses; the message is the host's own.
pub(crate) fn run(command: ModelCommand, out: &mut dyn Write) -> anyhow::Result<()> {
    match command {
        ModelCommand::List { at } => print(out, &at, &Admin::new(at.clone()).get(MODELS)?, table),
        ModelCommand::Load { model: (name, path), at } => {
            let body = json!({ "name": name, "path": path });
            let model = load(&at, &body, out)?;
            print(out, &at, &model, |model| {
                let served = format!("{} is served: {}", text(model, "name"), variants(model));
                std::iter::once(served).chain(unserved(model)).collect::<Vec<_>>().join("\n")
            })
        }
        ModelCommand::Unload { name, grace_s, at } => {
            let grace = grace_s.map(|s| format!("?grace_ms={}", s * 1_000)).unwrap_or_default();
            let path = format!("{MODELS}/{}{grace}", segment(&name));
            // The host says when it is over: that may take as long as its requests do.
            let answer = Admin::patient(at.clone(), None).send("DELETE", &path, Vec::new(), "")?;
            print(out, &at, &answer, unloaded)
        }
    }
}

/// Follows a load to its end; the model.
fn load(at: &AdminArgs, body: &Value, out: &mut dyn Write) -> anyhow::Result<Value> {
    let headers = [("content-type", "application/json"), ("accept", "text/event-stream")];
    let admin = Admin::patient(at.clone(), None);
    let mut answer = admin.ask("POST", MODELS, body.to_string().into_bytes(), &headers)?;
    let is_bar = std::io::stdout().is_terminal() && !at.json;
    let mut last = None;
    for line in BufReader::new(answer.body_mut().as_reader()).lines() {
        let line = line.context("the progress broke off; `pointsman model list` says what became of it")?;
        let Some(event) = line.strip_prefix("data: ") else { continue };
        let event: Value = serde_json::from_str(event).context("an event that is not JSON")?;
        if is_bar && (event["error"].is_object() || event["model"].is_object()) {
            writeln!(out)?;
        }
        if let Some(message) = event["error"]["message"].as_str() {
            bail!("{message}");
        }
        if event["model"].is_object() {
            return Ok(event["model"].clone());
        }
        if is_bar {
            write!(out, "\r{}", bar(&event))?;
            out.flush()?;
        } else if !at.json && last != Some(tenth(&event)) {
            last = Some(tenth(&event));
            writeln!(out, "{}", progress(&event))?;
        }
    }
    bail!("the host ended before the model was loaded")
}

/// What makes a line worth writing.
fn tenth(event: &Value) -> (String, u64) {
    (text(event, "stage"), event["percent"].as_u64().unwrap_or_default() / 10)
}

fn progress(event: &Value) -> String {
    let mb = |key: &str| event[key].as_u64().unwrap_or_default() / 1_000_000;
    let (percent, stage) = (event["percent"].as_u64().unwrap_or_default(), text(event, "stage"));
    format!("{percent:>3} %  {stage}  {} of {} MB", mb("bytes"), mb("total_bytes"))
}

fn bar(event: &Value) -> String {
    let full = event["percent"].as_u64().unwrap_or_default() as usize * BAR / 100;
    let (full, rest) = ("#".repeat(full.min(BAR)), "-".repeat(BAR - full.min(BAR)));
    // Wider than any line before it.
    format!("[{full}{rest}] {:<40}", progress(event))
}

fn variants(model: &Value) -> String {
    let all = model["variants"].as_array().map_or(&[][..], Vec::as_slice);
    all.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", ")
}

/// A line for each device that cannot serve it.
fn unserved(model: &Value) -> Vec<String> {
    let all = model["unserved"].as_array().map_or(&[][..], Vec::as_slice);
    let line =
        |one: &Value| format!("  {} not on {}: {}", text(one, "variant"), text(one, "device"), text(one, "error"));
    all.iter().map(line).collect()
}

fn unloaded(answer: &Value) -> String {
    let ended = match answer["ended"].as_u64() {
        None | Some(0) => String::new(),
        Some(n) => format!("; {n} requests were ended"),
    };
    let mb = answer["bytes"].as_u64().unwrap_or_default() / 1_000_000;
    format!("{} is unloaded after {} ms, {mb} MB are free{ended}", text(answer, "name"), answer["waited_ms"])
}

fn table(answer: &Value) -> String {
    let mut lines = vec![format!(
        "{:<24} {:<9} {:<11} {:>9} {:>8}  {:<34} {}",
        "NAME", "STATE", "SOURCE", "MB", "IDLE", "REPLICAS", "PATH"
    )];
    for model in rows(answer) {
        let replicas = model["replicas"].as_array().map_or(&[][..], Vec::as_slice);
        let owners = ["weights", "kv", "workspace", "graphs"];
        let bytes = |replica: &Value| -> u64 { owners.iter().filter_map(|of| replica["memory"][of].as_u64()).sum() };
        let mb = replicas.iter().map(bytes).sum::<u64>() / 1_000_000;
        let names: Vec<&str> = replicas.iter().filter_map(|replica| replica["name"].as_str()).collect();
        let idle = model["idle_ms"].as_u64().map_or("-".to_owned(), |ms| format!("{} s", ms / 1_000));
        let (name, state, source) = (text(model, "name"), text(model, "state"), text(model, "source"));
        let (names, path) = (names.join(", "), text(model, "path"));
        lines.push(format!("{name:<24} {state:<9} {source:<11} {mb:>9} {idle:>8}  {names:<34} {path}"));
        lines.extend(model["error"].as_str().map(|error| format!("  {error}")));
        lines.extend(unserved(model));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_grows_and_keeps_its_width() {
        let event = |percent: u64| json!({"stage": "packing", "bytes": 5_000_000, "total_bytes": 10_000_000, "percent": percent});
        for (percent, expect) in [(0, 0), (50, 15), (99, 29), (100, 30)] {
            let bar = bar(&event(percent));
            assert_eq!((bar.matches('#').count(), bar.len()), (expect, 73), "{bar}");
        }
        assert_eq!(progress(&event(50)), " 50 %  packing  5 of 10 MB");
    }
}
