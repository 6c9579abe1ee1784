//! `pointsman policy rollout ...`: start one, read its report as a table, steer it.

use std::io::Write;

use anyhow::{Context, bail};
use serde_json::{Value, json};

use crate::cli::{RolloutCommand, StartArgs};
use crate::client::{Admin, print, rows, text};

/// Runs one command; what it prints goes to `out`.
///
/// # Errors
/// The host cannot be reached or refuses; the message is the host's own.
pub(crate) fn run(command: RolloutCommand, out: &mut dyn Write) -> anyhow::Result<()> {
    match command {
        RolloutCommand::Start(args) => start(*args, out),
        RolloutCommand::Status { of, at } => {
            let admin = Admin::new(at.clone());
            match of.as_deref() {
                Some(id) if slot_of(id).is_ok() => print(out, &at, &admin.get(&path_of(id, "")?)?, report),
                Some(slot) => print(out, &at, &admin.get(&format!("/admin/v1/slots/{slot}/rollouts"))?, reports),
                None => print(out, &at, &of_all_slots(&admin)?, overview),
            }
        }
        RolloutCommand::Promote { id, step, at } => {
            let body = json!({ "step": step }).to_string().into_bytes();
            let answer = Admin::new(at.clone()).send("POST", &path_of(&id, "/promote")?, body, "application/json")?;
            print(out, &at, &answer, report)
        }
        RolloutCommand::Abort { id, at } => {
            let answer =
                Admin::new(at.clone()).send("POST", &path_of(&id, "/abort")?, Vec::new(), "application/json")?;
            print(out, &at, &answer, report)
        }
        RolloutCommand::Pause { id, at } => {
            let answer =
                Admin::new(at.clone()).send("POST", &path_of(&id, "/pause")?, Vec::new(), "application/json")?;
            print(out, &at, &answer, report)
        }
        RolloutCommand::Resume { id, at } => {
            let answer =
                Admin::new(at.clone()).send("POST", &path_of(&id, "/resume")?, Vec::new(), "application/json")?;
            print(out, &at, &answer, report)
        }
    }
}

fn start(args: StartArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let StartArgs { slot, component, mode, config, steps, auto_promote, plan, at } = args;
    let admin = Admin::new(at.clone());
    let Value::Object(mut body) = plan else { bail!("--plan takes a JSON object, such as {{\"block_ms\": 10000}}") };
    body.insert("component".into(), admin.resolve(&component)?.into());
    body.insert("mode".into(), mode.into());
    body.insert("config".into(), config);
    if !steps.is_empty() {
        body.insert("steps".into(), json!(steps));
    }
    if auto_promote {
        body.insert("auto_promote".into(), true.into());
    }
    let path = format!("/admin/v1/slots/{slot}/rollouts");
    let body = Value::Object(body).to_string().into_bytes();
    print(out, &at, &admin.send("POST", &path, body, "application/json")?, report)
}

/// An id is its slot and the candidate's generation: `router-7`.
fn slot_of(id: &str) -> anyhow::Result<&str> {
    let (slot, generation) = id.rsplit_once('-').unwrap_or((id, ""));
    let is_id = !generation.is_empty() && generation.bytes().all(|b| b.is_ascii_digit());
    is_id.then_some(slot).with_context(|| format!("`{id}` is not the id of a rollout, such as `router-7`"))
}

fn path_of(id: &str, verb: &str) -> anyhow::Result<String> {
    Ok(format!("/admin/v1/slots/{}/rollouts/{id}{verb}", slot_of(id)?))
}

fn of_all_slots(admin: &Admin) -> anyhow::Result<Value> {
    let mut found = Vec::new();
    for slot in rows(&admin.get("/admin/v1/slots")?) {
        let listed = admin.get(&format!("/admin/v1/slots/{}/rollouts", text(slot, "slot")))?;
        found.extend(rows(&listed).iter().cloned());
    }
    Ok(Value::Array(found))
}

// === tables ===

fn overview(answer: &Value) -> String {
    let mut lines = vec![format!(
        "{:<24} {:<11} {:<10} {:>5} {:>8}  {:<34} {}",
        "ROLLOUT", "MODE", "PHASE", "%", "PERIODS", "CANDIDATE", "NOTE"
    )];
    for r in rows(answer) {
        lines.push(format!(
            "{:<24} {:<11} {:<10} {:>5} {:>8}  {:<34} {}",
            text(r, "id"),
            text(r, "mode"),
            text(&r["phase"], "is"),
            text(r, "percent"),
            text(&r["evidence"], "periods"),
            text(&r["candidate"], "name"),
            note(r),
        ));
    }
    lines.join("\n")
}

