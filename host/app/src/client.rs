//! `pointsman policy ...`: a thin client of the admin API. It prints tables for people and JSON for scripts.

use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use pointsman_policy::Digest;
use serde_json::{Value, json};
use ureq::tls::{RootCerts, TlsConfig};

use crate::cli::{AdminArgs, AliasCommand, CacheCommand, PolicyCommand, Switch};
use crate::oci::SIGNATURE_ANNOTATION;
use crate::reference::{OCI_SCHEME, Reference};
use crate::trust::{SecretKey, Signature};
use crate::{explain, rollouts};

/// Runs one command; what it prints goes to `out`.
///
/// # Errors
/// The host cannot be reached or refuses; the message is the host's own.
pub(crate) fn run(command: PolicyCommand, out: &mut dyn Write) -> anyhow::Result<()> {
    match command {
        PolicyCommand::Upload { file, signature, at } => {
            let admin = Admin::new(at.clone());
            let answer = match file.starts_with(OCI_SCHEME) {
                true => admin.pull(&file, signature.as_deref())?,
                false => admin.upload(Path::new(&file), signature.as_deref())?,
            };
            print(out, &at, &answer, uploaded)
        }
        PolicyCommand::List { at } => {
            let answer = Admin::new(at.clone()).get("/admin/v1/components")?;
            print(out, &at, &answer, component_table)
        }
        PolicyCommand::Activate { slot, component, config, if_generation, budget, handover, on_fault, at } => {
            let admin = Admin::new(at.clone());
            let (component, budget) = (admin.resolve(&component)?, budget.into_budget());
            let (handover, on_fault) = (handover.as_str(), on_fault.as_str());
            let mut body = json!({ "component": component, "config": config, "budget": budget });
            (body["handover"], body["on_fault"]) = (handover.into(), on_fault.into());
            if let Some(generation) = if_generation {
                body["if_generation"] = generation.into();
            }
            let answer = admin.put_slot(&slot.to_string(), &body)?;
            print(out, &at, &answer, |a| activated(&slot.to_string(), a))
        }
        PolicyCommand::Rollback { slot, if_generation, at } => {
            let path = format!("/admin/v1/slots/{slot}/rollback");
            let body = json!({ "if_generation": if_generation }).to_string().into_bytes();
            let answer = Admin::new(at.clone()).send("POST", &path, body, "application/json")?;
            print(out, &at, &answer, |a| activated(&slot.to_string(), a))
        }
        PolicyCommand::Remove { slot, if_generation, at } => {
            let condition = if_generation.map(|generation| format!("?if_generation={generation}")).unwrap_or_default();
            let path = format!("/admin/v1/slots/{slot}{condition}");
            let answer = Admin::new(at.clone()).send("DELETE", &path, Vec::new(), "")?;
            print(out, &at, &answer, |a| activated(&slot.to_string(), a))
        }
        PolicyCommand::Delete { component, at } => {
            let admin = Admin::new(at);
            let digest = admin.find(&component)?;
            admin.send("DELETE", &format!("/admin/v1/components/{digest}"), Vec::new(), "")?;
            writeln!(out, "deleted {digest}").context("cannot print")
        }
        PolicyCommand::Journal { after, follow, at } => {
            let longest = (!follow).then_some(PATIENCE);
            let path = format!("/admin/v1/journal?after={after}{}", if follow { "&follow" } else { "" });
            Admin::patient(at, longest).copy(&path, out)
        }
        PolicyCommand::Rollout(command) => rollouts::run(command, out),
        PolicyCommand::SafeMode { switch, reason, at } => {
            print(out, &at, &Admin::new(at.clone()).switch_safe_mode(switch, reason)?, safe_mode)
        }
        PolicyCommand::Explain { id, at } => {
            let path = match &id {
                Some(id) => format!("/admin/v1/requests/{id}"),
                None => "/admin/v1/requests".to_owned(),
            };
            let answer = Admin::new(at.clone()).get(&path)?;
            print(out, &at, &answer, if id.is_some() { explain::table } else { explain::list })
        }
        PolicyCommand::Record { slot, limit, seconds, output, at } => {
            let path = format!("/admin/v1/slots/{slot}/record?limit={limit}&seconds={seconds}");
            writeln!(out, "recording {slot}: {limit} decisions or {seconds} s, whichever comes first")?;
            out.flush()?;
            Admin::patient(at, Some(Duration::from_secs(seconds) + PATIENCE)).save(&path, &output, out)
        }
        PolicyCommand::Keygen { file } => keygen(&file, out),
        PolicyCommand::Sign { file, key } => sign(&file, &key, out),
        PolicyCommand::Status { at } => status(at, out),
    }
}

