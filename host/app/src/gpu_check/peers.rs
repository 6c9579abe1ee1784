//! The same decode steps by PyTorch, on the same machine in the same run.
//!
//! A script that a Python with PyTorch gets on its standard input, so that one file is all that travels; without PyTorch a line
//! says so, and nothing is compared.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use anyhow::Context;
use serde_json::{Value as Json, json};

use super::Check;
use super::report::PeerFigure;

const SCRIPT: &str = include_str!("../../../../benches/peers.py");

impl Check<'_> {
    pub(super) fn peers(&mut self) -> anyhow::Result<()> {
        let python = self.python.display().to_string();
        let spawned = Command::new(&self.python).arg("-").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let Ok(mut child) = spawned else {
            return self.report.say(&format!("no PyTorch: {python} does not start"), json!({"peers": python}));
        };
        // A child that ends early says why on its own standard error.
        let _ = child.stdin.take().map(|mut stdin| stdin.write_all(SCRIPT.as_bytes()));
        let lines = BufReader::new(child.stdout.take().context("a pipe")?).lines();
        let (tell, told) = mpsc::channel();
        // On a thread of its own: one that says nothing for long is not waited for longer than it has time.
        // It is left alone at the end, too: a child of the child may hold the pipe.
        std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| tell.send(line)));
        loop {
            let left = Duration::from_nanos(self.until.saturating_sub(self.clock.nanos()));
            match told.recv_timeout(left) {
                Ok(line) => self.line(&line)?,
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    self.report.skip("figures of PyTorch", 1)?;
                    break;
                }
            }
        }
        // It may have ended by itself.
        let _ = child.kill();
        child.wait()?;
        Ok(())
    }

    /// A line of the script is a JSON object; what else is printed there is another library's.
    fn line(&mut self, line: &str) -> anyhow::Result<()> {
        let Ok(json) = serde_json::from_str::<Json>(line) else { return Ok(()) };
        let figure = || {
            let number = |key: &str| json[key].as_u64().and_then(|n| usize::try_from(n).ok());
            let name = json["name"].as_str()?.to_owned();
            Some(PeerFigure {
                name,
                rows: number("rows")?,
                context: number("context")?,
                seconds: json["seconds"].as_f64()?,
            })
        };
        if let Some(figure) = figure() {
            self.report.peer(figure);
        }
        if let (Some(name), Some(seconds), true) =
            (json["name"].as_str(), json["seconds"].as_f64(), json["job"].is_object())
        {
            self.report.job(name, seconds);
        }
        self.report.say(&format!("beside: {line}"), json!({"peer": json}))
    }
}
