//! What admission, tokens, routing and events cost an embedder: a request through `Host::submit` beside the same one put
//! straight into the driver's mailbox, on a device that computes nothing. Bar: 0.2 ms between the medians.
#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use pointsman::host::{Call, Event, Host, HostConfig, Request};
use pointsman_benches::{Samples, header, now, readable};
use pointsman_sched::draft::DraftMethod;
use pointsman_sched::ids::{Priority, RequestId};
use pointsman_sched::prefix::chain_hashes;
use pointsman_sched::request::{Request as EngineRequest, Sampling, SinkEvent, SinkState, TokenSink};
use pointsman_server::ports::EnginePort;
use serde_json::json;
use tokio::sync::mpsc;

/// The bar, between the medians.
const BAR: Duration = Duration::from_micros(200);
const WARM_UP: u64 = 200;
const CALLS: u64 = 3_000;
const PROMPT: [u32; 32] = [17; 32];

/// Tokens of a request: one, where all is overhead, and some, where each event counts.
const TOKENS: [u32; 2] = [1, 32];

/// What the driver says, to whoever waits.
#[derive(Debug)]
struct Sink(mpsc::Sender<bool>);

impl TokenSink for Sink {
    fn push(&mut self, event: SinkEvent) -> SinkState {
        let ended = matches!(event, SinkEvent::Finished(_));
        if self.0.try_send(ended).is_ok() { SinkState::Open } else { SinkState::Closed }
    }
}

/// One request put straight into the mailbox.
async fn direct(engine: &Arc<dyn EnginePort>, number: u64, tokens: u32) -> anyhow::Result<()> {
    let catalog = engine.catalog();
    let variant = catalog.variants.first().context("the demo is served")?;
    let replica = variant.replicas.first().context("a variant has a replica")?;
    let (sender, mut events) = mpsc::channel(256);
    let request = EngineRequest {
        id: RequestId(1 << 40 | number),
        tenant: 0,
        tenant_name: "default".into(),
        session: 0,
        priority: Priority::Normal,
        arrived: 1,
        deadline: 0,
        prompt: PROMPT.into(),
        block_hashes: chain_hashes(&PROMPT, variant.block_tokens).into(),
        transient: false,
        draft_tokens: 0,
        draft_method: DraftMethod::Ngram,
        max_new_tokens: tokens,
        min_new_tokens: 0,
        stop_tokens: Arc::default(),
        sampling: Arc::new(Sampling::default()),
        attributes: Arc::default(),
        fork_of: None,
        mask: None,
        router_generation: 0,
        sink: Box::new(Sink(sender)),
    };
    replica.gauges.reserve(u32::try_from(PROMPT.len())?);
    engine.submit(replica.id, request).map_err(|(_, error)| error)?;
    while let Some(ended) = events.recv().await {
        if ended {
            return Ok(());
        }
    }
    anyhow::bail!("the driver dropped a request")
}

/// The same through the host.
async fn through(host: &Host, tokens: u32) -> anyhow::Result<()> {
    let body = json!({"model": "demo:f16", "prompt": PROMPT, "max_tokens": tokens, "ignore_eos": true});
    let mut events = host.submit(Request::new(Call::Completion, body)).await?;
    while let Some(event) = events.next().await {
        if matches!(event?, Event::Done { .. }) {
            return Ok(());
        }
    }
    anyhow::bail!("no end")
}

fn main() -> anyhow::Result<()> {
    header("embed: Host::submit beside the driver's mailbox, on the null device");
    let folder = tempfile::tempdir()?;
    let config = HostConfig {
        data_dir: Some(folder.path().to_owned()),
        devices: vec!["null".to_owned()],
        ..HostConfig::default()
    };
    let host = Host::start(config)?;
    let engine = host.engine();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build()?;
    for tokens in TOKENS {
        let [mut straight, mut whole] = [Samples::default(), Samples::default()];
        // In turn, so that the machine's slow phases meet both.
        for number in 0..WARM_UP + CALLS {
            let start = now();
            runtime.block_on(direct(&engine, number, tokens))?;
            let middle = now();
            runtime.block_on(through(&host, tokens))?;
            if number >= WARM_UP {
                straight.add(middle - start);
                whole.add(middle.elapsed());
            }
        }
        let (straight, whole) = (straight.percentiles(), whole.percentiles());
        straight.print(&format!("{tokens} tokens, mailbox"), None);
        whole.print(&format!("{tokens} tokens, Host::submit"), None);
        let added = whole.p50.saturating_sub(straight.p50);
        let met = if u128::from(added) <= BAR.as_nanos() { "met" } else { "MISSED" };
        println!("{tokens} tokens, added between the medians: {}   bar {BAR:?} {met}", readable(added));
    }
    Ok(())
}
