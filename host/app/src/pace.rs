//! How a replica does, as its driver sees it: busy or not, failing or not, and what its next steps will cost.
//!
//! Kept here and not in the scheduler, which has no clock of its own and must not decide by it; published as gauges that
//! routers read. Shares are moving averages, so that an old trouble fades: of time for the load, of requests for failures.

use std::sync::atomic::Ordering;

use pointsman_sched::execute::StepPlan;
use pointsman_sched::ids::Micros;
use pointsman_sched::predict::{StepSize, StepTimes};
use pointsman_sched::publish::ReplicaGauges;

/// Time in which a change of the load shows to two thirds.
const LOAD_MICROS: f64 = 1e6;
/// Weight of one request's end in the share of failures.
const FAILURE_WEIGHT: f64 = 1.0 / 32.0;
/// Weight of one step in the average of the turns.
const TURN_WEIGHT: f64 = 1.0 / 16.0;
/// A pause between two steps that is no longer a turn of others on the device.
const MOST_TURN: f64 = 64.0;
const PPM: f64 = 1e6;
/// Steps whose least duration bounds what is expected of the next one.
const RECENT: usize = 8;

/// One replica's pace.
#[derive(Debug)]
pub(crate) struct Pace {
    times: StepTimes,
    /// What the batch looked like last.
    last: StepSize,
    last_started: Micros,
    last_took: Micros,
    /// What the last steps took, in no order.
    recent: [Micros; RECENT],
    n_steps: usize,
    /// Whether the previous pass of the driver computed something here.
    in_a_row: bool,
    /// Time from step to step over the time of a step.
    turn: f64,
    busy: f64,
    busy_until: Micros,
    failed: f64,
    /// Tokens that a step computes.
    step_tokens: u32,
}

/// What a plan computes.
pub(crate) fn size_of(plan: &StepPlan) -> StepSize {
    let mut size = StepSize::default();
    for row in &plan.rows {
        let n_tokens = row.tokens.end - row.tokens.start;
        match n_tokens - row.drafts {
            // A draft costs what one more sequence does.
            1 => size.decode_sequences += n_tokens,
            n => size.prefill_tokens += n,
        }
        size.context_tokens += u64::from(row.position) + u64::from(n_tokens);
    }
    size
}

impl Pace {
    /// A replica that has done nothing yet.
    pub(crate) fn new(step_tokens: u32) -> Self {
        Self {
            times: StepTimes::default(),
            last: StepSize::default(),
            last_started: 0,
            last_took: 0,
            recent: [0; RECENT],
            n_steps: 0,
            in_a_row: false,
            turn: 1.0,
            busy: 0.0,
            busy_until: 0,
            failed: 0.0,
            step_tokens,
        }
    }

    /// A step was computed from `started` to `done`.
    #[expect(clippy::cast_precision_loss, reason = "durations stay far below 2^52 microseconds")]
    pub(crate) fn stepped(&mut self, size: StepSize, started: Micros, done: Micros) {
        if self.in_a_row {
            let turn = started.saturating_sub(self.last_started) as f64 / self.last_took.max(1) as f64;
            self.turn += TURN_WEIGHT * (turn.clamp(1.0, MOST_TURN) - self.turn);
        }
        let took = done.saturating_sub(started);
        self.times.learn(size, took);
        self.recent[self.n_steps % RECENT] = took;
        self.n_steps += 1;
        self.spend(started, 0.0);
        self.spend(done, 1.0);
        (self.last, self.last_started, self.last_took, self.in_a_row) = (size, started, took, true);
    }

    /// What a step of this size takes at least, as far as steps tell: no longer than the shortest of the last ones, since an estimate
    /// alone may be far too long where few steps had a prompt.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the cast saturates")]
    pub(crate) fn expects(&self, size: StepSize) -> Micros {
        let least = self.recent.iter().copied().min().unwrap_or(0);
        self.times.estimate(size).map_or(0, |micros| least.min(micros as Micros))
    }

    /// There was nothing to compute.
    pub(crate) fn idled(&mut self, now: Micros) {
        self.spend(now, 0.0);
        (self.last, self.in_a_row) = (StepSize::default(), false);
    }

    /// A request ended, by a fault or well.
    pub(crate) fn ended(&mut self, failed: bool) {
        self.failed += FAILURE_WEIGHT * (f64::from(u8::from(failed)) - self.failed);
    }