fn status(at: AdminArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let admin = Admin::new(at.clone());
    let (answer, switch) = (admin.get("/admin/v1/slots")?, admin.get(SAFE_MODE)?);
    print(out, &at, &answer, |slots| match switch["on"] == true {
        true => format!("{}\n{}", slot_table(slots), safe_mode(&switch)),
        false => slot_table(slots),
    })
}

/// `pointsman alias ...`.
///
/// # Errors
/// As for [`run`].
pub(crate) fn alias(command: AliasCommand, out: &mut dyn Write) -> anyhow::Result<()> {
    match command {
        AliasCommand::List { at } => {
            let answer = Admin::new(at.clone()).get("/admin/v1/aliases")?;
            print(out, &at, &answer, |a| rows(a).iter().map(alias_lines).collect::<Vec<_>>().join("\n"))
        }
        AliasCommand::Set { alias, weights, router: _, sticky, if_generation, at } => {
            let weights: serde_json::Map<String, Value> = weights.into_iter().map(|(v, w)| (v, w.into())).collect();
            let mut body = json!({ "weights": weights, "sticky": sticky });
            if let Some(generation) = if_generation {
                body["if_generation"] = generation.into();
            }
            let path = format!("/admin/v1/aliases/{}", segment(&alias));
            let answer =
                Admin::new(at.clone()).send("PUT", &path, body.to_string().into_bytes(), "application/json")?;
            print(out, &at, &answer, alias_lines)
        }
    }
}

/// `pointsman cache ...`.
///
/// # Errors
/// As for [`run`].
pub(crate) fn cache(command: CacheCommand, out: &mut dyn Write) -> anyhow::Result<()> {
    const CACHE: &str = "/admin/v1/cache";
    match command {
        CacheCommand::Status { at } => print(out, &at, &Admin::new(at.clone()).get(CACHE)?, cache_lines),
        CacheCommand::Clear { at } => {
            let answer = Admin::new(at.clone()).send("DELETE", CACHE, Vec::new(), "")?;
            print(out, &at, &answer, |a| format!("forgot {} answers, {} bytes", a["entries"], a["bytes"]))
        }
    }
}

fn cache_lines(stats: &Value) -> String {
    if stats["enabled"] == false {
        return "the response cache is off: server.response_cache_mib gives it room".to_owned();
    }
    let [entries, bytes, most, ttl] = ["entries", "bytes", "max_bytes", "ttl_s"].map(|name| &stats[name]);
    let [hits, misses, joined, bypassed] = ["hits", "misses", "joined", "bypassed"].map(|name| &stats[name]);
    let [stale, stored, evicted] = ["stale", "stored", "evicted"].map(|name| &stats[name]);
    format!(
        "{entries} answers, {bytes} of {most} bytes, each kept for {ttl} s\n\
         hits {hits}, joined {joined}, misses {misses} (of them stale {stale}), not looked up {bypassed}\n\
         stored {stored}, evicted {evicted}"
    )
}

const SAFE_MODE: &str = "/admin/v1/safe-mode";

/// Fewest hex digits that stand for a digest: fewer could be a name with a letter missing.
const MIN_DIGEST: usize = 8;

/// The admin API of a host.
pub(crate) struct Admin {
    pub(crate) at: AdminArgs,
    agent: ureq::Agent,
}

/// Longest time for an answer: a pull and a compilation may stand before it.
const PATIENCE: Duration = Duration::from_secs(3_600);
/// Longest time for a connection.
const CONNECT: Duration = Duration::from_secs(5);

impl Admin {
    pub(crate) fn new(at: AdminArgs) -> Self {
        Self::patient(at, Some(PATIENCE))
    }

