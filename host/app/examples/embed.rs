//! A host inside a program: one request as events, many as they end, a deadline, and a cancel.
//!
//! `cargo run --release -p pointsman --example embed`
#![expect(clippy::print_stdout, reason = "an example says what happens")]

use std::error::Error;
use std::time::Duration;

use pointsman::host::{Call, Event, Host, HostConfig, Priority, Request};
use serde_json::json;

/// Starts a host on a folder of its own and asks it.
pub(crate) fn main() -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    let host = Host::start(HostConfig { data_dir: Some(folder.path().to_owned()), ..HostConfig::default() })?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_time().build()?;
    runtime.block_on(ask(&host))?;
    runtime.block_on(host.drained());
    Ok(())
}

async fn ask(host: &Host) -> Result<(), Box<dyn Error>> {
    // One request, as it is computed.
    let body =
        json!({"model": "demo", "messages": [{"role": "user", "content": "What is ownership?"}], "max_tokens": 16});
    let mut events = host.submit(Request::new(Call::Chat, body).tenant("acme").priority(Priority::High)).await?;
    let mut text = String::new();
    while let Some(event) = events.next().await {
        match event? {
            Event::Delta { text: piece, .. } => text.push_str(&piece),
            Event::Done { completion_tokens, .. } => println!("{}: {completion_tokens} tokens: {text}", events.model()),
            Event::Started { .. } | Event::Prefilled { .. } | Event::Scored { .. } | Event::Embedded { .. } => {}
        }
    }

    // Many, four at a time, as they end.
    let prompts = ["A trait is", "A lifetime is", "A crate is", "Cargo is", "A slice is", "A box is"];
    let complete = |prompt: &str| Request::new(Call::Completion, json!({"model": "demo", "prompt": prompt}));
    let mut answers = host.submit_many(prompts.map(|prompt| complete(prompt).priority(Priority::Low)), 4);
    let mut answered = 0;
    while let Some((place, answer)) = answers.next().await {
        println!("{}{}", prompts[place], answer?["choices"][0]["text"]);
        answered += 1;
    }
    assert_eq!(answered, prompts.len());

    // A deadline that cannot be kept, and a request that nobody wants any more: dropping its events cancels it.
    let long = || json!({"model": "demo", "prompt": "Once", "max_tokens": 400, "ignore_eos": true});
    let late = host.answer(Request::new(Call::Completion, long()).timeout(Duration::from_millis(1))).await;
    println!("late: {}", late.err().ok_or("400 tokens in a millisecond")?);
    drop(host.submit(Request::new(Call::Completion, long())).await?);
    Ok(())
}