    /// Says so to the routers.
    pub(crate) fn publish(&self, gauges: &ReplicaGauges) {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a million")]
        let ppm = |share: f64| (share.clamp(0.0, 1.0) * PPM).round() as u32;
        gauges.busy_ppm.store(ppm(self.busy), Ordering::Relaxed);
        gauges.failed_ppm.store(ppm(self.failed), Ordering::Relaxed);
        gauges.look_ahead(self.times.outlook(self.last, self.step_tokens, self.turn));
    }

    /// The time until `until` was spent computing (1) or not (0).
    #[expect(clippy::cast_precision_loss, reason = "durations stay far below 2^52 microseconds")]
    fn spend(&mut self, until: Micros, busy: f64) {
        let span = until.saturating_sub(self.busy_until) as f64;
        self.busy += (1.0 - (-span / LOAD_MICROS).exp()) * (busy - self.busy);
        self.busy_until = self.busy_until.max(until);
    }
}

#[cfg(test)]
mod tests {
    use pointsman_sched::execute::Row;
    use pointsman_sched::ids::RequestId;

    use super::*;

    fn gauges(pace: &Pace) -> (u32, u32) {
        let gauges = ReplicaGauges::default();
        pace.publish(&gauges);
        (gauges.busy_ppm.load(Ordering::Relaxed), gauges.failed_ppm.load(Ordering::Relaxed))
    }

    #[test]
    fn a_step_is_expected_to_take_what_the_shortest_of_the_last_ones_did() {
        let mut pace = Pace::new(512);
        let decode = StepSize { decode_sequences: 8, ..StepSize::default() };
        let prompt = StepSize { prefill_tokens: 400, ..decode };
        assert_eq!(pace.expects(decode), 0, "nothing is known");
        for step in 0..40 {
            let (size, took) = if step % 5 == 0 { (prompt, 20_000) } else { (decode, 5_000) };
            pace.stepped(size, step * 50_000, step * 50_000 + took);
        }
        for size in [decode, prompt] {
            assert!((4_000..=5_000).contains(&pace.expects(size)), "{}", pace.expects(size));
        }
        (40..48).for_each(|step| pace.stepped(prompt, step * 50_000, step * 50_000 + 20_000));
        assert!((18_000..=20_000).contains(&pace.expects(prompt)) && pace.expects(decode) < 8_000);
    }

    #[test]
    fn the_load_is_the_share_of_recent_time() {
        let mut pace = Pace::new(512);
        let size = StepSize { decode_sequences: 1, ..StepSize::default() };
        for step in 1..=4_000 {
            // Three of every four milliseconds.
            pace.stepped(size, step * 4_000, step * 4_000 + 3_000);
        }
        let (busy, _) = gauges(&pace);
        assert!((745_000..755_000).contains(&busy), "{busy}");
        assert!((1.32..1.35).contains(&pace.turn), "a turn is four milliseconds, a step three: {}", pace.turn);
        pace.idled(4_000 * 4_000 + 1_003_000);
        let (busy, _) = gauges(&pace);
        assert!((270_000..280_000).contains(&busy), "a third of it after a second: {busy}");
        pace.idled(u64::MAX);
        assert_eq!(gauges(&pace).0, 0);
    }

    #[test]
    fn failures_fade_with_the_requests_after_them() {
        let mut pace = Pace::new(512);
        (0..32).for_each(|_| pace.ended(true));
        let (_, failed) = gauges(&pace);
        assert!((600_000..700_000).contains(&failed), "{failed}");
        (0..200).for_each(|_| pace.ended(false));
        assert!(gauges(&pace).1 < 2_000);
    }

    #[test]
    fn a_pause_is_not_a_turn() {
        let mut pace = Pace::new(512);
        let size = StepSize { decode_sequences: 1, ..StepSize::default() };
        for step in 1..=100 {
            pace.stepped(size, step * 1_000_000, step * 1_000_000 + 1_000);
            pace.idled(step * 1_000_000 + 2_000);
        }
        assert_eq!(pace.turn, 1.0);
    }

    #[test]
    fn rows_of_one_known_token_decode() {
        let row = |tokens: std::ops::Range<u32>, position| Row {
            request: RequestId(1),
            tokens,
            position,
            blocks: 0..1,
            sample: None,
            drafts: 0,
        };
        let drafted = Row { drafts: 3, ..row(33..37, 10) };
        let plan = StepPlan { rows: vec![row(0..1, 99), row(1..33, 16), drafted], ..StepPlan::default() };
        let expect = StepSize { prefill_tokens: 32, decode_sequences: 1 + 4, context_tokens: 100 + 48 + 14 };
        assert_eq!(size_of(&plan), expect);
    }
}
