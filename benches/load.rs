//! What the host itself costs and how it stands overload, on a device that computes nothing, with `pointsman bench` as the load
//! generator on the same cores.
//!
//! The added time is the difference to a server that does nothing but read a request and write the bytes of an answer of the host's,
//! under the same load in the same run: the client's own cost and the sockets' are in both. Bars: 150 us and 1 ms added at 5,000
//! requests a second; no stall over 50 ms (the step included) and 64 KB a stream in 1,000 streams; at three times the capacity the
//! throughput within 5 % of its peak, and refusals within 10 ms.
#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::io::ErrorKind;
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use anyhow::{Context, ensure};
use pointsman_benches::header;
use pointsman_tests::Host;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};

/// Rounds of each load, taken in turns; the figure is the median.
const ROUNDS: usize = 5;
/// Most bytes of a request of the load generator.
const REQUEST_BYTES: usize = 16 << 10;
const STREAMS: u64 = 1_000;

fn program() -> anyhow::Result<String> {
    std::env::current_exe()?.into_os_string().into_string().ok().context("a path in UTF-8")
}

/// Runs the load generator; its report.
fn load(url: &str, args: &str) -> anyhow::Result<Value> {
    let mut command = Command::new(program()?);
    command.args(["bench", "--json", "--model", "demo:f16", "--url", url]);
    let output = command.args(args.split(' ')).output()?;
    ensure!(output.status.success(), "bench {args}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn ms(report: &Value, time: &str, quantile: &str) -> f64 {
    report["latency"][time][quantile].as_f64().unwrap_or(f64::NAN)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn verdict(is_met: bool) -> &'static str {
    if is_met { "met" } else { "MISSED" }
}

// === the barest server ===

/// What it says: the list of models to a GET, the completion to a POST.
#[derive(Debug)]
struct Answers {
    models: Vec<u8>,
    completion: Vec<u8>,
}

/// Answers requests with the same bytes, for as long as the connection is there.
async fn echo(socket: TcpStream, answers: Arc<Answers>) -> anyhow::Result<()> {
    socket.set_nodelay(true)?;
    let (mut read, mut chunk) = (Vec::with_capacity(REQUEST_BYTES), [0; REQUEST_BYTES]);
    loop {
        while let Some(length) = request_length(&read) {
            let answer = if read.starts_with(b"GET") { &answers.models } else { &answers.completion };
            read.drain(..length);
            // An answer of some hundred bytes fits a socket that its client empties.
            ensure!(socket.try_write(answer)? == answer.len(), "the client reads no answers");
        }
        socket.readable().await?;
        match socket.try_read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(n) => read.extend_from_slice(&chunk[..n]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Bytes of the first request, once it is whole.
fn request_length(read: &[u8]) -> Option<usize> {
    let head = read.windows(4).position(|end| end == b"\r\n\r\n")? + 4;
    let text = std::str::from_utf8(&read[..head]).ok()?.to_ascii_lowercase();
    let body = text.lines().find_map(|line| line.strip_prefix("content-length: ")?.trim().parse().ok()).unwrap_or(0);
    (read.len() >= head + body).then_some(head + body)
}

fn response(body: &Value) -> Vec<u8> {
    let body = body.to_string();
    let head = format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", body.len());
    [head, body].concat().into_bytes()
}

/// Starts it on a runtime, to say what the host says; its URL.
fn bare(runtime: &tokio::runtime::Runtime, host: &Host) -> anyhow::Result<String> {
    let request = json!({ "model": "demo:f16", "prompt": "Rust is a", "max_tokens": 1, "ignore_eos": true });
    let answers = Arc::new(Answers {
        models: response(&host.get("/v1/models").body),
        completion: response(&host.post("/v1/completions", &request).body),
    });
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0"))?;
    let url = format!("http://{}", listener.local_addr()?);
    runtime.spawn(async move {
        let mut connections = tokio::task::JoinSet::new();
        while let Ok((socket, _)) = listener.accept().await {
            connections.spawn(echo(socket, Arc::clone(&answers)));
        }
    });
    Ok(url)
}

// === the loads ===

fn added() -> anyhow::Result<()> {
    let host = Host::shipped(&program()?, "", &[("ENGINE__DEVICES", "[\"null\"]")]);
    // One thread, as the host has on two cores.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let bare = bare(&runtime, &host)?;
    for rate in [1_000, 2_000, 5_000] {
        let args = format!("--rate {rate} --requests {} --shape 16:1 --no-stream --warm-up 64", rate * 5);
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            rounds.push((load(&bare, &args)?, load(&host.data, &args)?));
        }
        // On a machine that is busy otherwise, the host may refuse some.
        let refused: u64 = rounds.iter().filter_map(|(_, h)| Some(h["sent"].as_u64()? - h["answered"].as_u64()?)).sum();
        let [(bare50, host50), (bare99, host99)] = ["p50", "p99"].map(|quantile| {
            let one = |report: &Value| ms(report, "e2e_ms", quantile);
            (
                median(rounds.iter().map(|(bare, _)| one(bare)).collect()),
                median(rounds.iter().map(|(_, h)| one(h)).collect()),
            )
        });
        let added = [host50 - bare50, host99 - bare99].map(|ms| ms * 1_000.0);
        let bars = match rate {
            5_000 => {
                let is_met = refused == 0 && added[0] < 150.0 && added[1] < 1_000.0;
                format!("   bars 150 and 1000 us {}", verdict(is_met))
            }
            _ => String::new(),
        };
        println!(
            "{rate} requests/s, {refused} refused: p50 {host50:.3} ms beside {bare50:.3} of a bare server, p99 {host99:.3} beside {bare99:.3}: \
             added {:.0} us and {:.0} us{bars}",
            added[0], added[1]
        );
    }
    Ok(())
}

fn streams() -> anyhow::Result<()> {
    let settings = [
        ("ENGINE__DEVICES", "[\"null:20000\"]"),
        // Room for all of them at once: none is put back into the queue.
        ("ENGINE__KV_MIB", "1024"),
        ("SERVER__MAX_CONNECTIONS", "4096"),
        ("SERVER__MAX_IN_FLIGHT", "2048"),
        ("SCHED__MAX_RUNNING", "1024"),
        ("SCHED__MAX_WAITING", "2048"),
        ("SCHED__MAX_BATCH_TOKENS", "4096"),
    ];
    let host = Host::shipped(&program()?, "", &settings);
    // Everything that is allocated once has been.
    load(&host.data, "--concurrency 32 --requests 64 --shape 16:8 --warm-up 0")?;
    let idle = host.resident_bytes();
    let (over, is_over) = mpsc::channel::<()>();
    let (report, most) = std::thread::scope(|scope| {
        let host = &host;
        let watch = scope.spawn(move || {
            let mut most = 0;
            while is_over.recv_timeout(Duration::from_millis(20)) == Err(mpsc::RecvTimeoutError::Timeout) {
                most = most.max(host.resident_bytes());
            }
            most
        });
        let report =
            load(&host.data, &format!("--concurrency {STREAMS} --requests {STREAMS} --shape 16:100 --warm-up 0"));
        drop(over);
        (report, watch.join().unwrap_or_default())
    });
    let report = report?;
    ensure!(report["answered"] == STREAMS, "some streams were not answered: {report}");
    let (p50, p99, max) = (ms(&report, "itl_ms", "p50"), ms(&report, "itl_ms", "p99"), ms(&report, "itl_ms", "max"));
    println!(
        "{STREAMS} streams of 100 tokens, steps of 20 ms: between tokens p50 {p50:.1} ms, p99 {p99:.1} ms, max {max:.1} ms   bar 50 ms {}",
        verdict(max < 50.0)
    );
    let each = most.saturating_sub(idle) as f64 / STREAMS as f64 / 1e3;
    println!("{STREAMS} streams: {each:.1} KB of memory each   bar 64 KB {}", verdict(each < 64.0));
    Ok(())
}

fn overload() -> anyhow::Result<()> {
    let settings =
        [("ENGINE__DEVICES", "[\"null:5000\"]"), ("SERVER__MAX_IN_FLIGHT", "64"), ("SCHED__MAX_RUNNING", "32")];
    let host = Host::shipped(&program()?, "", &settings);
    // As many clients as it admits: its peak, and what a request takes when everything is full.
    let peak = load(&host.data, "--concurrency 64 --requests 1000 --shape 16:20")?;
    let capacity = peak["requests_per_second"].as_f64().context("a rate")?;
    let args = format!("--rate {:.0} --seconds 10 --requests 1000000 --shape 16:20", capacity * 3.0);
    let is_over = AtomicBool::new(false);
    let (over, refusals) = std::thread::scope(|scope| {
        let probes = scope.spawn(|| {
            let request = json!({ "model": "demo:f16", "prompt": "Rust", "max_tokens": 20 });
            let mut refusals = 0;
            while !is_over.load(Ordering::Relaxed) {
                let answer = host.post("/v1/completions", &request);
                assert!(answer.status != 429 || answer.headers.contains_key("retry-after"), "{answer:?}");
                refusals += u32::from(answer.status == 429);
            }
            refusals
        });
        let over = load(&host.data, &args);
        is_over.store(true, Ordering::Relaxed);
        (over, probes.join().unwrap_or_default())
    });
    let over = over?;
    ensure!(refusals > 0, "no probe was refused");
    ensure!(over["failed"].as_object().is_some_and(serde_json::Map::is_empty), "requests failed: {}", over["failed"]);
    let share = over["requests_per_second"].as_f64().context("a rate")? / capacity;
    println!(
        "overload: {:.0} requests/s at most; offered three times that, {:.1} % of it are served, {} refused   bar 95 % {}",
        capacity,
        share * 100.0,
        over["rejected"],
        verdict(share > 0.95)
    );
    for quantile in ["p50", "p99"] {
        let [full, more] = [&peak, &over].map(|report| ms(report, "e2e_ms", quantile));
        println!("overload: an admitted request takes {more:.1} ms ({quantile}), at the peak {full:.1} ms");
    }
    // From when each was due: the generator's own delay is in it.
    let [p50, p99, max] = ["p50", "p99", "max"].map(|quantile| ms(&over, "refusal_ms", quantile));
    println!(
        "overload: a refusal takes {p50:.2} ms (p50), {p99:.2} ms (p99), {max:.2} ms (max)   bar 10 ms (p99) {}",
        verdict(p99 < 10.0)
    );
    Ok(())
}

fn main() -> anyhow::Result<ExitCode> {
    if matches!(std::env::args().nth(1).as_deref(), Some("serve" | "bench" | "__compile")) {
        return Ok(pointsman::main());
    }
    header("load: the host alone, and more than it can take");
    added()?;
    streams()?;
    overload()?;
    Ok(ExitCode::SUCCESS)
}
