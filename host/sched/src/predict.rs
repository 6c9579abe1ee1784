//! How long a step will take, learned from the steps before; and from it, how long a prompt would wait for its first token.
//!
//! Recursive least squares (Haykin, Adaptive Filter Theory) on `a + b * prefill tokens + c * decode sequences + d * context
//! tokens`, with forgetting: four numbers, a hundred multiplications a step, no history. Not a neural anything and not a
//! table of past requests, because a step's cost is very nearly linear in what it computes, and the coefficients follow the
//! machine when it slows down. Floating point, but on no path that decides what is computed.

use crate::ids::Micros;

/// Weight that an observation keeps after each later one: half of it is gone after about 350.
const KEEP: f64 = 0.998;
/// Doubt about the coefficients at the start.
const DOUBT: f64 = 1e4;
/// Doubt beyond which it is set back: steps that are all alike leave directions unseen, in which it would grow for ever.
const MOST_DOUBT: f64 = 1e8;
/// Steps until an estimate means something.
const ENOUGH: u32 = 16;
/// Brings the inputs to about the same size.
const SCALE: [f64; N] = [1.0, 1.0 / 256.0, 1.0 / 16.0, 1.0 / 4_096.0];
const N: usize = 4;

/// What a step computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepSize {
    /// Prompt tokens.
    pub prefill_tokens: u32,
    /// Sequences that get one more token.
    pub decode_sequences: u32,
    /// Tokens that attention reads, over all rows.
    pub context_tokens: u64,
}

/// The duration of steps as a function of their size.
#[derive(Clone, Debug)]
pub struct StepTimes {
    /// In milliseconds.
    coefficients: [f64; N],
    doubt: [[f64; N]; N],
    n_steps: u32,
}

/// What a replica's next steps look like to a prompt that would join them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outlook {
    /// Duration of a step that has no prompt to compute.
    pub step_ns: u64,
    /// What each prompt token adds.
    pub token_ns: u64,
    /// Prompt tokens that fit into a step; 0 while nothing is known.
    pub step_tokens: u32,
}

// === impl StepSize ===

impl StepSize {
    #[expect(clippy::cast_precision_loss, reason = "sizes stay far below 2^52")]
    fn inputs(self) -> [f64; N] {
        let Self { prefill_tokens, decode_sequences, context_tokens } = self;
        let raw = [1.0, f64::from(prefill_tokens), f64::from(decode_sequences), context_tokens as f64];
        std::array::from_fn(|i| raw[i] * SCALE[i])
    }
}

// === impl StepTimes ===

impl Default for StepTimes {
    fn default() -> Self {
        Self { coefficients: [0.0; N], doubt: diagonal(DOUBT), n_steps: 0 }
    }
}

fn diagonal(value: f64) -> [[f64; N]; N] {
    std::array::from_fn(|i| std::array::from_fn(|j| if i == j { value } else { 0.0 }))
}