    /// One that waits this long for the end of an answer, or for ever.
    pub(crate) fn patient(at: AdminArgs, longest: Option<Duration>) -> Self {
        let roots = at.ca_file.clone().unwrap_or(RootCerts::PlatformVerifier);
        // The admin plane is not reached through the environment's proxy, which would see the token.
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .proxy(None)
            .tls_config(TlsConfig::builder().root_certs(roots).build())
            .timeout_connect(Some(CONNECT))
            .timeout_global(longest);
        Self { at, agent: config.build().into() }
    }

    /// Every line of the journal that the host keeps at hand.
    pub(crate) fn journal(&self) -> anyhow::Result<Vec<Value>> {
        let mut answer = self.ask("GET", "/admin/v1/journal", Vec::new(), &[])?;
        let lines = BufReader::new(answer.body_mut().as_reader()).lines();
        lines.map(|line| serde_json::from_str(&line?).context("a line of the journal")).collect()
    }

    /// Prints a stream of lines as they come.
    fn copy(&self, path: &str, out: &mut dyn Write) -> anyhow::Result<()> {
        let mut answer = self.ask("GET", path, Vec::new(), &[])?;
        for line in BufReader::new(answer.body_mut().as_reader()).lines() {
            writeln!(out, "{}", line.context("the stream broke off")?).context("cannot print")?;
        }
        Ok(())
    }

    /// Copies a stream of lines into a file, and says how many they were; the last one counts those that were lost.
    fn save(&self, path: &str, file: &Path, out: &mut dyn Write) -> anyhow::Result<()> {
        let cannot = || format!("cannot write {}", file.display());
        let mut answer = self.ask("GET", path, Vec::new(), &[])?;
        let mut to = BufWriter::new(std::fs::File::create(file).with_context(cannot)?);
        let (mut lines, mut last) = (0_u64, String::new());
        for line in BufReader::new(answer.body_mut().as_reader()).lines() {
            last = line.context("the recording broke off")?;
            writeln!(to, "{last}").with_context(cannot)?;
            lines += 1;
        }
        to.flush().with_context(cannot)?;
        let last: Value = serde_json::from_str(&last).unwrap_or_default();
        let Some(dropped) = last["dropped"].as_u64() else { bail!("the recording broke off after {lines} lines") };
        writeln!(out, "{}: {} lines, {dropped} lost", file.display(), lines - 1)?;
        Ok(())
    }

