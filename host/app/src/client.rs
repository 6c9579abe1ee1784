//! `pointsman policy ...`: a thin client of the admin API. It prints tables for people and JSON for scripts.

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::{Value, json};

use crate::cli::{AdminArgs, PolicyCommand};
use crate::explain;

/// Runs one command; what it prints goes to `out`.
///
/// # Errors
/// The host cannot be reached or refuses; the message is the host's own.
pub(crate) fn run(command: PolicyCommand, out: &mut dyn Write) -> anyhow::Result<()> {
    match command {
        PolicyCommand::Upload { file, at } => {
            let answer = Admin::new(at.clone()).upload(&file)?;
            print(out, &at, &answer, |a| {
                format!(
                    "{}  {}  {} bytes  compiled in {} ms",
                    text(a, "digest"),
                    text(a, "world"),
                    a["size"],
                    a["compile_ms"]
                )
            })
        }
        PolicyCommand::List { at } => {
            let answer = Admin::new(at.clone()).get("/admin/v1/components")?;
            print(out, &at, &answer, component_table)
        }
        PolicyCommand::Activate { slot, component, config, if_generation, at } => {
            let admin = Admin::new(at.clone());
            let mut body = json!({ "component": admin.resolve(&component)?, "config": config });
            if let Some(generation) = if_generation {
                body["if_generation"] = generation.into();
            }
            let answer = admin.send(
                "PUT",
                &format!("/admin/v1/slots/{slot}"),
                body.to_string().into_bytes(),
                "application/json",
            )?;
            print(out, &at, &answer, |a| activated(&slot.to_string(), a))
        }
        PolicyCommand::Rollback { slot, at } => {
            let path = format!("/admin/v1/slots/{slot}/rollback");
            let answer = Admin::new(at.clone()).send("POST", &path, Vec::new(), "application/json")?;
            print(out, &at, &answer, |a| activated(&slot.to_string(), a))
        }
        PolicyCommand::Explain { id, at } => {
            let path = match &id {
                Some(id) => format!("/admin/v1/requests/{id}"),
                None => "/admin/v1/requests".to_owned(),
            };
            let answer = Admin::new(at.clone()).get(&path)?;
            print(out, &at, &answer, if id.is_some() { explain::table } else { explain::list })
        }
        PolicyCommand::Status { at } => {
            let answer = Admin::new(at.clone()).get("/admin/v1/slots")?;
            print(out, &at, &answer, slot_table)
        }
    }
}

/// Fewest hex digits that stand for a digest: fewer could be a name with a letter missing.
const MIN_DIGEST: usize = 8;

struct Admin {
    at: AdminArgs,
    agent: ureq::Agent,
}

impl Admin {
    fn new(at: AdminArgs) -> Self {
        let config =
            ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(Duration::from_secs(60)));
        Self { at, agent: config.build().into() }
    }

    fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.send("GET", path, Vec::new(), "")
    }

    fn upload(&self, file: &Path) -> anyhow::Result<Value> {
        let bytes = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        self.send("POST", "/admin/v1/components", bytes, "application/wasm")
    }

    fn send(&self, method: &str, path: &str, body: Vec<u8>, content_type: &str) -> anyhow::Result<Value> {
        let url = format!("{}{path}", self.at.url.trim_end_matches('/'));
        let mut request = ureq::http::Request::builder().method(method).uri(&url);
        if !content_type.is_empty() {
            request = request.header("content-type", content_type);
        }
        if let Some(token) = &self.at.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let request = request.body(body).with_context(|| format!("`{url}` is not a URL"))?;
        let answer = self.agent.run(request);
        let mut answer =
            answer.with_context(|| format!("cannot reach the admin API at {}; is pointsman running?", self.at.url))?;
        let status = answer.status();
        let text = answer.body_mut().read_to_string().context("the answer broke off")?;
        let value: Value = serde_json::from_str(&text).unwrap_or(Value::String(text));
        if status.is_success() {
            return Ok(value);
        }
        match value["error"]["message"].as_str() {
            Some(message) => bail!("{message}"),
            None => bail!("the admin API answered {status}: {value}"),
        }
    }

    /// A digest for what a person calls a component.
    fn resolve(&self, name: &str) -> anyhow::Result<String> {
        if name == "native" {
            return Ok(name.to_owned());
        }
        if Path::new(name).is_file() {
            return Ok(text(&self.upload(Path::new(name))?, "digest"));
        }
        let listed = self.get("/admin/v1/components")?;
        let hex = name.trim_start_matches("sha256:");
        let matches = |c: &&Value| {
            let named = c["name"].as_str().is_some_and(|n| n == name || n.split('@').next() == Some(name));
            named || (hex.len() >= MIN_DIGEST && text(c, "digest").starts_with(&format!("sha256:{hex}")))
        };
        let found: Vec<String> = rows(&listed).iter().filter(matches).map(|c| text(c, "digest")).collect();
        match found.as_slice() {
            [digest] => Ok(digest.clone()),
            [] => bail!(
                "no component `{name}`: give a digest, a built-in's name, a file or `native` (`pointsman policy list` shows them)"
            ),
            many => bail!("`{name}` fits {} components: {}", many.len(), many.join(", ")),
        }
    }
}

