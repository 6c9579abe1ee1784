//! The scheduler's configuration: one value, validated once, so that no later line has to ask whether a bound is sane.

use crate::ids::Micros;

/// Bounds of one replica's scheduler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Positions in a KV block.
    pub block_tokens: u32,
    /// Blocks in the pool.
    pub n_blocks: u32,
    /// Sequences that may run at once.
    pub max_running: u32,
    /// Tokens that one step may compute, prefill and decode together. At least `max_running`, so that every running
    /// sequence can decode in every step.
    pub step_tokens: u32,
    /// Requests that may wait before [`submit`](crate::scheduler::Scheduler::submit) refuses; preempted ones come on top.
    pub max_waiting: u32,
    /// Prefill tokens of one sequence in one step at most, whatever a policy asks for.
    pub prefill_chunk: u32,
    /// A request that has stood still for longer than this, all its waits together, goes before everything.
    pub starvation_us: Micros,
    /// Context length of the model: prompt and output together.
    pub context_tokens: u32,
}

/// Why a configuration makes no scheduler; the operator's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A bound that must be positive.
    #[error("`{0}` is 0; set it to at least 1")]
    Zero(&'static str),
    /// Decodes would not fit a step.
    #[error("`step_tokens` ({step_tokens}) is below `max_running` ({max_running}); raise it, or lower `max_running`")]
    StepTooSmall {
        /// Tokens of a step.
        step_tokens: u32,
        /// Sequences at once.
        max_running: u32,
    },
    /// Positions are 32-bit numbers.
    #[error("{n_blocks} blocks of {block_tokens} tokens exceed 2^31 positions; lower `n_blocks`")]
    PoolTooLarge {
        /// Blocks.
        n_blocks: u32,
        /// Positions in each.
        block_tokens: u32,
    },
    /// A context no pool of 32-bit positions can address.
    #[error("a context of {0} tokens exceeds 2^31 positions; lower `context_tokens`")]
    ContextTooLarge(u32),
    /// Queues are preallocated.
    #[error("`{name}` is {value}; at most {MAX_SEQUENCES} is supported")]
    TooManySequences {
        /// Which bound.
        name: &'static str,
        /// Its value.
        value: u32,
    },
}

/// Bound of `max_running` and of `max_waiting`.
pub const MAX_SEQUENCES: u32 = 1 << 20;

/// Bound of positions in a pool and in a context, far below where 32-bit sums could overflow.
const MAX_POSITIONS: u64 = 1 << 31;

impl Config {
    /// Checks the bounds against one another.
    ///
    /// # Errors
    /// The first rule that is broken, in words for the operator.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let positive = [
            ("block_tokens", u64::from(self.block_tokens)),
            ("n_blocks", u64::from(self.n_blocks)),
            ("max_running", u64::from(self.max_running)),
            ("step_tokens", u64::from(self.step_tokens)),
            ("max_waiting", u64::from(self.max_waiting)),
            ("prefill_chunk", u64::from(self.prefill_chunk)),
            ("starvation_us", self.starvation_us),
            ("context_tokens", u64::from(self.context_tokens)),
        ];
        if let Some((name, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(ConfigError::Zero(name));
        }
        for (name, value) in [("max_running", self.max_running), ("max_waiting", self.max_waiting)] {
            if value > MAX_SEQUENCES {
                return Err(ConfigError::TooManySequences { name, value });
            }
        }
        let Self { block_tokens, n_blocks, max_running, step_tokens, .. } = *self;
        if step_tokens < max_running {
            return Err(ConfigError::StepTooSmall { step_tokens, max_running });
        }
        if u64::from(n_blocks) * u64::from(block_tokens) > MAX_POSITIONS {
            return Err(ConfigError::PoolTooLarge { n_blocks, block_tokens });
        }
        if u64::from(self.context_tokens) > MAX_POSITIONS {
            return Err(ConfigError::ContextTooLarge(self.context_tokens));
        }
        Ok(())
    }

    /// Blocks that hold `n_tokens` positions.
    pub(crate) fn blocks_for(&self, n_tokens: u32) -> u32 {
        n_tokens.div_ceil(self.block_tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_checked_against_one_another() {
        let good = Config {
            block_tokens: 16,
            n_blocks: 64,
            max_running: 8,
            step_tokens: 64,
            max_waiting: 100,
            prefill_chunk: 32,
            starvation_us: 1_000_000,
            context_tokens: 2_048,
        };
        for (config, expect) in [
            (good, Ok(())),
            (Config { block_tokens: 0, ..good }, Err(ConfigError::Zero("block_tokens"))),
            (Config { starvation_us: 0, ..good }, Err(ConfigError::Zero("starvation_us"))),
            (Config { step_tokens: 7, ..good }, Err(ConfigError::StepTooSmall { step_tokens: 7, max_running: 8 })),
            (
                Config { n_blocks: 1 << 30, ..good },
                Err(ConfigError::PoolTooLarge { n_blocks: 1 << 30, block_tokens: 16 }),
            ),
            (Config { context_tokens: u32::MAX, ..good }, Err(ConfigError::ContextTooLarge(u32::MAX))),
            (
                Config { max_waiting: u32::MAX, ..good },
                Err(ConfigError::TooManySequences { name: "max_waiting", value: u32::MAX }),
            ),
        ] {
            assert_eq!(config.validate(), expect, "{config:?}");
        }
    }
}