fn dot(a: &[f64; N], b: &[f64; N]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

impl StepTimes {
    /// Learns from a step of this size that took this long.
    #[expect(clippy::cast_precision_loss, reason = "a step lasts far less than 2^52 microseconds")]
    pub fn learn(&mut self, size: StepSize, took: Micros) {
        // Divided by the duration, so that what counts is the error as a share: long steps vary by more than short ones last.
        let took_ms = took.max(1) as f64 * 1e-3;
        let inputs = size.inputs().map(|input| input / took_ms);
        let spread: [f64; N] = std::array::from_fn(|i| dot(&self.doubt[i], &inputs));
        let gain = 1.0 / (KEEP + dot(&spread, &inputs));
        let error = 1.0 - dot(&self.coefficients, &inputs);
        for i in 0..N {
            self.coefficients[i] += gain * spread[i] * error;
            for j in 0..N {
                self.doubt[i][j] = (self.doubt[i][j] - gain * spread[i] * spread[j]) / KEEP;
            }
        }
        let doubt: f64 = (0..N).map(|i| self.doubt[i][i]).sum();
        if !(0.0..MOST_DOUBT).contains(&doubt) {
            self.doubt = diagonal(DOUBT);
        }
        if !self.coefficients.iter().all(|c| c.is_finite()) {
            *self = Self::default();
        }
        self.n_steps = self.n_steps.saturating_add(1);
    }

    /// Expected duration of a step in microseconds; `None` while too few were seen.
    #[must_use]
    pub fn estimate(&self, size: StepSize) -> Option<f64> {
        (self.n_steps >= ENOUGH).then(|| dot(&self.coefficients, &size.inputs()).max(0.0) * 1e3)
    }

    /// What follows for prompts that would join a batch of `running` sequences with so much context, when a step computes
    /// `step_tokens` in all. `turn` is the time from one step to the next over the time that a step takes: more than 1 where
    /// replicas share a device.
    #[must_use]
    pub fn outlook(&self, running: StepSize, step_tokens: u32, turn: f64) -> Outlook {
        let room = step_tokens.saturating_sub(running.decode_sequences).max(1);
        let empty = self.estimate(StepSize { prefill_tokens: 0, ..running });
        let full = self.estimate(StepSize { prefill_tokens: room, ..running });
        let (Some(empty), Some(full)) = (empty, full) else { return Outlook::default() };
        let per_token = (full - empty).max(0.0) / f64::from(room);
        Outlook { step_ns: nanoseconds(empty * turn), token_ns: nanoseconds(per_token * turn), step_tokens: room }
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the cast saturates")]
fn nanoseconds(micros: f64) -> u64 {
    (micros * 1e3) as u64
}

// === impl Outlook ===

impl Outlook {
    /// Time until a prompt has its first token, when so many prompt tokens (its own included) are to be computed by then;
    /// 0 while nothing is known. Does not foresee a wait for a place in a full batch.
    #[must_use]
    pub fn first_token(&self, prompt_tokens: u64) -> Micros {
        if self.step_tokens == 0 {
            return 0;
        }
        let n_steps = prompt_tokens.div_ceil(self.step_tokens.into()).max(1);
        let ns = n_steps.saturating_mul(self.step_ns).saturating_add(prompt_tokens.saturating_mul(self.token_ns));
        (ns / 1_000).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the model assumes, in microseconds.
    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    fn cost(size: StepSize) -> f64 {
        let StepSize { prefill_tokens, decode_sequences, context_tokens } = size;
        800.0 + 90.0 * f64::from(prefill_tokens) + 400.0 * f64::from(decode_sequences) + 0.5 * context_tokens as f64
    }

    /// The same on a real machine: give or take a tenth.
    fn took(size: StepSize, turn: u64, slower: f64) -> Micros {
        let noise = 0.9 + 0.2 * f64::from(u32::try_from(turn * 7_919 % 101).expect("small")) / 100.0;
        nanoseconds(cost(size) * noise * slower) / 1_000
    }

    /// Steps of a lively replica.
    fn size(turn: u64) -> StepSize {
        let n = |modulus: u64, salt: u64| u32::try_from((turn * 2_654_435_761 + salt) % modulus).expect("small");
        StepSize { prefill_tokens: n(257, 11), decode_sequences: n(17, 5), context_tokens: n(5_000, 3).into() }
    }

    fn worst_error(times: &StepTimes, slower: f64) -> f64 {
        let error = |(prefill_tokens, decode_sequences, context_tokens)| {
            let size = StepSize { prefill_tokens, decode_sequences, context_tokens };
            let truth = cost(size) * slower;
            (times.estimate(size).expect("enough steps") - truth).abs() / truth
        };
        [(0, 1, 100), (256, 0, 256), (0, 16, 4_000), (128, 8, 2_000)].map(error).into_iter().fold(0.0, f64::max)
    }

    #[test]
    fn the_cost_of_steps_is_learned_and_followed() {
        let mut times = StepTimes::default();
        assert_eq!(times.estimate(StepSize::default()), None);
        for turn in 0..400 {
            times.learn(size(turn), took(size(turn), turn, 1.0));
        }
        assert!(worst_error(&times, 1.0) < 0.1, "{} {times:?}", worst_error(&times, 1.0));
        for turn in 0..2_000 {
            times.learn(size(turn), took(size(turn), turn, 2.0));
        }
        assert!(worst_error(&times, 2.0) < 0.1, "half the speed: {} {times:?}", worst_error(&times, 2.0));
    }

    #[test]
    fn steps_that_are_all_alike_do_no_harm() {
        let mut times = StepTimes::default();
        let alike = StepSize { prefill_tokens: 0, decode_sequences: 4, context_tokens: 400 };
        for _ in 0..100_000 {
            times.learn(alike, 2_500);
        }
        let estimate = times.estimate(alike).expect("enough steps");
        assert!((2_499.0..2_501.0).contains(&estimate), "{times:?}");
        for turn in 0..400 {
            times.learn(size(turn), took(size(turn), turn, 1.0));
        }
        assert!(worst_error(&times, 1.0) < 0.1, "{} {times:?}", worst_error(&times, 1.0));
    }

    #[test]
    fn the_first_token_takes_the_steps_that_its_queue_takes() {
        let outlook = Outlook { step_ns: 1_000_000, token_ns: 10_000, step_tokens: 100 };
        for (outlook, tokens, expect) in [
            (Outlook::default(), 50, 0),
            (outlook, 0, 1_000),
            (outlook, 50, 1_500),
            (outlook, 100, 2_000),
            (outlook, 101, 3_010),
            (outlook, 1_000, 20_000),
            (Outlook { token_ns: u64::MAX, ..outlook }, u64::MAX, u64::MAX / 1_000),
        ] {
            assert_eq!(outlook.first_token(tokens), expect, "{tokens}");
        }
        let mut times = StepTimes::default();
        assert_eq!(times.outlook(StepSize::default(), 512, 1.0), Outlook::default());
        for turn in 0..400 {
            times.learn(size(turn), took(size(turn), turn, 1.0));
        }
        let busy = StepSize { prefill_tokens: 9, decode_sequences: 12, context_tokens: 1_000 };
        let (alone, shared) = (times.outlook(busy, 512, 1.0), times.outlook(busy, 512, 2.0));
        assert_eq!(alone.step_tokens, 500);
        assert!((80_000..100_000).contains(&alone.token_ns), "{alone:?}");
        assert!(shared.step_ns > 2 * alone.step_ns - 10 && shared.token_ns >= 2 * alone.token_ns, "{shared:?}");
    }
}