fn reports(answer: &Value) -> String {
    match rows(answer) {
        [] => "no rollout here yet; `pointsman policy rollout start` begins one".into(),
        found => found.iter().map(report).collect::<Vec<_>>().join("\n\n"),
    }
}

/// One sentence on why it is where it is.
fn note(r: &Value) -> String {
    let phase = &r["phase"];
    let cause = &phase["cause"];
    let holds: Vec<&str> = r["holds"].as_array().map_or(Vec::new(), |l| l.iter().filter_map(Value::as_str).collect());
    match (phase["is"].as_str(), cause["kind"].as_str()) {
        (_, Some("guard")) => format!("harmful: {}", text(cause, "metric")),
        (_, Some("asked")) => "asked".into(),
        (_, Some(_)) => text(cause, "what"),
        (Some("paused"), _) => text(phase, "why"),
        (Some("running"), _) if !holds.is_empty() => format!("held: {}", holds.join("; ")),
        (Some("running"), _) if r["ready"] == true => "ready: promote it, or `--step` for the next step".into(),
        _ => String::new(),
    }
}

fn report(r: &Value) -> String {
    let evidence = &r["evidence"];
    let mut lines = vec![
        format!("{}  {}  {}  {}", text(r, "id"), text(r, "mode"), text(&r["phase"], "is"), note(r))
            .trim_end()
            .to_owned(),
        format!(
            "candidate {} at {} % of the time against {}; {} periods, {} in this step",
            text(&r["candidate"], "name"),
            text(r, "percent"),
            text(&r["control"], "name"),
            text(evidence, "periods"),
            text(evidence, "step_periods"),
        ),
        String::new(),
        format!(
            "{:<16} {:>10} {:>10} {:>10} {:>22} {:>10} {:>5}",
            "GUARD", "CONTROL", "CANDIDATE", "HARM", "IS WITHIN", "MARGIN", "N"
        ),
    ];
    for guard in rows(&evidence["guards"]) {
        let within = match (guard["lower"].as_f64(), guard["upper"].as_f64()) {
            (Some(lower), Some(upper)) => format!("{lower:.4} to {upper:.4}"),
            _ => "unknown yet".into(),
        };
        lines.push(format!(
            "{:<16} {:>10} {:>10} {:>10} {within:>22} {:>10} {:>5}",
            text(guard, "metric"),
            number(&guard["control"]),
            number(&guard["candidate"]),
            number(&guard["harm"]),
            number(&guard["margin"]),
            text(guard, "n"),
        ));
    }
    lines.push(String::new());
    lines.push(format!("{:<24} {:>14} {:>14}", "", "CONTROL", "CANDIDATE"));
    let rows: [(&str, &[&str]); 12] = [
        ("requests", &["requests"]),
        ("goodput (share)", &["goodput"]),
        ("failed", &["counts", "failed"]),
        ("rejected", &["counts", "rejected"]),
        ("time to first token, ms", &["ttft_mean_ms"]),
        ("between tokens, ms", &["itl_mean_ms"]),
        ("end to end, ms", &["e2e_mean_ms"]),
        ("tokens generated", &["counts", "tokens"]),
        ("prompt cached (share)", &["cached"]),
        ("policy calls", &["policy", "calls"]),
        ("policy call, us", &["policy", "call_mean_us"]),
        ("policy faults", &["policy", "faults"]),
    ];
    for (label, path) in rows {
        let cell = |arm: &str| number(path.iter().fold(&r[arm], |value, key| &value[*key]));
        lines.push(format!("{label:<24} {:>14} {:>14}", cell("control"), cell("candidate")));
    }
    lines.join("\n")
}

fn number(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::Number(n) if n.is_f64() => format!("{:.4}", n.as_f64().unwrap_or_default()),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_names_its_slot() {
        for (id, slot) in [
            ("router-7", Some("router")),
            ("telemetry.slo-log-12", Some("telemetry.slo-log")),
            ("router", None),
            ("telemetry.slo-log", None),
            ("router-", None),
        ] {
            assert_eq!(slot_of(id).ok(), slot, "{id}");
        }
    }
}