    pub(crate) fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.send("GET", path, Vec::new(), "")
    }

    fn upload(&self, file: &Path, signature: Option<&Path>) -> anyhow::Result<Value> {
        let bytes = read(file)?;
        let beside = signature_beside(file);
        let signature = signature.or(Some(&*beside).filter(|path| path.is_file()));
        let signature = signature.map(|path| anyhow::Ok(Signature::parse(&read(path)?)?.to_text())).transpose()?;
        let header = signature.as_deref().map(|text| ("x-pointsman-signature", text));
        let headers = [Some(("content-type", "application/wasm")), header];
        self.send_with("POST", "/admin/v1/components", bytes, &headers.into_iter().flatten().collect::<Vec<_>>())
    }

    /// Switches safe mode, or says which it is.
    fn switch_safe_mode(&self, switch: Option<Switch>, reason: Option<String>) -> anyhow::Result<Value> {
        let Some(switch) = switch else { return self.get(SAFE_MODE) };
        let body = json!({ "on": switch == Switch::On, "reason": reason });
        self.send("POST", SAFE_MODE, body.to_string().into_bytes(), "application/json")
    }

    /// Has the host fetch what a reference names.
    pub(crate) fn pull(&self, reference: &str, signature: Option<&Path>) -> anyhow::Result<Value> {
        if signature.is_some() {
            bail!("a pulled component brings its signature in the manifest's annotation `{SIGNATURE_ANNOTATION}`");
        }
        let body = json!({ "component": reference }).to_string().into_bytes();
        self.send("POST", "/admin/v1/components", body, "application/json")
    }

    pub(crate) fn send(&self, method: &str, path: &str, body: Vec<u8>, content_type: &str) -> anyhow::Result<Value> {
        let content_type = (!content_type.is_empty()).then_some(("content-type", content_type));
        self.send_with(method, path, body, content_type.as_slice())
    }

    fn send_with(&self, method: &str, path: &str, body: Vec<u8>, headers: &[(&str, &str)]) -> anyhow::Result<Value> {
        let text =
            self.ask(method, path, body, headers)?.body_mut().read_to_string().context("the answer broke off")?;
        Ok(serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// Asks; an answer that is not a success is an error in the host's words.
    pub(crate) fn ask(
        &self,
        method: &str,
        path: &str,
        body: Vec<u8>,
        headers: &[(&str, &str)],
    ) -> anyhow::Result<ureq::http::Response<ureq::Body>> {
        let url = format!("{}{path}", self.at.url.trim_end_matches('/'));
        let mut request = ureq::http::Request::builder().method(method).uri(&url);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(token) = &self.at.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let request = request.body(body).with_context(|| format!("`{url}` is not a URL"))?;
        let answer = self.agent.run(request);
        let mut answer =
            answer.with_context(|| format!("cannot reach the admin API at {}; is pointsman running?", self.at.url))?;
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let text = answer.body_mut().read_to_string().context("the answer broke off")?;
        let value: Value = serde_json::from_str(&text).unwrap_or(Value::String(text));
        match value["error"]["message"].as_str() {
            Some(message) => bail!("{message}"),
            None => bail!("the admin API answered {status}: {value}"),
        }
    }

    /// A digest for what a person calls a component.
    pub(crate) fn resolve(&self, name: &str) -> anyhow::Result<String> {
        self.named(name, |file, pin| self.offer(file, pin))
    }

    /// A digest for what a person calls a component: that of a file by `file`, which gets the pin too.
    fn named(
        &self,
        name: &str,
        file: impl Fn(&Path, Option<&Digest>) -> anyhow::Result<String>,
    ) -> anyhow::Result<String> {
        if name == "native" || name.starts_with(OCI_SCHEME) {
            return Ok(name.to_owned());
        }
        let (name, pin) = match name.parse() {
            Ok(Reference::Named { name, pin: Some(pin) }) => (name, Some(pin)),
            Err(error) if name.contains("@sha256:") => return Err(error.into()),
            _ => (name.to_owned(), None),
        };
        let path = Path::new(&name);
        let found = if path.is_file() { file(path, pin.as_ref())? } else { self.find(&name)? };
        match pin {
            Some(pin) if pin.as_str() != found => bail!("`{name}` is pinned to {pin} and has the digest {found}"),
            _ => Ok(found),
        }
    }

    /// Like [`resolve`](Self::resolve), and uploads nothing.
    pub(crate) fn identify(&self, name: &str) -> anyhow::Result<String> {
        self.named(name, |file, _| Ok(Digest::of(&read(file)?).to_string()))
    }

    /// Uploads a file, unless it is not what it is pinned to; its digest.
    fn offer(&self, file: &Path, pin: Option<&Digest>) -> anyhow::Result<String> {
        let digest = Digest::of(&read(file)?);
        let wanted = pin.is_none_or(|pin| *pin == digest);
        if wanted { Ok(text(&self.upload(file, None)?, "digest")) } else { Ok(digest.to_string()) }
    }

    /// The digest of a component that is there.
    fn find(&self, name: &str) -> anyhow::Result<String> {
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

fn read(file: &Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))
}

fn signature_beside(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".sig");
    name.into()
}

/// Makes a secret key and says what the host's configuration needs.
fn keygen(file: &Path, out: &mut dyn Write) -> anyhow::Result<()> {
    let key = SecretKey::generate().context("no randomness for a key")?;
    key.write(file)?;
    let name = file.file_stem().and_then(|name| name.to_str()).unwrap_or("name");
    writeln!(out, "wrote the secret key to {}; give the hosts its public half:\n", file.display())?;
    writeln!(out, "[trust.keys]\n{name} = \"{}\"", key.public_text()).context("cannot print")
}

/// Signs a component and writes the signature beside it.
fn sign(file: &Path, key: &Path, out: &mut dyn Write) -> anyhow::Result<()> {
    let key = SecretKey::read(key)?;
    let digest = Digest::of(&read(file)?);
    let (path, signature) = (signature_beside(file), key.sign(digest.as_str()).to_text());
    std::fs::write(&path, format!("{signature}\n")).with_context(|| format!("cannot write {}", path.display()))?;
    writeln!(out, "signed {digest} with {}\n{}: {signature}", key.public_text(), path.display())?;
    writeln!(out, "as an annotation of an OCI manifest: {SIGNATURE_ANNOTATION}={signature}").context("cannot print")
}

