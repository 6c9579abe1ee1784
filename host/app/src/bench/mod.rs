//! `pointsman bench`: load on a server that speaks OpenAI's HTTP, and what its clients would have felt.
//!
//! Two loops, because they answer different questions. Closed: so many clients, each asking again when it is answered; it finds
//! the throughput, and hides waiting, since a slow server is asked less. Open: requests come at a rate whatever the server
//! does, timed from when they were due, so that waiting in front of a slow server counts. Inputs come from a seed: two
//! servers are asked the same. Not a benchmark of this program (those are in benches/): any server can be measured.

mod ask;
mod load;
mod report;
mod shape;

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use anyhow::bail;

use self::ask::Target;
pub(crate) use self::shape::Shape;
use crate::cli::BenchArgs;
use crate::clock::SystemClock;

/// Runs the load and prints what came of it.
///
/// # Errors
/// The server cannot be reached, serves no such model, or answered no request well.
pub(crate) fn run(args: &BenchArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let clock = Arc::new(SystemClock::start());
    let tally = runtime.block_on(async {
        let target = Target::connect(args, Arc::clone(&clock)).await?;
        anyhow::Ok(load::run(args, Arc::new(target), &clock).await)
    })?;
    // Requests that were cut off hold connections.
    runtime.shutdown_timeout(Duration::from_secs(1));
    match args.json {
        true => writeln!(out, "{:#}", tally.json(args))?,
        false => write!(out, "{}", tally.table(args))?,
    }
    match tally.nothing_done() {
        Some(why) => bail!("no request was answered: {why}"),
        None => Ok(()),
    }
}
