//! How far a request is: a number from 0 to 100, and how long the rest may take.
//!
//! It counts tokens and not time: those of the prompts, and as many new ones as the request may have. So it never goes back, does
//! not depend on how fast others let it be, and jumps at the end of a text that is shorter than it might have been. Time is
//! estimated for what is left of one text alone, at the pace that it has had so far: an upper bound, because it may end sooner.

use std::sync::Arc;

use pointsman_sched::ids::Micros;

use crate::ports::Clock;

/// One choice.
#[derive(Clone, Copy, Debug)]
pub(super) struct Task {
    prompt: u32,
    max_new: u32,
    computed: u32,
    generated: u32,
    has_ended: bool,
    first_token: Micros,
}

/// A request.
#[derive(Debug)]
pub(super) struct Progress {
    clock: Arc<dyn Clock>,
    tasks: Vec<Task>,
}

/// Where the text of a choice is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Decoded {
    pub(super) tokens: u32,
    pub(super) max_tokens: u32,
    /// Nobody knows before the second token.
    pub(super) remaining_ms: Option<u64>,
}

// === impl Task ===

impl Task {
    pub(super) fn new(prompt: usize, max_new: u32) -> Self {
        let prompt = u32::try_from(prompt).unwrap_or(u32::MAX);
        Self { prompt, max_new, computed: 0, generated: 0, has_ended: false, first_token: 0 }
    }

    fn all(&self) -> u64 {
        u64::from(self.prompt) + u64::from(self.max_new)
    }

    fn done(&self) -> u64 {
        if self.has_ended { self.all() } else { (u64::from(self.computed) + u64::from(self.generated)).min(self.all()) }
    }
}

// === impl Progress ===

impl Progress {
    pub(super) fn new(clock: &Arc<dyn Clock>, tasks: Vec<Task>) -> Self {
        Self { clock: Arc::clone(clock), tasks }
    }

    /// Of all choices together, in percent; 100 is for the end.
    pub(super) fn percent(&self) -> u8 {
        let sum = |f: fn(&Task) -> u64| self.tasks.iter().map(f).sum::<u64>();
        let percent = sum(Task::done) * 100 / sum(Task::all).max(1);
        u8::try_from(percent.min(99)).unwrap_or(99)
    }

    /// So many tokens of a prompt are computed; how many are now, and in percent of it.
    pub(super) fn prefilled(&mut self, choice: usize, tokens: u32) -> (u32, u8) {
        let Some(task) = self.tasks.get_mut(choice) else { return (tokens, 0) };
        // A preemption computes them again, and nobody needs to see that.
        task.computed = task.computed.max(tokens.min(task.prompt));
        let percent = u64::from(task.computed) * 100 / u64::from(task.prompt.max(1));
        (task.computed, u8::try_from(percent).unwrap_or(100))
    }

    /// A token has come.
    pub(super) fn token(&mut self, choice: usize) -> Decoded {
        let now = self.clock.now();
        let Some(task) = self.tasks.get_mut(choice) else {
            return Decoded { tokens: 0, max_tokens: 0, remaining_ms: None };
        };
        task.computed = task.prompt;
        task.generated += 1;
        if task.generated == 1 {
            task.first_token = now;
        }
        let left = u64::from(task.max_new.saturating_sub(task.generated));
        let took = now.saturating_sub(task.first_token).saturating_mul(left);
        let remaining_us = took.checked_div(u64::from(task.generated - 1));
        let remaining_ms = remaining_us.map(|us| us.div_ceil(1_000));
        Decoded { tokens: task.generated, max_tokens: task.max_new, remaining_ms }
    }

    pub(super) fn ended(&mut self, choice: usize) {
        if let Some(task) = self.tasks.get_mut(choice) {
            task.has_ended = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::fakes::FakeClock;

    #[test]
    fn progress_counts_tokens_and_never_goes_back() {
        let clock = Arc::new(FakeClock::default());
        let shared: Arc<dyn Clock> = Arc::clone(&clock) as _;
        let mut progress = Progress::new(&shared, vec![Task::new(80, 20), Task::new(80, 20)]);
        assert_eq!(progress.percent(), 0);
        for (tokens, expect, percent) in [(40, (40, 50), 20), (16, (40, 50), 20), (72, (72, 90), 36)] {
            assert_eq!((progress.prefilled(0, tokens), progress.percent()), (expect, percent), "{tokens}");
        }
        for (n, remaining_ms, percent) in [(1, None, 40), (2, Some(18 * 5), 41), (3, Some(17 * 5), 41)] {
            let expect = Decoded { tokens: n, max_tokens: 20, remaining_ms };
            assert_eq!((progress.token(0), progress.percent()), (expect, percent), "{n}");
            clock.now.fetch_add(5_000, Ordering::Relaxed);
        }
        progress.ended(0);
        assert_eq!(progress.percent(), 50);
        progress.ended(1);
        assert_eq!(progress.percent(), 99, "100 is said with the last event");
    }
}