pub(crate) fn print(
    out: &mut dyn Write,
    at: &AdminArgs,
    answer: &Value,
    table: impl Fn(&Value) -> String,
) -> anyhow::Result<()> {
    let text = if at.json { serde_json::to_string_pretty(answer)? } else { table(answer) };
    writeln!(out, "{text}").context("cannot print")
}

pub(crate) fn rows(answer: &Value) -> &[Value] {
    let list = answer.as_array().or_else(|| answer["data"].as_array());
    list.map_or(&[], Vec::as_slice)
}

/// A name as a part of a path: a model may be called anything.
pub(crate) fn segment(name: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.:@~".contains(&b);
    let escape = |b: u8| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") };
    name.bytes().map(escape).collect()
}

pub(crate) fn text(value: &Value, key: &str) -> String {
    match &value[key] {
        Value::String(s) => s.clone(),
        Value::Null => "-".into(),
        other => other.to_string(),
    }
}

fn uploaded(a: &Value) -> String {
    format!(
        "{}  {}  {} bytes  compiled in {} ms  signed by {}",
        text(a, "digest"),
        text(a, "world"),
        a["size"],
        a["compile_ms"],
        a["signed_by"].as_str().unwrap_or("nobody")
    )
}

fn activated(slot: &str, answer: &Value) -> String {
    let ms = answer["warm_ms"].as_f64().unwrap_or_default();
    let us = answer["publish_us"].as_f64().unwrap_or_default();
    let mut said = format!(
        "{slot}: {};g={}  (warmed in {ms:.1} ms, published in {us:.1} us)",
        text(answer, "revision"),
        answer["generation"]
    );
    let handed = &answer["handover"];
    if !handed.is_null() {
        said += &format!("\n  {} instances were handed {} bytes", handed["restored"], handed["bytes"]);
        let cold = handed["cold"].as_array().map_or(&[][..], Vec::as_slice);
        cold.iter().filter_map(Value::as_str).for_each(|line| said += &format!("\n  cold: {line}"));
    }
    said
}

fn safe_mode(answer: &Value) -> String {
    if answer["on"] != true {
        return "safe mode is off: the policies of the slots answer".to_owned();
    }
    if answer["since_start"] == true {
        return "safe mode is on since the start: only a restart without --safe-mode ends it".to_owned();
    }
    let (by, reason) = (text(answer, "by"), text(answer, "reason"));
    format!("safe mode is on: every slot is native (by {by}: {reason}); `pointsman policy safe-mode off` ends it")
}

fn component_table(answer: &Value) -> String {
    let mut lines = vec![format!(
        "{:<34} {:<17} {:>9}  {:<20} {:<12} {}",
        "NAME", "WORLD", "BYTES", "DIGEST", "SIGNED BY", "USED BY"
    )];
    for c in rows(answer) {
        let used: Vec<&str> =
            c["used_by"].as_array().map_or(Vec::new(), |l| l.iter().filter_map(Value::as_str).collect());
        let digest: String = text(c, "digest").chars().take(19).collect();
        lines.push(format!(
            "{:<34} {:<17} {:>9}  {digest:<20} {:<12} {}",
            text(c, "name"),
            text(c, "world"),
            c["size"],
            if c["builtin"] == true { "(built in)".to_owned() } else { text(c, "signed_by") },
            used.join(", ")
        ));
    }
    lines.join("\n")
}

fn alias_lines(alias: &Value) -> String {
    let how = match alias["sticky"].as_str() {
        Some(sticky) => format!("by weight, sticky by {sticky}"),
        None => "the router chooses".to_owned(),
    };
    let mut lines = vec![format!("{};g={}  {how}", text(alias, "alias"), alias["generation"])];
    for variant in alias["variants"].as_array().map_or(&[][..], Vec::as_slice) {
        let (id, weight, replicas) = (text(variant, "id"), text(variant, "weight"), &variant["replicas"]);
        lines.push(format!("  {id:<32} weight {weight:>5}  {replicas} replicas"));
    }
    if let Some(id) = alias["rollout"]["id"].as_str() {
        let (candidate, percent) = (text(&alias["rollout"], "candidate"), &alias["rollout"]["percent"]);
        lines.push(format!("  rollout {id} is under way: {candidate} has {percent} % of the requests now"));
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
