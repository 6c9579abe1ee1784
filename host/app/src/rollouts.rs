//! `pointsman policy rollout ...`: start one, read its report as a table, steer it.

use std::io::Write;
use std::str::FromStr;

use anyhow::{Context, bail};
use pointsman_control::{SlotName, SlotNameError};
use serde_json::{Value, json};

use crate::cli::{RolloutCommand, StartArgs};
use crate::client::{Admin, print, rows, segment, text};

/// What a rollout is of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Subject {
    /// Two policies.
    Slot(SlotName),
    /// Two variants.
    Alias(String),
}

// === impl Subject ===

impl FromStr for Subject {
    type Err = SlotNameError;

    fn from_str(text: &str) -> Result<Self, SlotNameError> {
        match text.strip_prefix("alias.") {
            Some(alias) if !alias.is_empty() => Ok(Self::Alias(alias.to_owned())),
            _ => text.parse().map(Self::Slot),
        }
    }
}

impl Subject {
    /// Where its rollouts are.
    pub(crate) fn path(&self) -> String {
        match self {
            Self::Slot(slot) => format!("/admin/v1/slots/{slot}/rollouts"),
            Self::Alias(alias) => format!("/admin/v1/aliases/{}/rollouts", segment(alias)),
        }
    }
}

/// Runs one command; what it prints goes to `out`.
///
/// # Errors
/// The host cannot be reached or refuses; the message is the host's own.
pub(crate) fn run(command: RolloutCommand, out: &mut dyn Write) -> anyhow::Result<()> {
    match command {
        RolloutCommand::Start(args) => start(*args, out),
        RolloutCommand::Status { of, at } => {
            let admin = Admin::new(at.clone());
            match of {
                Some(of) => status(&admin, &of, out),
                None => print(out, &at, &of_all(&admin)?, overview),
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
    let StartArgs { subject, candidate, mode, config, steps, sample, auto_promote, plan, at } = args;
    let admin = Admin::new(at.clone());
    let Value::Object(mut body) = plan else { bail!("--plan takes a JSON object, such as {{\"block_ms\": 10000}}") };
    match (&subject, config) {
        (Subject::Slot(_), config) => {
            body.insert("component".into(), admin.resolve(&candidate)?.into());
            body.insert("config".into(), config.unwrap_or_else(|| json!({})));
        }
        (Subject::Alias(_), None) => drop(body.insert("candidate".into(), candidate.into())),
        (Subject::Alias(_), Some(_)) => bail!("a variant takes no --set: it is a model, not a policy"),
    }
    body.insert("mode".into(), mode.into());
    if !steps.is_empty() {
        body.insert("steps".into(), json!(steps));
    }
    if let Some(share) = sample {
        body.insert("sample".into(), share.into());
    }
    if auto_promote {
        body.insert("auto_promote".into(), true.into());
    }
    let body = Value::Object(body).to_string().into_bytes();
    print(out, &at, &admin.send("POST", &subject.path(), body, "application/json")?, report)
}

/// A rollout's report, or those of a subject: `alias.llama-3` may be either.
fn status(admin: &Admin, of: &str, out: &mut dyn Write) -> anyhow::Result<()> {
    let error = match path_of(of, "").and_then(|path| admin.get(&path)) {
        Ok(found) => return print(out, &admin.at, &found, report),
        Err(error) => error,
    };
    match of.parse::<Subject>() {
        Ok(subject) => print(out, &admin.at, &admin.get(&subject.path())?, reports),
        Err(_) => Err(error),
    }
}

/// An id is its slot and the candidate's generation, `router-7`, or its alias and a number, `alias.demo-1`.
fn subject_of(id: &str) -> anyhow::Result<Subject> {
    let (subject, number) = id.rsplit_once('-').unwrap_or((id, ""));
    let is_id = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
    let subject = is_id.then_some(subject).and_then(|subject| subject.parse().ok());
    subject.with_context(|| format!("`{id}` is not the id of a rollout, such as `router-7` or `alias.demo-1`"))
}

fn path_of(id: &str, verb: &str) -> anyhow::Result<String> {
    Ok(format!("{}/{}{verb}", subject_of(id)?.path(), segment(id)))
}

fn of_all(admin: &Admin) -> anyhow::Result<Value> {
    let mut found = Vec::new();
    let (slots, aliases) = (admin.get("/admin/v1/slots")?, admin.get("/admin/v1/aliases")?);
    let slots = rows(&slots).iter().map(|slot| text(slot, "slot"));
    let aliases = rows(&aliases).iter().map(|alias| format!("alias.{}", text(alias, "alias")));
    for subject in slots.chain(aliases) {
        let listed = admin.get(&subject.parse::<Subject>()?.path())?;
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

/// Its first line.
fn headline(r: &Value) -> String {
    let line = format!("{}  {}  {}  {}", text(r, "id"), text(r, "mode"), text(&r["phase"], "is"), note(r));
    line.trim_end().to_owned()
}

fn shadow_report(r: &Value) -> String {
    let shadow = &r["evidence"]["shadow"];
    let answers = &shadow["answers"];
    let percent = r["spec"]["sample"].as_f64().unwrap_or_default() * 100.0;
    let within = match (shadow["lower"].as_f64(), shadow["upper"].as_f64()) {
        (Some(lower), Some(upper)) => format!(", within {lower:.4} to {upper:.4}"),
        _ => String::new(),
    };
    let count = |name: &str| (name.to_owned(), number(&answers[name]));
    let micros = |name: &str| answers[name].as_f64().filter(|ns| *ns > 0.0).map(|ns| ns * 1e-3);
    let time = |label: &str, name| (label.to_owned(), micros(name).map_or("-".to_owned(), |us| format!("{us:.1}")));
    let mut cells = vec![("agreement".to_owned(), format!("{}{within}", number(&shadow["share"]))), count("agreed")];
    let differed = answers["differed"].as_object().into_iter().flatten();
    cells.extend(differed.map(|(kind, n)| (kind.clone(), number(n))));
    cells.extend([count("unanswered"), count("dropped")]);
    cells.extend([time("call, median, us", "call_p50_ns"), time("call, 99 %, us", "call_p99_ns")]);
    cells.push(("faults".to_owned(), number(&r["candidate"]["policy"]["faults"])));
    let mut lines = vec![
        headline(r),
        format!(
            "candidate {} is asked about {percent} % of what {} decides; {} periods with answers\n",
            text(&r["candidate"], "name"),
            text(&r["control"], "name"),
            text(shadow, "n"),
        ),
    ];
    lines.extend(cells.into_iter().map(|(label, cell)| format!("{label:<24} {cell}")));
    lines.join("\n")
}

fn report(r: &Value) -> String {
    if r["mode"] == "shadow" {
        return shadow_report(r);
    }
    let evidence = &r["evidence"];
    let mut lines = vec![
        headline(r),
        format!(
            "candidate {} at {} % of the {} against {}; {} periods, {} in this step",
            text(&r["candidate"], "name"),
            text(r, "percent"),
            if text(r, "subject").starts_with("alias.") { "requests" } else { "time" },
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
        if label.starts_with("policy") && r["control"]["policy"].is_null() {
            continue;
        }
        lines.push(format!("{label:<24} {:>14} {:>14}", cell("control"), cell("candidate")));
    }
    let caveats = r["caveats"].as_array().into_iter().flatten().filter_map(Value::as_str);
    lines.extend(caveats.map(|caveat| format!("\nnote: {caveat}")));
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
        for (id, path) in [
            ("router-7", Some("/admin/v1/slots/router/rollouts/router-7")),
            ("telemetry.slo-log-12", Some("/admin/v1/slots/telemetry.slo-log/rollouts/telemetry.slo-log-12")),
            ("alias.demo-1", Some("/admin/v1/aliases/demo/rollouts/alias.demo-1")),
            ("alias.org/llama-3-2", Some("/admin/v1/aliases/org%2Fllama-3/rollouts/alias.org%2Fllama-3-2")),
            ("router", None),
            ("telemetry.slo-log", None),
            ("router-", None),
            ("nowhere-7", None),
            ("alias.-1", None),
        ] {
            assert_eq!(path_of(id, "").ok().as_deref(), path, "{id}");
        }
    }
}