fn print(out: &mut dyn Write, at: &AdminArgs, answer: &Value, table: impl Fn(&Value) -> String) -> anyhow::Result<()> {
    let text = if at.json { serde_json::to_string_pretty(answer)? } else { table(answer) };
    writeln!(out, "{text}").context("cannot print")
}

fn rows(answer: &Value) -> &[Value] {
    let list = answer.as_array().or_else(|| answer["data"].as_array());
    list.map_or(&[], Vec::as_slice)
}

fn text(value: &Value, key: &str) -> String {
    match &value[key] {
        Value::String(s) => s.clone(),
        Value::Null => "-".into(),
        other => other.to_string(),
    }
}

fn activated(slot: &str, answer: &Value) -> String {
    let ms = answer["warm_ms"].as_f64().unwrap_or_default();
    let us = answer["publish_us"].as_f64().unwrap_or_default();
    format!(
        "{slot}: {};g={}  (warmed in {ms:.1} ms, published in {us:.1} us)",
        text(answer, "revision"),
        answer["generation"]
    )
}

fn component_table(answer: &Value) -> String {
    let mut lines = vec![format!("{:<34} {:<17} {:>9}  {:<20} {}", "NAME", "WORLD", "BYTES", "DIGEST", "USED BY")];
    for c in rows(answer) {
        let used: Vec<&str> =
            c["used_by"].as_array().map_or(Vec::new(), |l| l.iter().filter_map(Value::as_str).collect());
        let digest: String = text(c, "digest").chars().take(19).collect();
        lines.push(format!(
            "{:<34} {:<17} {:>9}  {digest:<20} {}",
            text(c, "name"),
            text(c, "world"),
            c["size"],
            used.join(", ")
        ));
    }
    lines.join("\n")
}

fn slot_table(answer: &Value) -> String {
    let mut lines = vec![format!(
        "{:<20} {:<36} {:>4}  {:<10} {:>10} {:>7} {:>10}  {}",
        "SLOT", "ACTIVE", "GEN", "HEALTH", "CALLS", "FAULTS", "FALLBACKS", "PREVIOUS"
    )];
    for s in rows(answer) {
        let faults: u64 = s["counters"]["faults"].as_object().map_or(0, |f| f.values().filter_map(Value::as_u64).sum());
        lines.push(format!(
            "{:<20} {:<36} {:>4}  {:<10} {:>10} {faults:>7} {:>10}  {}",
            text(s, "slot"),
            text(&s["active"], "revision"),
            text(&s["active"], "generation"),
            text(&s["health"], "state"),
            text(&s["counters"], "calls"),
            text(&s["counters"], "fallbacks"),
            text(&s["previous"], "revision"),
        ));
    }
    lines.join("\n")
}
