//! What a GPU's monitor says: asked once a second on a thread of its own, and read by everybody where that thread left it.
//!
//! A look goes through NVIDIA's driver, which may take long or never answer, and who wants to know is on a thread that serves
//! HTTP: probes, scrapes, the admin plane. So nobody waits for a look. A thread for each GPU, so that one whose driver hangs
//! does not take the figures of the others along. Not a tokio task: a look that never ends would keep a worker for ever.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use pointsman_engine::cuda::Seen;
use pointsman_sched::ids::Micros;

use crate::clock::SystemClock;
use crate::deploy::lock;

/// Time between two looks.
const PERIOD: Duration = Duration::from_secs(1);
/// From this age on a look is not shown: no figure is better than one of a driver that hangs.
const STALE: Micros = 10_000_000;
/// How often it is looked whether the thread has ended, and how many times: a look takes milliseconds where the driver answers.
const STOP_LOOK: Duration = Duration::from_millis(10);
const STOP_LOOKS: usize = 50;

/// Watches one GPU until it is stopped or dropped.
#[derive(Debug)]
pub(crate) struct Monitor {
    board: Arc<Board>,
    thread: JoinHandle<()>,
}

/// What the thread and its readers share.
#[derive(Debug, Default)]
struct Board {
    /// The last look, and when it came back; none before the first. Locked for a copy, never for a look.
    last: Mutex<Option<(Micros, Seen)>>,
    is_over: AtomicBool,
}

impl Monitor {
    /// Looks at once, and then once a second.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(crate) fn start(
        device: &str,
        clock: Arc<SystemClock>,
        look: impl FnMut() -> Seen + Send + 'static,
    ) -> std::io::Result<Self> {
        Self::start_every(PERIOD, device, clock, look)
    }

    /// The same with another time between two looks.
    pub(crate) fn start_every(
        period: Duration,
        device: &str,
        clock: Arc<SystemClock>,
        mut look: impl FnMut() -> Seen + Send + 'static,
    ) -> std::io::Result<Self> {
        let board = Arc::<Board>::default();
        let written = Arc::clone(&board);
        let run = move || {
            while !written.is_over.load(Ordering::Acquire) {
                let seen = look();
                *lock(&written.last) = Some((clock.micros(), seen));
                std::thread::park_timeout(period);
            }
        };
        let thread = std::thread::Builder::new().name(format!("monitor-{device}")).spawn(run)?;
        Ok(Self { board, thread })
    }

    /// What the last look showed; nothing where that was too long ago.
    pub(crate) fn seen(&self, now: Micros) -> Seen {
        let last = *lock(&self.board.last);
        last.filter(|(at, _)| now.saturating_sub(*at) < STALE).map(|(_, seen)| seen).unwrap_or_default()
    }

    /// Ends the thread, and waits a moment for it: the library must not be taken down under a look when the program ends. Who
    /// waits for a driver that does not answer is left to the end of the process.
    pub(crate) fn stop(&self) {
        self.end();
        for _ in 0..STOP_LOOKS {
            if self.thread.is_finished() {
                return;
            }
            std::thread::park_timeout(STOP_LOOK);
        }
        let name = self.thread.thread().name().unwrap_or_default();
        tracing::warn!("{name} still waits for the GPU's driver; it ends with the process");
    }

    /// Tells the thread to end.
    pub(crate) fn end(&self) {
        self.board.is_over.store(true, Ordering::Release);
        self.thread.thread().unpark();
    }
}

impl Drop for Monitor {
    /// A start that failed leaves no thread behind.
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;
    use std::sync::mpsc::sync_channel;

    use super::*;

    const FIGURES: Seen =
        Seen { free_bytes: Some(7), utilization: Some(0.25), temperature: Some(40), power_watts: Some(300.5) };

    #[test]
    fn a_driver_that_hangs_holds_nobody_up_and_its_figures_go() {
        let clock = Arc::new(SystemClock::start());
        let start = clock.micros();
        // A look comes back when the test answers it.
        let (answer, answers) = sync_channel::<Seen>(0);
        let begun = Arc::new(AtomicU32::new(0));
        let looks = Arc::clone(&begun);
        let look = move || {
            looks.fetch_add(1, Ordering::Release);
            answers.recv().unwrap_or_default()
        };
        let monitor = Monitor::start_every(Duration::ZERO, "test", Arc::clone(&clock), look).expect("a thread");
        assert_eq!(monitor.seen(start), Seen::default(), "no look has come back");
        answer.send(FIGURES).expect("it looks");
        while monitor.seen(start) == Seen::default() {
            std::thread::yield_now();
        }
        while begun.load(Ordering::Acquire) < 2 {
            std::thread::yield_now();
        }
        // The second look hangs. What the first one showed is there for a while, and then no more.
        assert_eq!(monitor.seen(start + STALE - 1), FIGURES);
        assert_eq!(monitor.seen(clock.micros() + STALE), Seen::default());
        monitor.stop();
        assert!(!monitor.thread.is_finished(), "who stops it does not wait for the driver");
        drop(answer);
        while !monitor.thread.is_finished() {
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_thread_that_sleeps_is_woken_to_end() {
        const HOUR: Duration = Duration::from_secs(3_600);
        let clock = Arc::new(SystemClock::start());
        let start = clock.micros();
        let monitor = Monitor::start_every(HOUR, "test", clock, || FIGURES).expect("a thread");
        while monitor.seen(start) != FIGURES {
            std::thread::yield_now();
        }
        monitor.end();
        while !monitor.thread.is_finished() {
            std::thread::yield_now();
        }
    }
}
