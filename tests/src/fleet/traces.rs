//! Traffic: who sends what, how long and how often. Rates are shares of what a replica can do, so that a trace means the
//! same load on a model of a device and on a real one.

use std::ops::Range;

use pointsman_sched::ids::{Micros, Priority};

use super::Ask;
use crate::rng::Rng;

/// Token ids that prompts are made of; within the vocabulary of the demo model.
const TOKENS: Range<u32> = 10..2_000;

/// What a generated token counts in prompt tokens; about what it costs in a full batch. It only says how the sources of a mix
/// share their load: how much the mix is altogether is measured.
const GENERATED: f64 = 2.0;

/// One kind of traffic, with Poisson arrivals.
#[derive(Clone, Debug)]
pub struct Source {
    /// See [`Ask::class`].
    pub class: usize,
    /// Whose it is.
    pub tenant: u32,
    /// Its urgency.
    pub priority: Priority,
    /// Prompt tokens, uniform.
    pub prompt: Range<u32>,
    /// Prefixes that its prompts begin with, one of them each: how many, and of how many tokens.
    pub prefixes: (u32, u32),
    /// Tokens to generate, uniform.
    pub new: Range<u32>,
    /// Mean time between two arrivals.
    pub gap: Micros,
    /// When it sends.
    pub during: Range<Micros>,
}

impl Default for Source {
    fn default() -> Self {
        Self {
            class: 0,
            tenant: 1,
            priority: Priority::Normal,
            prompt: 20..100,
            prefixes: (0, 0),
            new: 8..40,
            gap: 10_000,
            during: 0..0,
        }
    }
}

impl Source {
    /// What a request of its kind is, in the mean: see [`Ask::work`].
    #[must_use]
    pub fn work(&self) -> f64 {
        let mean = |range: &Range<u32>| f64::from(range.start + range.end - 1) / 2.0;
        mean(&self.prompt) + f64::from(self.prefixes.1) + GENERATED * mean(&self.new)
    }

    /// Sends `share` of what a replica does that takes `unit_us` for a unit of work.
    #[must_use]
    pub fn at_load(self, share: f64, unit_us: f64) -> Self {
        Self { gap: (self.work() * unit_us / share) as Micros, ..self }
    }
}

impl Ask {
    /// Work of this request, in prompt tokens.
    #[must_use]
    pub fn work(&self) -> f64 {
        self.prompt.len() as f64 + GENERATED * f64::from(self.max_new)
    }
}

/// The traffic of all sources, in order of arrival.
#[must_use]
pub fn trace(seed: u64, sources: &[Source]) -> Vec<Ask> {
    let mut asks = Vec::new();
    for (place, source) in (0_u64..).zip(sources) {
        // Each source has numbers of its own: leaving one out changes nothing about the others.
        let mut rng = Rng::new(seed.wrapping_mul(1_000).wrapping_add(place));
        let text =
            |rng: &mut Rng, len: u32| -> Vec<u32> { (0..len).map(|_| rng.within(TOKENS.start, TOKENS.end)).collect() };
        let prefixes: Vec<_> = (0..source.prefixes.0).map(|_| text(&mut rng, source.prefixes.1)).collect();
        let mut at = source.during.start as f64;
        loop {
            at -= rng.unit().ln() * source.gap as f64;
            if at >= source.during.end as f64 {
                break;
            }
            let mut prompt = if prefixes.is_empty() {
                Vec::new()
            } else {
                prefixes[rng.within(0, source.prefixes.0) as usize].clone()
            };
            let own = rng.within(source.prompt.start, source.prompt.end);
            prompt.extend(text(&mut rng, own));
            asks.push(Ask {
                at: at as Micros + 1,
                class: source.class,
                tenant: source.tenant,
                priority: source.priority,
                session: 0,
                prompt: prompt.into(),
                max_new: rng.within(source.new.start, source.new.end),
            });
        }
    }
    asks.sort_by_key(|ask| ask.at);
    asks
}
